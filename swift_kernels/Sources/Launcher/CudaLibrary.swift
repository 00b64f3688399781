import CLibraryGemm
import CMetalStep

/// NVIDIA's library of matrix products (cuBLASLt), for launches of the kernel `library_gemm`.
///
/// Its calls are made with the device's context current.
final class CudaLibrary {
  static let kernel = "library_gemm"
  private static let names = ["libcublasLt.so.13", "libcublasLt.so.12"]
  private static let toolkit = "/usr/local/cuda/lib64"

  fileprivate let pointer: OpaquePointer

  private init(_ pointer: OpaquePointer) { self.pointer = pointer }

  deinit { ms_gemm_library_close(pointer) }

  /// The library that METALSTEP_CUBLAS names, or else the first that is found where the loader looks, in the folders of
  /// `LibraryFolders` and in CUDA's own.
  ///
  /// - Throws: `LaunchError.argument` where there is none, with what to do; plans then have to do without it.
  static func open() throws(LaunchError) -> CudaLibrary {
    let places = names + (LibraryFolders.all() + [toolkit]).flatMap { folder in names.map { "\(folder)/\($0)" } }
    let paths = Environment.text("METALSTEP_CUBLAS").map { [$0] } ?? places
    var reasons: [(path: String, text: String)] = []
    for path in paths {
      let (library, text) = withErrorText { ms_gemm_library_open(path, $0, $1) }
      if let library { return CudaLibrary(library) }
      reasons.append((path, text))
    }
    throw .argument(
      "cuBLAS: \(LibraryFolders.firstReason(reasons)); looked in \(paths.count) places. Long prompts take longer without it: "
        + "pip install nvidia-cublas, or set METALSTEP_CUBLAS to libcublasLt.so of CUDA 12 or later")
  }

  /// A launch of `library_gemm` with its constants and the device addresses of its bindings.
  ///
  /// - Throws: `LaunchError.argument` for constants or bindings that are not such a launch's; `LaunchError.device` where
  ///   the library has no way to multiply matrices of these sizes.
  func operation(constants: UnsafeRawBufferPointer, addresses: [UInt64]) throws(LaunchError) -> any CudaOperation {
    let size = MemoryLayout<MSGpuLibraryGemmParams>.size
    guard constants.count == size, addresses.count == CudaGemm.bindings else {
      throw .argument(
        "\(Self.kernel): \(constants.count) bytes of constants and \(addresses.count) bindings, expected \(size) and "
          + "\(CudaGemm.bindings)")
    }
    var params = MSGpuLibraryGemmParams()
    withUnsafeMutableBytes(of: &params) { $0.copyMemory(from: constants) }
    let (gemm, text) = withErrorText { ms_gemm_create(pointer, &params, $0, $1) }
    guard let gemm else { throw .device("cuBLAS: \(text)") }
    return CudaGemm(gemm, of: self, addresses: addresses)
  }
}

/// A product by NVIDIA's library, resolved.
final class CudaGemm: CudaOperation {
  fileprivate static let bindings = Int(MS_LIBRARY_GEMM_WORKSPACE.rawValue) + 1

  let name = CudaLibrary.kernel
  let endsInKernel = false  // the library may end in copies of memory, which nothing may overtake
  private let gemm: OpaquePointer
  private let library: CudaLibrary  // which `gemm` refers to
  private let addresses: [UInt64]

  fileprivate init(_ gemm: OpaquePointer, of library: CudaLibrary, addresses: [UInt64]) {
    self.gemm = gemm
    self.library = library
    self.addresses = addresses
  }

  deinit { ms_gemm_destroy(gemm) }

  /// `isEarly` is of no use here: the library's kernels do not wait by themselves for what is in front of them.
  func enqueue(on stream: OpaquePointer, isEarly: Bool) throws(LaunchError) {
    let (status, text) = withErrorText { ms_gemm_enqueue(gemm, UnsafeMutableRawPointer(stream), addresses, $0, $1) }
    guard status == 0 else { throw .device("cuBLAS: \(text)") }
  }
}

/// What `body` returns, and the text that it writes to the memory it is given.
private func withErrorText<Result>(_ body: (UnsafeMutablePointer<CChar>, Int) -> Result) -> (Result, String) {
  withUnsafeTemporaryAllocation(of: CChar.self, capacity: 512) { text in
    text[0] = 0
    let result = body(text.baseAddress!, text.count)
    return (result, String(cString: text.baseAddress!))
  }
}
