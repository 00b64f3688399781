#if canImport(Metal)
import Metal
#else
import MetalSim
#endif

/// Keeps buffers resident on the GPU, so that Metal need not see to it for each of them in every step. Methods may be
/// called from any thread.
protocol MetalResidency: AnyObject {
  /// From the next `commit` on.
  func add(_ buffer: any MTLBuffer)
  func remove(_ buffer: any MTLBuffer)
  /// Makes what was added resident, before the commands that use it are committed.
  func commit()
  /// Gives everything up; calls after it do nothing.
  func end()
}

/// One residency set for all buffers of a device. Before macOS 15 there is none, and Metal does it step by step.
@available(macOS 15, *)
final class MetalResidencySet: MetalResidency {
  private let queue: any MTLCommandQueue
  private let set: any MTLResidencySet
  private let limit: UInt64  // bytes
  private let lock = Lock()
  private var members: Set<ObjectIdentifier> = []
  private var bytes: UInt64 = 0
  private var isChanged = false
  private var isEnded = false

  /// nil when Metal gives none: its commands work without.
  ///
  /// - Parameter limit: bytes that the set holds at most. Memory in a set is wired, and more than the GPU should have
  ///   takes it from everything else; buffers beyond are left to Metal.
  init?(_ device: any MTLDevice, queue: any MTLCommandQueue, limit: UInt64) {
    let descriptor = MTLResidencySetDescriptor()
    descriptor.label = "metalstep"
    guard let set = try? device.makeResidencySet(descriptor: descriptor) else { return nil }
    queue.addResidencySet(set)
    self.queue = queue
    self.set = set
    self.limit = limit
  }

  func add(_ buffer: any MTLBuffer) {
    lock.lock()
    defer { lock.unlock() }
    guard !isEnded, bytes + UInt64(buffer.length) <= limit else { return }
    set.addAllocation(buffer)
    members.insert(ObjectIdentifier(buffer))
    bytes += UInt64(buffer.length)
    isChanged = true
  }

  func remove(_ buffer: any MTLBuffer) {
    lock.lock()
    defer { lock.unlock() }
    guard !isEnded, members.remove(ObjectIdentifier(buffer)) != nil else { return }
    bytes -= UInt64(buffer.length)
    set.removeAllocation(buffer)
    set.commit()  // the set keeps the memory until then
  }

  func commit() {
    lock.lock()
    defer { lock.unlock() }
    guard !isEnded, isChanged else { return }
    isChanged = false
    set.commit()
    set.requestResidency()
  }

  func end() {
    lock.lock()
    defer { lock.unlock() }
    guard !isEnded else { return }
    isEnded = true
    queue.removeResidencySet(set)
    set.endResidency()
    set.removeAllAllocations()
    set.commit()
  }
}
