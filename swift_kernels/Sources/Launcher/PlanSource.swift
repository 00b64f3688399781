import CMetalStep

/// What a plan is made of, checked for all that does not depend on the device. The pointers are the caller's: valid
/// only while the plan is made.
struct PlanSource {
  struct Binding {
    let buffer: any DeviceBuffer
    let offset: Int  // bytes, less than buffer.bytes

    var address: UnsafeMutableRawPointer { buffer.contents + offset }
  }

  let launches: UnsafeBufferPointer<MSLaunch>
  let maxTokens: UInt32
  let maxSampled: UInt32
  private let bindings: [Binding]
  private let constants: UnsafeRawBufferPointer

  /// - Throws: `LaunchError.argument` for a range beyond the arrays, an unknown buffer or an offset beyond its end.
  init(
    launches: UnsafeBufferPointer<MSLaunch>, binds: UnsafeBufferPointer<MSBind>, constants: UnsafeRawBufferPointer,
    maxTokens: UInt32, maxSampled: UInt32, buffers: BufferTable
  ) throws(LaunchError) {
    var bindings: [Binding] = []
    bindings.reserveCapacity(binds.count)
    for (i, bind) in binds.enumerated() {
      guard let buffer = buffers[bind.buffer] else {
        throw .argument("plan: binding \(i) names buffer \(bind.buffer), which this device does not have")
      }
      guard bind.offset < UInt64(buffer.bytes) else {
        throw .argument(
          "plan: binding \(i) starts at byte \(bind.offset) of buffer \(bind.buffer), which has \(buffer.bytes) bytes")
      }
      bindings.append(Binding(buffer: buffer, offset: Int(bind.offset)))
    }
    for (i, launch) in launches.enumerated() {
      guard UInt64(launch.bind_first) + UInt64(launch.binds) <= UInt64(binds.count) else {
        throw .argument(
          "plan: launch \(i) has bindings \(launch.bind_first) and \(launch.binds) on, of \(binds.count) in all")
      }
      guard UInt64(launch.const_first) + UInt64(launch.const_bytes) <= UInt64(constants.count) else {
        throw .argument(
          "plan: launch \(i) has constants from byte \(launch.const_first), \(launch.const_bytes) bytes, of \(constants.count) in all"
        )
      }
      guard launch.barrier <= 1 else {
        throw .argument("plan: launch \(i) has barrier \(launch.barrier), expected 0 or 1")
      }
    }
    self.launches = launches
    self.maxTokens = maxTokens
    self.maxSampled = maxSampled
    self.bindings = bindings
    self.constants = constants
  }

  /// Every buffer that a launch can touch.
  var buffers: [any DeviceBuffer] { bindings.map(\.buffer) }

  /// In the order of `[[buffer(i)]]`.
  func bindings(of launch: MSLaunch) -> ArraySlice<Binding> {
    let first = Int(launch.bind_first)
    return bindings[first..<first + Int(launch.binds)]
  }

  /// Not aligned to anything: copy before use.
  func constants(of launch: MSLaunch) -> UnsafeRawBufferPointer {
    let first = Int(launch.const_first)
    return UnsafeRawBufferPointer(rebasing: constants[first..<first + Int(launch.const_bytes)])
  }
}
