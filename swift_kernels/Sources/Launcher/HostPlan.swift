import CKernels
import CMetalStep

/// The launches of one step on the host device, resolved into a HostProgram and the memory it points to.
final class HostPlan: DevicePlan, TicketQueue.Job {
  private let device: HostDevice
  private var pool: OpaquePointer
  private let program: UnsafeMutablePointer<HostProgram>
  private let memory: HostBuffer  // launches, grids, bindings, constants
  private let scratch: HostScratch
  private let buffers: [any DeviceBuffer]  // kept alive: the program holds their addresses

  init(_ source: PlanSource, device: HostDevice) throws(LaunchError) {
    self.device = device
    pool = device.pool
    let count = source.launches.count
    var layout = Layout()
    let launchesAt = layout.reserve(count * MemoryLayout<HostProgram.Launch>.stride)
    let gridsAt = layout.reserve(count * 3 * MemoryLayout<UInt32>.stride)
    let places = source.launches.map { launch in
      (
        bindings: layout.reserve(Int(launch.binds) * MemoryLayout<UnsafeMutableRawPointer?>.stride),
        constants: layout.reserve(Int(launch.const_bytes))
      )
    }
    memory = try HostBuffer(bytes: layout.bytes)
    let base = memory.contents
    let launches = (base + launchesAt).bindMemory(to: HostProgram.Launch.self, capacity: count)
    let grids = (base + gridsAt).bindMemory(to: UInt32.self, capacity: count * 3)

    var perThread = 0
    var shared = 0
    var sharedInUse = false  // by a launch since the last barrier
    for (i, launch) in source.launches.enumerated() {
      let kernel = try device.kernel(launch.kernel, launch: i)
      let constants = base + places[i].constants
      if launch.const_bytes > 0 {
        constants.copyMemory(from: source.constants(of: launch).baseAddress!, byteCount: Int(launch.const_bytes))
      }
      let bindings = (base + places[i].bindings).bindMemory(
        to: UnsafeMutableRawPointer?.self, capacity: Int(launch.binds))
      for (slot, binding) in source.bindings(of: launch).enumerated() { bindings[slot] = binding.address }
      (grids[i * 3], grids[i * 3 + 1], grids[i * 3 + 2]) = launch.grid

      let needs: ms_scratch
      do throws(LaunchError) {
        needs = try kernel.scratch(
          constants: constants, constantBytes: Int(launch.const_bytes), binds: Int(launch.binds),
          maxTokens: source.maxTokens, maxSampled: source.maxSampled, threads: device.threads)
      } catch { throw .argument("plan: launch \(i) (\(kernel.name)): \(error.text)") }
      guard let ownBytes = Layout.padded(needs.per_thread), let sharedBytes = Layout.padded(needs.shared) else {
        throw .memory(
          "plan: launch \(i) (\(kernel.name)) asks for \(needs.per_thread) bytes of scratch a thread, \(needs.shared) in common"
        )
      }
      perThread = max(perThread, ownBytes)
      shared = max(shared, sharedBytes)
      // Launches that no data ties together may overlap, but the shared scratch is one.
      let barrier = launch.barrier != 0 || (sharedInUse && sharedBytes > 0)
      sharedInUse = (sharedInUse && !barrier) || sharedBytes > 0
      (launches + i).initialize(
        to: HostProgram.Launch(
          function: kernel.function, buffers: bindings, constants: constants, grid: grids + i * 3, barrier: barrier))
    }
    buffers = source.buffers
    scratch = try device.scratch(perThread: perThread, shared: shared)
    program = .allocate(capacity: 1)
    program.initialize(
      to: HostProgram(
        launches: launches, count: count, pool: device.pool, shared: scratch.address, scratch: scratch.of(thread: 0),
        scratchStride: scratch.perThread))
  }

  deinit { program.deallocate() }

  func run(steps: Int) throws(LaunchError) -> UInt64 { try device.queue.run(self, steps: steps) }

  /// Called by the queue, one job at a time.
  func execute(steps: Int) {
    program.pointee.steps = steps
    ms_pool_run(pool, HostProgram.replay, program)
  }

  func profile(into times: UnsafeMutablePointer<UInt64>) throws(LaunchError) {
    try device.queue.exclusively {
      program.pointee.times = times
      ms_pool_run(pool, HostProgram.profile, program)
      program.pointee.times = nil
    }
  }

  func limit(threads: Int32) throws(LaunchError) {
    let limited = try device.pool(of: threads)
    try device.queue.exclusively {
      pool = limited
      program.pointee.pool = limited
    }
  }

  /// Offsets of 64-byte aligned parts in one block of memory.
  private struct Layout {
    var bytes = 0

    mutating func reserve(_ count: Int) -> Int {
      defer { bytes += (count + 63) & ~63 }
      return bytes
    }

    /// A size of scratch, rounded up to 128 bytes; nil beyond 2^40 bytes, which no kernel can mean.
    static func padded(_ count: UInt64) -> Int? { count <= 1 << 40 ? (Int(count) + 127) & ~127 : nil }
  }
}
