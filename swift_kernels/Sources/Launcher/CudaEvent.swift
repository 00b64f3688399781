import CCuda

#if canImport(Darwin)
import Darwin
#else
import Glibc
#endif

/// A place in the stream that can be waited for, or timed.
final class CudaEvent {
  /// Nanoseconds for which a wait asks again and again: longer than the steps of small models.
  private static let spin: Int64 = 2_000_000
  /// Microseconds that it sleeps between two looks from then on. A launch of 6.8 ms is seen 0.03 ms after its end, by the
  /// driver's own wait, which is an interrupt's, 0.17 ms after it (H100).
  private static let nap: UInt32 = 20

  let event: OpaquePointer
  private let context: CudaContext

  /// Made with the context current.
  init(_ context: CudaContext, isTimed: Bool = false) throws(LaunchError) {
    var event: OpaquePointer?
    let flags = isTimed ? 0 : UInt32(MS_CUDA_EVENT_NO_TIMING)
    try context.check(context.driver.functions.cuEventCreate(&event, flags), "cuda: event")
    self.context = context
    self.event = event!
  }

  deinit { context.leave { _ = context.driver.functions.cuEventDestroy(event) } }

  /// Marks the end of what is queued so far.
  func record() throws(LaunchError) {
    try context.check(context.driver.functions.cuEventRecord(event, context.stream), "cuda: event")
  }

  /// Marks a place in the graph that is captured from `stream`, each time it runs.
  func record(within stream: OpaquePointer) throws(LaunchError) {
    try context.check(
      context.driver.functions.cuEventRecordWithFlags(event, stream, UInt32(MS_CUDA_EVENT_EXTERNAL)), "cuda: event")
  }

  /// `CUDA_ERROR_NOT_READY` until what is in front of it is done, then 0 or the error of what failed.
  @inline(__always)
  func query() -> Int32 { context.driver.functions.cuEventQuery(event) }

  /// Waits until then; at `deadline` (`MonotonicClock` nanoseconds) it gives up and returns `MS_CUDA_NOT_READY`.
  func wait(until deadline: Int64? = nil) -> Int32 {
    let end = MonotonicClock.now() + Self.spin
    while true {
      let code = query()
      guard code == MS_CUDA_NOT_READY else { return code }
      let now = MonotonicClock.now()
      if let deadline, now >= deadline { return code }
      if now >= end { usleep(Self.nap) }
    }
  }

  /// Nanoseconds from an earlier event to this one; both are done.
  func nanoseconds(since earlier: CudaEvent) -> Double {
    var milliseconds: Float = 0
    guard context.driver.functions.cuEventElapsedTime(&milliseconds, earlier.event, event) == 0 else { return 0 }
    return Double(milliseconds) * 1e6
  }
}
