/// The kernels of a CUDA device: sources compiled to modules, and what launches have named. Methods may be called from
/// any thread; several compile side by side.
final class CudaKernels {
  private let context: CudaContext
  private let compiler: CudaCompiler
  private let lock = Lock()
  private var modules: [CudaModule] = []
  private var kernels: [any CudaKernel] = []  // by id
  private var ids: [String: Int32] = [:]

  /// - Throws: `LaunchError.device` where NVIDIA's compiler cannot be found.
  init(_ context: CudaContext) throws(LaunchError) {
    self.context = context
    compiler = try CudaCompiler(context)
  }

  /// A library of products is closed with the context current.
  deinit { context.leave { kernels.removeAll() } }

  /// See `Device.addLibrary`. A name that an earlier library has stays that one's.
  func add(source: String) throws(LaunchError) {
    let module = try compiler.module(source: source)
    lock.lock()
    defer { lock.unlock() }
    modules.append(module)
  }

  /// See `Device.findKernel`.
  func find(name: String) throws(LaunchError) -> Int32 {
    lock.lock()
    defer { lock.unlock() }
    if let id = ids[name] { return id }
    let kernel = try context.enter { () throws(LaunchError) in try make(name) }
    let id = Int32(kernels.count)
    kernels.append(kernel)
    ids[name] = id
    return id
  }

  /// Those that exist, by id.
  func all() -> [any CudaKernel] {
    lock.lock()
    defer { lock.unlock() }
    return kernels
  }

  private func make(_ name: String) throws(LaunchError) -> any CudaKernel {
    if name == CudaLibrary.kernel { return CudaLibraryKernel(try CudaLibrary.open()) }
    for module in modules {
      if let function = try CudaFunction(name, of: module, in: context) { return function }
    }
    throw .argument("kernel: none of the \(modules.count) libraries of this device has \"\(name)\"")
  }
}
