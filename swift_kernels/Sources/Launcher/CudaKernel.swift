import CMetalStep

/// What a launch can name.
protocol CudaKernel {
  var name: String { get }

  /// A launch of it. With the context current.
  ///
  /// - Parameter addresses: of its bindings, in the order of `[[buffer(i)]]`.
  /// - Throws: `LaunchError.argument` for a launch that does not fit the kernel.
  func operation(
    _ launch: MSLaunch, number: Int, addresses: [UInt64], constants: UnsafeRawBufferPointer
  ) throws(LaunchError) -> any CudaOperation
}

/// Products of matrices by NVIDIA's library.
struct CudaLibraryKernel: CudaKernel {
  let name = CudaLibrary.kernel
  private let library: CudaLibrary

  init(_ library: CudaLibrary) { self.library = library }

  func operation(
    _ launch: MSLaunch, number: Int, addresses: [UInt64], constants: UnsafeRawBufferPointer
  ) throws(LaunchError) -> any CudaOperation {
    try library.operation(constants: constants, addresses: addresses)
  }
}
