import CCuda
import CMetalStep

/// An NVIDIA GPU. Its memory is its own: the host sees only buffers that are shared, and writes, reads and copies the
/// others in the order of the runs.
final class CudaDevice: Device {
  static let kind = "cuda"

  let isUnified = false
  private let context: CudaContext
  private let kernels: CudaKernels
  private let tickets: CudaTickets
  private let staging: CudaStaging

  /// - Parameter name: "cuda", or "cuda:N" for the process's GPU N.
  /// - Throws: `LaunchError.argument` for another name or `threads` other than 0; `LaunchError.device` where the machine
  ///   lacks the GPU, its driver or NVIDIA's compiler.
  init(name: String, threads: Int32) throws(LaunchError) {
    guard threads == 0 else {
      throw .argument("\(name): threads is \(threads), expected 0: threads are the host device's")
    }
    context = try CudaContext(ordinal: try Self.ordinal(name))
    kernels = try CudaKernels(context)
    tickets = CudaTickets(context)
    staging = CudaStaging(context)
  }

  static func isName(_ name: String) -> Bool { name == kind || name.hasPrefix(kind + ":") }

  var info: MSDeviceInfo {
    var info = MSDeviceInfo()
    info.setName(context.gpu.name)
    info.memory_bytes = UInt64(CudaBuffer.left(of: context))
    return info
  }

  func makeBuffer(bytes: Int, memory: ms_memory) throws(LaunchError) -> any DeviceBuffer {
    try CudaBuffer(context, bytes: bytes, memory: memory)
  }

  func wrapBuffer(_ address: UnsafeMutableRawPointer, bytes: Int) throws(LaunchError) -> any DeviceBuffer {
    throw .memory("buffer: \(context.gpu.name) has memory of its own and wraps none; copy the \(bytes) bytes into a buffer")
  }

  func write(_ source: UnsafeRawBufferPointer, to target: DeviceRegion) throws(LaunchError) {
    try queue { () throws(LaunchError) in try staging.write(source, to: target.deviceAddress) }
  }

  func read(_ source: DeviceRegion, into target: UnsafeMutableRawBufferPointer) throws(LaunchError) {
    try context.enter { () throws(LaunchError) in try staging.read(source.deviceAddress, into: target) }
  }

  func copy(_ source: DeviceRegion, to target: DeviceRegion, bytes: Int) throws(LaunchError) {
    try queue { () throws(LaunchError) in
      try context.check(
        context.driver.functions.cuMemcpyDtoDAsync(target.deviceAddress, source.deviceAddress, bytes, context.stream),
        "copy")
    }
  }

  func addLibrary(source: String) throws(LaunchError) { try kernels.add(source: source) }

  func findKernel(name: String) throws(LaunchError) -> Int32 { try kernels.find(name: name) }

  func makePlan(_ source: PlanSource) throws(LaunchError) -> any DevicePlan {
    try CudaPlan(source, context: context, tickets: tickets, kernels: kernels.all())
  }

  func wait(for ticket: UInt64, timeout: Int64?) throws(LaunchError) { try tickets.wait(for: ticket, timeout: timeout) }

  func pack(_ source: MSWeightSource, into buffer: any DeviceBuffer, offset: Int) throws(LaunchError) {
    throw .argument("weight: a GPU's kernels read weights as they are stored; copy them into a buffer")
  }

  /// What has been queued cannot be taken back: it is waited for.
  func close() { tickets.close() }

  private func queue(_ body: () throws(LaunchError) -> Void) throws(LaunchError) {
    try context.enter { () throws(LaunchError) in
      context.submission.lock()
      defer { context.submission.unlock() }
      try body()
    }
  }

  private static func ordinal(_ name: String) throws(LaunchError) -> Int32 {
    guard name != kind else { return 0 }
    guard let number = Int32(name.dropFirst(kind.count + 1)), number >= 0 else {
      throw .argument("device: \"\(name)\" is unknown, expected \"cuda\" or \"cuda:N\" with a GPU's number N, from 0 on")
    }
    return number
  }
}

extension DeviceRegion {
  fileprivate var deviceAddress: UInt64 { UInt64(UInt(bitPattern: address)) }
}
