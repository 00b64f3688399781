#if canImport(Metal)
import Foundation
import Metal
#else
import MetalSim
#endif

extension LaunchError {
  /// A failure of `commands` in Metal's own words, or nil: the error, and what Metal knows of each encoder.
  ///
  /// A step is one encoder, so a run can tell no more than that the step is at fault; a profile has one for each
  /// launch.
  static func failure(of commands: any MTLCommandBuffer, _ what: String) -> LaunchError? {
    guard commands.status == .error else { return nil }
    guard let error = commands.error else { return .device("\(what): the commands failed, and Metal does not say why") }
    let value: Any = error  // a cast from `Error` itself is a warning on Apple's systems and impossible elsewhere
    let information = (value as? NSError)?.userInfo[MTLCommandBufferEncoderInfoErrorKey]
    let encoders = information as? [any MTLCommandBufferEncoderInfo] ?? []
    let states = encoders.map { "\($0.label) \($0.errorState.text)" }.joined(separator: ", ")
    return .device("\(what): \(error.localizedDescription)\(states.isEmpty ? "" : " (\(states))")")
  }
}

extension MTLCommandEncoderErrorState {
  fileprivate var text: String {
    switch self {
    case .completed: return "completed"
    case .affected: return "was affected"
    case .pending: return "had not begun"
    case .faulted: return "faulted"
    default: return "is in an unknown state"
    }
  }
}
