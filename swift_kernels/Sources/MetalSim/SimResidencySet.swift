/// What would be resident. Its caller guards it with a lock.
final class SimResidencySet: MTLResidencySet {
  private let log: SimLog?
  private var pending: [ObjectIdentifier: any MTLAllocation] = [:]
  private var committed: [ObjectIdentifier: any MTLAllocation] = [:]
  private var isRequested = false

  init(log: SimLog?) { self.log = log }

  var allocationCount: Int { pending.count }
  var allocatedSize: UInt64 { committed.values.reduce(0) { $0 + UInt64($1.allocatedSize) } }

  func addAllocation(_ allocation: any MTLAllocation) { pending[ObjectIdentifier(allocation)] = allocation }
  func removeAllocation(_ allocation: any MTLAllocation) { pending[ObjectIdentifier(allocation)] = nil }
  func removeAllAllocations() { pending.removeAll() }

  func commit() {
    committed = pending
    log?.write("residency commit \(committed.count) \(allocatedSize)")
  }

  func requestResidency() {
    isRequested = true
    log?.write("residency request \(committed.count) \(allocatedSize)")
  }

  func endResidency() {
    isRequested = false
    log?.write("residency end")
  }
}
