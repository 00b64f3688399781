// Apple's Metal API, as much of it as the launcher uses, on the CPU. Names, labels and raw values are those of
// `import Metal`, so that MetalDevice.swift is one text for both. This file: values; MetalProtocols.swift: objects.

public typealias CFTimeInterval = Double

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

public enum MTLMathMode: Int, Sendable {
  case safe = 0
  case relaxed = 1
  case fast = 2
}

public final class MTLCompileOptions {
  public init() {}

  public var mathMode = MTLMathMode.fast
  @available(*, deprecated, message: "Use mathMode instead")
  public var fastMathEnabled: Bool {
    get { mathMode == .fast }
    set { mathMode = newValue ? .fast : .safe }
  }
}

/// What Metal gives as an NSError.
struct SimError: Error, CustomStringConvertible {
  let description: String
}

extension Error {
  /// Foundation's, which is not linked here.
  public var localizedDescription: String { "\(self)" }
}

/// Objective-C's, which has nothing to release here.
public func autoreleasepool<Result>(invoking body: () throws -> Result) rethrows -> Result { try body() }
