/// Function constants, which only foreign shaders have. A text gives their values, by index, in lines of its own, and so
/// is compiled once for each set of values:
///
///     #pragma metalstep function_constant(20) true
///     constant bool has_mask [[function_constant(20)]];
///
/// A constant without a value may be declared but not used, as in Metal.
struct SimFunctionConstants {
  let edits: [SimSourceText.Edit]

  init(_ text: SimSourceText) throws {
    let values = Self.values(text)
    var edits: [SimSourceText.Edit] = []
    var indices: [String: String] = [:]  // by name
    var at = 0
    while let attribute = text.find("[[function_constant(", from: at) {
      let open = attribute + 19
      let close = text.close(open)
      at = close
      guard let end = text.skipSpace(close + 2), text.code[end] == UInt8(ascii: ";") else {
        throw text.error(at: attribute, "expected `constant T name [[function_constant(index)]];`")
      }
      let before = text.code[..<attribute].lastIndex { ";{}".utf8.contains($0) }.map { $0 + 1 } ?? 0
      let start = text.skipSpace(before) ?? attribute
      var words = text.text(start..<attribute).split { $0.isWhitespace }.map(String.init)
      words.removeAll { ["constant", "static", "const"].contains($0) }
      let index = text.text(text.inside(open)).trimmed
      guard let name = words.popLast(), !words.isEmpty else {
        throw text.error(at: attribute, "expected `constant T name [[function_constant(index)]];`")
      }
      indices[name] = index
      let type = words[words.count - 1]  // before it may stand macros
      let declaration =
        values[index].map { "static const \(type) \(name) = \(type)(\($0));" }
        ?? "extern const \(type) \(name) __asm__(\"function_constant_\(index)_has_no_value\");"
      edits.append(.init(range: start..<end + 1, text: declaration))
    }
    for start in text.words("is_function_constant_defined") {
      guard let open = text.skipSpace(start + 28), text.code[open] == UInt8(ascii: "(") else { continue }
      let end = text.close(open)
      let name = text.text(text.inside(open)).trimmed
      edits.append(.init(range: start..<end, text: indices[name].flatMap { values[$0] } == nil ? "false" : "true"))
    }
    self.edits = edits
  }

  private static func values(_ text: SimSourceText) -> [String: String] {
    let head = "#pragma metalstep function_constant("
    var values: [String: String] = [:]
    for line in text.source.split(separator: UInt8(ascii: "\n")) where line.starts(with: head.utf8) {
      let parts = String(decoding: line.dropFirst(head.utf8.count), as: UTF8.self).split(separator: ")", maxSplits: 1)
      if parts.count == 2 { values[String(parts[0]).trimmed] = String(parts[1]).trimmed }
    }
    return values
  }
}
