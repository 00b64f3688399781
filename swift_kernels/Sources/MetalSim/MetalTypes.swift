// Apple's Metal API, as much of it as the launcher uses, on the CPU. Names, labels and raw values are those of
// `import Metal`, so that the launcher's Metal files are one text for both. This file: values; MetalDescriptors.swift
// and MetalProtocols.swift: objects; FoundationTypes.swift: what Metal takes from Foundation.

public struct MTLSize {
  public var width: Int
  public var height: Int
  public var depth: Int

  public init(width: Int, height: Int, depth: Int) {
    self.width = width
    self.height = height
    self.depth = depth
  }
}

public struct MTLResourceOptions: OptionSet, Sendable {
  public let rawValue: UInt
  public init(rawValue: UInt) { self.rawValue = rawValue }

  public static let storageModeShared: MTLResourceOptions = []
}

public struct MTLBarrierScope: OptionSet, Sendable {
  public let rawValue: UInt
  public init(rawValue: UInt) { self.rawValue = rawValue }

  public static let buffers = MTLBarrierScope(rawValue: 1)
}

public struct MTLPipelineOption: OptionSet, Sendable {
  public let rawValue: UInt
  public init(rawValue: UInt) { self.rawValue = rawValue }

  public static let failOnBinaryArchiveMiss = MTLPipelineOption(rawValue: 4)
}

public struct MTLCommandBufferErrorOption: OptionSet, Sendable {
  public let rawValue: UInt
  public init(rawValue: UInt) { self.rawValue = rawValue }

  public static let encoderExecutionStatus = MTLCommandBufferErrorOption(rawValue: 1)
}

public enum MTLDispatchType: UInt, Sendable {
  case serial = 0
  case concurrent = 1
}

public enum MTLCommandBufferStatus: UInt, Sendable {
  case notEnqueued = 0
  case enqueued = 1
  case committed = 2
  case scheduled = 3
  case completed = 4
  case error = 5
}

public enum MTLCommandEncoderErrorState: Int, Sendable {
  case unknown = 0
  case completed = 1
  case affected = 2
  case pending = 3
  case faulted = 4
}

public enum MTLMathMode: Int, Sendable {
  case safe = 0
  case relaxed = 1
  case fast = 2
}

public enum MTLMathFloatingPointFunctions: Int, Sendable {
  case fast = 0
  case precise = 1
}

public enum MTLLanguageVersion: UInt, Sendable {
  case version3_0 = 196608
  case version3_1 = 196609
  case version3_2 = 196610
}
