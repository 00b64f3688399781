/// Definitions that say again, for another address space, what an earlier one said: C++ has one space, and they would be a
/// redefinition. The first stays.
struct SimOverloads {
  let repeats: [SimSourceText.Edit]

  private static let spaces: Set<String> = ["device", "threadgroup", "constant", "thread"]

  init(_ text: SimSourceText) {
    var repeats: [SimSourceText.Edit] = []
    var seen: Set<String> = []
    var scopes = [0]
    var next = 1
    var begin = 0
    var at = 0
    while at < text.code.count {
      let byte = text.code[at]
      if byte == UInt8(ascii: "{") {
        let (head, hasSpace) = Self.withoutSpaces(text.code[begin..<at])
        let isFunction = head.contains(")") && !head.hasSuffix("=")
        let isNew = head.isEmpty || head.hasSuffix("=") || seen.insert("\(scopes.last ?? 0) \(head)").inserted
        if !isNew && hasSpace {
          let start = text.skipSpace(begin) ?? begin
          at = text.close(at)
          if let end = text.skipSpace(at), text.code[end] == UInt8(ascii: ";") { at = end + 1 }
          repeats.append(.init(range: start..<at, text: ""))
        } else if isFunction {
          at = text.close(at)  // what is in a body is nobody else's
        } else {
          scopes.append(next)
          next += 1
          at += 1
        }
        begin = at
        continue
      }
      if byte == UInt8(ascii: "}"), scopes.count > 1 { scopes.removeLast() }
      if byte == UInt8(ascii: "}") || byte == UInt8(ascii: ";") { begin = at + 1 }
      at += 1
    }
    self.repeats = repeats
  }

  /// The words and signs of a definition's head, one space between them.
  private static func withoutSpaces(_ head: ArraySlice<UInt8>) -> (String, Bool) {
    var words: [String] = []
    var word: [UInt8] = []
    var hasSpace = false
    func end() {
      let text = String(decoding: word, as: UTF8.self)
      word = []
      if text.isEmpty { return }
      if spaces.contains(text) { hasSpace = true } else { words.append(text) }
    }
    for byte in head {
      if byte.isIdentifier {
        word.append(byte)
      } else {
        end()
        if !byte.isSpace { words.append(String(UnicodeScalar(byte))) }
      }
    }
    end()
    return (words.joined(separator: " "), hasSpace)
  }
}
