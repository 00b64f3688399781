/// Memory that the launches of a step share: a part for each thread and one for all.
///
/// One job runs at a time, so plans share it too: a plan takes the device's scratch when that is large enough for it.
final class HostScratch {
  let perThread: Int  // bytes, a multiple of 128: neighbours share no cache line, nor a pair that is fetched together
  let shared: Int  // bytes
  let address: UnsafeMutableRawPointer  // the shared part, then thread 0's, thread 1's, …

  /// - Throws: `LaunchError.memory`.
  init(perThread: Int, shared: Int, threads: Int) throws(LaunchError) {
    self.perThread = perThread
    self.shared = shared
    let (all, overflow) = perThread.multipliedReportingOverflow(by: threads)
    let (bytes, overflow2) = all.addingReportingOverflow(shared)
    guard !overflow, !overflow2 else {
      throw .memory("plan: scratch of \(shared) bytes and \(perThread) a thread is too large")
    }
    memory = try HostBuffer(bytes: bytes)
    address = memory.contents
  }

  func of(thread: Int32) -> UnsafeMutableRawPointer { address + shared + Int(thread) * perThread }

  private let memory: HostBuffer
}
