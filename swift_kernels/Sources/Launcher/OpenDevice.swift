import CKernels
import CMetalStep

#if canImport(Darwin)
import Darwin
#else
import Glibc
#endif

/// A device behind a handle: its buffers by id, and the checks that do not depend on the kind of device.
final class OpenDevice {
  static let handles = HandleTable<OpenDevice>(kind: 1)
  private static let packAlignment: UInt64 = 64  // bytes: a panel's lines are read with aligned loads

  private let device: any Device
  private let lock = Lock()
  private var buffers = BufferTable()
  private var isClosed = false

  private init(_ device: any Device) { self.device = device }

  // MARK: Devices

  static func open(
    name: UnsafePointer<CChar>?, threads: Int32, handle: UnsafeMutablePointer<UnsafeMutableRawPointer?>?
  ) throws(LaunchError) {
    guard let name else { throw .missing("name") }
    guard let handle else { throw .missing("device") }
    let device: any Device
    switch String(cString: name) {
    case "host": device = try HostDevice(threads: threads)
    #if canImport(Metal)
    case "metal": device = try MetalDevice(name: "metal", threads: threads)
    case "metal-sim":
      throw .argument("device: \"metal-sim\" is for machines without Metal, and this one has it; open \"metal\"")
    #else
    case "metal-sim": device = try MetalDevice(name: "metal-sim", threads: threads)
    case "metal":
      throw .device(
        "metal: this machine has no Metal device; use device \"metal-sim\", which runs the same shaders on the CPU, slowly, "
          + "or \"host\"")
    #endif
    case let other where CudaDevice.isName(other): device = try CudaDevice(name: other, threads: threads)
    case let other:
      throw .argument("device: \"\(other)\" is unknown, expected \"host\", \"metal\", \"metal-sim\" or \"cuda\"")
    }
    handle.pointee = handles.insert(OpenDevice(device))
  }

  static func find(_ handle: UnsafeMutableRawPointer?) throws(LaunchError) -> OpenDevice {
    guard let device = handles.find(handle) else {
      throw .argument("this device does not exist: it was closed, or the handle is not a device's")
    }
    return device
  }

  /// Closing what is not open does nothing.
  static func close(_ handle: UnsafeMutableRawPointer?) {
    handles.remove(handle)?.close()
  }

  private func close() {
    lock.lock()
    isClosed = true
    lock.unlock()
    device.close()
    let plans = OpenPlan.handles.removeAll { $0.device === self }
    lock.lock()
    buffers.removeAll()
    lock.unlock()
    withExtendedLifetime(plans) {}
  }

  func writeInfo(_ info: UnsafeMutablePointer<MSDeviceInfo>?) throws(LaunchError) {
    guard let info else { throw .missing("info") }
    info.pointee = device.info
    info.pointee.unified = device.isUnified ? 1 : 0
  }

  // MARK: Buffers

  func createBuffer(bytes: UInt64, memory: UInt32, id: UnsafeMutablePointer<Int32>?) throws(LaunchError) {
    guard let id else { throw .missing("buffer") }
    guard memory <= MS_MEMORY_DEVICE.rawValue else {
      throw .argument("buffer: memory is \(memory), expected 0 (shared) or 1 (the device's own)")
    }
    guard let bytes = Int(exactly: bytes) else {
      throw .memory("buffer: \(bytes) bytes are more than a machine can address")
    }
    let buffer = try device.makeBuffer(bytes: bytes, memory: ms_memory(memory))
    id.pointee = try locked { () throws(LaunchError) in try buffers.insert(buffer) }
  }

  func wrapBuffer(
    _ address: UnsafeMutableRawPointer?, bytes: UInt64, id: UnsafeMutablePointer<Int32>?
  ) throws(LaunchError) {
    guard let id else { throw .missing("buffer") }
    guard let address else { throw .missing("address") }
    let page = UInt64(getpagesize())
    guard UInt64(UInt(bitPattern: address)) % page == 0 else {
      throw .argument(
        "buffer: address \(address) is not a multiple of the page of \(page) bytes; wrap the whole mapping and "
          + "bind offsets")
    }
    guard bytes > 0 else { throw .argument("buffer: 0 bytes to wrap, expected 1 or more") }
    let (end, overflow) = UInt64(UInt(bitPattern: address)).addingReportingOverflow(bytes)
    guard !overflow, end <= UInt64(Int.max) - page else {
      throw .argument("buffer: \(bytes) bytes from address \(address) on are more than a machine can address")
    }
    let buffer = try device.wrapBuffer(address, bytes: Int(bytes))
    id.pointee = try locked { () throws(LaunchError) in try buffers.insert(buffer) }
  }

  func contents(of id: Int32) throws(LaunchError) -> UnsafeMutableRawPointer {
    let buffer = try buffer(id)
    guard buffer.isVisible else {
      throw .argument("buffer \(id) is the device's own memory, which the host does not see; write and read it by calls")
    }
    return buffer.contents
  }

  func write(_ data: UnsafeRawPointer?, to id: Int32, offset: UInt64, bytes: UInt64) throws(LaunchError) {
    let target = try region(of: id, offset: offset, bytes: bytes, isWritten: true)
    guard bytes > 0 else { return }
    guard let data else { throw .missing("data") }
    try device.write(UnsafeRawBufferPointer(start: data, count: Int(bytes)), to: target)
  }

  func read(_ data: UnsafeMutableRawPointer?, from id: Int32, offset: UInt64, bytes: UInt64) throws(LaunchError) {
    let source = try region(of: id, offset: offset, bytes: bytes, isWritten: false)
    guard bytes > 0 else { return }
    guard let data else { throw .missing("data") }
    try device.read(source, into: UnsafeMutableRawBufferPointer(start: data, count: Int(bytes)))
  }

  func copy(from: Int32, offset fromOffset: UInt64, to: Int32, offset toOffset: UInt64, bytes: UInt64) throws(LaunchError) {
    let source = try region(of: from, offset: fromOffset, bytes: bytes, isWritten: false)
    let target = try region(of: to, offset: toOffset, bytes: bytes, isWritten: true)
    guard bytes > 0 else { return }
    try device.copy(source, to: target, bytes: Int(bytes))
  }

  /// `bytes` bytes of a buffer from `offset` on, which are there.
  private func region(of id: Int32, offset: UInt64, bytes: UInt64, isWritten: Bool) throws(LaunchError) -> DeviceRegion {
    let buffer = try buffer(id)
    guard !isWritten || !buffer.isReadOnly else {
      throw .argument("buffer \(id) is wrapped memory, which is only read")
    }
    let (end, overflow) = offset.addingReportingOverflow(bytes)
    guard !overflow, end <= UInt64(buffer.bytes) else {
      throw .argument("buffer \(id): \(bytes) bytes at offset \(offset) do not fit; it has \(buffer.bytes)")
    }
    return DeviceRegion(buffer: buffer, offset: Int(offset))
  }

  func destroyBuffer(_ id: Int32) throws(LaunchError) {
    // Freed without the lock: a GPU may have to end what it does first.
    guard let buffer = try locked({ () throws(LaunchError) in buffers.remove(id) }) else { throw .unknownBuffer(id) }
    withExtendedLifetime(buffer) {}
  }

  private func buffer(_ id: Int32) throws(LaunchError) -> any DeviceBuffer {
    guard let buffer = try locked({ () throws(LaunchError) in buffers[id] }) else { throw .unknownBuffer(id) }
    return buffer
  }

  // MARK: Kernels and plans

  func addLibrary(_ source: UnsafePointer<CChar>?) throws(LaunchError) {
    guard let source else { throw .missing("source") }
    try checkOpen()
    try device.addLibrary(source: String(cString: source))
  }

  func findKernel(_ name: UnsafePointer<CChar>?, id: UnsafeMutablePointer<Int32>?) throws(LaunchError) {
    guard let name else { throw .missing("name") }
    guard let id else { throw .missing("kernel") }
    try checkOpen()
    id.pointee = try device.findKernel(name: String(cString: name))
  }

  func createPlan(
    launches: UnsafePointer<MSLaunch>?, _ launchCount: UInt32, binds: UnsafePointer<MSBind>?, _ bindCount: UInt32,
    constants: UnsafeRawPointer?, _ constantBytes: UInt64, maxTokens: UInt32, maxSampled: UInt32,
    handle: UnsafeMutablePointer<UnsafeMutableRawPointer?>?
  ) throws(LaunchError) {
    guard launches != nil || launchCount == 0 else { throw .missing("launches") }
    guard binds != nil || bindCount == 0 else { throw .missing("binds") }
    guard constants != nil || constantBytes == 0 else { throw .missing("constants") }
    guard let handle else { throw .missing("plan") }
    guard let constantBytes = Int(exactly: constantBytes) else {
      throw .argument("plan: constant_bytes is \(constantBytes), more than a machine can address")
    }
    let table = try locked { () throws(LaunchError) in buffers }
    let source = try PlanSource(
      launches: UnsafeBufferPointer(start: launches, count: Int(launchCount)),
      binds: UnsafeBufferPointer(start: binds, count: Int(bindCount)),
      constants: UnsafeRawBufferPointer(start: constants, count: constantBytes), maxTokens: maxTokens,
      maxSampled: maxSampled, buffers: table)
    let plan = OpenPlan(try device.makePlan(source), device: self)
    // Under the lock: a plan whose handle came after the device closed would never be freed.
    handle.pointee = try locked { () throws(LaunchError) in OpenPlan.handles.insert(plan) }
  }

  func wait(for ticket: UInt64, timeout: Int64) throws(LaunchError) {
    try device.wait(for: ticket, timeout: timeout < 0 ? nil : timeout)
  }

  // MARK: Weights

  /// Bytes of the packed form. Throws for a combination that cannot be packed.
  static func weightBytes(n: UInt32, k: UInt32, bits: UInt32, groupSize: UInt32, dtype: UInt32) throws(LaunchError)
    -> UInt64
  {
    let bytes = ms_panel_bytes(n, k, bits, groupSize, dtype)
    guard bytes > 0 else {
      throw .argument(
        "weight: n=\(n), k=\(k), bits=\(bits), group_size=\(groupSize), dtype=\(dtype) cannot be packed; expected bits 2, 3, 4, 5, 6 "
          + "or 8 with group_size 32, 64 or 128 that divides k and a float dtype, or bits 16 or 32 with group_size 0")
    }
    return bytes
  }

  func packWeight(_ source: UnsafePointer<MSWeightSource>?, into id: Int32, offset: UInt64) throws(LaunchError) {
    guard let source = source?.pointee else { throw .missing("source") }
    let bytes = try Self.weightBytes(
      n: source.n, k: source.k, bits: source.bits, groupSize: source.group_size, dtype: source.dtype)
    guard source.data != nil else { throw .missing("source.data") }
    if source.format == MS_WEIGHT_AFFINE.rawValue {
      guard source.scales != nil else { throw .missing("source.scales") }
      guard source.biases != nil else { throw .missing("source.biases") }
    }
    if let order = source.row_order {
      for row in 0..<Int(source.n) where order[row] < 0 {
        throw .argument("weight: row_order[\(row)] is \(order[row]), expected a row of the source, 0 or more")
      }
    }
    let buffer = try buffer(id)
    guard !buffer.isReadOnly else { throw .argument("weight: buffer \(id) is wrapped memory, which is only read") }
    guard offset % Self.packAlignment == 0 else {
      throw .argument("weight: offset is \(offset), expected a multiple of \(Self.packAlignment) bytes")
    }
    let (end, overflow) = offset.addingReportingOverflow(bytes)
    guard !overflow, end <= UInt64(buffer.bytes) else {
      throw .argument(
        "weight: \(bytes) bytes at offset \(offset) do not fit into buffer \(id), which has \(buffer.bytes)")
    }
    try device.pack(source, into: buffer, offset: Int(offset))
  }

  // MARK: Closing

  private func checkOpen() throws(LaunchError) { try locked { () throws(LaunchError) in } }

  /// Runs `body` under the device's lock; throws when the device has been closed meanwhile by another thread.
  private func locked<Result>(_ body: () throws(LaunchError) -> Result) throws(LaunchError) -> Result {
    lock.lock()
    defer { lock.unlock() }
    guard !isClosed else { throw .argument("the device is closed; open it again") }
    return try body()
  }
}
