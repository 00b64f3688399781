import CMetalSim

/// An object that commands use: kept until they have run, or not where the caller promised to keep it.
struct SimReference<Object: AnyObject> {
  private let retained: Object?
  private weak var unretained: Object?

  init(_ object: Object, retains: Bool) {
    retained = retains ? object : nil
    unretained = object
  }

  var object: Object? { retained ?? unretained }
}

/// A dispatch with everything it was encoded with.
struct SimDispatch {
  struct Argument {
    let buffer: SimReference<SimBuffer>
    let offset: Int
  }

  let pipeline: SimReference<SimPipeline>
  let arguments: [Argument?]  // SIM_MAX_BUFFERS, by index
  let grid: MTLSize
  let threads: MTLSize

  /// - Throws: `SimError` naming the kernel.
  func run(seed: UInt64) throws {
    guard let function = pipeline.object?.function else {
      throw SimError(description: "a pipeline was freed before the commands that use it were done")
    }
    let buffers = arguments.map { $0?.buffer.object }
    let pointers = zip(buffers, arguments).map { buffer, argument in buffer.map { $0.contents() + argument!.offset } }
    for index in function.buffers {
      guard arguments.indices.contains(index), arguments[index] != nil else {
        throw SimError(description: "\(function.name): nothing is bound to [[buffer(\(index))]]")
      }
      guard pointers[index] != nil else {
        throw SimError(description: "\(function.name): [[buffer(\(index))]] was freed before the commands were done")
      }
    }
    var message = [CChar](repeating: 0, count: SIM_MESSAGE)
    let code = withExtendedLifetime(buffers) {
      sim_dispatch(function.entry, pointers, grid.words, threads.words, seed, &message)
    }
    guard code == 0 else { throw SimError(description: "\(function.name): \(String(cString: message))") }
  }
}

final class SimEncoder: MTLComputeCommandEncoder {
  var label: String?
  private var calls: [(name: String, count: Int)] = []
  private let commands: SimCommandBuffer
  private let isSerial: Bool
  private var pipeline: SimPipeline?
  private var arguments = [(buffer: SimBuffer, offset: Int)?](repeating: nil, count: Int(SIM_MAX_BUFFERS))

  init(_ commands: SimCommandBuffer, _ type: MTLDispatchType) {
    self.commands = commands
    isSerial = type == .serial
  }

  func setComputePipelineState(_ state: any MTLComputePipelineState) {
    count("setComputePipelineState")
    pipeline = state as? SimPipeline
  }

  func setBuffer(_ buffer: (any MTLBuffer)?, offset: Int, index: Int) {
    count("setBuffer")
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

  func setBufferOffset(_ offset: Int, index: Int) {
    count("setBufferOffset")
    guard arguments.indices.contains(index), let (buffer, _) = arguments[index] else {
      return commands.fail("setBufferOffset at index \(index), where no buffer is set")
    }
    guard (0..<buffer.length).contains(offset) else {
      return commands.fail("setBufferOffset at offset \(offset) of a buffer of \(buffer.length) bytes")
    }
    arguments[index] = (buffer, offset)
  }

  func dispatchThreadgroups(_ threadgroupsPerGrid: MTLSize, threadsPerThreadgroup: MTLSize) {
    count("dispatchThreadgroups")
    guard let pipeline else { return commands.fail("a dispatch without a pipeline") }
    let retains = commands.retainsReferences
    commands.append(
      SimDispatch(
        pipeline: SimReference(pipeline, retains: retains),
        arguments: arguments.map { argument in
          argument.map { SimDispatch.Argument(buffer: SimReference($0.buffer, retains: retains), offset: $0.offset) }
        }, grid: threadgroupsPerGrid, threads: threadsPerThreadgroup))
    if isSerial { commands.barrier() }
  }

  func memoryBarrier(scope: MTLBarrierScope) {
    count("memoryBarrier")
    commands.barrier()
  }

  func endEncoding() {
    commands.endEncoding(label: label ?? "", calls: calls.map { " \($0.name)=\($0.count)" }.joined())
    pipeline = nil
    arguments = []
  }

  private func count(_ name: String) {
    if let index = calls.firstIndex(where: { $0.name == name }) {
      calls[index].count += 1
    } else {
      calls.append((name, 1))
    }
  }
}

extension MTLSize {
  fileprivate var words: [UInt32] { [width, height, depth].map { UInt32(clamping: $0) } }
}
