import CMetalStep

#if canImport(Metal)
import Metal
#else
import MetalSim
#endif

/// The launches of one step on a Metal device, encoded anew for every step: one command buffer and one concurrent encoder,
/// in which the plan's barriers are the only order between launches.
final class MetalPlan: DevicePlan, @unchecked Sendable {
  /// Everything that encoding needs. References are not counted here, which would cost more than the rest of the loop:
  /// `kernels`, `buffers` and `constants` keep them alive.
  private struct Launch {
    unowned(unsafe) let pipeline: any MTLComputePipelineState
    let barrier: Bool
    let grid: MTLSize
    let threads: MTLSize
    let binds: Range<Int>
  }
  private struct Bind {
    unowned(unsafe) let buffer: any MTLBuffer
    let offset: Int
    let index: Int
  }

  private static let bufferSlots = 31  // of an encoder's argument table
  private static let constantAlignment = 256  // of an offset into a buffer of the constant address space, on any GPU

  private let device: MetalDevice
  private let kernels: [MetalKernel]
  private let buffers: [any DeviceBuffer]
  private let constants: MetalBuffer?
  private let launches: UnsafeMutableBufferPointer<Launch>
  private let binds: UnsafeMutableBufferPointer<Bind>

  /// - Parameter kernels: the device's, by id.
  init(_ source: PlanSource, device: MetalDevice, kernels: [MetalKernel]) throws(LaunchError) {
    var constantOffsets: [Int] = []
    var constantBytes = 0
    for (i, launch) in source.launches.enumerated() {
      try Self.check(launch, number: i, kernels: kernels)
      constantOffsets.append(constantBytes)
      constantBytes +=
        (Int(launch.const_bytes) + Self.constantAlignment - 1) / Self.constantAlignment * Self.constantAlignment
    }
    // A buffer and not setBytes, which copies at every step and takes 4 KB at most: programs are longer.
    let constants = constantBytes == 0 ? nil : try MetalBuffer(device.device, bytes: constantBytes)

    var launches: [Launch] = []
    var binds: [Bind] = []
    for (launch, constantOffset) in zip(source.launches, constantOffsets) {
      let first = binds.count
      for (index, binding) in source.bindings(of: launch).enumerated() {
        guard let buffer = binding.buffer as? MetalBuffer else { throw .argument("plan: a buffer of another device") }
        binds.append(Bind(buffer: buffer.buffer, offset: binding.offset, index: index))
      }
      if launch.const_bytes > 0, let constants {
        (constants.contents + constantOffset).copyMemory(
          from: source.constants(of: launch).baseAddress!, byteCount: Int(launch.const_bytes))
        binds.append(Bind(buffer: constants.buffer, offset: constantOffset, index: binds.count - first))
      }
      launches.append(
        Launch(
          pipeline: kernels[Int(launch.kernel)].pipeline, barrier: launch.barrier != 0, grid: MTLSize(launch.grid),
          threads: MTLSize(launch.threads), binds: first..<binds.count))
    }
    self.device = device
    self.kernels = kernels
    self.constants = constants
    buffers = source.buffers
    self.launches = .allocate(capacity: launches.count)
    _ = self.launches.initialize(from: launches)
    self.binds = .allocate(capacity: binds.count)
    _ = self.binds.initialize(from: binds)
  }

  deinit {
    launches.deinitialize().deallocate()
    binds.deinitialize().deallocate()
  }

  /// Metal keeps 64 command buffers in flight; a call that would exceed them waits for the first to complete.
  func run(steps: Int) throws(LaunchError) -> UInt64 {
    let tickets = device.tickets
    let ticket = tickets.issue(count: steps)
    for step in 0..<steps {
      let isCommitted = commit(launches[...]) { commands in
        // The closure refers to the plan, and so to all that the commands use, until they have completed.
        tickets.complete(ticket, failure: self.failure(of: commands))
      }
      guard isCommitted else {
        tickets.complete(ticket, count: steps - step, failure: .device("run: Metal gave no command buffer or encoder"))
        break
      }
    }
    return ticket
  }

  func profile(into times: UnsafeMutablePointer<UInt64>) throws(LaunchError) {
    for i in launches.indices {
      var seconds = 0.0
      var failure: LaunchError?
      let isCommitted = commit(launches[i...i]) { _ in
      } afterwards: { commands in
        commands.waitUntilCompleted()
        seconds = commands.gpuEndTime - commands.gpuStartTime
        failure = self.failure(of: commands)
      }
      guard isCommitted else { throw .device("profile: Metal gave no command buffer or encoder") }
      if let failure { throw failure }
      times[i] = UInt64(max(0, seconds) * 1e9)
    }
  }

  /// Encodes and commits one command buffer; false when Metal gave none.
  private func commit(
    _ launches: Slice<UnsafeMutableBufferPointer<Launch>>, completed: @escaping MTLCommandBufferHandler,
    afterwards: (any MTLCommandBuffer) -> Void = { _ in }
  ) -> Bool {
    // Python's threads have no pool of their own, and Metal's objects would pile up.
    autoreleasepool {
      guard let commands = device.queue.makeCommandBuffer(),
        let encoder = commands.makeComputeCommandEncoder(dispatchType: .concurrent)
      else { return false }
      encode(launches, to: encoder)
      encoder.endEncoding()
      commands.addCompletedHandler(completed)
      commands.commit()
      afterwards(commands)
      return true
    }
  }

  private func encode(_ launches: Slice<UnsafeMutableBufferPointer<Launch>>, to encoder: any MTLComputeCommandEncoder) {
    var current: ObjectIdentifier?
    for launch in launches {
      if launch.barrier { encoder.memoryBarrier(scope: .buffers) }
      let pipeline = ObjectIdentifier(launch.pipeline)
      if pipeline != current {
        encoder.setComputePipelineState(launch.pipeline)
        current = pipeline
      }
      for i in launch.binds { encoder.setBuffer(binds[i].buffer, offset: binds[i].offset, index: binds[i].index) }
      encoder.dispatchThreadgroups(launch.grid, threadsPerThreadgroup: launch.threads)
    }
  }

  private func failure(of commands: any MTLCommandBuffer) -> LaunchError? {
    guard commands.status == .error else { return nil }
    return .device(
      "run: \(commands.error?.localizedDescription ?? "the command buffer failed, and Metal does not say why")")
  }

  private static func check(_ launch: MSLaunch, number: Int, kernels: [MetalKernel]) throws(LaunchError) {
    guard launch.kernel >= 0, launch.kernel < kernels.count else {
      throw .argument(
        "plan: launch \(number) names kernel \(launch.kernel); ms_kernel_find has given out \(kernels.count)")
    }
    let kernel = kernels[Int(launch.kernel)]
    let (grid, threads) = (MTLSize(launch.grid), MTLSize(launch.threads))
    let limit = kernel.pipeline.maxTotalThreadsPerThreadgroup
    guard grid.width > 0, grid.height > 0, grid.depth > 0 else {
      throw .argument(
        "plan: launch \(number) (\(kernel.name)) has grid \(launch.grid), expected 1 or more along each axis")
    }
    guard threads.width > 0, threads.height > 0, threads.depth > 0, threads.width <= limit, threads.height <= limit,
      threads.depth <= limit, threads.width * threads.height * threads.depth <= limit
    else {
      throw .argument(
        "plan: launch \(number) (\(kernel.name)) has threads \(launch.threads), expected 1 to \(limit) in all")
    }
    let slots = Int(launch.binds) + (launch.const_bytes > 0 ? 1 : 0)
    guard slots <= Self.bufferSlots else {
      throw .argument(
        "plan: launch \(number) (\(kernel.name)) binds \(slots) buffers, and Metal takes \(Self.bufferSlots)")
    }
  }
}

extension MTLSize {
  fileprivate init(_ words: (UInt32, UInt32, UInt32)) {
    self.init(width: Int(words.0), height: Int(words.1), depth: Int(words.2))
  }
}
