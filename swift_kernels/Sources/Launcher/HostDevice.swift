import CKernels
import CMetalStep

/// The CPU: C kernels for the best instruction set it has, run on a thread pool.
final class HostDevice: Device {
  static let maxThreads: Int32 = 1024  // as METALSTEP_THREADS (pool.h)

  let info: MSDeviceInfo
  let threads: Int32
  let pool: OpaquePointer
  let queue = TicketQueue()
  private let kernels: [HostKernel]
  private let poolsLock = Lock()
  private var smallerPools: [Int32: OpaquePointer] = [:]  // by threads; one pool works at a time, the others sleep
  private let scratchLock = Lock()
  private var largestScratch: HostScratch?

  /// - Parameter threads: of the pool; 0 takes METALSTEP_THREADS or what the machine has.
  /// - Throws: `LaunchError.argument` for a count or a METALSTEP_CPU that does not fit this machine.
  init(threads: Int32) throws(LaunchError) {
    guard (0...Self.maxThreads).contains(threads) else {
      throw .argument("host: threads is \(threads), expected 0 (as many as the machine has) to \(Self.maxThreads)")
    }
    var message = [CChar](repeating: 0, count: 256)
    let isa = ms_host_isa(&message)
    guard isa >= 0, isa < Int32(MS_ISA_COUNT.rawValue) else { throw .argument(String(cString: message)) }
    kernels = try HostKernel.all(isa: isa)
    let count = threads == 0 ? ms_pool_default_threads() : threads
    guard count >= 1 else {
      throw .argument("host: METALSTEP_THREADS is not a number of threads, expected 1 to \(Self.maxThreads)")
    }
    guard let pool = ms_pool_create(count) else { throw .memory("host: a pool of \(count) threads cannot be started") }
    self.pool = pool
    self.threads = ms_pool_size(pool)
    var info = MSDeviceInfo()
    info.setName("host")
    info.setISA(String(cString: ms_host_isa_name(isa)))
    info.threads = self.threads
    info.memory_bytes = HostMemory.limit()
    self.info = info
  }

  func makeBuffer(bytes: Int, memory: ms_memory) throws(LaunchError) -> any DeviceBuffer {
    try HostBuffer(bytes: bytes)
  }

  func wrapBuffer(_ address: UnsafeMutableRawPointer, bytes: Int) -> any DeviceBuffer {
    HostBuffer(wrapping: address, bytes: bytes)
  }

  func addLibrary(source: String) throws(LaunchError) {
    throw .argument("library: the host device has its kernels built in and takes no sources")
  }

  func findKernel(name: String) throws(LaunchError) -> Int32 {
    guard let id = kernels.firstIndex(where: { $0.name == name }) else {
      let known = kernels.map(\.name).joined(separator: ", ")
      throw .argument("kernel: the host device has no \"\(name)\"; it has \(known)")
    }
    return Int32(id)
  }

  func makePlan(_ source: PlanSource) throws(LaunchError) -> any DevicePlan { try HostPlan(source, device: self) }

  func wait(for ticket: UInt64, timeout: Int64?) throws(LaunchError) { try queue.wait(for: ticket, timeout: timeout) }

  func pack(_ source: MSWeightSource, into buffer: any DeviceBuffer, offset: Int) throws(LaunchError) {
    var source = source
    var problem: String?
    let bytes = ms_panel_bytes(source.n, source.k, source.bits, source.group_size, source.dtype)
    (buffer as? HostBuffer)?.preferHugePages(offset: offset, bytes: Int(bytes))
    try queue.exclusively {
      var message = [CChar](repeating: 0, count: 256)
      problem = ms_panel_pack(pool, &source, buffer.contents + offset, &message).map { String(cString: $0) }
    }
    if let problem { throw .argument("weight: \(problem)") }
  }

  func close() {
    queue.close()
    ms_pool_destroy(pool)
    for smaller in smallerPools.values { ms_pool_destroy(smaller) }
  }

  /// A pool of so many threads, for plans that leave processors to others.
  func pool(of count: Int32) throws(LaunchError) -> OpaquePointer {
    guard (1...threads).contains(count) else {
      throw .argument("plan: a limit of \(count) threads, expected 1 to the device's \(threads)")
    }
    if count == threads { return pool }
    poolsLock.lock()
    defer { poolsLock.unlock() }
    if let known = smallerPools[count] { return known }
    guard let made = ms_pool_create(count) else { throw .memory("host: a pool of \(count) threads cannot be started") }
    smallerPools[count] = made
    return made
  }

  /// - Parameter launch: its number in the plan, for the message.
  func kernel(_ id: Int32, launch: Int) throws(LaunchError) -> HostKernel {
    guard id >= 0, id < kernels.count else {
      throw .argument(
        "plan: launch \(launch) names kernel \(id); ms_kernel_find gives ids from 0 to \(kernels.count - 1)")
    }
    return kernels[Int(id)]
  }

  /// Scratch of at least these sizes, shared with other plans of this device.
  func scratch(perThread: Int, shared: Int) throws(LaunchError) -> HostScratch {
    scratchLock.lock()
    defer { scratchLock.unlock() }
    if let largest = largestScratch, largest.perThread >= perThread, largest.shared >= shared { return largest }
    let scratch = try HostScratch(
      perThread: max(perThread, largestScratch?.perThread ?? 0), shared: max(shared, largestScratch?.shared ?? 0),
      threads: Int(threads))
    largestScratch = scratch
    return scratch
  }
}
