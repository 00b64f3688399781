import CMetalStep

#if canImport(Metal)
import Metal
#else
import Glibc
import MetalSim
#endif

/// The GPU behind Apple's Metal; where there is none, the simulated one, with this same text.
final class MetalDevice: Device {
  /// Command buffers, and so steps, that are committed and not completed. More would only use memory: a step takes the
  /// GPU far longer than it takes to encode the next.
  static let maxInFlight = 64

  let device: any MTLDevice
  let queue: any MTLCommandQueue
  let tickets = MetalTickets()
  let submission = Lock()  // commands are committed one step after the other
  let residency: (any MetalResidency)?
  let commandBuffers: MTLCommandBufferDescriptor
  private let kernels: MetalKernels

  /// - Parameter name: under which it is opened, for messages.
  /// - Throws: `LaunchError.argument` for `threads` other than 0; `LaunchError.device` on a machine without a GPU.
  init(name: String, threads: Int32) throws(LaunchError) {
    guard threads == 0 else {
      throw .argument("\(name): threads is \(threads), expected 0: threads are the host device's")
    }
    guard let device = MTLCreateSystemDefaultDevice() else {
      throw .device("\(name): this machine has no Metal device; open \"host\"")
    }
    guard let queue = device.makeCommandQueue(maxCommandBufferCount: Self.maxInFlight) else {
      throw .device("\(name): \(device.name) gives no command queue; another process may have used it up")
    }
    self.device = device
    self.queue = queue
    if #available(macOS 15, *) {
      residency = MetalResidencySet(device, queue: queue, limit: device.recommendedMaxWorkingSetSize)
    } else {
      residency = nil
    }
    commandBuffers = MTLCommandBufferDescriptor()
    commandBuffers.retainedReferences = false  // a plan keeps all that its commands use until they have completed
    commandBuffers.errorOptions = .encoderExecutionStatus
    kernels = MetalKernels(device)
  }

  var info: MSDeviceInfo {
    var info = MSDeviceInfo()
    info.setName(device.name)
    let taken = UInt64(device.currentAllocatedSize)
    info.memory_bytes = device.recommendedMaxWorkingSetSize - min(taken, device.recommendedMaxWorkingSetSize)
    return info
  }

  func makeBuffer(bytes: Int, memory: ms_memory) throws(LaunchError) -> any DeviceBuffer {
    try MetalBuffer(device, bytes: bytes, residency: residency)
  }

  func wrapBuffer(_ address: UnsafeMutableRawPointer, bytes: Int) throws(LaunchError) -> any DeviceBuffer {
    try MetalBuffer(wrapping: address, bytes: bytes, page: Int(getpagesize()), device: device, residency: residency)
  }

  func addLibrary(source: String) throws(LaunchError) { try kernels.add(source: source) }

  func findKernel(name: String) throws(LaunchError) -> Int32 { try kernels.find(name: name) }

  func makePlan(_ source: PlanSource) throws(LaunchError) -> any DevicePlan {
    let plan = try MetalPlan(source, device: self, kernels: kernels.all())
    residency?.commit()
    return plan
  }

  func wait(for ticket: UInt64, timeout: Int64?) throws(LaunchError) { try tickets.wait(for: ticket, timeout: timeout) }

  func pack(_ source: MSWeightSource, into buffer: any DeviceBuffer, offset: Int) throws(LaunchError) {
    throw .argument("weight: a GPU's kernels read weights as they are stored; wrap or copy them into a buffer")
  }

  /// What has been committed cannot be taken back: it is waited for.
  func close() {
    tickets.waitForAll()
    residency?.end()
  }
}
