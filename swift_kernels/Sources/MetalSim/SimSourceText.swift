/// Metal source with its code told apart from what is not, and the means to change it line for line.
struct SimSourceText {
  struct Edit {
    let range: Range<Int>
    let text: String
  }

  let source: [UInt8]
  /// `source` with comments, strings and preprocessor lines blanked: what is code, at the same positions.
  let code: [UInt8]

  init(_ text: String) {
    source = Array(text.utf8)
    code = Self.blanked(source)
  }

  /// Comments and, unless kept, strings and preprocessor lines become spaces.
  static func blanked(_ source: [UInt8], keepingDirectives: Bool = false) -> [UInt8] {
    var code = source
    let newline = UInt8(ascii: "\n")
    let quote = UInt8(ascii: "\"")
    let backslash = UInt8(ascii: "\\")
    let slash = UInt8(ascii: "/")
    var at = 0
    var lineIsEmpty = true
    func starts(_ first: UInt8, _ second: UInt8) -> Bool {
      source[at] == first && at + 1 < source.count && source[at + 1] == second
    }
    func blank(while condition: () -> Bool) {
      while at < source.count, condition() {
        if source[at] != newline { code[at] = UInt8(ascii: " ") }
        at += 1
      }
    }
    while at < source.count {
      if starts(slash, slash) {
        blank { source[at] != newline }
      } else if starts(slash, UInt8(ascii: "*")) {
        let start = at
        blank { !(at >= start + 4 && source[at - 1] == slash && source[at - 2] == UInt8(ascii: "*")) }
      } else if source[at] == UInt8(ascii: "#"), lineIsEmpty, !keepingDirectives {
        blank { source[at] != newline || source[at - 1] == backslash }
      } else if source[at] == quote, !keepingDirectives {
        let start = at
        blank { source[at] != newline && !(at > start + 1 && source[at - 1] == quote && source[at - 2] != backslash) }
      } else {
        if source[at] == newline { lineIsEmpty = true } else if !source[at].isSpace { lineIsEmpty = false }
        at += 1
      }
    }
    return code
  }

  func text(_ range: Range<Int>) -> String { String(decoding: code[range], as: UTF8.self) }

  /// The string literal that starts in `range`, without its quotes.
  func literal(in range: Range<Int>) -> String? {
    guard let open = source[range].firstIndex(of: UInt8(ascii: "\"")),
      let end = source[(open + 1)..<range.upperBound].firstIndex(of: UInt8(ascii: "\""))
    else { return nil }
    return String(decoding: source[open + 1..<end], as: UTF8.self)
  }

  func find(_ pattern: StaticString, from start: Int) -> Int? {
    let bytes = UnsafeBufferPointer(start: pattern.utf8Start, count: pattern.utf8CodeUnitCount)
    guard start >= 0, code.count >= bytes.count, start <= code.count - bytes.count else { return nil }
    return code.withUnsafeBufferPointer { code in
      var at = start
      while at <= code.count - bytes.count {
        var same = 0
        while same < bytes.count, code[at + same] == bytes[same] { same += 1 }
        if same == bytes.count { return at }
        at += 1
      }
      return nil
    }
  }

  /// Where the identifier `name` stands.
  func words(_ name: StaticString) -> [Int] {
    var found: [Int] = []
    var at = 0
    while let start = find(name, from: at) {
      at = start + name.utf8CodeUnitCount
      if (start == 0 || !code[start - 1].isIdentifier) && (at == code.count || !code[at].isIdentifier) {
        found.append(start)
      }
    }
    return found
  }

  func skipSpace(_ start: Int) -> Int? { start < code.count ? code[start...].firstIndex { !$0.isSpace } : nil }

  func word(from start: Int) -> Range<Int>? {
    guard let first = skipSpace(start), code[first].isIdentifier else { return nil }
    return first..<(code[first...].firstIndex { !$0.isIdentifier } ?? code.count)
  }

  /// The position after the bracket that closes the one at `open`.
  func close(_ open: Int) -> Int {
    let pairs: [UInt8: UInt8] = [
      UInt8(ascii: "("): UInt8(ascii: ")"), UInt8(ascii: "["): UInt8(ascii: "]"), UInt8(ascii: "{"): UInt8(ascii: "}"),
      UInt8(ascii: "<"): UInt8(ascii: ">"),
    ]
    let opening = code[open]
    let closing = pairs[opening]
    var depth = 0
    for at in open..<code.count {
      if code[at] == opening { depth += 1 }
      if code[at] == closing { depth -= 1 }
      if depth == 0 { return at + 1 }
    }
    return code.count
  }

  /// What stands between the bracket at `open` and its closing one, or the end of the text.
  func inside(_ open: Int) -> Range<Int> {
    let end = close(open)
    let isClosed = end - 1 > open && ")]}>".utf8.contains(code[end - 1])
    return open + 1..<(isClosed ? end - 1 : end)
  }

  func splitAtCommas(_ range: Range<Int>) -> [Range<Int>] {
    var parts: [Range<Int>] = []
    var depth = 0
    var start = range.lowerBound
    for at in range {
      if "(<[".utf8.contains(code[at]) { depth += 1 }
      if ")>]".utf8.contains(code[at]) { depth -= 1 }
      if code[at] == UInt8(ascii: ","), depth == 0 {
        parts.append(start..<at)
        start = at + 1
      }
    }
    if let last = skipSpace(start), last < range.upperBound { parts.append(start..<range.upperBound) }
    return parts
  }

  /// `source` with the edits made; lines keep their numbers. An edit inside another is left out.
  func applied(_ edits: [Edit]) -> String {
    var result: [UInt8] = []
    var at = 0
    for edit in edits.sorted(by: { $0.range.lowerBound < $1.range.lowerBound }) where edit.range.lowerBound >= at {
      result += source[at..<edit.range.lowerBound]
      result += Array(edit.text.utf8)
      result += source[edit.range].filter { $0 == UInt8(ascii: "\n") }
      at = edit.range.upperBound
    }
    result += source[at...]
    return String(decoding: result, as: UTF8.self)
  }

  /// An error where the compiler would see it: `#line` counts.
  func error(at position: Int, _ text: String) -> SimError {
    var file = "program_source"
    var line = 0
    for content in source[..<min(position, source.count)].split(
      separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
    {
      line += 1
      let words = String(decoding: content, as: UTF8.self).split(separator: " ")
      if words.count == 3, words[0] == "#line", let next = Int(words[1]) {
        file = String(words[2].dropFirst().dropLast())
        line = next - 1
      }
    }
    return SimError(description: "\(file):\(max(line, 1)): error: \(text)")
  }
}

extension UInt8 {
  var isSpace: Bool { self == 32 || (9...13).contains(self) }
  var isIdentifier: Bool {
    (48...57).contains(self) || (65...90).contains(self) || (97...122).contains(self) || self == 95
  }
}

extension String {
  var trimmed: String {
    String(drop { $0.isWhitespace }.reversed().drop { $0.isWhitespace }.reversed())
  }
  var isIdentifier: Bool { !isEmpty && utf8.allSatisfy { $0.isIdentifier } }
}
