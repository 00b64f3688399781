// Browsers start no worker of a page that was opened as a file. This runs the search's worker in a hidden frame instead, and nothing elsewhere.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      const inner = frame.contentWindow
      inner.document.open() // else some browsers put another empty document in its place later
      inner.document.write("<!doctype html><head></head>")
      inner.document.close()
      window.addEventListener("message", event => {
        if (event.source === inner) this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      })
      const load = address => new Promise((resolve, reject) => {
        const script = inner.document.createElement("script")
        script.onload = resolve
        script.onerror = reject
        script.src = new URL(address, url).href
        inner.document.head.appendChild(script)
      })
      inner.postMessage = data => window.dispatchEvent(new MessageEvent("message", { data, source: inner }))
      inner.importScripts = (...addresses) => addresses.reduce((before, next) => before.then(() => load(next)), Promise.resolve())
      this.ready = load(url)
      this.inner = inner
    }
    postMessage(data) {
      this.ready.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
}
