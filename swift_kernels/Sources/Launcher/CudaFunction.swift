import CCuda
import CMetalStep

/// A compiled kernel.
final class CudaFunction: CudaKernel {
  let name: String
  let context: CudaContext
  let function: OpaquePointer
  let maxThreads: Int  // of a block, by what the kernel needs of registers
  let parameterBytes: [Int]  // in their order; a buffer is an address of 8 bytes
  private let module: CudaModule

  /// With the context current. nil when the module has no such kernel.
  init?(_ name: String, of module: CudaModule, in context: CudaContext) throws(LaunchError) {
    let functions = context.driver.functions
    var function: OpaquePointer?
    let code = functions.cuModuleGetFunction(&function, module.module, name)
    if code == MS_CUDA_NOT_FOUND { return nil }
    try context.check(code, "kernel \(name)")
    var threads: Int32 = 0
    try context.check(
      functions.cuFuncGetAttribute(&threads, Int32(MS_CUDA_FUNCTION_MAX_THREADS), function), "kernel \(name)")
    var sizes: [Int] = []
    var (offset, bytes) = (0, 0)
    while functions.cuFuncGetParamInfo(function, sizes.count, &offset, &bytes) == 0 { sizes.append(bytes) }
    self.name = name
    self.context = context
    self.function = function!
    self.module = module
    maxThreads = Int(threads)
    parameterBytes = sizes
  }

  func operation(
    _ launch: MSLaunch, number: Int, addresses: [UInt64], constants: UnsafeRawBufferPointer
  ) throws(LaunchError) -> any CudaOperation {
    try CudaLaunch(launch, number: number, kernel: self, addresses: addresses, constants: constants)
  }
}
