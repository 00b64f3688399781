public protocol MTLAllocation: AnyObject {
  var allocatedSize: Int { get }
}

public protocol MTLResource: MTLAllocation {
  var label: String? { get set }
}

public protocol MTLBuffer: MTLResource {
  var length: Int { get }
  func contents() -> UnsafeMutableRawPointer
}

public protocol MTLFunction: AnyObject {
  var name: String { get }
}

public protocol MTLLibrary: AnyObject {
  var functionNames: [String] { get }
  func makeFunction(name functionName: String) -> (any MTLFunction)?
}

public protocol MTLComputePipelineState: MTLAllocation {
  var maxTotalThreadsPerThreadgroup: Int { get }
  var threadExecutionWidth: Int { get }
}

public protocol MTLBinaryArchive: AnyObject {
  func addComputePipelineFunctions(descriptor: MTLComputePipelineDescriptor) throws
  func serialize(to url: URL) throws
}

public protocol MTLResidencySet: AnyObject {
  var allocationCount: Int { get }
  var allocatedSize: UInt64 { get }
  func addAllocation(_ allocation: any MTLAllocation)
  func removeAllocation(_ allocation: any MTLAllocation)
  func removeAllAllocations()
  func commit()
  func requestResidency()
  func endResidency()
}

public protocol MTLCommandEncoder: AnyObject {
  var label: String? { get set }
  func endEncoding()
}

public protocol MTLComputeCommandEncoder: MTLCommandEncoder {
  func setComputePipelineState(_ state: any MTLComputePipelineState)
  func setBuffer(_ buffer: (any MTLBuffer)?, offset: Int, index: Int)
  func setBufferOffset(_ offset: Int, index: Int)
  func dispatchThreadgroups(_ threadgroupsPerGrid: MTLSize, threadsPerThreadgroup: MTLSize)
  func memoryBarrier(scope: MTLBarrierScope)
}

public typealias MTLCommandBufferHandler = @Sendable (any MTLCommandBuffer) -> Void

public protocol MTLCommandBuffer: AnyObject {
  var status: MTLCommandBufferStatus { get }
  var error: (any Error)? { get }
  var gpuStartTime: CFTimeInterval { get }
  var gpuEndTime: CFTimeInterval { get }
  func makeComputeCommandEncoder(dispatchType: MTLDispatchType) -> (any MTLComputeCommandEncoder)?
  func addCompletedHandler(_ block: @escaping MTLCommandBufferHandler)
  func commit()
  func waitUntilCompleted()
}

public protocol MTLCommandBufferEncoderInfo: AnyObject {
  var label: String { get }
  var debugSignposts: [String] { get }
  var errorState: MTLCommandEncoderErrorState { get }
}

public protocol MTLCommandQueue: AnyObject {
  func makeCommandBuffer(descriptor: MTLCommandBufferDescriptor) -> (any MTLCommandBuffer)?
  func addResidencySet(_ residencySet: any MTLResidencySet)
  func removeResidencySet(_ residencySet: any MTLResidencySet)
}

public protocol MTLDevice: AnyObject {
  var name: String { get }
  var recommendedMaxWorkingSetSize: UInt64 { get }
  var currentAllocatedSize: Int { get }
  var maxBufferLength: Int { get }
  func makeCommandQueue(maxCommandBufferCount: Int) -> (any MTLCommandQueue)?
  func makeBuffer(length: Int, options: MTLResourceOptions) -> (any MTLBuffer)?
  func makeBuffer(
    bytesNoCopy pointer: UnsafeMutableRawPointer, length: Int, options: MTLResourceOptions,
    deallocator: (@Sendable (UnsafeMutableRawPointer, Int) -> Void)?
  ) -> (any MTLBuffer)?
  func makeLibrary(source: String, options: MTLCompileOptions?) throws -> any MTLLibrary
  func makeComputePipelineState(function computeFunction: any MTLFunction) throws -> any MTLComputePipelineState
  func makeComputePipelineState(
    descriptor: MTLComputePipelineDescriptor, options: MTLPipelineOption,
    reflection: AutoreleasingUnsafeMutablePointer<MTLAutoreleasedComputePipelineReflection?>?
  ) throws -> any MTLComputePipelineState
  func makeBinaryArchive(descriptor: MTLBinaryArchiveDescriptor) throws -> any MTLBinaryArchive
  func makeResidencySet(descriptor: MTLResidencySetDescriptor) throws -> any MTLResidencySet
}

public func MTLCreateSystemDefaultDevice() -> (any MTLDevice)? { SimDevice() }
