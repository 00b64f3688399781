import Glibc

/// The names of functions that have been compiled, in a file of lines. Code is KernelCompiler's to keep, and a name may
/// stand for it since the launcher has an archive for each source.
final class SimBinaryArchive: MTLBinaryArchive {
  private static let head = "simulated metalarchive"

  private let log: SimLog?
  private var entries: Set<String> = []

  init(_ url: URL?, log: SimLog?) throws {
    self.log = log
    guard let url else { return }
    var text: [UInt8] = []
    if let file = fopen(url.path, "r") {
      defer { fclose(file) }
      while case let byte = getc(file), byte != EOF { text.append(UInt8(truncatingIfNeeded: byte)) }
    }
    let lines = String(decoding: text, as: UTF8.self).split(separator: "\n").map { String($0) }
    guard lines.first == Self.head else { throw SimError(description: "\(url.path) is not an archive") }
    entries = Set(lines.dropFirst())
  }

  func contains(_ function: SimFunction) -> Bool { entries.contains(function.name) }

  func addComputePipelineFunctions(descriptor: MTLComputePipelineDescriptor) throws {
    guard let function = descriptor.computeFunction as? SimFunction else {
      throw SimError(description: "a pipeline descriptor without a function of this device")
    }
    log?.write("pipeline \(function.name) compiled")
    entries.insert(function.name)
  }

  func serialize(to url: URL) throws {
    guard let file = fopen(url.path, "w") else { throw SimError(description: "\(url.path) cannot be written") }
    for line in [Self.head] + entries.sorted() { fputs(line + "\n", file) }
    guard fclose(file) == 0 else { throw SimError(description: "\(url.path) cannot be written") }
  }
}
