#if canImport(Metal)
import Metal
#else
import MetalSim
#endif

/// Memory that the GPU and the host share.
final class MetalBuffer: DeviceBuffer {
  let buffer: any MTLBuffer
  let bytes: Int

  init(_ device: any MTLDevice, bytes: Int) throws(LaunchError) {
    guard bytes <= device.maxBufferLength,
      let buffer = device.makeBuffer(length: max(bytes, 1), options: .storageModeShared)
    else {
      throw .memory("buffer: \(device.name) cannot give \(bytes) bytes; a buffer has at most \(device.maxBufferLength)")
    }
    self.buffer = buffer
    self.bytes = bytes
    // Metal does not say what a new buffer holds.
    buffer.contents().initializeMemory(as: UInt8.self, repeating: 0, count: bytes)
  }

  var contents: UnsafeMutableRawPointer { buffer.contents() }
}
