import CMetalSim
import Glibc

final class SimBuffer: MTLBuffer {
  let length: Int
  var label: String?
  private let device: SimDevice
  private let memory: UnsafeMutableRawPointer
  private let deallocator: (UnsafeMutableRawPointer, Int) -> Void

  init?(length: Int, device: SimDevice) {
    guard length > 0, let memory = sim_memory_allocate(length) else { return nil }
    self.length = length
    self.device = device
    self.memory = memory
    deallocator = { memory, _ in sim_memory_free(memory) }
    memset(memory, 0xff, length)  // what Metal leaves there is nobody's business: NaN
    device.allocate(length)
  }

  /// nil for memory that is not whole pages, of this machine's size.
  init?(
    wrapping memory: UnsafeMutableRawPointer, length: Int,
    deallocator: (@Sendable (UnsafeMutableRawPointer, Int) -> Void)?, device: SimDevice
  ) {
    let page = sysconf(Int32(_SC_PAGESIZE))
    guard length > 0, length % page == 0, UInt(bitPattern: memory) % UInt(page) == 0 else { return nil }
    self.length = length
    self.device = device
    self.memory = memory
    self.deallocator = deallocator ?? { _, _ in }
    device.allocate(length)
  }

  deinit {
    device.allocate(-length)
    deallocator(memory, length)
  }

  var allocatedSize: Int { length }

  func contents() -> UnsafeMutableRawPointer { memory }
}
