#if canImport(Darwin)
import Darwin
#else
import Glibc
#endif

/// Machine code in files, so that the next process need not compile. A cache: whatever goes wrong with it costs the time
/// to compile, no more.
struct CudaCubins {
  private static let magic: UInt64 = 0x3142_5543_4b53_4d31  // of the layout below; files of another are not read

  /// In front of the machine code, which fills the rest of the file.
  private struct Header: Equatable {
    var magic: UInt64
    var key: UInt64  // hash of the key, another one than in the file's name
    var bytes: UInt64
    var check: UInt64  // hash of the machine code
  }

  private let folder = CacheFolder.path("cubins")

  /// What was kept for this key, whole and unchanged.
  func cubin(of key: String) -> [UInt8]? {
    guard let path = path(of: key), let file = fopen(path, "rb") else { return nil }
    defer { fclose(file) }
    var header = Header(magic: 0, key: 0, bytes: 0, check: 0)
    var status = stat()
    guard fstat(fileno(file), &status) == 0, fread(&header, MemoryLayout<Header>.size, 1, file) == 1,
      header.magic == Self.magic, header.bytes > 0,
      header.bytes == UInt64(status.st_size) - UInt64(MemoryLayout<Header>.size)
    else { return nil }
    var cubin = [UInt8](repeating: 0, count: Int(header.bytes))
    guard fread(&cubin, cubin.count, 1, file) == 1, header == Self.header(of: cubin, key: key) else { return nil }
    return cubin
  }

  func keep(_ cubin: [UInt8], of key: String) {
    guard let path = path(of: key) else { return }
    var unfinished = "\(path).XXXXXX".utf8CString.map { $0 }
    let descriptor = mkstemp(&unfinished)
    guard descriptor >= 0 else { return }
    var header = Self.header(of: cubin, key: key)
    let size = MemoryLayout<Header>.size
    var isWhole = write(descriptor, &header, size) == size
    isWhole = write(descriptor, cubin, cubin.count) == cubin.count && isWhole
    isWhole = close(descriptor) == 0 && isWhole
    if !isWhole || rename(unfinished, path) != 0 { unlink(unfinished) }
  }

  private func path(of key: String) -> String? {
    folder.map { "\($0)/\(String(Self.hash(key.utf8, seed: 0xcbf2_9ce4_8422_2325), radix: 16)).cubin" }
  }

  private static func header(of cubin: [UInt8], key: String) -> Header {
    Header(
      magic: magic, key: hash(key.utf8, seed: 0x9e37_79b9_7f4a_7c15), bytes: UInt64(cubin.count),
      check: hash(cubin, seed: 0xcbf2_9ce4_8422_2325))
  }

  /// FNV-1a, 64 bits, from any seed, its bits mixed at the end.
  private static func hash(_ bytes: some Sequence<UInt8>, seed: UInt64) -> UInt64 {
    var value = seed
    for byte in bytes { value = (value ^ UInt64(byte)) &* 0x100_0000_01b3 }
    value = (value ^ (value >> 30)) &* 0xbf58_476d_1ce4_e5b9
    return value ^ (value >> 31)
  }
}
