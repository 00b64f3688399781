import CCuda
import CMetalStep

/// A launch of a compiled kernel.
final class CudaLaunch: CudaOperation {
  let name: String
  let endsInKernel = true
  private let kernel: CudaFunction
  private let launch: MSLaunch
  private let values: UnsafeMutableRawBufferPointer  // of the parameters: addresses, then the constants
  private let parameters: UnsafeMutableBufferPointer<UnsafeMutableRawPointer?>

  /// - Parameter number: of the launch in its plan, for messages.
  /// - Throws: `LaunchError.argument` for a geometry, bindings or constants that do not fit.
  init(
    _ launch: MSLaunch, number: Int, kernel: CudaFunction, addresses: [UInt64], constants: UnsafeRawBufferPointer
  ) throws(LaunchError) {
    let sizes = kernel.parameterBytes
    try Self.check(launch, number: number, kernel: kernel, constants: constants.count)
    name = kernel.name
    self.kernel = kernel
    self.launch = launch
    let constantsAt = addresses.count * MemoryLayout<UInt64>.size
    let room = constants.isEmpty ? 0 : sizes[addresses.count]
    values = .allocate(byteCount: max(constantsAt + room, 1), alignment: 16)
    values.initializeMemory(as: UInt8.self, repeating: 0)
    for (i, address) in addresses.enumerated() {
      values.storeBytes(of: address, toByteOffset: i * MemoryLayout<UInt64>.size, as: UInt64.self)
    }
    if !constants.isEmpty { UnsafeMutableRawBufferPointer(rebasing: values[constantsAt...]).copyMemory(from: constants) }
    parameters = .allocate(capacity: max(sizes.count, 1))
    parameters.initialize(repeating: nil)
    for i in sizes.indices { parameters[i] = values.baseAddress! + i * MemoryLayout<UInt64>.size }
  }

  deinit {
    values.deallocate()
    parameters.deallocate()
  }

  func enqueue(on stream: OpaquePointer, isEarly: Bool) throws(LaunchError) {
    var attribute = ms_cuda_launch_attribute()
    attribute.id = UInt32(MS_CUDA_ATTRIBUTE_EARLY_START)
    attribute.value = 1
    let code = withUnsafeMutablePointer(to: &attribute) { attribute in
      var config = ms_cuda_launch()
      config.grid = launch.grid
      config.threads = launch.threads
      config.stream = stream
      config.attributes = attribute
      config.attribute_count = isEarly ? 1 : 0
      return kernel.context.driver.functions.cuLaunchKernelEx(&config, kernel.function, parameters.baseAddress, nil)
    }
    try kernel.context.check(code, "launch of \(name)")
  }

  private static func check(
    _ launch: MSLaunch, number: Int, kernel: CudaFunction, constants: Int
  ) throws(LaunchError) {
    let gpu = kernel.context.gpu
    let what = "plan: launch \(number) (\(kernel.name))"
    let (grid, threads) = (words(launch.grid), words(launch.threads))
    for (axis, name) in ["x", "y", "z"].enumerated() {
      guard (1...gpu.maxGridByAxis[axis]).contains(grid[axis]) else {
        throw .argument(
          "\(what) has grid \(launch.grid), expected 1 to \(gpu.maxGridByAxis[axis]) along \(name) on \(gpu.name)")
      }
      guard (1...gpu.maxThreadsByAxis[axis]).contains(threads[axis]) else {
        throw .argument(
          "\(what) has threads \(launch.threads), expected 1 to \(gpu.maxThreadsByAxis[axis]) along \(name) on \(gpu.name)")
      }
    }
    let all = threads.reduce(1) { $0 * Int($1) }
    guard all <= kernel.maxThreads else {
      throw .argument("\(what) has threads \(launch.threads), expected 1 to \(kernel.maxThreads) in all")
    }
    // As elsewhere, buffers may be bound behind those that a kernel takes; the constants have their place.
    let sizes = kernel.parameterBytes
    let binds = Int(launch.binds)
    guard constants > 0 ? sizes.count == binds + 1 : sizes.count <= binds else {
      throw .argument(
        "\(what) has \(binds) bindings and \(constants) bytes of constants; the kernel takes \(sizes.count) "
          + "parameters, constants included")
    }
    guard sizes.prefix(binds).allSatisfy({ $0 == MemoryLayout<UInt64>.size }) else {
      throw .argument("\(what) has no constants; the kernel takes \(sizes.last ?? 0) bytes of them")
    }
    guard constants == 0 || constants <= sizes[binds] else {
      throw .argument(
        "\(what) has \(constants) bytes of constants, and the kernel takes \(sizes[binds]) at most")
    }
  }
}

private func words(_ three: (UInt32, UInt32, UInt32)) -> [UInt32] { [three.0, three.1, three.2] }
