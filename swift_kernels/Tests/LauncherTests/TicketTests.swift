import XCTest

@testable import Launcher

final class TicketTests: XCTestCase {
  private final class Job: TicketQueue.Job, @unchecked Sendable {
    var done: [Int] = []
    var failure: LaunchError?

    func execute(steps: Int) throws(LaunchError) {
      done.append(steps)
      if let failure { throw failure }
    }
  }

  private func error(of body: () throws(LaunchError) -> Void) -> LaunchError? {
    do throws(LaunchError) {
      try body()
      return nil
    } catch { return error }
  }

  func testTicketsThatWereNeverGivenOut() throws {
    for name in Caller.names {
      let device = try Caller(name)
      let plan = try XCTUnwrap(device.plan([]).plan)
      for ticket in [0, 1, UInt64.max] { XCTAssertEqual(device.wait(ticket, nanoseconds: 0), argument) }
      var ticket: UInt64 = 0
      XCTAssertEqual(planRun(plan, 1, &ticket), ok)
      XCTAssertEqual(device.wait(ticket, nanoseconds: Int64.max), ok)
      XCTAssertEqual(device.wait(ticket, nanoseconds: Int64.min), ok)
      XCTAssertEqual(device.wait(ticket + 1), argument)
    }
  }

  func testMetalTicketsFinishInOrderWhateverCompletesFirst() throws {
    let tickets = MetalTickets()
    let (first, second) = (tickets.issue(count: 2), tickets.issue(count: 1))
    tickets.complete(second, failure: nil)
    tickets.complete(first, failure: nil)
    for ticket in [first, second] {
      XCTAssertEqual(error { () throws(LaunchError) in try tickets.wait(for: ticket, timeout: 0) }?.code, timeout)
    }
    tickets.complete(first, failure: nil)
    try tickets.wait(for: second, timeout: 0)
    tickets.waitForAll()
  }

  func testTheFirstFailureOfATicketIsToldOnce() throws {
    let tickets = MetalTickets()
    let ticket = tickets.issue(count: 3)
    tickets.complete(ticket, failure: nil)
    tickets.complete(ticket, failure: .device("first"))
    tickets.complete(ticket, failure: .device("second"))
    XCTAssertEqual(error { () throws(LaunchError) in try tickets.wait(for: ticket, timeout: nil) }?.text, "first")
    try tickets.wait(for: ticket, timeout: nil)
  }

  func testMetalTicketsWakeThoseThatWait() {
    let tickets = MetalTickets()
    let count = 200
    let issued = (0..<count).map { _ in tickets.issue(count: 1) }
    DispatchQueue.concurrentPerform(iterations: 4) { thread in
      if thread < 2 {
        for ticket in issued.reversed() where Int(ticket) % 2 == thread { tickets.complete(ticket, failure: nil) }
      } else {
        for ticket in issued {
          XCTAssertNil(self.error { () throws(LaunchError) in try tickets.wait(for: ticket, timeout: nil) })
        }
      }
    }
  }

  func testQueuedJobsRunInOrder() throws {
    let queue = TicketQueue()
    let job = Job()
    let tickets = try (1...5).map { try queue.run(job, steps: $0) }
    XCTAssertEqual(tickets, [1, 2, 3, 4, 5])
    try queue.wait(for: 5, timeout: nil)
    XCTAssertEqual(job.done, [1, 2, 3, 4, 5])
    job.failure = .device("job")
    let ticket = try queue.run(job, steps: 1)
    XCTAssertEqual(error { () throws(LaunchError) in try queue.wait(for: ticket, timeout: nil) }?.text, "job")
    try queue.wait(for: ticket, timeout: nil)
    queue.close()
    XCTAssertEqual(error { () throws(LaunchError) in _ = try queue.run(job, steps: 1) }?.code, argument)
  }

  func testAClosedQueueDropsWhatHasNotBegun() throws {
    let queue = TicketQueue()
    let job = Job()
    let ticket = try queue.run(job, steps: 1)
    queue.close()
    queue.close()
    XCTAssertEqual(error { () throws(LaunchError) in try queue.wait(for: ticket, timeout: nil) }?.code, argument)
    XCTAssertEqual(error { () throws(LaunchError) in try queue.exclusively {} }?.code, argument)
    XCTAssertEqual(job.done, [])
  }
}
