#if canImport(Metal)
import Metal
#else
import MetalSim
#endif

/// Memory that the GPU and the host share, resident on the GPU while it exists.
final class MetalBuffer: DeviceBuffer {
  let buffer: any MTLBuffer
  let bytes: Int
  let isReadOnly: Bool
  private let residency: (any MetalResidency)?
  private let memory: HostBuffer?

  /// Bytes from which on a buffer is the process's own zeroed pages: to write zeros into a KV cache of gigabytes would
  /// take seconds.
  private static let ownPages = 64 << 20

  /// - Throws: `LaunchError.memory`.
  init(_ device: any MTLDevice, bytes: Int, residency: (any MetalResidency)?) throws(LaunchError) {
    // Metal tracks which commands write it, so that one step follows the other without an event between them.
    let memory = bytes < Self.ownPages || bytes > device.maxBufferLength ? nil : try HostBuffer(bytes: bytes)
    let made: (any MTLBuffer)?
    if let memory {
      made = device.makeBuffer(
        bytesNoCopy: memory.contents, length: HostBuffer.wholePages(bytes), options: .storageModeShared,
        deallocator: nil)
    } else {
      made = device.makeBuffer(length: max(bytes, 1), options: .storageModeShared)
    }
    guard bytes <= device.maxBufferLength, let buffer = made else {
      throw .memory(
        "buffer: \(device.name) cannot give \(bytes) bytes; a buffer has at most \(device.maxBufferLength), and all of "
          + "them together \(device.recommendedMaxWorkingSetSize), of which \(device.currentAllocatedSize) are taken")
    }
    self.buffer = buffer
    self.bytes = bytes
    self.residency = residency
    self.memory = memory
    isReadOnly = false
    // Metal does not say what a new buffer holds.
    if memory == nil { buffer.contents().initializeMemory(as: UInt8.self, repeating: 0, count: bytes) }
    residency?.add(buffer)
  }

  /// The caller's memory; `address` is a multiple of `page`.
  ///
  /// - Throws: `LaunchError.memory`, for the caller to copy instead.
  init(
    wrapping address: UnsafeMutableRawPointer, bytes: Int, page: Int, device: any MTLDevice,
    residency: (any MetalResidency)?
  ) throws(LaunchError) {
    let length = (bytes + page - 1) / page * page  // Metal maps whole pages only
    guard length <= device.maxBufferLength else {
      throw .memory(
        "buffer: \(device.name) wraps at most \(device.maxBufferLength) bytes, not \(length); copy them into "
          + "several buffers")
    }
    guard
      let buffer = device.makeBuffer(
        bytesNoCopy: address, length: length, options: .storageModeShared, deallocator: nil)
    else { throw .memory("buffer: \(device.name) cannot wrap \(length) bytes at \(address); copy them into a buffer") }
    self.buffer = buffer
    self.bytes = bytes
    self.residency = residency
    memory = nil
    isReadOnly = true
    residency?.add(buffer)
  }

  deinit { residency?.remove(buffer) }

  var contents: UnsafeMutableRawPointer { buffer.contents() }
}
