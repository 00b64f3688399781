import CMetalSim
import Glibc

/// Metal source compiled for the CPU. Its code goes with it: functions, and so pipelines, keep it. A sanitizer's stays,
/// whose reports and whose runtime outlive a library.
final class SimLibrary: MTLLibrary {
  private let kernels: [String: KernelScanner.Kernel]
  private let handle: UnsafeMutableRawPointer
  private let mode: SimMode

  init(source: String, mathMode: MTLMathMode) throws {
    let scanner = KernelScanner(source)
    let translation = try scanner.translate()
    let text = String(cString: sim_prelude()) + "\n#line 1 \"program_source\"\n" + translation.text
    let path = try KernelCompiler.library(text: text, fastMath: mathMode == .fast)
    guard let handle = dlopen(path, RTLD_NOW | RTLD_LOCAL) else {
      throw SimError(description: "\(path): \(String(cString: dlerror()))")
    }
    guard let symbol = dlsym(handle, "sim_set_runtime") else {
      throw SimError(description: "\(path) is not a library of simulated kernels; delete it")
    }
    typealias SetRuntime = @convention(c) (UnsafePointer<sim_runtime>?) -> Void
    sim_find_sanitizers(handle)
    unsafeBitCast(symbol, to: SetRuntime.self)(sim_runtime_functions())
    self.handle = handle
    mode = try SimMode.chosen()
    kernels = translation.kernels
  }

  deinit { if !mode.isSanitizer { dlclose(handle) } }

  var functionNames: [String] { kernels.keys.sorted() }

  func makeFunction(name functionName: String) -> (any MTLFunction)? {
    guard let kernel = kernels[functionName], let symbol = dlsym(handle, "sim_entry_\(functionName)") else {
      return nil
    }
    let entry = unsafeBitCast(symbol, to: sim_entry.self)
    return SimFunction(name: functionName, entry: entry, buffers: kernel.buffers, library: self)
  }
}
