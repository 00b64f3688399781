/// Why commands failed, as Metal tells it.
struct SimFailure {
  struct CommandBufferError: NSError {
    let domain = MTLCommandBufferErrorDomain
    let code: Int
    let userInfo: [String: Any]
  }

  let text: String
  var code = 1  // MTLCommandBufferErrorInternal

  /// Faults of a GPU that METALSTEP_SIM_FAULT names, with Metal's texts.
  static func fault(_ name: String) -> SimFailure? {
    switch name {
    case "timeout":
      return SimFailure(
        text: "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)", code: 2)
    case "memory":
      return SimFailure(
        text: "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)", code: 8)
    case "removed":
      return SimFailure(
        text: "Device was removed (0000000b:kIOGPUCommandBufferCallbackErrorDeviceRemoved)", code: 11)
    default: return nil
    }
  }

  /// - Parameter encoders: labels, where the command buffer was asked to report their states.
  func error(encoders: [String]?) -> CommandBufferError {
    var information: [String: Any] = [NSLocalizedDescriptionKey: text]
    if let encoders {
      let infos: [any MTLCommandBufferEncoderInfo] = encoders.map { EncoderInfo(label: $0) }
      information[MTLCommandBufferEncoderInfoErrorKey] = infos
    }
    return CommandBufferError(code: code, userInfo: information)
  }

  private final class EncoderInfo: MTLCommandBufferEncoderInfo {
    let label: String
    let debugSignposts: [String] = []
    let errorState = MTLCommandEncoderErrorState.faulted

    init(label: String) { self.label = label }
  }
}
