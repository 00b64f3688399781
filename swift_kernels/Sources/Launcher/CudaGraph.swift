import CCuda

/// Operations captured into one graph, which one call of the driver replays.
final class CudaGraph {
  private(set) var operations: [any CudaOperation]
  private let context: CudaContext
  private let executable: OpaquePointer

  /// With the context current.
  ///
  /// - Parameter events: none, or one in front of all operations and one behind each; operations do not overlap then.
  init(_ context: CudaContext, _ operations: [any CudaOperation], events: [CudaEvent] = []) throws(LaunchError) {
    let functions = context.driver.functions
    // A stream of its own: other threads may be queuing runs on the device's.
    var stream: OpaquePointer?
    try context.check(functions.cuStreamCreate(&stream, UInt32(MS_CUDA_STREAM_NON_BLOCKING)), "plan")
    defer { _ = functions.cuStreamDestroy(stream) }
    // Relaxed: a library that loads its code when it is first used may do so within.
    try context.check(functions.cuStreamBeginCapture(stream, Int32(MS_CUDA_CAPTURE_RELAXED)), "plan")
    var graph: OpaquePointer?
    var problem: LaunchError?
    do throws(LaunchError) {
      var mayOverlap = false
      try events.first?.record(within: stream!)
      for (i, operation) in operations.enumerated() {
        try operation.enqueue(on: stream!, isEarly: mayOverlap && context.gpu.startsEarly)
        if !events.isEmpty { try events[i + 1].record(within: stream!) }
        mayOverlap = operation.endsInKernel && events.isEmpty
      }
    } catch { problem = error }
    let ended = functions.cuStreamEndCapture(stream, &graph)
    if let problem {
      if let graph { _ = functions.cuGraphDestroy(graph) }
      throw problem
    }
    try context.check(ended, "plan")
    defer { _ = functions.cuGraphDestroy(graph) }
    var executable: OpaquePointer?
    try context.check(functions.cuGraphInstantiate(&executable, graph, 0), "plan of \(operations.count) launches")
    self.context = context
    self.executable = executable!
    self.operations = operations
  }

  /// The code that it runs is freed behind it, a library's with the context current.
  deinit {
    context.leave {
      _ = context.driver.functions.cuGraphExecDestroy(executable)
      operations.removeAll()
    }
  }

  /// Brings it to the GPU, so that the first run does not have to. With `submission` held.
  func upload() throws(LaunchError) {
    try context.check(context.driver.functions.cuGraphUpload(executable, context.stream), "plan")
  }

  /// Queues one run. With `submission` held.
  @inline(__always)
  func launch() throws(LaunchError) {
    try context.check(context.driver.functions.cuGraphLaunch(executable, context.stream), "run")
  }
}
