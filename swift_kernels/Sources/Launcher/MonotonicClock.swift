#if canImport(Darwin)
import Darwin
#else
import Glibc
#endif

enum MonotonicClock {
  /// Nanoseconds since some fixed point in the past. About 20 ns a call.
  @inline(__always) static func now() -> Int64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Int64(time.tv_sec) * 1_000_000_000 + Int64(time.tv_nsec)
  }
}
