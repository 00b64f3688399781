/// Where shared libraries may be that the loader does not find by their names.
enum LibraryFolders {
  private static let lock = Lock()
  nonisolated(unsafe) private static var folders: [String] = []

  /// A folder that is there already keeps its place.
  static func add(_ folder: UnsafePointer<CChar>?) throws(LaunchError) {
    guard let folder else { throw .missing("folder") }
    let path = String(cString: folder)
    lock.lock()
    defer { lock.unlock() }
    if !folders.contains(path) { folders.append(path) }
  }

  /// Of the reasons for which libraries do not serve, that of the first which is there, or else the first of all.
  static func firstReason(_ reasons: [(path: String, text: String)]) -> String {
    let telling = reasons.first { !$0.text.hasPrefix("\($0.path): cannot open shared object file: No such file") }
    return (telling ?? reasons[0]).text
  }

  /// In the order in which they were added.
  static func all() -> [String] {
    lock.lock()
    defer { lock.unlock() }
    return folders
  }
}
