#if canImport(Darwin)
import Darwin
#else
import Glibc
#endif

enum Environment {
  /// A variable's value; nil when it is not set, or empty.
  static func text(_ name: String) -> String? {
    guard let value = getenv(name), value.pointee != 0 else { return nil }
    return String(cString: value)
  }
}
