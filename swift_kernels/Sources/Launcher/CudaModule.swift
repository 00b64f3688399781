import CCuda

/// Machine code on a GPU.
final class CudaModule {
  let module: OpaquePointer
  private let context: CudaContext

  /// With the context current.
  init(_ context: CudaContext, module: OpaquePointer) {
    self.context = context
    self.module = module
  }

  deinit { context.leave { _ = context.driver.functions.cuModuleUnload(module) } }
}
