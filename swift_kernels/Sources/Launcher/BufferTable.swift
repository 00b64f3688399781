/// A device's buffers by id. Ids are not used twice, so that a destroyed buffer's id stays unknown.
struct BufferTable {
  private var buffers: [Int32: any DeviceBuffer] = [:]
  private var next: Int32 = 0

  subscript(id: Int32) -> (any DeviceBuffer)? { buffers[id] }

  mutating func insert(_ buffer: any DeviceBuffer) throws(LaunchError) -> Int32 {
    guard next < Int32.max else { throw .memory("buffer: the device has used up its buffer ids; open it again") }
    defer { next += 1 }
    buffers[next] = buffer
    return next
  }

  /// The buffer, if there was such a one. Its memory is freed when nobody refers to it.
  mutating func remove(_ id: Int32) -> (any DeviceBuffer)? { buffers.removeValue(forKey: id) }

  mutating func removeAll() { buffers.removeAll() }
}
