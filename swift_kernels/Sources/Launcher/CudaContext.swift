import CCuda

/// A GPU's context with the one stream on which everything of a device happens. Buffers, plans and kernels refer to it,
/// so that it ends after them.
///
/// The context is the GPU's primary one, which other libraries of the process share.
final class CudaContext: @unchecked Sendable {
  let driver: CudaDriver
  let gpu: CudaGPU
  let stream: OpaquePointer
  /// Held while work is queued: what belongs together stays together.
  let submission = Lock()
  private let context: OpaquePointer
  private let lock = Lock()
  private var failure: String?  // of the GPU, after which it does nothing more
  /// What the GPU is doing, for the text of a failure. Set once, before the context is used.
  var work: () -> String? = { nil }

  init(ordinal: Int32) throws(LaunchError) {
    driver = try CudaDriver()
    gpu = try CudaGPU(driver, ordinal: ordinal)
    var context: OpaquePointer?
    let code = driver.functions.cuDevicePrimaryCtxRetain(&context, gpu.device)
    guard code == 0, let context else {
      throw .device("cuda: \(gpu.name) gives no context: \(driver.text(of: code)); \(Self.advice(on: code))")
    }
    self.context = context
    var stream: OpaquePointer?
    var created = driver.functions.cuCtxPushCurrent(context)
    if created == 0 {
      created = driver.functions.cuStreamCreate(&stream, UInt32(MS_CUDA_STREAM_NON_BLOCKING))
      Self.pop(driver)
    }
    guard created == 0, let stream else {
      _ = driver.functions.cuDevicePrimaryCtxRelease(gpu.device)
      throw .device("cuda: \(gpu.name) gives no stream: \(driver.text(of: created)); \(Self.advice(on: created))")
    }
    self.stream = stream
  }

  deinit {
    if driver.functions.cuCtxPushCurrent(context) == 0 {
      _ = driver.functions.cuStreamDestroy(stream)
      Self.pop(driver)
    }
    _ = driver.functions.cuDevicePrimaryCtxRelease(gpu.device)
  }

  // MARK: Calls of the driver

  /// Runs `body` with the context current for this thread; what was current before is so again afterwards.
  ///
  /// - Throws: `LaunchError.device` when the GPU has failed before.
  @inline(__always)
  func enter<Result>(_ body: () throws(LaunchError) -> Result) throws(LaunchError) -> Result {
    try checkUsable()
    try check(driver.functions.cuCtxPushCurrent(context), "cuda")
    defer { Self.pop(driver) }
    return try body()
  }

  /// As `enter`, to free what is left, which a failed GPU no longer has. Returns the error for which `body` did not run, or 0.
  @discardableResult func leave(_ body: () -> Void) -> Int32 {
    let code = driver.functions.cuCtxPushCurrent(context)
    guard code == 0 else { return code }
    body()
    Self.pop(driver)
    return 0
  }

  private static func pop(_ driver: CudaDriver) {
    var popped: OpaquePointer?
    _ = driver.functions.cuCtxPopCurrent(&popped)
  }

  /// - Throws: `LaunchError.device` for a code that is an error.
  @inline(__always)
  func check(_ code: Int32, _ what: @autoclosure () -> String) throws(LaunchError) {
    if code != 0 { throw error(code, what()) }
  }

  /// The error of a code. One that the GPU does not recover from ends the context.
  func error(_ code: Int32, _ what: String) -> LaunchError {
    if Self.endsContext(code) { return failure(code, what) }
    let text = "\(what): \(driver.text(of: code))"
    guard code == MS_CUDA_OUT_OF_MEMORY else { return .device(text) }
    return .memory(
      "\(text): the driver needs more of \(gpu.name)'s memory than is left; use a smaller model or less KV memory, or end "
        + "other programs on this GPU")
  }

  // MARK: Failures

  /// The error of a code that what was queued has given. The GPU does nothing from now on; the first reason is kept.
  func failure(_ code: Int32, _ what: String) -> LaunchError {
    let text = "\(what): \(driver.text(of: code))\(work().map { ", in a plan of \($0)" } ?? "")"
    lock.lock()
    if failure == nil { failure = text }
    lock.unlock()
    return .device(
      "\(text); the GPU does nothing more for this process: start a new one. `compute-sanitizer --report-api-errors no` tells "
        + "the launch and the address")
  }

  /// - Throws: `LaunchError.device` when the GPU has failed.
  @inline(__always)
  func checkUsable() throws(LaunchError) {
    lock.lock()
    let failure = failure
    lock.unlock()
    if let failure {
      throw .device(
        "cuda: \(gpu.name) has failed before (\(failure)) and does nothing more for this process: start a new one")
    }
  }

  /// What to do where a GPU cannot be opened.
  private static func advice(on code: Int32) -> String {
    switch Int(code) {
    case MS_CUDA_OUT_OF_MEMORY: return "other processes have filled its memory: end them (nvidia-smi lists them)"
    case MS_CUDA_UNAVAILABLE: return "another process may have it for itself: nvidia-smi shows its compute mode"
    case _ where endsContext(code): return "it has failed before: start a new process"
    default: return "nvidia-smi may say more"
    }
  }

  /// Errors after which a context gives the same error for every call: faults of kernels and of the machine.
  private static func endsContext(_ code: Int32) -> Bool {
    switch code {
    case 46, 214, 220, 700, 702, 709, 710, 714...719, 721, 999: return true
    default: return false
    }
  }
}
