/// Counts the command buffers of each run until the last one has completed.
///
/// Unlike `TicketQueue` it runs nothing: Metal's own queue does, and calls back on a thread of its own.
final class MetalTickets: @unchecked Sendable {
  private let lock = Lock()
  private let finished = Condition()
  private var left: [UInt64: Int] = [:]  // command buffers not yet completed, by ticket
  private var failures: [UInt64: LaunchError] = [:]
  private var last: UInt64 = 0
  private var lastFinished: UInt64 = 0  // with all before it

  /// A ticket that is finished by `count` calls of `complete`.
  func issue(count: Int) -> UInt64 {
    lock.lock()
    defer { lock.unlock() }
    last += 1
    left[last] = count
    return last
  }

  /// One command buffer of the ticket has ended; the first failure is the one that is told.
  func complete(_ ticket: UInt64, count: Int = 1, failure: LaunchError?) {
    lock.lock()
    defer { lock.unlock() }
    if let failure, failures[ticket] == nil { failures[ticket] = failure }
    left[ticket]! -= count
    while left[lastFinished + 1] == 0 {
      lastFinished += 1
      left[lastFinished] = nil
    }
    finished.broadcast()
  }

  /// See `Device.wait`.
  func wait(for ticket: UInt64, timeout: Int64?) throws(LaunchError) {
    lock.lock()
    defer { lock.unlock() }
    guard ticket >= 1, ticket <= last else {
      throw .argument("wait: ticket \(ticket) is not one of this device's, which has given out \(last)")
    }
    let deadline = timeout.map { limit in
      let (sum, overflow) = MonotonicClock.now().addingReportingOverflow(limit)
      return overflow ? Int64.max : sum
    }
    while lastFinished < ticket {
      guard let deadline else {
        finished.wait(lock)
        continue
      }
      guard MonotonicClock.now() < deadline else {
        throw .timeout("wait: ticket \(ticket) has not finished in time; wait for it again")
      }
      finished.wait(lock, until: deadline)
    }
    if let failure = failures.removeValue(forKey: ticket) { throw failure }
  }

  /// Returns when every ticket is finished.
  func waitForAll() {
    lock.lock()
    defer { lock.unlock() }
    while lastFinished < last { finished.wait(lock) }
  }
}
