import Glibc

final class SimCommandBuffer: MTLCommandBuffer, @unchecked Sendable {
  let retainsReferences: Bool
  private let reportsEncoders: Bool
  private let queue: SimQueue.Worker
  private let log: SimLog?
  private var encoders: [(label: String, calls: String)] = []
  private var spans: [[SimDispatch]] = [[]]  // dispatches with no barrier between them
  private var handlers: [MTLCommandBufferHandler] = []
  private var isEncoding = false
  private var isCommitted = false
  private var seed: UInt64 = 0
  // Written by the worker, under its lock, once the buffer is committed.
  private var progress = MTLCommandBufferStatus.notEnqueued
  private var failure: SimFailure?
  private var finalError: SimFailure.CommandBufferError?
  private(set) var gpuStartTime: CFTimeInterval = 0
  private(set) var gpuEndTime: CFTimeInterval = 0

  init(_ queue: SimQueue.Worker, _ descriptor: MTLCommandBufferDescriptor, log: SimLog?) {
    self.queue = queue
    self.log = log
    retainsReferences = descriptor.retainedReferences
    reportsEncoders = descriptor.errorOptions.contains(.encoderExecutionStatus)
  }

  deinit { if !isCommitted { queue.finish() } }

  var status: MTLCommandBufferStatus { queue.locked { progress } }
  var error: (any Error)? { queue.locked { finalError } }

  func makeComputeCommandEncoder(dispatchType: MTLDispatchType) -> (any MTLComputeCommandEncoder)? {
    guard !isEncoding else { return nil }
    isEncoding = true
    return SimEncoder(self, dispatchType)
  }

  func append(_ dispatch: SimDispatch) { spans[spans.count - 1].append(dispatch) }
  func barrier() { if !spans[spans.count - 1].isEmpty { spans.append([]) } }

  /// - Parameter calls: what the encoder was asked to do, for the log.
  func endEncoding(label: String, calls: String) {
    encoders.append((label, calls))
    barrier()
    isEncoding = false
  }

  /// Metal's validation layer would stop the program; here the commands fail when they are run.
  func fail(_ text: String) { if failure == nil { failure = SimFailure(text: text) } }

  func addCompletedHandler(_ block: @escaping MTLCommandBufferHandler) { handlers.append(block) }

  func commit() {
    if isEncoding { fail("commit before endEncoding") }
    // Read here, on the caller's thread: the environment may not be read beside a thread that changes it.
    if let text = environment("METALSTEP_SIM_SEED") {
      if let number = UInt64(text) { seed = number } else { fail("METALSTEP_SIM_SEED is \(text), expected a number") }
    }
    if let name = environment("METALSTEP_SIM_FAULT") {
      if let fault = SimFailure.fault(name) { failure = fault } else { fail("METALSTEP_SIM_FAULT is \(name)") }
    }
    for encoder in encoders { log?.write("commands \(encoder.label)\(encoder.calls)") }
    isCommitted = true
    progress = .committed
    queue.enqueue(self)
  }

  func waitUntilCompleted() { queue.wait { self.progress == .completed || self.progress == .error } }

  /// On the queue's worker.
  func execute() {
    let start = now()
    var reason = queue.locked { failure }
    do {
      for span in spans where reason == nil {
        for dispatch in ordered(span) { try dispatch.run(seed: seed) }
      }
    } catch { reason = SimFailure(text: "\(error)") }
    let end = now()
    let error = reason?.error(encoders: reportsEncoders ? encoders.map(\.label) : nil)
    queue.locked {
      gpuStartTime = start
      gpuEndTime = end
      finalError = error
      progress = error == nil ? .completed : .error
    }
    for handler in handlers { handler(self) }
    handlers = []  // they may refer to this buffer
    queue.finish()
  }

  /// Between barriers a GPU may take dispatches in any order, and the seed says in which.
  private func ordered(_ span: [SimDispatch]) -> [SimDispatch] {
    switch seed {
    case 0: return span
    case 1: return span.reversed()
    default:
      var generator = SeededGenerator(state: seed)
      return span.shuffled(using: &generator)
    }
  }

  private func now() -> CFTimeInterval {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) * 1e-9
  }
}

/// SplitMix64.
struct SeededGenerator: RandomNumberGenerator {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var z = state
    z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
    z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
    return z ^ (z >> 31)
  }
}
