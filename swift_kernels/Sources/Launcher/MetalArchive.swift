#if canImport(Metal)
import Foundation
import Metal
#else
import Glibc
import MetalSim
#endif

/// The compiled pipelines of one library in a file, so that the next process need not compile them. A cache: whatever
/// goes wrong with it costs the time to compile, no more.
final class MetalArchive {
  private let device: any MTLDevice
  private let archive: any MTLBinaryArchive
  private let path: String
  private var isChanged = false

  /// nil where Metal keeps no archives. A file that it does not take, e.g. of another system version, is begun anew.
  init?(_ device: any MTLDevice, path: String) {
    let descriptor = MTLBinaryArchiveDescriptor()
    var kept: (any MTLBinaryArchive)?
    if access(path, R_OK) == 0 {
      descriptor.url = URL(fileURLWithPath: path)
      kept = try? device.makeBinaryArchive(descriptor: descriptor)
      descriptor.url = nil
    }
    guard let archive = kept ?? (try? device.makeBinaryArchive(descriptor: descriptor)) else { return nil }
    self.device = device
    self.archive = archive
    self.path = path
  }

  /// A pipeline out of the archive, or a new one, which joins it.
  func makePipeline(_ function: any MTLFunction) throws -> any MTLComputePipelineState {
    let descriptor = MTLComputePipelineDescriptor()
    descriptor.label = function.name
    descriptor.computeFunction = function
    descriptor.binaryArchives = [archive]
    if let kept = try? device.makeComputePipelineState(
      descriptor: descriptor, options: .failOnBinaryArchiveMiss, reflection: nil)
    {
      return kept
    }
    if (try? archive.addComputePipelineFunctions(descriptor: descriptor)) != nil { isChanged = true }
    return try device.makeComputePipelineState(descriptor: descriptor, options: [], reflection: nil)
  }

  /// Writes the file if a pipeline has joined since. Another process may do the same: the last one's file stays.
  func save() {
    guard isChanged else { return }
    isChanged = false
    let unfinished = "\(path).\(getpid())"
    guard (try? archive.serialize(to: URL(fileURLWithPath: unfinished))) != nil else { return }
    if rename(unfinished, path) != 0 { unlink(unfinished) }
  }
}
