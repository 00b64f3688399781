/// A launch of a plan, resolved: all that it needs is at hand when it is queued.
protocol CudaOperation: AnyObject {
  /// Of the kernel.
  var name: String { get }

  /// Whether the last thing it queues is a kernel, which the next launch may overlap.
  var endsInKernel: Bool { get }

  /// Queues it, with the context current. The stream may be one that is captured.
  ///
  /// - Parameter isEarly: it may begin while the kernel before it still runs.
  func enqueue(on stream: OpaquePointer, isEarly: Bool) throws(LaunchError)
}
