import CKernels

/// A kernel of the host device, resolved for this machine's instruction set.
struct HostKernel {
  typealias Prepare =
    @convention(c) (
      UnsafeRawPointer?, UInt32, UInt32, UInt32, UInt32, Int32, UnsafeMutablePointer<ms_scratch>?,
      UnsafeMutablePointer<CChar>?
    ) -> UnsafePointer<CChar>?

  let name: String
  let function: ms_host_function
  private let prepare: Prepare

  /// All kernels of the library, in the order of their ids.
  static func all(isa: Int32) throws(LaunchError) -> [HostKernel] {
    var kernels: [HostKernel] = []
    for id in 0..<ms_host_kernel_count() {
      guard let entry = ms_host_kernel_at(id)?.pointee, let name = entry.name, let prepare = entry.prepare,
        let function = [entry.function.0, entry.function.1, entry.function.2, entry.function.3][Int(isa)]
          ?? entry.function.0
      else { throw .device("host: kernel \(id) is not complete; the library was not built as a whole") }
      kernels.append(HostKernel(name: String(cString: name), function: function, prepare: prepare))
    }
    return kernels
  }

  /// Scratch that a launch needs. Throws the kernel's own text when its constants do not fit.
  func scratch(
    constants: UnsafeRawPointer, constantBytes: Int, binds: Int, maxTokens: UInt32, maxSampled: UInt32, threads: Int32
  ) throws(LaunchError) -> ms_scratch {
    var scratch = ms_scratch()
    var problem: String?
    withUnsafeTemporaryAllocation(of: CChar.self, capacity: 256) { message in
      message.initialize(repeating: 0)
      let text = prepare(
        constants, UInt32(constantBytes), UInt32(binds), maxTokens, maxSampled, threads, &scratch, message.baseAddress)
      problem = text.map { String(cString: $0) }
    }
    if let problem { throw .argument(problem) }
    return scratch
  }
}
