import CCuda
import CMetalStep

/// Memory of a GPU, or the host's memory that the GPU reads and writes over the bus.
final class CudaBuffer: DeviceBuffer {
  /// Bytes of the GPU's memory that buffers leave free: kernels, graphs and the driver itself need some, and a GPU
  /// without any fails in ways that nobody understands.
  private static let reserve = 128 << 20

  let contents: UnsafeMutableRawPointer
  let bytes: Int
  let isVisible: Bool
  let isReadOnly = false
  private let context: CudaContext

  /// - Throws: `LaunchError.memory` with what there is.
  init(_ context: CudaContext, bytes: Int, memory: ms_memory) throws(LaunchError) {
    self.context = context
    self.bytes = bytes
    isVisible = memory == MS_MEMORY_SHARED
    contents =
      isVisible ? try Self.pinned(context, bytes: max(bytes, 1)) : try Self.device(context, bytes: max(bytes, 1))
  }

  deinit {
    context.leave {
      let functions = context.driver.functions
      _ = functions.cuStreamSynchronize(context.stream)  // a copy to or from it may be queued
      if isVisible {
        _ = functions.cuMemFreeHost(contents)
      } else {
        _ = functions.cuMemFree(UInt64(UInt(bitPattern: contents)))
      }
    }
  }

  /// Free and all memory of the GPU, in bytes.
  static func memory(of context: CudaContext) throws(LaunchError) -> (free: Int, total: Int) {
    try context.enter { () throws(LaunchError) in
      var free = 0
      var total = 0
      try context.check(context.driver.functions.cuMemGetInfo(&free, &total), "cuda: memory")
      return (free, total)
    }
  }

  /// What buffers may still take.
  static func left(of context: CudaContext) -> Int {
    guard let memory = try? memory(of: context) else { return 0 }
    return max(0, memory.free - reserve)
  }

  private static func device(_ context: CudaContext, bytes: Int) throws(LaunchError) -> UnsafeMutableRawPointer {
    let memory = try memory(of: context)
    func refusal(_ why: String) -> LaunchError {
      .memory(
        "buffer: \(context.gpu.name) cannot give \(bytes) bytes\(why): \(memory.free) of its \(memory.total) bytes are "
          + "free, of which \(reserve) stay so. Use a smaller model or less KV memory, or end other programs on this GPU")
    }
    guard bytes <= memory.free - reserve else { throw refusal("") }
    let functions = context.driver.functions
    return try context.enter { () throws(LaunchError) in
      var address: UInt64 = 0
      let code = functions.cuMemAlloc(&address, bytes)
      if code == MS_CUDA_OUT_OF_MEMORY { throw refusal(" in one piece") }
      try context.check(code, "buffer: \(bytes) bytes")
      context.submission.lock()
      defer { context.submission.unlock() }
      let zeroed = functions.cuMemsetD8Async(address, 0, bytes, context.stream)
      if zeroed != 0 {
        _ = functions.cuMemFree(address)
        throw context.error(zeroed, "buffer: \(bytes) bytes")
      }
      return UnsafeMutableRawPointer(bitPattern: UInt(address))!
    }
  }

  /// Pinned memory has one address for the host and the GPU.
  static func pinned(_ context: CudaContext, bytes: Int) throws(LaunchError) -> UnsafeMutableRawPointer {
    try context.enter { () throws(LaunchError) in
      var address: UnsafeMutableRawPointer?
      let flags = UInt32(MS_CUDA_HOST_PORTABLE | MS_CUDA_HOST_MAPPED)
      let code = context.driver.functions.cuMemHostAlloc(&address, bytes, flags)
      guard code == 0, let address else {
        if code == MS_CUDA_OUT_OF_MEMORY {
          throw .memory(
            "buffer: \(bytes) bytes of the machine's memory cannot be pinned for \(context.gpu.name): too few are free, or the "
              + "container may have no more; end other programs, or give it more")
        }
        throw context.error(code, "buffer: \(bytes) pinned bytes")
      }
      address.initializeMemory(as: UInt8.self, repeating: 0, count: bytes)
      return address
    }
  }
}
