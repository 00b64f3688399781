import Glibc

/// What Metal was asked to do, a line each, for tests: METALSTEP_SIM_LOG names the file.
///
/// - `pipeline NAME compiled` or `archived` (it came out of a binary archive)
/// - `residency commit COUNT BYTES`, `residency request COUNT BYTES`, `residency end`
/// - `queue adds residency set`, `queue removes residency set`
/// - `commands LABEL CALL=COUNT …`: a committed command buffer's encoder and how often each of its methods was called
final class SimLog: Sendable {
  private let path: String

  /// nil unless asked for. On the thread that opens a device: the environment may not be read beside one that changes
  /// it.
  init?() {
    guard let path = environment("METALSTEP_SIM_LOG") else { return nil }
    self.path = path
  }

  func write(_ line: String) {
    guard let file = fopen(path, "a") else { return }
    fputs(line + "\n", file)
    fclose(file)
  }
}
