import CMetalSim
import Glibc

/// A dispatch with everything it was encoded with.
struct SimDispatch {
  typealias Argument = (buffer: SimBuffer, offset: Int)

  let function: SimFunction
  let arguments: [Argument?]  // by index
  let grid: MTLSize
  let threads: MTLSize

  /// - Throws: `SimError` naming the kernel.
  func run(seed: UInt64) throws {
    let pointers = arguments.map { argument in argument.map { $0.buffer.contents() + $0.offset } }
    for index in function.buffers where !pointers.indices.contains(index) || pointers[index] == nil {
      throw SimError(description: "\(function.name): nothing is bound to [[buffer(\(index))]]")
    }
    var message = [CChar](repeating: 0, count: SIM_MESSAGE)
    guard sim_dispatch(function.entry, pointers, grid.words, threads.words, seed, &message) == 0 else {
      throw SimError(description: "\(function.name): \(String(cString: message))")
    }
  }
}

final class SimEncoder: MTLComputeCommandEncoder {
  private static let bufferSlots = 31  // of Metal's argument table

  private let commands: SimCommandBuffer
  private let isSerial: Bool
  private var pipeline: SimPipeline?
  private var arguments = [SimDispatch.Argument?](repeating: nil, count: bufferSlots)

  init(_ commands: SimCommandBuffer, _ type: MTLDispatchType) {
    self.commands = commands
    isSerial = type == .serial
  }

  func setComputePipelineState(_ state: any MTLComputePipelineState) { pipeline = state as? SimPipeline }

  func setBuffer(_ buffer: (any MTLBuffer)?, offset: Int, index: Int) {
    guard arguments.indices.contains(index) else { return commands.fail("setBuffer at index \(index)") }
    guard let buffer = buffer as? SimBuffer else {
      arguments[index] = nil
      return
    }
    guard (0..<buffer.length).contains(offset) else {
      return commands.fail("setBuffer at offset \(offset) of a buffer of \(buffer.length) bytes")
    }
    arguments[index] = (buffer, offset)
  }

  func dispatchThreadgroups(_ threadgroupsPerGrid: MTLSize, threadsPerThreadgroup: MTLSize) {
    guard let pipeline else { return commands.fail("a dispatch without a pipeline") }
    commands.append(
      SimDispatch(
        function: pipeline.function, arguments: arguments, grid: threadgroupsPerGrid, threads: threadsPerThreadgroup))
    if isSerial { commands.barrier() }
  }

  func memoryBarrier(scope: MTLBarrierScope) { commands.barrier() }
  func endEncoding() { commands.endEncoding() }
}

final class SimCommandBuffer: MTLCommandBuffer, @unchecked Sendable {
  private let queue: SimQueue.Worker
  private var spans: [[SimDispatch]] = [[]]  // dispatches with no barrier between them
  private var handlers: [MTLCommandBufferHandler] = []
  private var isEncoding = false
  private var seed: UInt64 = 0
  // Written by the worker, under its lock, once the buffer is committed.
  private var progress = MTLCommandBufferStatus.notEnqueued
  private var failure: SimError?
  private(set) var gpuStartTime: CFTimeInterval = 0
  private(set) var gpuEndTime: CFTimeInterval = 0

  init(_ queue: SimQueue.Worker) { self.queue = queue }

  var status: MTLCommandBufferStatus { queue.locked { progress } }
  var error: (any Error)? { queue.locked { failure } }

  func makeComputeCommandEncoder(dispatchType: MTLDispatchType) -> (any MTLComputeCommandEncoder)? {
    guard !isEncoding else { return nil }
    isEncoding = true
    return SimEncoder(self, dispatchType)
  }

  func append(_ dispatch: SimDispatch) { spans[spans.count - 1].append(dispatch) }
  func barrier() { if !spans[spans.count - 1].isEmpty { spans.append([]) } }

  func endEncoding() {
    barrier()
    isEncoding = false
  }

  /// Metal's validation layer would stop the program; here the commands fail when they are run.
  func fail(_ text: String) { if failure == nil { failure = SimError(description: text) } }

  func addCompletedHandler(_ block: @escaping MTLCommandBufferHandler) { handlers.append(block) }

  func commit() {
    if isEncoding { fail("commit before endEncoding") }
    // Read here, on the caller's thread: the environment may not be read beside a thread that changes it.
    if let text = environment("METALSTEP_SIM_SEED") {
      if let number = UInt64(text) { seed = number } else { fail("METALSTEP_SIM_SEED is \(text), expected a number") }
    }
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
    } catch let error as SimError {
      reason = error
    } catch {
      reason = SimError(description: "\(error)")
    }
    let end = now()
    queue.locked {
      gpuStartTime = start
      gpuEndTime = end
      failure = reason
      progress = reason == nil ? .completed : .error
    }
    for handler in handlers { handler(self) }
    handlers = []  // they may refer to this buffer
    queue.announce()
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

extension MTLSize {
  fileprivate var words: [UInt32] { [width, height, depth].map { UInt32(clamping: $0) } }
}
