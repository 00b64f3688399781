#if canImport(Metal)
import Metal
#else
import MetalSim
#endif

/// The launches of a step as calls of a compute encoder, worked out once: in a step, what is set already is not set
/// again.
///
/// It is plain memory and counts no references, which would cost more than the rest of the loop: whoever makes it keeps
/// the pipelines and buffers alive.
final class MetalEncoding {
  struct Binding {
    unowned(unsafe) let buffer: any MTLBuffer
    let offset: Int
  }

  fileprivate struct Launch {
    unowned(unsafe) let pipeline: any MTLComputePipelineState
    let isOtherPipeline: Bool  // than the launch's before
    let barrier: Bool
    let grid: MTLSize
    let threads: MTLSize
    let bindings: Range<Int>  // all of them, by index
    let changes: Range<Int>
  }

  /// A binding that differs from what an earlier launch of the step left at its index.
  fileprivate struct Change {
    let binding: Binding
    let index: Int
    let isOffsetOnly: Bool
  }

  private let launches: UnsafeMutableBufferPointer<Launch>
  private let bindings: UnsafeMutableBufferPointer<Binding>
  private let changes: UnsafeMutableBufferPointer<Change>

  var count: Int { launches.count }

  /// Collects launches in their order.
  struct Builder {
    fileprivate var launches: [Launch] = []
    fileprivate var bindings: [Binding] = []
    fileprivate var changes: [Change] = []
    private var bound: [Binding?] = []  // by index

    mutating func append(
      _ pipeline: any MTLComputePipelineState, barrier: Bool, grid: MTLSize, threads: MTLSize, bindings new: [Binding]
    ) {
      let (firstBinding, firstChange) = (bindings.count, changes.count)
      for (index, binding) in new.enumerated() {
        if index == bound.count { bound.append(nil) }
        let before = bound[index]
        let isSameBuffer = before.map { $0.buffer === binding.buffer } ?? false
        if !isSameBuffer || before?.offset != binding.offset {
          changes.append(Change(binding: binding, index: index, isOffsetOnly: isSameBuffer))
        }
        bound[index] = binding
      }
      bindings += new
      launches.append(
        Launch(
          pipeline: pipeline, isOtherPipeline: launches.last.map { $0.pipeline !== pipeline } ?? true, barrier: barrier,
          grid: grid, threads: threads, bindings: firstBinding..<bindings.count, changes: firstChange..<changes.count))
    }
  }

  init(_ builder: Builder) {
    launches = Self.copy(builder.launches)
    bindings = Self.copy(builder.bindings)
    changes = Self.copy(builder.changes)
  }

  deinit {
    launches.deinitialize().deallocate()
    bindings.deinitialize().deallocate()
    changes.deinitialize().deallocate()
  }

  /// The whole step, into an encoder in which nothing is set.
  func encode(to encoder: any MTLComputeCommandEncoder) {
    for launch in launches {
      if launch.barrier { encoder.memoryBarrier(scope: .buffers) }
      if launch.isOtherPipeline { encoder.setComputePipelineState(launch.pipeline) }
      for i in launch.changes {
        let change = changes[i]
        if change.isOffsetOnly {
          encoder.setBufferOffset(change.binding.offset, index: change.index)
        } else {
          encoder.setBuffer(change.binding.buffer, offset: change.binding.offset, index: change.index)
        }
      }
      encoder.dispatchThreadgroups(launch.grid, threadsPerThreadgroup: launch.threads)
    }
  }

  /// One launch alone, into an encoder in which nothing is set.
  func encode(launch number: Int, to encoder: any MTLComputeCommandEncoder) {
    let launch = launches[number]
    encoder.setComputePipelineState(launch.pipeline)
    for (index, binding) in bindings[launch.bindings].enumerated() {
      encoder.setBuffer(binding.buffer, offset: binding.offset, index: index)
    }
    encoder.dispatchThreadgroups(launch.grid, threadsPerThreadgroup: launch.threads)
  }

  private static func copy<Element>(_ elements: [Element]) -> UnsafeMutableBufferPointer<Element> {
    let memory = UnsafeMutableBufferPointer<Element>.allocate(capacity: elements.count)
    _ = memory.initialize(from: elements)
    return memory
  }
}
