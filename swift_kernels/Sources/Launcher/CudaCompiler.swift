import CCuda

#if canImport(Darwin)
import Darwin
#else
import Glibc
#endif

/// NVIDIA's run-time compiler, and what it has compiled before.
final class CudaCompiler: @unchecked Sendable {
  private static let names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]

  private let context: CudaContext
  private let nvrtc: ms_nvrtc
  private let version: (major: Int32, minor: Int32)
  private let options: [String]
  private let cubins = CudaCubins()

  /// - Throws: `LaunchError.device` where there is no compiler, or none that knows this GPU.
  init(_ context: CudaContext) throws(LaunchError) {
    self.context = context
    (nvrtc, version) = try Self.find(newest: context.driver.version / 1000)
    let architecture = try Self.architecture(nvrtc, version: version, gpu: context.gpu)
    options = ["-arch=sm_\(architecture)", "-std=c++17", "-default-device", "-w"]  // no warnings: errors come first
  }

  /// The module of a source. Any thread may call it.
  ///
  /// - Throws: `LaunchError.device` with the compiler's own text.
  func module(source: String) throws(LaunchError) -> CudaModule {
    let key = "nvrtc \(version.major).\(version.minor) \(options.joined(separator: " "))\n\(source)"
    if let cubin = cubins.cubin(of: key), let module = try? load(cubin) { return module }
    let cubin = try compile(source)
    let module = try load(cubin)
    cubins.keep(cubin, of: key)
    return module
  }

  private func load(_ cubin: [UInt8]) throws(LaunchError) -> CudaModule {
    try context.enter { () throws(LaunchError) in
      var module: OpaquePointer?
      let code = context.driver.functions.cuModuleLoadData(&module, cubin)
      if [MS_CUDA_INVALID_IMAGE, MS_CUDA_NO_BINARY_FOR_GPU, MS_CUDA_UNSUPPORTED_BINARY].contains(Int(code)) {
        throw .device(
          "library: the driver, for CUDA \(CudaDriver.text(context.driver.version)), does not take what NVIDIA's compiler "
            + "\(version.major).\(version.minor) has made: \(context.driver.text(of: code)). Install a newer driver, or an "
            + "older compiler: pip install nvidia-cuda-nvrtc-cu12")
      }
      try context.check(code, "library")
      return CudaModule(context, module: module!)
    }
  }

  private func compile(_ source: String) throws(LaunchError) -> [UInt8] {
    var program: OpaquePointer?
    guard nvrtc.nvrtcCreateProgram(&program, source, "kernels.cu", 0, nil, nil) == 0 else {
      throw .device("library: NVIDIA's compiler does not start")
    }
    defer { _ = nvrtc.nvrtcDestroyProgram(&program) }
    let words = options.map { strdup($0) }
    defer { words.forEach { free($0) } }
    let code = nvrtc.nvrtcCompileProgram(program, Int32(words.count), words.map { UnsafePointer($0) })
    var bytes = 0
    guard code == 0 else {
      _ = nvrtc.nvrtcGetProgramLogSize(program, &bytes)
      var log = [CChar](repeating: 0, count: bytes + 1)
      _ = nvrtc.nvrtcGetProgramLog(program, &log)
      let text = String(cString: log)
      throw .device("library: \(text.isEmpty ? "NVIDIA's compiler gives error \(code), without a word" : text)")
    }
    guard nvrtc.nvrtcGetCUBINSize(program, &bytes) == 0, bytes > 0 else {
      throw .device("library: NVIDIA's compiler gives no machine code for \(options[0])")
    }
    var cubin = [UInt8](repeating: 0, count: bytes)
    let isGiven = cubin.withUnsafeMutableBytes { memory in
      nvrtc.nvrtcGetCUBIN(program, memory.baseAddress!.assumingMemoryBound(to: CChar.self)) == 0
    }
    guard isGiven else { throw .device("library: NVIDIA's compiler gives no machine code for \(options[0])") }
    return cubin
  }

  /// The first library that METALSTEP_NVRTC, the loader, `LibraryFolders` and CUDA's own folders have; rather one that is
  /// not newer than the driver.
  private static func find(newest: Int32) throws(LaunchError) -> (ms_nvrtc, (major: Int32, minor: Int32)) {
    var places: [String]
    if let chosen = Environment.text("METALSTEP_NVRTC") {
      places = [chosen]
    } else {
      let toolkits = ["CUDA_HOME", "CUDA_PATH"].compactMap { Environment.text($0) } + ["/usr/local/cuda"]
      let folders = LibraryFolders.all() + toolkits.map { $0 + "/lib64" }
      places = names + folders.flatMap { folder in names.map { "\(folder)/\($0)" } }
    }
    var newer: (ms_nvrtc, (major: Int32, minor: Int32))?
    var reasons: [(path: String, text: String)] = []
    for place in places {
      var nvrtc = ms_nvrtc()
      var message = [CChar](repeating: 0, count: 512)
      guard ms_nvrtc_load(&nvrtc, place, &message, message.count) else {
        reasons.append((place, String(cString: message)))
        continue
      }
      var version: (major: Int32, minor: Int32) = (0, 0)
      guard nvrtc.nvrtcVersion(&version.major, &version.minor) == 0 else {
        reasons.append((place, "\(place) does not tell its version"))
        continue
      }
      if version.major <= newest { return (nvrtc, version) }
      if newer == nil { newer = (nvrtc, version) }
    }
    if let newer { return newer }
    throw .device(
      "cuda: no NVIDIA compiler (NVRTC) in \(places.count) places: \(LibraryFolders.firstReason(reasons)); "
        + "pip install nvidia-cuda-nvrtc (driver 580 or later) or nvidia-cuda-nvrtc-cu12, or set METALSTEP_NVRTC to "
        + "libnvrtc.so")
  }

  /// The newest architecture that the compiler knows and the GPU runs: code for one runs on later ones of its generation.
  private static func architecture(
    _ nvrtc: ms_nvrtc, version: (major: Int32, minor: Int32), gpu: CudaGPU
  ) throws(LaunchError) -> Int32 {
    var count: Int32 = 0
    _ = nvrtc.nvrtcGetNumSupportedArchs(&count)
    var known = [Int32](repeating: 0, count: Int(max(count, 1)))
    _ = nvrtc.nvrtcGetSupportedArchs(&known)
    let own = gpu.capability.major * 10 + gpu.capability.minor
    guard let found = known.filter({ $0 / 10 == gpu.capability.major && $0 <= own }).max() else {
      throw .device(
        "cuda: NVIDIA's compiler \(version.major).\(version.minor) has no code for \(gpu.name), which is sm_\(own); install a "
          + "newer one: pip install --upgrade nvidia-cuda-nvrtc")
    }
    return found
  }
}
