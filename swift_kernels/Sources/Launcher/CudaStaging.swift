import CCuda

/// Pinned memory through which the host's bytes go to the GPU and back: a copy from or to any other memory would make the
/// driver wait for the stream.
///
/// Writes fill one segment after the other, and wait only where a segment's last bytes are still being copied. Not for
/// several threads at once: writes hold the context's `submission`, reads their own lock.
final class CudaStaging {
  private static let segmentBytes = 4 << 20
  private static let segments = 4
  private static let alignment = 256

  private final class Segment {
    let memory: UnsafeMutableRawPointer
    let copied: CudaEvent
    var used = 0
    var isInFlight = false
    private let context: CudaContext

    init(_ context: CudaContext) throws(LaunchError) {
      self.context = context
      copied = try CudaEvent(context)
      memory = try CudaBuffer.pinned(context, bytes: CudaStaging.segmentBytes)
    }

    deinit {
      context.leave {
        _ = context.driver.functions.cuStreamSynchronize(context.stream)
        _ = context.driver.functions.cuMemFreeHost(memory)
      }
    }
  }

  private let context: CudaContext
  private var ring: [Segment] = []  // made when first needed
  private var current = 0
  private var incoming: Segment?
  private let reading = Lock()

  init(_ context: CudaContext) { self.context = context }

  /// Queues a copy; `source` may be reused when it returns. With `submission` held and the context current.
  func write(_ source: UnsafeRawBufferPointer, to address: UInt64) throws(LaunchError) {
    var done = 0
    while done < source.count {
      let segment = try segmentWithRoom()
      let count = min(source.count - done, Self.segmentBytes - segment.used)
      let staged = segment.memory + segment.used
      staged.copyMemory(from: source.baseAddress! + done, byteCount: count)
      try context.check(
        context.driver.functions.cuMemcpyHtoDAsync(address + UInt64(done), staged, count, context.stream), "write")
      done += count
      segment.used = (segment.used + count + Self.alignment - 1) / Self.alignment * Self.alignment
    }
  }

  /// Copies to the host after all that is queued; returns when it is done. With the context current.
  func read(_ address: UInt64, into target: UnsafeMutableRawBufferPointer) throws(LaunchError) {
    reading.lock()
    defer { reading.unlock() }
    if incoming == nil { incoming = try Segment(context) }
    let segment = incoming!
    var done = 0
    while done < target.count {
      let count = min(target.count - done, Self.segmentBytes)
      try queueRead(address + UInt64(done), into: segment, count: count)
      try finish(segment.copied, "read")
      (target.baseAddress! + done).copyMemory(from: segment.memory, byteCount: count)
      done += count
    }
  }

  private func queueRead(_ address: UInt64, into segment: Segment, count: Int) throws(LaunchError) {
    context.submission.lock()
    defer { context.submission.unlock() }
    try context.check(
      context.driver.functions.cuMemcpyDtoHAsync(segment.memory, address, count, context.stream), "read")
    try segment.copied.record()
  }

  private func segmentWithRoom() throws(LaunchError) -> Segment {
    if ring.isEmpty { ring.append(try Segment(context)) }
    let segment = ring[current]
    if segment.used < Self.segmentBytes { return segment }
    try segment.copied.record()
    segment.isInFlight = true
    if ring.count < Self.segments { ring.append(try Segment(context)) }
    current = (current + 1) % ring.count
    let next = ring[current]
    if next.isInFlight { try finish(next.copied, "write") }
    next.isInFlight = false
    next.used = 0
    return next
  }

  private func finish(_ event: CudaEvent, _ what: String) throws(LaunchError) {
    let code = event.wait()
    if code != 0 { throw context.failure(code, what) }
  }
}
