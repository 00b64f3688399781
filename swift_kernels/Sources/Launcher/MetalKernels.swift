#if canImport(Metal)
import Metal
#else
import MetalSim
#endif

/// A kernel that launches can name.
struct MetalKernel {
  let name: String
  let pipeline: any MTLComputePipelineState
}

/// The kernels of a Metal device: sources compiled to libraries, and a pipeline for each kernel that was asked for.
/// Methods may be called from any thread.
final class MetalKernels {
  private static let simdWidth = 32  // threads of a simdgroup: the kernels are written for it, as Apple's chips have it

  private struct Library {
    let library: any MTLLibrary
    let archive: MetalArchive?
  }

  private let device: any MTLDevice
  private let lock = Lock()
  private var libraries: [Library] = []
  private var homes: [String: Int] = [:]  // of a function: the number of its library
  private var kernels: [MetalKernel] = []  // by id
  private var ids: [String: Int32] = [:]

  init(_ device: any MTLDevice) { self.device = device }

  /// See `Device.addLibrary`. A name that an earlier library has stays that one's.
  func add(source: String) throws(LaunchError) {
    let library: any MTLLibrary
    do { library = try device.makeLibrary(source: source, options: Self.options) } catch {
      throw .device("library: \(error.localizedDescription)")
    }
    let path = CacheFolder.path("pipelines").map { "\($0)/\(Self.hash("\(device.name)\n\(source)")).metalarchive" }
    let archive = path.flatMap { MetalArchive(device, path: $0) }
    lock.lock()
    defer { lock.unlock() }
    for name in library.functionNames where homes[name] == nil { homes[name] = libraries.count }
    libraries.append(Library(library: library, archive: archive))
  }

  /// See `Device.findKernel`.
  func find(name: String) throws(LaunchError) -> Int32 {
    lock.lock()
    defer { lock.unlock() }
    if let id = ids[name] { return id }
    guard let home = homes[name], let function = libraries[home].library.makeFunction(name: name) else {
      let known = libraries.flatMap(\.library.functionNames).joined(separator: ", ")
      throw .argument(
        "kernel: no library of this device has \"\(name)\"; they have \(known.isEmpty ? "nothing" : known)")
    }
    let pipeline: any MTLComputePipelineState
    do {
      pipeline =
        try libraries[home].archive?.makePipeline(function) ?? device.makeComputePipelineState(function: function)
    } catch { throw .device("kernel \(name): \(error.localizedDescription)") }
    guard pipeline.threadExecutionWidth == Self.simdWidth else {
      throw .device(
        "kernel \(name): a simdgroup of \(device.name) has \(pipeline.threadExecutionWidth) threads, expected "
          + "\(Self.simdWidth); the kernels are for Apple's own chips")
    }
    let id = Int32(kernels.count)
    kernels.append(MetalKernel(name: name, pipeline: pipeline))
    ids[name] = id
    return id
  }

  /// Those that exist, by id. The pipelines that are new since are written to the cache: a plan is about to be made,
  /// and no step waits.
  func all() -> [MetalKernel] {
    lock.lock()
    defer { lock.unlock() }
    for library in libraries { library.archive?.save() }
    return kernels
  }

  private static var options: MTLCompileOptions {
    let options = MTLCompileOptions()
    options.languageVersion = .version3_1  // the first with bfloat, and the newest of macOS 14
    // Infinities and NaN keep their meaning: masks and poisoned rows rely on it. Functions are as exact as elsewhere;
    // a kernel that wants the fast ones says so.
    if #available(macOS 15, *) {
      options.mathMode = .safe
      options.mathFloatingPointFunctions = .precise
    } else {
      options.fastMathEnabled = false
    }
    return options
  }

  /// FNV-1a, 64 bits. A collision costs a compilation: the archive has no such function then.
  private static func hash(_ text: String) -> String {
    var value: UInt64 = 0xcbf2_9ce4_8422_2325
    for byte in text.utf8 { value = (value ^ UInt64(byte)) &* 0x100_0000_01b3 }
    return String(value, radix: 16)
  }
}
