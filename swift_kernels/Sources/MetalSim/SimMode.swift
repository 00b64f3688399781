/// How kernels are compiled, beside Metal's maths mode: METALSTEP_SIM_SANITIZE.
enum SimMode: String, CaseIterable {
  case plain = ""
  /// Over-reads by a byte of device buffers and threadgroup variables end the process with AddressSanitizer's report.
  case address
  /// Races between threads of a threadgroup are reported by ThreadSanitizer, which must be preloaded.
  case thread
  /// As with Metal's fast maths: no NaN, no infinity, sums in any order.
  case fastMath = "fast-math"

  static func chosen() throws -> SimMode {
    let name = environment("METALSTEP_SIM_SANITIZE") ?? ""
    guard let mode = SimMode(rawValue: name) else {
      let names = allCases.dropFirst().map(\.rawValue).joined(separator: ", ")
      throw SimError(description: "METALSTEP_SIM_SANITIZE is \(name), expected one of \(names)")
    }
    return mode
  }

  var isSanitizer: Bool { self == .address || self == .thread }

  /// Of clang.
  var arguments: [String] {
    let traced = ["-O1", "-g", "-fno-omit-frame-pointer"]
    switch self {
    case .plain: return ["-O2"]
    case .fastMath: return ["-O2", "-ffast-math"]
    case .address:
      // Fibers' stacks are none that it knows of.
      return traced + ["-fsanitize=address", "-shared-libasan", "-fsanitize-address-use-after-return=never"]
    case .thread: return traced + ["-fsanitize=thread"]
    }
  }

  /// The library that the code needs and that may not be where the loader looks.
  var runtime: String? {
    #if arch(x86_64)
    let machine = "x86_64"
    #else
    let machine = "aarch64"
    #endif
    return self == .address ? "libclang_rt.asan-\(machine).so" : nil
  }
}
