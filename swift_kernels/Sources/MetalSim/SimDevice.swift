import CMetalSim
import Glibc

final class SimDevice: MTLDevice {
  var name: String { "Simulated Metal" }
  var recommendedMaxWorkingSetSize: UInt64 {
    UInt64(sysconf(Int32(_SC_PHYS_PAGES))) * UInt64(sysconf(Int32(_SC_PAGESIZE))) / 4 * 3
  }
  var maxBufferLength: Int { Int(recommendedMaxWorkingSetSize) }

  func makeCommandQueue() -> (any MTLCommandQueue)? { SimQueue() }

  func makeBuffer(length: Int, options: MTLResourceOptions) -> (any MTLBuffer)? {
    length <= maxBufferLength ? SimBuffer(length: length) : nil
  }

  func makeLibrary(source: String, options: MTLCompileOptions?) throws -> any MTLLibrary {
    try SimLibrary(source: source, mathMode: (options ?? MTLCompileOptions()).mathMode)
  }

  func makeComputePipelineState(function computeFunction: any MTLFunction) throws -> any MTLComputePipelineState {
    guard let function = computeFunction as? SimFunction else {
      throw SimError(description: "function \(computeFunction.name) is not of this device")
    }
    return SimPipeline(function)
  }
}

final class SimBuffer: MTLBuffer {
  private static let pageBytes = 16384  // of Apple's chips

  let length: Int
  private let memory: UnsafeMutableRawPointer

  init?(length: Int) {
    var memory: UnsafeMutableRawPointer?
    guard length > 0, posix_memalign(&memory, Self.pageBytes, length) == 0, let memory else { return nil }
    self.length = length
    self.memory = memory
    memset(memory, 0xff, length)  // what Metal leaves there is nobody's business: NaN
  }

  deinit { free(memory) }

  func contents() -> UnsafeMutableRawPointer { memory }
}

final class SimFunction: MTLFunction {
  let name: String
  let entry: sim_entry
  let buffers: [Int]  // indices that its parameters name
  let library: SimLibrary  // whose code `entry` is

  init(name: String, entry: @escaping sim_entry, buffers: [Int], library: SimLibrary) {
    self.name = name
    self.entry = entry
    self.buffers = buffers
    self.library = library
  }
}

final class SimPipeline: MTLComputePipelineState {
  let function: SimFunction

  init(_ function: SimFunction) { self.function = function }

  var maxTotalThreadsPerThreadgroup: Int { SIM_MAX_THREADS }
  var threadExecutionWidth: Int { SIM_SIMD_WIDTH }
}
