// What Metal's API takes from Foundation and Objective-C, which are not linked here.

public typealias CFTimeInterval = Double
public typealias AutoreleasingUnsafeMutablePointer<Pointee> = UnsafeMutablePointer<Pointee>

public struct URL: Sendable {
  public let path: String
  public init(fileURLWithPath path: String) { self.path = path }
}

public let NSLocalizedDescriptionKey = "NSLocalizedDescription"

/// A class in Foundation; for whoever reads an error it comes to the same.
public protocol NSError: Error {
  var domain: String { get }
  var code: Int { get }
  var userInfo: [String: Any] { get }
}

/// What Metal gives as an NSError without more than a text.
struct SimError: Error, CustomStringConvertible {
  let description: String
}

extension Error {
  public var localizedDescription: String {
    (self as? NSError)?.userInfo[NSLocalizedDescriptionKey] as? String ?? "\(self)"
  }
}

/// There is nothing to release.
public func autoreleasepool<Result>(invoking body: () throws -> Result) rethrows -> Result { try body() }
