import CCuda

/// The runs of a CUDA device in the order in which they were queued, each with an event behind it.
///
/// Nobody waits for the GPU but the callers of `wait`; what a run uses is held until its ticket is known to be finished.
final class CudaTickets: @unchecked Sendable {
  private struct Run {
    let event: CudaEvent
    let plan: CudaPlan
  }

  private let context: CudaContext
  private let lock = Lock()
  private var runs: [Run] = []  // of the tickets after `lastFinished`, in order
  private var lastFinished: UInt64 = 0  // with all before it
  private var spare: [CudaEvent] = []
  private var isClosed = false
  private var end: LaunchError?  // of runs that had not ended when the device was closed

  init(_ context: CudaContext) {
    self.context = context
    context.work = { [weak self] in self?.work }
  }

  /// Queues runs of a plan by `enqueue` and gives them a ticket. With the context current.
  func issue(_ plan: CudaPlan, enqueue: () throws(LaunchError) -> Void) throws(LaunchError) -> UInt64 {
    context.submission.lock()
    defer { context.submission.unlock() }
    guard !isClosed else { throw .argument("this device is closed; open it again") }
    let event = try takeEvent()
    try enqueue()
    try event.record()
    lock.lock()
    defer { lock.unlock() }
    runs.append(Run(event: event, plan: plan))
    return lastFinished + UInt64(runs.count)
  }

  /// See `Device.wait`.
  func wait(for ticket: UInt64, timeout: Int64?) throws(LaunchError) {
    guard let code = try result(of: ticket, timeout: timeout) else { return }
    if code == MS_CUDA_NOT_READY {
      throw .timeout("wait: ticket \(ticket) has not finished in time; wait for it again")
    }
    guard code == 0 else { throw context.failure(code, "run") }
    release(through: ticket)
  }

  /// What the run's event gives, at the latest when the time is over; nil when the run is known to be finished.
  private func result(of ticket: UInt64, timeout: Int64?) throws(LaunchError) -> Int32? {
    guard let event = try event(of: ticket) else { return nil }
    let deadline = timeout.map { limit in
      let (sum, overflow) = MonotonicClock.now().addingReportingOverflow(limit)
      return overflow ? Int64.max : sum
    }
    return try context.enter { () throws(LaunchError) in event.wait(until: deadline) }
  }

  /// Returns when every run has ended, well or not; no run is queued behind it. Runs are let go of where the GPU has failed,
  /// too: they refer to their plans, which refer to this.
  func close() {
    context.submission.lock()
    isClosed = true
    context.submission.unlock()
    var ended: Int32 = 0
    let entered = context.leave { ended = context.driver.functions.cuStreamSynchronize(context.stream) }
    let code = entered == 0 ? ended : entered
    let failure = code == 0 ? nil : context.failure(code, "close")
    lock.lock()
    end = failure
    let held = (runs, spare)
    lastFinished += UInt64(runs.count)
    runs = []
    spare = []
    lock.unlock()
    withExtendedLifetime(held) {}  // freed without the lock
  }

  /// nil when it is known to be finished.
  private func event(of ticket: UInt64) throws(LaunchError) -> CudaEvent? {
    lock.lock()
    defer { lock.unlock() }
    if let end { throw end }
    guard ticket >= 1, ticket <= lastFinished + UInt64(runs.count) else {
      throw .argument(
        "wait: ticket \(ticket) is not one of this device's, which has given out \(lastFinished + UInt64(runs.count))")
    }
    return ticket <= lastFinished ? nil : runs[Int(ticket - lastFinished) - 1].event
  }

  /// An event that is not in use. Runs that nobody waits for are looked at here, so that they do not pile up.
  private func takeEvent() throws(LaunchError) -> CudaEvent {
    if let ticket = finishedFirst() { release(through: ticket) }
    lock.lock()
    let event = spare.popLast()
    lock.unlock()
    if let event { return event }
    return try CudaEvent(context)
  }

  /// The ticket of the first run, if it has finished.
  private func finishedFirst() -> UInt64? {
    lock.lock()
    let event = runs.first?.event
    let ticket = lastFinished + 1
    lock.unlock()
    return event?.query() == 0 ? ticket : nil
  }

  /// The runs up to this one are finished.
  private func release(through ticket: UInt64) {
    lock.lock()
    guard ticket > lastFinished else { return lock.unlock() }
    var ended = Array(runs.prefix(Int(ticket - lastFinished)))
    runs.removeFirst(ended.count)
    lastFinished = ticket
    lock.unlock()
    // A wait of another thread may still look at an event; and plans are freed without the lock.
    var free: [CudaEvent] = []
    while var run = ended.popLast()?.event { if isKnownUniquelyReferenced(&run) { free.append(run) } }
    lock.lock()
    spare += free
    lock.unlock()
  }

  /// The kernels of the first run that has not ended; the GPU does not say which of its launches fails.
  private var work: String? {
    lock.lock()
    let plan = runs.first?.plan
    lock.unlock()
    return plan?.kernelNames
  }
}
