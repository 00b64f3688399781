/// The objects that C callers hold, by handle.
///
/// A handle is a number, not an address: slot, generation and kind. A stale handle, one of another kind or a wild one
/// is found out by comparing numbers, so no memory is read on a caller's word.
final class HandleTable<Object: AnyObject> {
  private struct Slot {
    var object: Object?
    var generation: UInt32
  }

  private let kind: UInt
  private let lock = Lock()
  private var slots: [Slot] = []
  private var free: [Int] = []

  /// - Parameter kind: from 1 to 15, different for each table.
  init(kind: UInt) { self.kind = kind }

  func insert(_ object: Object) -> UnsafeMutableRawPointer {
    lock.lock()
    defer { lock.unlock() }
    let index: Int
    if let reused = free.popLast() {
      index = reused
      slots[index].object = object
    } else {
      index = slots.count
      slots.append(Slot(object: object, generation: 1))
    }
    // Not zero, since kind is not.
    return UnsafeMutableRawPointer(bitPattern: UInt(slots[index].generation) << 32 | UInt(index) << 4 | kind)!
  }

  func find(_ handle: UnsafeMutableRawPointer?) -> Object? {
    lock.lock()
    defer { lock.unlock() }
    return slot(of: handle).flatMap { slots[$0].object }
  }

  /// The object behind `handle`, which is no longer valid afterwards; nil when it was not.
  @discardableResult func remove(_ handle: UnsafeMutableRawPointer?) -> Object? {
    lock.lock()
    defer { lock.unlock() }
    return slot(of: handle).flatMap { clear($0) }
  }

  func removeAll(where condition: (Object) -> Bool) -> [Object] {
    lock.lock()
    defer { lock.unlock() }
    return slots.indices.compactMap { index in
      slots[index].object.map(condition) == true ? clear(index) : nil
    }
  }

  private func slot(of handle: UnsafeMutableRawPointer?) -> Int? {
    let bits = UInt(bitPattern: handle)
    let index = Int(bits >> 4 & 0xFFF_FFFF)
    guard bits & 15 == kind, index < slots.count, slots[index].generation == UInt32(bits >> 32) else { return nil }
    return index
  }

  private func clear(_ index: Int) -> Object? {
    guard let object = slots[index].object else { return nil }
    slots[index].object = nil
    slots[index].generation &+= 1
    free.append(index)
    return object
  }
}
