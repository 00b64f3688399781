import Glibc

/// Compiles translated kernels with clang, once: results are kept in a folder of the user, by the hash of all that goes
/// in.
enum KernelCompiler {
  private static let common = [
    "-x", "c++", "-std=c++17", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti", "-fno-strict-aliasing",
    "-fno-math-errno", "-fvisibility=default", "-ffp-contract=fast", "-fstack-clash-protection",
    "-Wno-everything", "-Werror=return-type",
  ]
  #if arch(x86_64)
  private static let target = ["-mavx2", "-mfma", "-mf16c", "-Xclang", "-ffloat16-excess-precision=none"]
  #else
  private static let target: [String] = []
  #endif

  /// The path of a shared library with the code of `text`.
  ///
  /// - Throws: `SimError` with the compiler's own text, or saying that there is no compiler.
  static func library(text: String, fastMath: Bool) throws -> String {
    let compiler = try findCompiler()
    let mode = try SimMode.chosen()
    var arguments = common + target + mode.arguments + (fastMath ? ["-ffast-math"] : [])
    if let runtime = mode.runtime {
      arguments.append("-Wl,-rpath," + (try folder(of: runtime, compiler.path)))
    }
    // The compiler is named in the text's first line, so that equal texts were compiled alike.
    let stored = "// \(compiler.identity) \(arguments.joined(separator: " "))\n" + text
    let folder = try cacheFolder()
    let base = folder + "/" + hash(stored)
    // A hash alone may collide; the text beside the library cannot.
    if access(base + ".so", R_OK) == 0, read(base + ".cpp") == stored { return base + ".so" }

    let unique = base + ".\(getpid()).\(pthread_self())"
    let outputs = (source: unique + ".cpp", library: unique + ".so", messages: unique + ".txt")
    defer { unlink(outputs.messages) }
    try write(stored, to: outputs.source)
    let status = try run(
      compiler.path, arguments + ["-o", outputs.library, outputs.source, "-lm"], output: outputs.messages)
    guard status == 0 else {
      let messages = read(outputs.messages) ?? ""
      unlink(outputs.source)
      unlink(outputs.library)
      throw SimError(description: messages.isEmpty ? "\(compiler.path) failed with status \(status)" : messages)
    }
    // The library last: whoever finds it finds the text too.
    guard rename(outputs.source, base + ".cpp") == 0, rename(outputs.library, base + ".so") == 0 else {
      throw SimError(description: "\(base).so cannot be written: \(String(cString: strerror(errno)))")
    }
    return base + ".so"
  }

  /// METALSTEP_CLANG, or clang++ on PATH; and what tells one version of it from another.
  private static func findCompiler() throws -> (path: String, identity: String) {
    let name = environment("METALSTEP_CLANG") ?? "clang++"
    let folders = name.contains("/") ? [""] : (environment("PATH") ?? "").split(separator: ":").map { $0 + "/" }
    for folder in folders where access(folder + name, X_OK) == 0 {
      var status = stat()
      guard stat(folder + name, &status) == 0 else { continue }
      return (folder + name, "\(folder + name) \(status.st_size) \(status.st_mtim.tv_sec)")
    }
    throw SimError(
      description: """
        simulated Metal compiles kernels with clang++, and there is no \(name)\(name.contains("/") ? "" : " on PATH"); \
        install clang or set METALSTEP_CLANG to its path (the host device needs no compiler)
        """)
  }

  /// Where the compiler keeps `file` of its own.
  private static func folder(of file: String, _ compiler: String) throws -> String {
    let answer = try cacheFolder() + "/\(getpid()).\(pthread_self()).answer.txt"
    defer { unlink(answer) }
    let status = try run(compiler, ["-print-file-name=\(file)"], output: answer)
    guard status == 0, let path = read(answer), let slash = path.lastIndex(of: "/") else {
      throw SimError(description: "\(compiler) has no \(file), which METALSTEP_SIM_SANITIZE needs")
    }
    return String(path[..<slash])
  }

  /// METALSTEP_SIM_CACHE, else metalstep/simulator in the user's cache folder.
  private static func cacheFolder() throws -> String {
    var folder: String
    if let chosen = environment("METALSTEP_SIM_CACHE") {
      folder = chosen
    } else if let cache = environment("XDG_CACHE_HOME") {
      folder = cache + "/metalstep/simulator"
    } else if let home = environment("HOME") {
      folder = home + "/.cache/metalstep/simulator"
    } else {
      throw SimError(description: "no folder for compiled kernels: set METALSTEP_SIM_CACHE, XDG_CACHE_HOME or HOME")
    }
    if !folder.hasPrefix("/"), let here = getcwd(nil, 0) {  // dlopen would search for a relative path
      folder = String(cString: here) + "/" + folder
      free(here)
    }
    var path = ""
    for part in folder.split(separator: "/") {
      path += "/" + part
      // Code is loaded from here: nobody else may write it.
      if mkdir(path, 0o700) != 0 && errno != EEXIST {
        throw SimError(
          description:
            "\(path), for compiled kernels, cannot be made: \(String(cString: strerror(errno))); set METALSTEP_SIM_CACHE"
        )
      }
    }
    return path
  }

  /// - Parameter output: the file for what the program writes.
  private static func run(_ program: String, _ arguments: [String], output: String) throws -> Int32 {
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, output, O_CREAT | O_WRONLY | O_TRUNC, 0o600)
    posix_spawn_file_actions_adddup2(&actions, STDOUT_FILENO, STDERR_FILENO)
    var words: [UnsafeMutablePointer<CChar>?] = ([program] + arguments).map { strdup($0) } + [nil]
    defer { for word in words { free(word) } }
    var process: pid_t = 0
    let failure = posix_spawn(&process, program, &actions, nil, &words, environ)
    guard failure == 0 else {
      throw SimError(description: "\(program) cannot be run: \(String(cString: strerror(failure)))")
    }
    var status: Int32 = 0
    while waitpid(process, &status, 0) < 0 {
      guard errno == EINTR else { throw SimError(description: "\(program): \(String(cString: strerror(errno)))") }
    }
    return status
  }

  private static func write(_ text: String, to path: String) throws {
    let written: Bool
    if let file = fopen(path, "w") {
      let complete = fputs(text, file) >= 0
      written = fclose(file) == 0 && complete
    } else {
      written = false
    }
    guard written else {
      throw SimError(
        description: "\(path) cannot be written: \(String(cString: strerror(errno))); set METALSTEP_SIM_CACHE")
    }
  }

  private static func read(_ path: String) -> String? {
    guard let file = fopen(path, "r") else { return nil }
    defer { fclose(file) }
    var text: [UInt8] = []
    var chunk = [UInt8](repeating: 0, count: 1 << 16)
    while case let count = fread(&chunk, 1, chunk.count, file), count > 0 { text += chunk[..<count] }
    return String(decoding: text, as: UTF8.self)
  }

  /// FNV-1a, 64 bits.
  private static func hash(_ text: String) -> String {
    var value: UInt64 = 0xcbf2_9ce4_8422_2325
    for byte in text.utf8 { value = (value ^ UInt64(byte)) &* 0x100_0000_01b3 }
    return String(value, radix: 16)
  }
}

func environment(_ name: String) -> String? {
  guard let value = getenv(name), value.pointee != 0 else { return nil }
  return String(cString: value)
}
