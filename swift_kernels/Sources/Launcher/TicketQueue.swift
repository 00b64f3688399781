#if canImport(Darwin)
import Darwin
#else
import Glibc
#endif

/// Runs queued jobs in order, one at a time, on whichever thread gets to them first.
///
/// A caller that waits without a limit runs the job itself: a thread of its own would cost two hops, 10 µs a step. The
/// runner thread, started when first needed, takes jobs that no one is about to wait for: when the ticket before has
/// not been waited for (several are in flight), when a wait has a limit (which running the job could overshoot), and
/// when the last wait came late (`patience`), so that a caller with other work between run and wait gets its steps done
/// meanwhile.
final class TicketQueue {
  protocol Job: AnyObject {
    func execute(steps: Int) throws(LaunchError)
  }

  private struct Entry {
    let job: any Job
    let steps: Int
    let ticket: UInt64
  }

  static let capacity = 1024  // jobs waiting to start
  /// Nanoseconds between run and wait within which the waiter is expected to run the job: a few times what Python needs
  /// from one call to the next, and less than a thread hop is worth.
  private static let patience: Int64 = 50_000

  private let lock = Lock()
  private let finished = Condition()  // a job has finished, or the queue has closed
  private let wanted = Condition()  // the runner is wanted, or the queue has closed
  private var entries: [Entry] = []
  private var failures: [UInt64: LaunchError] = [:]
  private var lastQueued: UInt64 = 0
  private var lastQueuedAt: Int64 = 0
  private var lastWaited: UInt64 = 0
  private var lastFinished: UInt64 = 0
  private var isBusy = false  // some thread is running a job, or has the queue for itself
  private var isClosed = false
  private var wakesAt = UInt64.max  // the lowest ticket that a sleeper waits for; 0: whatever happens next
  private var waitsComeLate = false
  private var isRunnerWanted = false
  private var runner: pthread_t?

  /// Queues the job and returns its ticket; tickets count from 1.
  func run(_ job: any Job, steps: Int) throws(LaunchError) -> UInt64 {
    lock.lock()
    defer { lock.unlock() }
    try checkOpen()
    guard entries.count < Self.capacity else {
      throw .argument("run: \(Self.capacity) runs are queued on this device; wait for one of them first")
    }
    lastQueued += 1
    lastQueuedAt = MonotonicClock.now()
    if waitsComeLate || lastWaited + 1 < lastQueued { try wantRunner() }
    entries.append(Entry(job: job, steps: steps, ticket: lastQueued))
    return lastQueued
  }

  /// See `Device.wait`.
  func wait(for ticket: UInt64, timeout: Int64?) throws(LaunchError) {
    lock.lock()
    defer { lock.unlock() }
    guard ticket >= 1, ticket <= lastQueued else {
      throw .argument("wait: ticket \(ticket) is not one of this device's, which has given out \(lastQueued)")
    }
    if ticket == lastQueued, ticket > lastWaited { waitsComeLate = MonotonicClock.now() - lastQueuedAt > Self.patience }
    lastWaited = max(lastWaited, ticket)
    let deadline = timeout.map { limit in
      let (sum, overflow) = MonotonicClock.now().addingReportingOverflow(limit)
      return overflow ? Int64.max : sum
    }
    while lastFinished < ticket {
      try checkOpen()
      if let deadline {
        guard MonotonicClock.now() < deadline else {
          if !isBusy { try wantRunner() }
          throw .timeout("wait: ticket \(ticket) has not finished in time; wait for it again")
        }
        if !isBusy { try wantRunner() }
        wakesAt = min(wakesAt, ticket)
        finished.wait(lock, until: deadline)
      } else if isBusy || isRunnerWanted {
        wakesAt = min(wakesAt, ticket)
        finished.wait(lock)
      } else {
        runFirst()
      }
    }
    if let failure = failures.removeValue(forKey: ticket) { throw failure }
  }

  /// Runs `body` when all queued jobs are done, with no job beside it.
  func exclusively(_ body: () -> Void) throws(LaunchError) {
    lock.lock()
    defer { lock.unlock() }
    while isBusy || !entries.isEmpty {
      try checkOpen()
      if isBusy {
        wakesAt = 0
        finished.wait(lock)
      } else {
        runFirst()
      }
    }
    try checkOpen()
    isBusy = true
    lock.unlock()
    body()
    lock.lock()
    becomeIdle()
  }

  /// Returns when no job is running; queued ones are dropped. Everything after it throws. Not to be called by a job.
  func close() {
    lock.lock()
    isClosed = true
    entries.removeAll()
    finished.broadcast()
    wanted.broadcast()
    while isBusy {
      wakesAt = 0
      finished.wait(lock)
    }
    let thread = runner
    runner = nil
    lock.unlock()
    if let thread { pthread_join(thread, nil) }
  }

  private func checkOpen() throws(LaunchError) {
    if isClosed { throw .argument("the device is closed; open it again") }
  }

  /// Takes the first entry and runs it without the lock. Called with the lock held, idle and not empty.
  private func runFirst() {
    let entry = entries.removeFirst()
    isBusy = true
    lock.unlock()
    var failure: LaunchError?
    do throws(LaunchError) { try entry.job.execute(steps: entry.steps) } catch { failure = error }
    lock.lock()
    lastFinished = entry.ticket
    if let failure { failures[entry.ticket] = failure }
    becomeIdle()
  }

  /// Sleepers are left alone until there is something for them: awake for each job, they would take a processor from the
  /// pool. One that finds the next job unclaimed runs it.
  private func becomeIdle() {
    isBusy = false
    if lastFinished >= wakesAt || (!entries.isEmpty && !isRunnerWanted) {
      wakesAt = .max
      finished.broadcast()
    }
    if isRunnerWanted { wanted.signal() }
  }

  /// Makes the runner take what is queued, until nothing is. Called with the lock held.
  private func wantRunner() throws(LaunchError) {
    isRunnerWanted = true
    if runner == nil { runner = try startRunner() }
    wanted.signal()
  }

  private func startRunner() throws(LaunchError) -> pthread_t {
    // Signals belong to the threads of the host program: Python's main thread must be the one they interrupt.
    var all = sigset_t()
    var before = sigset_t()
    sigfillset(&all)
    pthread_sigmask(SIG_BLOCK, &all, &before)
    defer { pthread_sigmask(SIG_SETMASK, &before, nil) }
    #if canImport(Darwin)
    var thread: pthread_t?
    #else
    var thread = pthread_t()
    #endif
    let queue = Unmanaged.passRetained(self)  // the thread's own reference, taken over by serve()
    let result = pthread_create(
      &thread, nil,
      { context in
        #if canImport(Darwin)
        let queue = Unmanaged<TicketQueue>.fromOpaque(context)
        #else
        let queue = Unmanaged<TicketQueue>.fromOpaque(context!)
        #endif
        queue.takeRetainedValue().serve()
        return nil
      }, queue.toOpaque())
    guard result == 0 else {
      queue.release()
      throw .memory("the thread that runs queued plans cannot be started: \(String(cString: strerror(result)))")
    }
    #if canImport(Darwin)
    return thread!
    #else
    return thread
    #endif
  }

  /// The runner thread: runs entries while it is wanted, else sleeps.
  private func serve() {
    lock.lock()
    while !isClosed {
      if entries.isEmpty { isRunnerWanted = false }
      if isRunnerWanted && !isBusy { runFirst() } else { wanted.wait(lock) }
    }
    lock.unlock()
  }
}
