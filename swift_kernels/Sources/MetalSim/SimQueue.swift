import CMetalSim
import Glibc

/// Runs command buffers one after the other on a thread of its own, as a GPU would.
final class SimQueue: MTLCommandQueue {
  private let worker: Worker
  private let log: SimLog?

  /// - Parameter limit: command buffers that exist and have not completed.
  init(_ limit: Int, log: SimLog?) {
    worker = Worker(limit)
    self.log = log
  }

  deinit { worker.stop() }

  /// Waits while there are as many as the queue takes.
  func makeCommandBuffer(descriptor: MTLCommandBufferDescriptor) -> (any MTLCommandBuffer)? {
    guard environment("METALSTEP_SIM_FAULT") != "lost" else { return nil }
    worker.begin()
    return SimCommandBuffer(worker, descriptor, log: log)
  }

  func addResidencySet(_ residencySet: any MTLResidencySet) { log?.write("queue adds residency set") }
  func removeResidencySet(_ residencySet: any MTLResidencySet) { log?.write("queue removes residency set") }

  /// The thread and what it shares with others. It outlives the queue until all that was committed is done.
  final class Worker: @unchecked Sendable {
    private let mutex: UnsafeMutablePointer<pthread_mutex_t> = .allocate(capacity: 1)
    private let changed: UnsafeMutablePointer<pthread_cond_t> = .allocate(capacity: 1)
    private let limit: Int
    private var unfinished = 0
    private var committed: [SimCommandBuffer] = []
    private var isStarted = false
    private var isStopped = false

    init(_ limit: Int) {
      self.limit = limit
      pthread_mutex_init(mutex, nil)
      pthread_cond_init(changed, nil)
    }

    deinit {
      pthread_cond_destroy(changed)
      pthread_mutex_destroy(mutex)
      changed.deallocate()
      mutex.deallocate()
    }

    func locked<Result>(_ body: () -> Result) -> Result {
      pthread_mutex_lock(mutex)
      defer { pthread_mutex_unlock(mutex) }
      return body()
    }

    func enqueue(_ commands: SimCommandBuffer) {
      locked {
        committed.append(commands)
        if !isStarted { start() }
        isStarted = true
        pthread_cond_broadcast(changed)
      }
    }

    func wait(until condition: () -> Bool) {
      locked { while !condition() { pthread_cond_wait(changed, mutex) } }
    }

    /// A command buffer is made.
    func begin() {
      locked {
        while unfinished >= limit { pthread_cond_wait(changed, mutex) }
        unfinished += 1
      }
    }

    /// A command buffer has completed, or was given up before it was committed.
    func finish() {
      locked {
        unfinished -= 1
        pthread_cond_broadcast(changed)
      }
    }

    func stop() {
      locked {
        isStopped = true
        pthread_cond_broadcast(changed)
      }
    }

    private func start() {
      var all = sigset_t()
      var before = sigset_t()
      sigfillset(&all)  // signals are for the program's own threads
      pthread_sigmask(SIG_BLOCK, &all, &before)
      defer { pthread_sigmask(SIG_SETMASK, &before, nil) }
      var thread = pthread_t()
      let result = pthread_create(
        &thread, nil,
        { context in
          Unmanaged<Worker>.fromOpaque(context!).takeRetainedValue().serve()
          sim_thread_end()
          return nil
        }, Unmanaged.passRetained(self).toOpaque())
      precondition(result == 0, "the simulated GPU's thread cannot be started")
      pthread_detach(thread)
    }

    private func serve() {
      while let commands = next() { commands.execute() }
    }

    private func next() -> SimCommandBuffer? {
      locked {
        while committed.isEmpty && !isStopped { pthread_cond_wait(changed, mutex) }
        return committed.isEmpty ? nil : committed.removeFirst()
      }
    }
  }
}
