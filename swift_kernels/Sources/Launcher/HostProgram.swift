import CKernels

/// A host plan in plain memory: what every thread of the pool replays. It refers to no Swift object, since counting
/// references would cost more than a launch (12–15 ns against 2).
struct HostProgram {
  struct Launch {
    var function: ms_host_function
    var buffers: UnsafeMutablePointer<UnsafeMutableRawPointer?>
    var constants: UnsafeMutableRawPointer
    var grid: UnsafeMutablePointer<UInt32>  // 3 words
    var barrier: Bool
  }

  var launches: UnsafeMutablePointer<Launch>
  var count: Int
  var pool: OpaquePointer
  var shared: UnsafeMutableRawPointer
  var scratch: UnsafeMutableRawPointer  // of thread 0
  var scratchStride: Int  // bytes from one thread's to the next's
  var steps = 1
  var times: UnsafeMutablePointer<UInt64>?  // profiling: nanoseconds by launch

  /// The body of a pool job: `context` is a HostProgram.
  static let replay: ms_pool_body = { context, thread, threads in
    let program = context!.assumingMemoryBound(to: HostProgram.self)
    var args = program.pointee.arguments(thread: thread, threads: threads)
    withUnsafeMutablePointer(to: &args) { args in
      let launches = program.pointee.launches
      let count = program.pointee.count
      let pool = program.pointee.pool
      for step in 0..<program.pointee.steps {
        if step > 0 { ms_pool_barrier(pool) }
        for i in 0..<count {
          let launch = launches + i
          if launch.pointee.barrier { ms_pool_barrier(pool) }
          args.pointee.set(launch.pointee)
          launch.pointee.function(args)
        }
      }
    }
  }

  /// As `replay` for one step, with a barrier behind each launch, so that its time is its own.
  static let profile: ms_pool_body = { context, thread, threads in
    let program = context!.assumingMemoryBound(to: HostProgram.self)
    var args = program.pointee.arguments(thread: thread, threads: threads)
    for i in 0..<program.pointee.count {
      let start = MonotonicClock.now()
      args.set(program.pointee.launches[i])
      program.pointee.launches[i].function(&args)
      ms_pool_barrier(program.pointee.pool)
      if thread == 0 { program.pointee.times![i] = UInt64(max(0, MonotonicClock.now() - start)) }
    }
  }

  private func arguments(thread: Int32, threads: Int32) -> ms_host_args {
    var args = ms_host_args()
    args.scratch = scratch + Int(thread) * scratchStride
    args.shared = shared
    args.pool = pool
    args.thread = thread
    args.threads = threads
    return args
  }
}

extension ms_host_args {
  @inline(__always) fileprivate mutating func set(_ launch: HostProgram.Launch) {
    buffers = UnsafePointer(launch.buffers)
    constants = UnsafeRawPointer(launch.constants)
    grid = UnsafePointer(launch.grid)
  }
}
