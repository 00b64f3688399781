/// Metal source to C++ source. The text is kept, line for line, but for what C++ has no word for:
/// - attributes `[[...]]` go; those of a kernel's parameters are listed for its entry point (metal_stdlib.h: SIM_ENTRY),
///   where C++ deduces the parameters' types by itself;
/// - `MS_INSTANCE(name, function)` becomes an entry point, and so does every kernel that is not a template;
/// - `threadgroup T x[n];` in a body becomes a reference to memory of the running threadgroup.
/// What it cannot classify is an error: a threadgroup array taken for a thread's own would hide a missing barrier.
struct KernelScanner {
  struct Kernel {
    var attributes: [String]  // "buffer<0>", "thread_position_in_grid", ...
    var isTemplate: Bool
    /// Indices of `[[buffer(i)]]`.
    var buffers: [Int] { attributes.compactMap { $0.hasPrefix("buffer<") ? Int($0.dropFirst(7).dropLast()) : nil } }
  }
  struct Translation {
    var text: String
    var kernels: [String: Kernel]  // by the name that makeFunction takes
  }
  private struct Edit {
    let range: Range<Int>
    let text: String
  }

  private let source: [UInt8]
  /// `source` with comments, strings and preprocessor lines blanked: what is code, at the same positions.
  private let code: [UInt8]

  init(_ text: String) {
    source = Array(text.utf8)
    code = Self.blanked(source)
  }

  func translate() throws -> Translation {
    try refuseQuotedIncludes()
    var edits = attributeEdits() + (try threadgroupEdits())
    let definitions = try kernelDefinitions()
    var kernels: [String: Kernel] = [:]
    for (name, kernel, end) in definitions {
      let list = kernel.attributes.map { "sim_" + $0 }.joined(separator: ", ")
      var text = " using sim_attributes_\(name) = sim_list<\(list)>;"
      if !kernel.isTemplate {
        text += " SIM_ENTRY(\(name), sim_attributes_\(name), \(name))"
        kernels[name] = kernel
      }
      edits.append(Edit(range: end..<end, text: text))
    }
    for instance in try instances() {
      let function = String(instance.function.prefix { $0 != "<" }).trimmed
      guard let definition = definitions.first(where: { $0.name == function }) else {
        throw error(at: instance.range.lowerBound, "MS_INSTANCE of \(function), which is not a kernel of this source")
      }
      guard kernels.updateValue(definition.kernel, forKey: instance.name) == nil else {
        throw error(at: instance.range.lowerBound, "a second kernel \(instance.name)")
      }
      let text = "SIM_ENTRY(\(instance.name), sim_attributes_\(function), \(instance.function))"
      edits.append(Edit(range: instance.range, text: text))
    }
    return Translation(text: applied(edits), kernels: kernels)
  }

  // MARK: what is looked for

  private func refuseQuotedIncludes() throws {
    var position = 0
    for line in Self.blanked(source, keepingDirectives: true).split(
      separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
    {
      position += line.count + 1
      if line.filter({ !$0.isSpace }).starts(with: Array("#include\"".utf8)) {
        throw error(at: position - 1, "a quoted include: run-time source has no include path; inline the file")
      }
    }
  }

  private func attributeEdits() -> [Edit] {
    var edits: [Edit] = []
    var at = 0
    while let start = find("[[", from: at) {
      let end = find("]]", from: start).map { $0 + 2 } ?? code.count
      edits.append(Edit(range: start..<end, text: ""))
      at = end
    }
    return edits
  }

  /// Each use of the word `threadgroup`: pointers and references stay, variables become group memory.
  private func threadgroupEdits() throws -> [Edit] {
    var edits: [Edit] = []
    for start in words("threadgroup") {
      if start >= 2, find("[[", from: start - 2) == start - 2 { continue }  // the attribute
      // Up to what tells a pointer from a variable, over template arguments.
      var at = start
      while at < code.count, !"*&;=,)[({".utf8.contains(code[at]) {
        at = code[at] == UInt8(ascii: "<") ? close(at) : at + 1
      }
      guard at < code.count else { throw error(at: start, "threadgroup at the end of the source") }
      if code[at] == UInt8(ascii: "*") || code[at] == UInt8(ascii: "&") { continue }
      if code[at] == UInt8(ascii: "("), let next = skipSpace(at + 1), "*&".utf8.contains(code[next]) { continue }
      var end = at
      while end < code.count, code[end] == UInt8(ascii: "[") { end = skipSpace(close(end)) ?? code.count }
      guard end < code.count, code[end] == UInt8(ascii: ";") else {
        throw error(
          at: start, "a threadgroup variable must be declared alone and without a value: threadgroup T name[sizes];")
      }
      let declaration = text(start + 11..<at).trimmed
      let name = String(declaration.reversed().prefix { $0.isLetter || $0.isNumber || $0 == "_" }.reversed())
      let type = String(declaration.dropLast(name.count)).trimmed
      guard !name.isEmpty, !type.isEmpty else {
        throw error(at: start, "a threadgroup variable without a type or a name")
      }
      let replacement =
        "typedef \(type) \(name)_type\(text(at..<end)); static const char \(name)_site = 0; "
        + "\(name)_type &\(name) = *(\(name)_type *)sim->threadgroup_memory(&\(name)_site, sizeof(\(name)_type));"
      edits.append(Edit(range: start..<end + 1, text: replacement))
    }
    return edits
  }

  private func kernelDefinitions() throws -> [(name: String, kernel: Kernel, end: Int)] {
    var found: [(name: String, kernel: Kernel, end: Int)] = []
    for start in words("kernel") {
      var at = start + 6
      var first = start
      if start >= 2, find("[[", from: start - 2) == start - 2 {
        first = start - 2
        at = (find("]]", from: start) ?? code.count) + 2
      }
      guard let result = word(from: at), text(result) == "void", let name = word(from: result.upperBound),
        let open = skipSpace(name.upperBound), code[open] == UInt8(ascii: "(")
      else { throw error(at: start, "expected `kernel void name(` or `[[kernel]] void name(`") }
      let end = close(open)
      let title = text(name)
      var attributes: [String] = []
      for (i, parameter) in splitAtCommas(open + 1..<end - 1).enumerated() {
        guard let attribute = attribute(in: parameter) else {
          throw error(at: parameter.lowerBound, "parameter \(i + 1) of kernel \(title) has no attribute")
        }
        attributes.append(attribute)
      }
      guard let body = skipSpace(end), code[body] == UInt8(ascii: "{") else {
        throw error(at: start, "kernel \(title) is declared without a body")
      }
      let before = code[..<first].last { !$0.isSpace }
      let kernel = Kernel(attributes: attributes, isTemplate: before == UInt8(ascii: ">"))
      found.append((title, kernel, close(body)))
    }
    return found
  }

  private func instances() throws -> [(range: Range<Int>, name: String, function: String)] {
    try words("MS_INSTANCE").map { start in
      guard let open = skipSpace(start + 11), code[open] == UInt8(ascii: "(") else {
        throw error(at: start, "expected MS_INSTANCE(name, function)")
      }
      let end = close(open)
      let parts = text(open + 1..<end - 1).split(separator: ",", maxSplits: 1).map { String($0).trimmed }
      guard parts.count == 2 else { throw error(at: start, "expected MS_INSTANCE(name, function)") }
      return (start..<end, parts[0], parts[1])
    }
  }

  /// The last attribute in a parameter's declaration, as a template's name: `buffer(0)` is `buffer<0>`.
  private func attribute(in parameter: Range<Int>) -> String? {
    guard let start = find("[[", from: parameter.lowerBound), start < parameter.upperBound,
      let end = find("]]", from: start), end < parameter.upperBound
    else { return nil }
    return text(start + 2..<end).filter { !$0.isWhitespace }.map { $0 == "(" ? "<" : $0 == ")" ? ">" : String($0) }
      .joined()
  }

  // MARK: text

  /// Comments and strings, and unless kept preprocessor lines, become spaces.
  private static func blanked(_ source: [UInt8], keepingDirectives: Bool = false) -> [UInt8] {
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

  private func text(_ range: Range<Int>) -> String { String(decoding: code[range], as: UTF8.self) }

  private func find(_ pattern: StaticString, from start: Int) -> Int? {
    let bytes = UnsafeBufferPointer(start: pattern.utf8Start, count: pattern.utf8CodeUnitCount)
    guard start >= 0, code.count >= bytes.count, start <= code.count - bytes.count else { return nil }
    return (start...code.count - bytes.count).first { code[$0..<$0 + bytes.count].elementsEqual(bytes) }
  }

  /// Where the identifier `name` stands.
  private func words(_ name: StaticString) -> [Int] {
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

  private func skipSpace(_ start: Int) -> Int? { start < code.count ? code[start...].firstIndex { !$0.isSpace } : nil }

  private func word(from start: Int) -> Range<Int>? {
    guard let first = skipSpace(start), code[first].isIdentifier else { return nil }
    return first..<(code[first...].firstIndex { !$0.isIdentifier } ?? code.count)
  }

  /// The position after the bracket that closes the one at `open`.
  private func close(_ open: Int) -> Int {
    let pairs: [UInt8: UInt8] = [
      UInt8(ascii: "("): UInt8(ascii: ")"), UInt8(ascii: "["): UInt8(ascii: "]"), UInt8(ascii: "{"): UInt8(ascii: "}"),
      UInt8(ascii: "<"): UInt8(ascii: ">"),
    ]
    var depth = 0
    for at in open..<code.count {
      if code[at] == code[open] { depth += 1 }
      if code[at] == pairs[code[open]] { depth -= 1 }
      if depth == 0 { return at + 1 }
    }
    return code.count
  }

  private func splitAtCommas(_ range: Range<Int>) -> [Range<Int>] {
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

  /// `source` with the edits made; lines keep their numbers.
  private func applied(_ edits: [Edit]) -> String {
    var result: [UInt8] = []
    var at = 0
    for edit in edits.sorted(by: { $0.range.lowerBound < $1.range.lowerBound }) where edit.range.lowerBound >= at {
      result += source[at..<edit.range.lowerBound]
      result += Array(edit.text.utf8)
      result += source[edit.range].filter { $0 == UInt8(ascii: "\n") }
      at = edit.range.upperBound
    }
    result += source[at...]
    // The translator brings the library itself.
    return String(decoding: result, as: UTF8.self).split(separator: "\n", omittingEmptySubsequences: false)
      .map { $0.hasPrefix("#include <metal_") ? "" : $0 }.joined(separator: "\n")
  }

  /// An error where the compiler would see it: `#line` counts.
  private func error(at position: Int, _ text: String) -> SimError {
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
  fileprivate var isSpace: Bool { self == 32 || (9...13).contains(self) }
  fileprivate var isIdentifier: Bool {
    (48...57).contains(self) || (65...90).contains(self) || (97...122).contains(self) || self == 95
  }
}

extension String {
  fileprivate var trimmed: String {
    String(drop { $0.isWhitespace }.reversed().drop { $0.isWhitespace }.reversed())
  }
}
