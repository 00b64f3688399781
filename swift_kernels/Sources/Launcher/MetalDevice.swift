import CMetalStep

#if canImport(Metal)
import Metal
#else
import MetalSim
#endif

/// The GPU behind Apple's Metal; where there is none, the simulated one, with this same text.
final class MetalDevice: Device {
  let info: MSDeviceInfo
  let device: any MTLDevice
  let queue: any MTLCommandQueue
  let tickets = MetalTickets()
  private let lock = Lock()
  private var libraries: [any MTLLibrary] = []
  private var kernels: [MetalKernel] = []  // by id

  /// - Throws: `LaunchError.argument` for `threads` other than 0; `LaunchError.device` on a machine without a GPU.
  init(threads: Int32) throws(LaunchError) {
    guard threads == 0 else {
      throw .argument("metal: threads is \(threads), expected 0: threads are the host device's")
    }
    guard let device = MTLCreateSystemDefaultDevice(), let queue = device.makeCommandQueue() else {
      throw .device("metal: this machine has no Metal device; open \"host\"")
    }
    self.device = device
    self.queue = queue
    var info = MSDeviceInfo()
    info.setName(device.name)
    info.memory_bytes = device.recommendedMaxWorkingSetSize
    self.info = info
  }

  func makeBuffer(bytes: Int) throws(LaunchError) -> any DeviceBuffer { try MetalBuffer(device, bytes: bytes) }

  func addLibrary(source: String) throws(LaunchError) {
    let options = MTLCompileOptions()
    // Infinities and NaN keep their meaning: masks and poisoned rows rely on it.
    if #available(macOS 15, *) { options.mathMode = .safe } else { options.fastMathEnabled = false }
    let library: any MTLLibrary
    do { library = try device.makeLibrary(source: source, options: options) } catch {
      throw .device("library: \(error.localizedDescription)")
    }
    lock.lock()
    defer { lock.unlock() }
    libraries.append(library)
  }

  func findKernel(name: String) throws(LaunchError) -> Int32 {
    lock.lock()
    defer { lock.unlock() }
    if let id = kernels.firstIndex(where: { $0.name == name }) { return Int32(id) }
    guard let function = libraries.lazy.compactMap({ $0.makeFunction(name: name) }).first else {
      let known = libraries.flatMap(\.functionNames).joined(separator: ", ")
      throw .argument(
        "kernel: no library of this device has \"\(name)\"; they have \(known.isEmpty ? "nothing" : known)")
    }
    do {
      kernels.append(MetalKernel(name: name, pipeline: try device.makeComputePipelineState(function: function)))
    } catch {
      throw .device("kernel \(name): \(error.localizedDescription)")
    }
    return Int32(kernels.count - 1)
  }

  func makePlan(_ source: PlanSource) throws(LaunchError) -> any DevicePlan {
    lock.lock()
    defer { lock.unlock() }
    return try MetalPlan(source, device: self, kernels: kernels)
  }

  func wait(for ticket: UInt64, timeout: Int64?) throws(LaunchError) { try tickets.wait(for: ticket, timeout: timeout) }

  func pack(_ source: MSWeightSource, into buffer: any DeviceBuffer, offset: Int) throws(LaunchError) {
    throw .argument("weight: no kernel of the metal device reads packed weights yet; use the host device")
  }

  /// What has been committed cannot be taken back: it is waited for.
  func close() { tickets.waitForAll() }
}

/// A kernel that launches can name.
struct MetalKernel {
  let name: String
  let pipeline: any MTLComputePipelineState
}
