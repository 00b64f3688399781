import CCuda

/// What is fixed of one GPU.
struct CudaGPU {
  /// Compute capability 8.0: the first whose tensor cores take what the kernels give them.
  private static let minimum = (major: Int32(8), minor: Int32(0))

  let device: Int32  // the driver's own handle
  let name: String
  let capability: (major: Int32, minor: Int32)
  let maxThreads: UInt32  // of a block
  let maxThreadsByAxis: [UInt32]
  let maxGridByAxis: [UInt32]

  /// Launches can be told to begin while the one before still runs.
  var startsEarly: Bool { capability.major >= 9 }

  /// - Throws: `LaunchError.argument` for a number that no GPU has; `LaunchError.device` for a GPU that is too old.
  init(_ driver: CudaDriver, ordinal: Int32) throws(LaunchError) {
    let count = try driver.deviceCount()
    guard ordinal < count else {
      throw .argument(
        "device: \"cuda:\(ordinal)\" does not exist, this process sees \(count) GPU\(count == 1 ? "" : "s")"
          + "\(CudaDriver.visible); expected cuda:0\(count == 1 ? "" : " to cuda:\(count - 1)")")
    }
    var device: Int32 = 0
    var name = [CChar](repeating: 0, count: 256)
    let code = driver.functions.cuDeviceGet(&device, ordinal)
    guard code == 0, driver.functions.cuDeviceGetName(&name, Int32(name.count - 1), device) == 0 else {
      throw .device("cuda:\(ordinal): the driver does not give this GPU: \(driver.text(of: code))")
    }
    func attribute(_ number: Int) -> Int32 {
      var value: Int32 = 0
      return driver.functions.cuDeviceGetAttribute(&value, Int32(number), device) == 0 ? value : 0
    }
    self.device = device
    self.name = String(cString: name)
    capability = (attribute(MS_CUDA_CAPABILITY_MAJOR), attribute(MS_CUDA_CAPABILITY_MINOR))
    maxThreads = UInt32(clamping: attribute(MS_CUDA_MAX_THREADS))
    maxThreadsByAxis = (0..<3).map { UInt32(clamping: attribute(MS_CUDA_MAX_THREADS_X + $0)) }
    maxGridByAxis = (0..<3).map { UInt32(clamping: attribute(MS_CUDA_MAX_GRID_X + $0)) }
    guard capability >= Self.minimum else {
      throw .device(
        "cuda:\(ordinal): \(self.name) has compute capability \(capability.major).\(capability.minor), expected "
          + "\(Self.minimum.major).\(Self.minimum.minor) or later (an A100 or newer); use device \"host\"")
    }
  }
}
