#if canImport(Darwin)
import Darwin
#else
import Glibc
#endif

/// A mutex. A class around allocated memory: a pthread_mutex_t must not move, which Swift's `inout` does not promise.
final class Lock {
  let mutex: UnsafeMutablePointer<pthread_mutex_t> = .allocate(capacity: 1)

  init() { pthread_mutex_init(mutex, nil) }

  deinit {
    pthread_mutex_destroy(mutex)
    mutex.deallocate()
  }

  @inline(__always) func lock() { pthread_mutex_lock(mutex) }
  @inline(__always) func unlock() { pthread_mutex_unlock(mutex) }
}
