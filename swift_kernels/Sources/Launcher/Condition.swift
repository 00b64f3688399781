#if canImport(Darwin)
import Darwin
#else
import Glibc
#endif

/// A condition variable whose time limit is a point on the monotonic clock.
final class Condition {
  private let condition: UnsafeMutablePointer<pthread_cond_t> = .allocate(capacity: 1)

  init() {
    #if canImport(Darwin)
    pthread_cond_init(condition, nil)
    #else
    var attributes = pthread_condattr_t()
    pthread_condattr_init(&attributes)
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
    pthread_cond_init(condition, &attributes)
    pthread_condattr_destroy(&attributes)
    #endif
  }

  deinit {
    pthread_cond_destroy(condition)
    condition.deallocate()
  }

  func wait(_ lock: Lock) { pthread_cond_wait(condition, lock.mutex) }

  /// Returns when woken or at `deadline` (`MonotonicClock` nanoseconds), whichever is first.
  func wait(_ lock: Lock, until deadline: Int64) {
    #if canImport(Darwin)
    var left = timespec(nanoseconds: max(0, deadline - MonotonicClock.now()))
    pthread_cond_timedwait_relative_np(condition, lock.mutex, &left)
    #else
    var at = timespec(nanoseconds: deadline)
    pthread_cond_timedwait(condition, lock.mutex, &at)
    #endif
  }

  func signal() { pthread_cond_signal(condition) }
  func broadcast() { pthread_cond_broadcast(condition) }
}

extension timespec {
  fileprivate init(nanoseconds: Int64) {
    self.init(tv_sec: Int(nanoseconds / 1_000_000_000), tv_nsec: Int(nanoseconds % 1_000_000_000))
  }
}
