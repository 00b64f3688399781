import CMetalStep

/// Why a call failed: one case per `ms_status`, each with the text that `ms_last_error` gives.
///
/// A text says what was wrong, what was expected and what to do.
enum LaunchError: Error {
  case argument(String)
  case device(String)
  case memory(String)
  case timeout(String)

  var code: Int32 {
    switch self {
    case .argument: return Int32(bitPattern: MS_ERROR_ARGUMENT.rawValue)
    case .device: return Int32(bitPattern: MS_ERROR_DEVICE.rawValue)
    case .memory: return Int32(bitPattern: MS_ERROR_MEMORY.rawValue)
    case .timeout: return Int32(bitPattern: MS_ERROR_TIMEOUT.rawValue)
    }
  }

  var text: String {
    switch self {
    case .argument(let text), .device(let text), .memory(let text), .timeout(let text): return text
    }
  }
}

extension LaunchError {
  static func missing(_ name: String) -> LaunchError { .argument("\(name) is NULL, expected a pointer") }
  static func unknownBuffer(_ id: Int32) -> LaunchError {
    .argument("buffer \(id) does not exist: it was destroyed, or the id is not from ms_buffer_create of this device")
  }

  /// The ms_status of `body`; keeps the text of an error for ms_last_error.
  static func status(of body: () throws(LaunchError) -> Void) -> Int32 {
    do throws(LaunchError) {
      try body()
      return Int32(bitPattern: MS_OK.rawValue)
    } catch {
      ms_last_error_set(error.text)
      return error.code
    }
  }

  /// What `body` returns, or nil, as `status`.
  static func value<Result>(of body: () throws(LaunchError) -> Result) -> Result? {
    do throws(LaunchError) { return try body() } catch {
      ms_last_error_set(error.text)
      return nil
    }
  }
}
