import CCuda

#if canImport(Darwin)
import Darwin
#else
import Glibc
#endif

/// NVIDIA's driver: its functions, and its errors in words.
final class CudaDriver {
  /// Versions as the driver counts them: 12.4 is the first that tells the sizes of a kernel's parameters; launches that
  /// begin early within a graph are older.
  private static let minimum: Int32 = 12040

  let functions: ms_cuda_driver
  let version: Int32

  /// The library that METALSTEP_CUDA_DRIVER names, else the system's.
  ///
  /// - Throws: `LaunchError.device` where there is no driver, or none that works.
  init() throws(LaunchError) {
    #if canImport(Darwin)
    throw .device("cuda: NVIDIA's GPUs are for Linux, and this is macOS; use device \"metal\" or \"host\"")
    #else
    let named = Environment.text("METALSTEP_CUDA_DRIVER")
    let path = named ?? "libcuda.so.1"
    var functions = ms_cuda_driver()
    var message = [CChar](repeating: 0, count: 512)
    let isLoaded = ms_cuda_driver_load(&functions, path, &message, message.count)
    var version: Int32 = 0
    // First: an older driver also lacks functions.
    if let ask = functions.cuDriverGetVersion, ask(&version) != 0 || version < Self.minimum {
      throw .device(
        "cuda: the driver supports CUDA \(Self.text(version)), expected \(Self.text(Self.minimum)) or later: install "
          + "NVIDIA's driver 550 or later, or use device \"host\"")
    }
    guard isLoaded else {
      if let named {
        throw .device(
          "no CUDA driver: METALSTEP_CUDA_DRIVER is \"\(named)\", expected the path of NVIDIA's libcuda.so.1: "
            + "\(String(cString: message)); unset it to take the system's, or use device \"host\"")
      }
      throw .device(
        "no CUDA driver: \(String(cString: message)); install NVIDIA's driver (in a container, run it with --gpus), or "
          + "use device \"host\"")
    }
    self.functions = functions
    self.version = version
    let code = functions.cuInit(0)
    if code == MS_CUDA_NO_DEVICE { throw noDevice }
    if code == MS_CUDA_NOT_INITIALIZED {
      throw .device(
        "cuda: the driver does not start: \(text(of: code)); a process that was forked from one that has used CUDA cannot use "
          + "it: start it anew (of multiprocessing, the method \"spawn\")")
    }
    guard code == 0 else {
      throw .device(
        "cuda: the driver does not start: \(text(of: code)); nvidia-smi may say more. Use device \"host\" meanwhile")
    }
    #endif
  }

  /// GPUs that this process sees.
  ///
  /// - Throws: `LaunchError.device` when there is none.
  func deviceCount() throws(LaunchError) -> Int32 {
    var count: Int32 = 0
    let code = functions.cuDeviceGetCount(&count)
    guard code == 0 || code == MS_CUDA_NO_DEVICE else {
      throw .device("cuda: the driver does not count its GPUs: \(text(of: code))")
    }
    guard count > 0 else { throw noDevice }
    return count
  }

  /// CUDA_VISIBLE_DEVICES as a hint, where it is set.
  static var visible: String {
    Environment.text("CUDA_VISIBLE_DEVICES").map { " (CUDA_VISIBLE_DEVICES is \"\($0)\")" } ?? ""
  }

  /// An error's description and name.
  func text(of code: Int32) -> String {
    var name: UnsafePointer<CChar>?
    var text: UnsafePointer<CChar>?
    guard functions.cuGetErrorName(code, &name) == 0, functions.cuGetErrorString(code, &text) == 0, let name, let text
    else { return "error \(code)" }
    return "\(String(cString: text)) (\(String(cString: name)))"
  }

  /// 12040 as "12.4".
  static func text(_ version: Int32) -> String { "\(version / 1000).\(version % 1000 / 10)" }

  private var noDevice: LaunchError {
    .device("cuda: the driver finds no NVIDIA GPU\(Self.visible); use device \"host\"")
  }
}
