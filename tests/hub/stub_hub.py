"""A hub in this process, for tests and for trying things out: `python tests/hub/stub_hub.py DIR --port 8765`, then HF_ENDPOINT.

DIR has a folder per model, DIR/owner/name. It answers what huggingface_hub asks the real one: the model's files and commit, refs, and files
with ETag, X-Repo-Commit, X-Linked-Size and ranges. Files of 1 kB and more are large ones with a sha256, as of Git LFS; others have git's
sha1. What it gets wrong on purpose is in `Faults`.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = 1000  # bytes from which a file is large
TOKEN = "hf_good"
API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+)|/(refs)|/tree/([^/]+))?")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Faults:
    """gated, private: models. status: answers to give before the right one, by path's end, last first. cut: bytes after which a file's
    connection breaks, the first time. wrong: files with other bytes than said. delay: seconds per 64 kB. no_ranges: whole files only.
    listed: what the list says of a file instead of the truth, by its name; "sha": of the commit."""

    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    status: dict[str, list[int]] = field(default_factory=dict)
    retry_after: str | None = "0"
    cut: dict[str, int] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    delay: float = 0.0
    no_ranges: bool = False
    login_page: bool = False
    listed: dict[str, dict[str, object]] = field(default_factory=dict)


class StubHub(ThreadingHTTPServer):
    """folder: of the models. requests: (method, path) as they came. sent: bytes of content by file. ranges: starts that were asked for."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.faults, self.stopped = folder, Faults(), False
        self.requests: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.ranges: list[tuple[str, int]] = []
        self.tags: dict[str, dict[str, str]] = {}  # model: tag: commit
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Broken connections are what is tested."""

    def start(self) -> StubHub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        self.stopped = True  # of connections that are kept open
        self.shutdown()
        self.server_close()

    def reset(self) -> None:
        """Without faults and counts. Answers that are still being sent count where they began."""
        self.faults, self.requests, self.sent, self.ranges = Faults(), [], Counter(), []

    def files(self, model: str) -> dict[str, bytes]:
        root = self.folder / model
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    def commit(self, model: str) -> str:
        """As git's: another one where a file changes."""
        found = hashlib.sha1(usedforsecurity=False)
        for name, data in self.files(model).items():
            found.update(f"{name}\0{etag(data)}\n".encode())
        return found.hexdigest()


def etag(data: bytes) -> str:
    if len(data) >= LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        if self.server.stopped:
            self.close_connection = True
            return self.connection.shutdown(2)
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        for end, statuses in self.server.faults.status.items():
            if path.endswith(end) and statuses:
                extra = {} if self.server.faults.retry_after is None else {"Retry-After": self.server.faults.retry_after}
                return self.send(statuses.pop(), b'{"error": "on purpose"}', extra)
        if self.server.faults.login_page:
            return self.send(200, b"<html>Please log in to this network</html>", {"Content-Type": "text/html"})
        if match := API.fullmatch(path):
            return self.api(*match.groups())
        if match := RESOLVE.fullmatch(path):
            return self.resolve(*match.groups())
        return self.failed(404, "EntryNotFound", "no such path")

    def failed(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.send(status, json.dumps({"error": message}).encode(), headers)

    def refused(self, model: str) -> bool:
        """Whether the caller may not even see the model; answered then, as the hub does."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and not token.startswith("hf_good"):
            self.failed(401, None, "Invalid credentials in Authorization header")
        elif not (self.server.folder / model).is_dir() or (model in self.server.faults.private and not token):
            if token:
                self.failed(404, "RepoNotFound", "Repository not found")
            else:
                self.failed(401, None, "Invalid username or password.")
        else:
            return False
        return True

    def found_commit(self, model: str, revision: str | None) -> str | None:
        commit = self.server.commit(model)
        known = {"main": commit, commit: commit, commit[:7]: commit, **self.server.tags.get(model, {})}
        return known.get(revision or "main")

    def api(self, model: str, revision: str | None, refs: str | None, tree: str | None) -> None:
        if self.refused(model):
            return None
        if refs:
            names = [{"name": "main", "ref": "refs/heads/main", "targetCommit": self.server.commit(model)}]
            tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in self.server.tags.get(model, {}).items()]
            return self.send(200, json.dumps({"branches": names, "tags": tags, "converts": []}).encode(), {})
        commit = self.found_commit(model, revision or tree)
        if commit is None:
            return self.failed(404, "RevisionNotFound", f"Invalid rev id: {revision or tree}")
        entries = []
        for name, data in self.server.files(model).items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": etag(data)[:40]}
            if len(data) >= LARGE:
                entry["lfs"] = {"sha256": etag(data), "size": len(data), "pointerSize": 134}
            entries.append({**entry, **self.server.faults.listed.get(name, {})})
        if tree:
            listed = [{"type": "file", "path": e["rfilename"], "size": e["size"], "oid": e["blobId"]} for e in entries]
            return self.send(200, json.dumps(listed).encode(), {})
        body = {"_id": "1", "id": model, "modelId": model, "sha": commit, "private": False, "tags": [], "downloads": 0, "siblings": entries}
        body |= self.server.faults.listed.get("sha", {})
        return self.send(200, json.dumps(body).encode(), {})

    def resolve(self, model: str, revision: str, name: str) -> None:
        if self.refused(model):
            return None
        if model in self.server.faults.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}_granted":
            status = 403 if self.headers.get("Authorization") else 401
            return self.failed(status, "GatedRepo", f"Access to model {model} is restricted.")
        commit = self.found_commit(model, revision)
        if commit is None:
            return self.failed(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        data = self.server.files(model).get(name)
        if data is None:
            return self.failed(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes", "X-Linked-Size": str(len(data))}
        return self.content(name, data, headers)

    def content(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        start, status, faults = 0, 200, self.server.faults
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and not faults.no_ranges:
            start, status = int(asked[1]), 206
            self.server.ranges.append((name, start))
            if start >= len(data):
                return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if name in faults.wrong:
            body = bytes(255 - byte for byte in body)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        cut, sent = faults.cut.pop(name, None), self.server.sent
        for at in range(0, len(body if cut is None else body[:cut]), 1 << 16):
            piece = body[at : min(at + (1 << 16), len(body) if cut is None else cut)]
            sent[name] += len(piece)  # first: who has the last piece may look at once
            self.wfile.write(piece)
            if faults.delay:
                time.sleep(faults.delay)
        if cut is not None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(2)
        return None

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="has a folder owner/name per model")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--slow", type=float, default=0.0, metavar="SECONDS", help="time to take per 64 kB of a file")
    parser.add_argument("--gated", action="append", default=[], metavar="MODEL", help="a model that needs the token hf_good_granted")
    args = parser.parse_args()
    hub = StubHub(args.folder, args.port)
    hub.faults = Faults(gated=set(args.gated), delay=args.slow)
    print(f"export HF_ENDPOINT={hub.url}", flush=True)
    try:
        hub.serve_forever()
    except KeyboardInterrupt:
        hub.server_close()


if __name__ == "__main__":
    main()
