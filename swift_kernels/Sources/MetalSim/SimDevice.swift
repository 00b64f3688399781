import CMetalSim
import Glibc

final class SimDevice: MTLDevice, @unchecked Sendable {
  let log = SimLog()
  let recommendedMaxWorkingSetSize: UInt64
  private let mutex: UnsafeMutablePointer<pthread_mutex_t> = .allocate(capacity: 1)
  private var allocated = 0

  init() {
    pthread_mutex_init(mutex, nil)
    let physical = UInt64(sysconf(Int32(_SC_PHYS_PAGES))) * UInt64(sysconf(Int32(_SC_PAGESIZE)))
    recommendedMaxWorkingSetSize = environment("METALSTEP_SIM_MEMORY").flatMap { UInt64($0) } ?? physical / 4 * 3
  }

  deinit {
    pthread_mutex_destroy(mutex)
    mutex.deallocate()
  }

  var name: String { "Simulated Metal" }
  var maxBufferLength: Int { Int(clamping: recommendedMaxWorkingSetSize) }
  var currentAllocatedSize: Int {
    pthread_mutex_lock(mutex)
    defer { pthread_mutex_unlock(mutex) }
    return allocated
  }

  /// Counts a buffer's bytes in or, when negative, out.
  func allocate(_ bytes: Int) {
    pthread_mutex_lock(mutex)
    allocated += bytes
    pthread_mutex_unlock(mutex)
  }

  func makeCommandQueue(maxCommandBufferCount: Int) -> (any MTLCommandQueue)? {
    SimQueue(maxCommandBufferCount, log: log)
  }

  func makeBuffer(length: Int, options: MTLResourceOptions) -> (any MTLBuffer)? {
    length <= maxBufferLength ? SimBuffer(length: length, device: self) : nil
  }

  func makeBuffer(
    bytesNoCopy pointer: UnsafeMutableRawPointer, length: Int, options: MTLResourceOptions,
    deallocator: (@Sendable (UnsafeMutableRawPointer, Int) -> Void)?
  ) -> (any MTLBuffer)? {
    length <= maxBufferLength
      ? SimBuffer(wrapping: pointer, length: length, deallocator: deallocator, device: self) : nil
  }

  func makeLibrary(source: String, options: MTLCompileOptions?) throws -> any MTLLibrary {
    try SimLibrary(source: source, mathMode: (options ?? MTLCompileOptions()).mathMode)
  }

  func makeComputePipelineState(function computeFunction: any MTLFunction) throws -> any MTLComputePipelineState {
    guard let function = computeFunction as? SimFunction else {
      throw SimError(description: "function \(computeFunction.name) is not of this device")
    }
    log?.write("pipeline \(function.name) compiled")
    return SimPipeline(function)
  }

  func makeComputePipelineState(
    descriptor: MTLComputePipelineDescriptor, options: MTLPipelineOption,
    reflection: AutoreleasingUnsafeMutablePointer<MTLAutoreleasedComputePipelineReflection?>?
  ) throws -> any MTLComputePipelineState {
    guard let function = descriptor.computeFunction as? SimFunction else {
      throw SimError(description: "a pipeline descriptor without a function of this device")
    }
    if (descriptor.binaryArchives ?? []).contains(where: { ($0 as? SimBinaryArchive)?.contains(function) == true }) {
      log?.write("pipeline \(function.name) archived")
      return SimPipeline(function)
    }
    guard !options.contains(.failOnBinaryArchiveMiss) else {
      throw SimError(description: "no archive has the pipeline of \(function.name)")
    }
    return try makeComputePipelineState(function: function)
  }

  func makeBinaryArchive(descriptor: MTLBinaryArchiveDescriptor) throws -> any MTLBinaryArchive {
    try SimBinaryArchive(descriptor.url, log: log)
  }

  func makeResidencySet(descriptor: MTLResidencySetDescriptor) throws -> any MTLResidencySet {
    SimResidencySet(log: log)
  }
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

  var allocatedSize: Int { 0 }
  var maxTotalThreadsPerThreadgroup: Int { SIM_MAX_THREADS }
  var threadExecutionWidth: Int { SIM_SIMD_WIDTH }
}
