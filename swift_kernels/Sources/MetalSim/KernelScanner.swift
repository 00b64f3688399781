/// Metal source to C++ source. The text is kept, line for line, but for what C++ has no word for:
/// - attributes `[[...]]` go; those of a kernel's parameters are listed for its entry point (sim_entry.h: SIM_ENTRY),
///   where C++ deduces the parameters' types by itself;
/// - instances become entry points, and so does every kernel that is not a template;
/// - `threadgroup T x[n];` in a body becomes a reference to memory of the running threadgroup;
/// - function constants get their values (SimFunctionConstants) and repeats for other address spaces go (SimOverloads).
/// What it cannot classify is an error: a threadgroup array taken for a thread's own would hide a missing barrier.
struct KernelScanner {
  struct Kernel {
    struct Parameter {
      let attribute: String  // "buffer<0>", "thread_position_in_grid", ...
      let isConditional: Bool  // bound only where a function constant says so
    }
    let parameters: [Parameter]
    let isTemplate: Bool
    /// Indices of `[[buffer(i)]]` that must be bound.
    var buffers: [Int] {
      parameters.filter { !$0.isConditional && $0.attribute.hasPrefix("buffer<") }
        .compactMap { Int($0.attribute.dropFirst(7).dropLast()) }
    }
  }
  struct Translation {
    var text: String
    var kernels: [String: Kernel]  // by the name that makeFunction takes
  }
  private struct Definition {
    let name: String
    let kernel: Kernel
    let end: Int
  }
  private struct Instance {
    let range: Range<Int>
    let name: String
    let function: String  // with its template arguments
  }
  private typealias Edit = SimSourceText.Edit

  private let text: SimSourceText

  init(_ source: String) { text = SimSourceText(source) }

  func translate() throws -> Translation {
    try refuseQuotedIncludes()
    var edits = attributeEdits() + (try threadgroupEdits())
    edits += try SimFunctionConstants(text).edits
    edits += SimOverloads(text).repeats
    let definitions = try kernelDefinitions()
    var kernels: [String: Kernel] = [:]
    for definition in definitions {
      let (name, kernel) = (definition.name, definition.kernel)
      let list = kernel.parameters.map { "sim_" + $0.attribute }.joined(separator: ", ")
      var entry = " using sim_attributes_\(name) = sim_list<\(list)>;"
      if !kernel.isTemplate {
        entry += " SIM_ENTRY(\(name), sim_attributes_\(name), \(name))"
        kernels[name] = kernel
      }
      edits.append(Edit(range: definition.end..<definition.end, text: entry))
    }
    for instance in try macroInstances("MS_INSTANCE") + macroInstances("instantiate_kernel") + explicitInstances() {
      let function = String(instance.function.prefix { $0 != "<" }).trimmed
      guard let definition = definitions.first(where: { $0.name == function }) else {
        throw text.error(
          at: instance.range.lowerBound, "an instance of \(function), which is not a kernel of this source")
      }
      guard instance.name.isIdentifier else {
        throw text.error(
          at: instance.range.lowerBound, "\"\(instance.name)\" as a kernel's name, expected an identifier")
      }
      guard kernels.updateValue(definition.kernel, forKey: instance.name) == nil else {
        throw text.error(at: instance.range.lowerBound, "a second kernel \(instance.name)")
      }
      let entry = "SIM_ENTRY(\(instance.name), sim_attributes_\(function), \(instance.function))"
      edits.append(Edit(range: instance.range, text: entry))
    }
    // The simulator brings the library itself.
    let lines = text.applied(edits).split(separator: "\n", omittingEmptySubsequences: false)
    let kept = lines.map { $0.filter { $0 != " " }.hasPrefix("#include<metal_") ? "" : $0 }
    return Translation(text: kept.joined(separator: "\n"), kernels: kernels)
  }

  private func refuseQuotedIncludes() throws {
    var position = 0
    for line in SimSourceText.blanked(text.source, keepingDirectives: true).split(
      separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
    {
      position += line.count + 1
      if line.filter({ !$0.isSpace }).starts(with: Array("#include\"".utf8)) {
        throw text.error(at: position - 1, "a quoted include: run-time source has no include path; inline the file")
      }
    }
  }

  private func attributeEdits() -> [Edit] {
    var edits: [Edit] = []
    var at = 0
    while let start = text.find("[[", from: at) {
      let end = text.find("]]", from: start).map { $0 + 2 } ?? text.code.count
      edits.append(Edit(range: start..<end, text: ""))
      at = end
    }
    return edits
  }

  /// Each use of the word `threadgroup`: pointers and references stay, variables become group memory.
  private func threadgroupEdits() throws -> [Edit] {
    let code = text.code
    var edits: [Edit] = []
    for start in text.words("threadgroup") {
      if start >= 2, text.find("[[", from: start - 2) == start - 2 { continue }  // the attribute
      if let next = text.skipSpace(start + 11), "{:".utf8.contains(code[next]) { continue }  // a member function's
      // Up to what tells a pointer from a variable, over template arguments.
      var at = start
      while at < code.count, !"*&;=,)[({>".utf8.contains(code[at]) {
        at = code[at] == UInt8(ascii: "<") ? text.close(at) : at + 1
      }
      guard at < code.count else { throw text.error(at: start, "threadgroup at the end of the source") }
      if "*&>".utf8.contains(code[at]) { continue }
      if code[at] == UInt8(ascii: "("), let next = text.skipSpace(at + 1), "*&".utf8.contains(code[next]) { continue }
      var end = at
      while end < code.count, code[end] == UInt8(ascii: "[") { end = text.skipSpace(text.close(end)) ?? code.count }
      guard end < code.count, code[end] == UInt8(ascii: ";") else {
        throw text.error(
          at: start, "a threadgroup variable must be declared alone and without a value: threadgroup T name[sizes];")
      }
      let declaration = text.text(start + 11..<at).trimmed
      let name = String(declaration.reversed().prefix { $0.isLetter || $0.isNumber || $0 == "_" }.reversed())
      let type = String(declaration.dropLast(name.count)).trimmed
      guard !name.isEmpty, !type.isEmpty else {
        throw text.error(at: start, "a threadgroup variable without a type or a name")
      }
      let replacement =
        "typedef \(type) \(name)_type\(text.text(at..<end)); static const char \(name)_site = 0; "
        + "\(name)_type &\(name) = *(\(name)_type *)sim->threadgroup_memory(&\(name)_site, sizeof(\(name)_type));"
      edits.append(Edit(range: start..<end + 1, text: replacement))
    }
    return edits
  }

  // MARK: kernels

  private func kernelDefinitions() throws -> [Definition] {
    var found: [Definition] = []
    for start in text.words("kernel") {
      var at = start + 6
      var first = start
      if start >= 2, text.find("[[", from: start - 2) == start - 2 {
        first = start - 2
        at = (text.find("]]", from: start) ?? text.code.count) + 2
      }
      guard let result = text.word(from: at) else { throw unexpected(start) }
      if text.text(result) == "decltype" { continue }  // an instance
      guard text.text(result) == "void", let name = text.word(from: result.upperBound),
        let open = text.skipSpace(name.upperBound), text.code[open] == UInt8(ascii: "(")
      else { throw unexpected(start) }
      let end = text.close(open)
      let title = text.text(name)
      let parameters = try parameters(of: title, in: text.inside(open))
      guard let body = text.skipSpace(end), text.code[body] == UInt8(ascii: "{") else {
        throw text.error(at: start, "kernel \(title) is declared without a body")
      }
      let before = text.code[..<first].last { !$0.isSpace }
      let kernel = Kernel(parameters: parameters, isTemplate: before == UInt8(ascii: ">"))
      found.append(Definition(name: title, kernel: kernel, end: text.close(body)))
    }
    return found
  }

  private func unexpected(_ start: Int) -> SimError {
    text.error(at: start, "expected `kernel void name(` or `[[kernel]] void name(`")
  }

  /// Metal numbers pointers, arrays and references without an attribute, each after the buffer before it.
  private func parameters(of title: String, in range: Range<Int>) throws -> [Kernel.Parameter] {
    var parameters: [Kernel.Parameter] = []
    var nextBuffer = 0
    for (i, parameter) in text.splitAtCommas(range).enumerated() {
      var attributes = attributes(in: parameter)
      if attributes.isEmpty, text.code[parameter].contains(where: { "*&[".utf8.contains($0) }) {
        attributes = ["buffer<\(nextBuffer)>"]
      }
      guard let attribute = attributes.first(where: { !$0.hasPrefix("function_constant<") }) else {
        throw text.error(at: parameter.lowerBound, "parameter \(i + 1) of kernel \(title) has no attribute")
      }
      if attribute.hasPrefix("buffer<"), let index = Int(attribute.dropFirst(7).dropLast()) { nextBuffer = index + 1 }
      parameters.append(.init(attribute: attribute, isConditional: attributes.count > 1))
    }
    return parameters
  }

  /// The attributes in a parameter's declaration, as templates' names: `buffer(0)` is `buffer<0>`.
  private func attributes(in parameter: Range<Int>) -> [String] {
    guard let start = text.find("[[", from: parameter.lowerBound), start < parameter.upperBound,
      let end = text.find("]]", from: start), end < parameter.upperBound
    else { return [] }
    return text.splitAtCommas(start + 2..<end).map { part in
      text.text(part).filter { !$0.isWhitespace }.map { $0 == "(" ? "<" : $0 == ")" ? ">" : String($0) }.joined()
    }
  }

  // MARK: instances

  /// `MS_INSTANCE(name, f<args>)` of the project, `instantiate_kernel("name", f, args...)` of MLX.
  private func macroInstances(_ macro: StaticString) throws -> [Instance] {
    try text.words(macro).map { start in
      let expected = text.error(at: start, "expected \(macro)(name, function)")
      guard let open = text.skipSpace(start + macro.utf8CodeUnitCount), text.code[open] == UInt8(ascii: "(") else {
        throw expected
      }
      let end = text.close(open)
      let parts = text.splitAtCommas(text.inside(open))
      guard parts.count >= 2 else { throw expected }
      if let name = text.literal(in: parts[0]) {
        let function = text.text(parts[1]).trimmed
        let arguments = text.text(parts[1].upperBound..<text.inside(open).upperBound).dropFirst()
        return Instance(range: start..<end, name: name, function: "\(function)<\(arguments)>")
      }
      let name = text.text(parts[0]).trimmed
      let function = text.text(parts[1].lowerBound..<text.inside(open).upperBound).trimmed
      return Instance(range: start..<end, name: name, function: function)
    }
  }

  /// `template [[host_name("name")]] [[kernel]] decltype(f<args>) f<args>;`
  private func explicitInstances() throws -> [Instance] {
    let templates = text.words("template")
    return try text.words("host_name").map { attribute in
      guard let template = templates.last(where: { $0 < attribute }),
        text.text(template + 8..<attribute).filter({ !$0.isWhitespace }) == "[[",
        let end = text.find(";", from: attribute), let name = text.literal(in: attribute..<end),
        let type = text.find("decltype", from: attribute), type < end, let open = text.skipSpace(type + 8),
        text.code[open] == UInt8(ascii: "(")
      else {
        throw text.error(
          at: attribute, "expected template [[host_name(\"name\")]] [[kernel]] decltype(function) function;")
      }
      let function = text.text(text.inside(open)).trimmed
      return Instance(range: template..<end + 1, name: name, function: function)
    }
  }
}
