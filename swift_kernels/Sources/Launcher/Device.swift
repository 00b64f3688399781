import CMetalStep

/// A kind of device behind the C ABI: host (C kernels on a thread pool), metal or cuda.
///
/// `OpenDevice` stands between the ABI and a device: it owns the table of buffer ids and checks whatever does not
/// depend on the kind (ids, offsets, ranges, closed devices). A device therefore never sees a buffer id, and only valid
/// ranges.
/// Any method may be called from any thread, several at a time; `close` is called once and nothing after it.
protocol Device: AnyObject {
  /// Fixed when the device is opened, except for the memory that is left.
  var info: MSDeviceInfo { get }

  /// Whether the host sees all memory of the device.
  var isUnified: Bool { get }

  /// Zeroed memory, at least 64-byte aligned. `bytes` may be 0: a launch cannot bind such a buffer.
  ///
  /// - Throws: `LaunchError.memory`.
  func makeBuffer(bytes: Int, memory: ms_memory) throws(LaunchError) -> any DeviceBuffer

  /// The caller's memory, without a copy. `address` is a multiple of the page and `bytes` is 1 or more; what is between
  /// the end and the page's end is the caller's too.
  ///
  /// - Throws: `LaunchError.memory` where the device cannot take it; the caller copies it then.
  func wrapBuffer(_ address: UnsafeMutableRawPointer, bytes: Int) throws(LaunchError) -> any DeviceBuffer

  /// Copies the host's bytes to `target` in the order of the device's runs; returns when `source` may be reused.
  func write(_ source: UnsafeRawBufferPointer, to target: DeviceRegion) throws(LaunchError)

  /// Copies `source` to the host's memory, after all runs queued before; returns when the bytes are there.
  func read(_ source: DeviceRegion, into target: UnsafeMutableRawBufferPointer) throws(LaunchError)

  /// Copies bytes from one region to another, in the order of the device's runs.
  func copy(_ source: DeviceRegion, to target: DeviceRegion, bytes: Int) throws(LaunchError)

  /// Compiles `source` (quoted includes already inlined) and adds its kernels to those that `findKernel` knows.
  ///
  /// - Throws: `LaunchError.device` with the compiler's own text; `LaunchError.argument` where kernels are built in.
  func addLibrary(source: String) throws(LaunchError)

  /// The id by which launches name a kernel; the same name gives the same id.
  func findKernel(name: String) throws(LaunchError) -> Int32

  /// Resolves everything that a run needs, so that a run looks nothing up.
  ///
  /// - Throws: `LaunchError.argument` for a kernel id, constants or geometry that do not fit.
  func makePlan(_ source: PlanSource) throws(LaunchError) -> any DevicePlan

  /// Returns when the ticket's run is done, and with it all earlier ones.
  ///
  /// - Parameter timeout: nanoseconds; nil waits without limit.
  /// - Throws: `LaunchError.timeout`, after which the ticket is still valid; `LaunchError.device` with the text of a
  ///   failed run, once; `LaunchError.argument` for a ticket that was never given out.
  func wait(for ticket: UInt64, timeout: Int64?) throws(LaunchError)

  /// Writes the weight in this device's layout. `buffer` is this device's and has `ms_panel_bytes` bytes from `offset`
  /// on, which is a multiple of 64.
  func pack(_ source: MSWeightSource, into buffer: any DeviceBuffer, offset: Int) throws(LaunchError)

  /// Lets a run in progress finish, drops queued ones (their waiters get an error), and frees threads and queues.
  func close()
}

/// Memory of a device. It lives as long as anything refers to it: a plan refers to the buffers it was made with.
protocol DeviceBuffer: AnyObject {
  /// Its address for the device's launches; the host's too where it `isVisible`.
  var contents: UnsafeMutableRawPointer { get }
  var bytes: Int { get }
  /// Whether the host sees it.
  var isVisible: Bool { get }
  /// Of wrapped memory, whose pages may not even be writable.
  var isReadOnly: Bool { get }
}

/// A place in a buffer, for as many bytes as the call says.
struct DeviceRegion {
  let buffer: any DeviceBuffer
  let offset: Int  // bytes

  var address: UnsafeMutableRawPointer { buffer.contents + offset }
}

/// The launches of one step, resolved for one device.
protocol DevicePlan: AnyObject {
  /// Queues `steps` runs (1 or more) and returns at once. Tickets of one device finish in order, counted from 1.
  func run(steps: Int) throws(LaunchError) -> UInt64

  /// Runs one step and writes each launch's wall time in nanoseconds to `times`, one element per launch.
  func profile(into times: UnsafeMutablePointer<UInt64>) throws(LaunchError)

  /// Lets so many of the host's threads run the plan from now on.
  func limit(threads: Int32) throws(LaunchError)
}

extension DevicePlan {
  /// A GPU has no such threads.
  func limit(threads: Int32) {}
}

extension DeviceBuffer {
  var isVisible: Bool { true }
}

/// Unified memory is copied by the host, whose caller sees to it that no run in flight uses it.
extension Device {
  var isUnified: Bool { true }

  func write(_ source: UnsafeRawBufferPointer, to target: DeviceRegion) throws(LaunchError) {
    target.address.copyMemory(from: source.baseAddress!, byteCount: source.count)
  }

  func read(_ source: DeviceRegion, into target: UnsafeMutableRawBufferPointer) throws(LaunchError) {
    target.baseAddress!.copyMemory(from: source.address, byteCount: target.count)
  }

  func copy(_ source: DeviceRegion, to target: DeviceRegion, bytes: Int) throws(LaunchError) {
    target.address.copyMemory(from: source.address, byteCount: bytes)
  }
}
