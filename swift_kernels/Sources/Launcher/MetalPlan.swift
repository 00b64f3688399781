import CMetalStep

#if canImport(Metal)
import Metal
#else
import MetalSim
#endif

/// The launches of one step on a Metal device, encoded anew for every step: one command buffer and one concurrent
/// encoder, in which the plan's barriers are the only order between launches. Steps follow one another, since Metal
/// tracks what command buffers write.
final class MetalPlan: DevicePlan, @unchecked Sendable {
  private static let bufferSlots = 31  // of an encoder's argument table
  private static let constantAlignment = 256  // of an offset into a buffer of the constant address space, on any GPU

  private let device: MetalDevice
  private let encoding: MetalEncoding
  private let names: [String]  // of the kernels, by launch
  // Not read again: the encoding and commands in flight refer to them without counting.
  private let pipelines: [any MTLComputePipelineState]
  private let buffers: [any DeviceBuffer]
  private let constants: MetalBuffer?

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
    let constants =
      constantBytes == 0
      ? nil : try MetalBuffer(device.device, bytes: constantBytes, residency: device.residency)

    var builder = MetalEncoding.Builder()
    for (launch, constantOffset) in zip(source.launches, constantOffsets) {
      var bindings: [MetalEncoding.Binding] = []
      for binding in source.bindings(of: launch) {
        guard let buffer = binding.buffer as? MetalBuffer else { throw .argument("plan: a buffer of another device") }
        bindings.append(MetalEncoding.Binding(buffer: buffer.buffer, offset: binding.offset))
      }
      if launch.const_bytes > 0, let constants {
        (constants.contents + constantOffset).copyMemory(
          from: source.constants(of: launch).baseAddress!, byteCount: Int(launch.const_bytes))
        bindings.append(MetalEncoding.Binding(buffer: constants.buffer, offset: constantOffset))
      }
      builder.append(
        kernels[Int(launch.kernel)].pipeline, barrier: launch.barrier != 0, grid: MTLSize(launch.grid),
        threads: MTLSize(launch.threads), bindings: bindings)
    }
    self.device = device
    self.constants = constants
    encoding = MetalEncoding(builder)
    names = source.launches.map { kernels[Int($0.kernel)].name }
    pipelines = source.launches.map { kernels[Int($0.kernel)].pipeline }
    buffers = source.buffers
  }

  /// Returns when all steps are committed, which with more than `MetalDevice.maxInFlight` in flight takes until the
  /// others have completed.
  func run(steps: Int) throws(LaunchError) -> UInt64 {
    // Tickets are numbered in the order in which their commands are committed.
    device.submission.lock()
    defer { device.submission.unlock() }
    let tickets = device.tickets
    let ticket = tickets.issue(count: steps)
    for step in 0..<steps {
      let isCommitted = commit(label: "step") { encoder in
        encoding.encode(to: encoder)
      } completed: { commands in
        // The closure refers to the plan, and so to all that the commands use, until they have completed.
        withExtendedLifetime(self) { tickets.complete(ticket, failure: .failure(of: commands, "run")) }
      }
      guard isCommitted else {
        tickets.complete(ticket, count: steps - step, failure: Self.noCommands("run"))
        break
      }
    }
    return ticket
  }

  func profile(into times: UnsafeMutablePointer<UInt64>) throws(LaunchError) {
    for i in 0..<encoding.count {
      var seconds = 0.0
      var failure: LaunchError?
      let isCommitted = commit(label: names[i]) { encoder in
        encoding.encode(launch: i, to: encoder)
      } completed: { _ in
      } afterwards: { commands in
        commands.waitUntilCompleted()
        seconds = commands.gpuEndTime - commands.gpuStartTime
        failure = .failure(of: commands, "profile: launch \(i)")
      }
      guard isCommitted else { throw Self.noCommands("profile") }
      if let failure { throw failure }
      times[i] = UInt64(max(0, seconds) * 1e9)
    }
  }

  /// Encodes and commits one command buffer; false when Metal gave none. Waits while the queue has as many as it takes.
  ///
  /// - Parameter label: of the encoder, by which Metal names it in errors.
  private func commit(
    label: String, encode: (any MTLComputeCommandEncoder) -> Void, completed: @escaping MTLCommandBufferHandler,
    afterwards: (any MTLCommandBuffer) -> Void = { _ in }
  ) -> Bool {
    // Python's threads have no pool of their own, and Metal's objects would pile up.
    autoreleasepool {
      guard let commands = device.queue.makeCommandBuffer(descriptor: device.commandBuffers),
        let encoder = commands.makeComputeCommandEncoder(dispatchType: .concurrent)
      else { return false }
      encoder.label = label
      encode(encoder)
      encoder.endEncoding()
      commands.addCompletedHandler(completed)
      commands.commit()
      afterwards(commands)
      return true
    }
  }

  private static func noCommands(_ what: String) -> LaunchError {
    .device("\(what): Metal gave no command buffer or encoder; the GPU may have been lost: open the device again")
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
