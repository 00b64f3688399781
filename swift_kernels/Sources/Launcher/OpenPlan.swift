import CMetalStep

/// A plan behind a handle, and the checks of a call on it.
final class OpenPlan {
  static let handles = HandleTable<OpenPlan>(kind: 2)
  /// Steps of one run. A run cannot be interrupted, so a mistyped count must not keep a process busy for days.
  static let maxSteps: UInt32 = 65_536

  let device: OpenDevice
  private let plan: any DevicePlan

  init(_ plan: any DevicePlan, device: OpenDevice) {
    self.plan = plan
    self.device = device
  }

  static func find(_ handle: UnsafeMutableRawPointer?) throws(LaunchError) -> OpenPlan {
    guard let plan = handles.find(handle) else {
      throw .argument("this plan does not exist: it was destroyed, or its device closed, or the handle is not a plan's")
    }
    return plan
  }

  func run(steps: UInt32, ticket: UnsafeMutablePointer<UInt64>?) throws(LaunchError) {
    guard let ticket else { throw .missing("ticket") }
    guard steps >= 1, steps <= Self.maxSteps else {
      throw .argument("run: steps is \(steps), expected 1 to \(Self.maxSteps)")
    }
    ticket.pointee = try plan.run(steps: Int(steps))
  }

  func limit(threads: Int32) throws(LaunchError) { try plan.limit(threads: threads) }

  func profile(_ nanoseconds: UnsafeMutablePointer<UInt64>?) throws(LaunchError) {
    guard let nanoseconds else { throw .missing("nanoseconds") }
    try plan.profile(into: nanoseconds)
  }
}
