#if canImport(Darwin)
import Darwin
#else
import Glibc
#endif

/// What this process may use of the machine's memory.
enum HostMemory {
  /// Physical memory, or the cgroup's limit where that is less; 0 when unknown.
  static func limit() -> UInt64 {
    let physical = UInt64(max(0, sysconf(Int32(_SC_PHYS_PAGES)))) * UInt64(max(0, sysconf(Int32(_SC_PAGESIZE))))
    guard let file = fopen("/sys/fs/cgroup/memory.max", "r") else { return physical }
    defer { fclose(file) }
    var line = [CChar](repeating: 0, count: 32)
    guard fgets(&line, Int32(line.count), file) != nil else { return physical }
    let limit = strtoull(line, nil, 10)  // 0 for "max"
    return limit > 0 ? min(limit, physical) : physical
  }
}
