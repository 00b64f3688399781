import CCuda
import CMetalStep

/// The launches of one step on a GPU, captured once: a run replays them as often as it has steps. What changes from step
/// to step is in buffers.
final class CudaPlan: DevicePlan, @unchecked Sendable {
  private let context: CudaContext
  private let tickets: CudaTickets
  private let graph: CudaGraph
  private let buffers: [any DeviceBuffer]  // not read again: the graph has their addresses

  /// - Parameter kernels: the device's, by id.
  init(
    _ source: PlanSource, context: CudaContext, tickets: CudaTickets, kernels: [any CudaKernel]
  ) throws(LaunchError) {
    self.context = context
    self.tickets = tickets
    buffers = source.buffers
    graph = try context.enter { () throws(LaunchError) in
      var operations: [any CudaOperation] = []
      for (i, launch) in source.launches.enumerated() {
        guard launch.kernel >= 0, launch.kernel < kernels.count else {
          throw .argument(
            "plan: launch \(i) names kernel \(launch.kernel); ms_kernel_find has given out \(kernels.count)")
        }
        let addresses = source.bindings(of: launch).map { UInt64(UInt(bitPattern: $0.address)) }
        operations.append(
          try kernels[Int(launch.kernel)].operation(
            launch, number: i, addresses: addresses, constants: source.constants(of: launch)))
      }
      let graph = try CudaGraph(context, operations)
      context.submission.lock()
      defer { context.submission.unlock() }
      try graph.upload()
      return graph
    }
  }

  func run(steps: Int) throws(LaunchError) -> UInt64 {
    try context.enter { () throws(LaunchError) in
      try tickets.issue(self) { () throws(LaunchError) in
        for _ in 0..<steps { try graph.launch() }
      }
    }
  }

  /// A graph of the same launches with an event behind each. They do not overlap, so their sum is more than a step takes.
  /// What events alone take, which is more than a small launch, is taken off.
  func profile(into times: UnsafeMutablePointer<UInt64>) throws(LaunchError) {
    try context.enter { () throws(LaunchError) in
      let bare = try timed([any CudaOperation](repeating: CudaNothing(), count: graph.operations.count)).sorted()
      let overhead = bare.isEmpty ? 0 : bare[bare.count / 2]
      for (i, time) in try timed(graph.operations).enumerated() { times[i] = UInt64(max(0, time - overhead)) }
    }
  }

  /// Nanoseconds from the end of each operation's predecessor to its own.
  private func timed(_ operations: [any CudaOperation]) throws(LaunchError) -> [Double] {
    var events: [CudaEvent] = []
    for _ in 0...operations.count { events.append(try CudaEvent(context, isTimed: true)) }
    let graph = try CudaGraph(context, operations, events: events)
    try queue(graph)
    let code = events[operations.count].wait()
    if code != 0 { throw context.failure(code, "profile of \(kernelNames)") }
    return operations.indices.map { events[$0 + 1].nanoseconds(since: events[$0]) }
  }

  private func queue(_ graph: CudaGraph) throws(LaunchError) {
    context.submission.lock()
    defer { context.submission.unlock() }
    try graph.upload()
    try graph.launch()
  }

  /// Of its launches, each once, as far as anyone would read.
  var kernelNames: String {
    let shown = 12
    var names: [String] = []
    for operation in graph.operations where !names.contains(operation.name) { names.append(operation.name) }
    let more = names.count > shown ? " and \(names.count - shown) more" : ""
    return names.isEmpty ? "no launches" : names.prefix(shown).joined(separator: ", ") + more
  }
}

/// A launch of nothing.
private final class CudaNothing: CudaOperation {
  let name = ""
  let endsInKernel = true

  func enqueue(on stream: OpaquePointer, isEarly: Bool) {}
}
