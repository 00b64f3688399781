#if canImport(Darwin)
import Darwin
#else
import Glibc
#endif

/// Where the launcher keeps what can be made again.
enum CacheFolder {
  /// METALSTEP_CACHE, else metalstep in the user's folder for such things; nil when there is none or it cannot be made.
  ///
  /// - Parameter name: of a folder in it.
  static func path(_ name: String) -> String? {
    guard let base = base() else { return nil }
    let folder = "\(base)/\(name)"
    var path = folder.hasPrefix("/") ? "" : "."
    for part in folder.split(separator: "/") {
      path += "/" + part
      // Code is loaded from here: nobody else may write it.
      if mkdir(path, 0o700) != 0 && errno != EEXIST { return nil }
    }
    return path
  }

  private static func base() -> String? {
    if let chosen = Environment.text("METALSTEP_CACHE") { return chosen }
    #if canImport(Darwin)
    return Environment.text("HOME").map { $0 + "/Library/Caches/metalstep" }
    #else
    return (Environment.text("XDG_CACHE_HOME") ?? Environment.text("HOME").map { $0 + "/.cache" }).map { $0 + "/metalstep" }
    #endif
  }
}
