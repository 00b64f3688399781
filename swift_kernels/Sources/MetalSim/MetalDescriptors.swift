public final class MTLCompileOptions {
  public init() {}

  public var languageVersion = MTLLanguageVersion.version3_2
  public var mathMode = MTLMathMode.fast
  public var mathFloatingPointFunctions = MTLMathFloatingPointFunctions.fast
  @available(*, deprecated, message: "Use mathMode instead")
  public var fastMathEnabled: Bool {
    get { mathMode == .fast }
    set { mathMode = newValue ? .fast : .safe }
  }
}

public final class MTLComputePipelineDescriptor {
  public init() {}

  public var label: String?
  public var computeFunction: (any MTLFunction)?
  public var binaryArchives: [any MTLBinaryArchive]?
}

public final class MTLBinaryArchiveDescriptor {
  public init() {}

  public var url: URL?
}

public final class MTLResidencySetDescriptor {
  public init() {}

  public var label: String?
  public var initialCapacity = 0
}

public final class MTLCommandBufferDescriptor {
  public init() {}

  public var retainedReferences = true
  public var errorOptions: MTLCommandBufferErrorOption = []
}

/// Only ever nil here.
public final class MTLComputePipelineReflection {}
public typealias MTLAutoreleasedComputePipelineReflection = MTLComputePipelineReflection

/// In the `userInfo` of a command buffer's error: `[any MTLCommandBufferEncoderInfo]`.
public let MTLCommandBufferEncoderInfoErrorKey = "MTLCommandBufferEncoderInfoErrorKey"
public let MTLCommandBufferErrorDomain = "MTLCommandBufferErrorDomain"
