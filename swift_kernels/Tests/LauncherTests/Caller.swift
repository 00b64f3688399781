import CMetalStep
import XCTest

@testable import Launcher

let ok = Int32(bitPattern: MS_OK.rawValue)
let argument = Int32(bitPattern: MS_ERROR_ARGUMENT.rawValue)
let deviceError = Int32(bitPattern: MS_ERROR_DEVICE.rawValue)
let memory = Int32(bitPattern: MS_ERROR_MEMORY.rawValue)
let timeout = Int32(bitPattern: MS_ERROR_TIMEOUT.rawValue)

/// What a failed call leaves for `ms_last_error`.
var lastText: String { lastError().map { String(cString: $0) } ?? "" }

/// A device as a C caller has it: by handle, status and text.
final class Caller {
  static let names = ["host", gpu]
  #if canImport(Metal)
  static let gpu = "metal"
  #else
  static let gpu = "metal-sim"
  #endif
  static let source = """
    #include <metal_stdlib>
    using namespace metal;
    kernel void add(device float* y [[buffer(0)]], constant float& by [[buffer(1)]],
                    uint i [[thread_position_in_grid]]) {
      y[i] = y[i] + by;
    }
    kernel void broken(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
      if (i == 0) threadgroup_barrier(mem_flags::mem_none);
      y[i] = 1;
    }
    """

  let handle: UnsafeMutableRawPointer

  init(_ name: String) throws {
    var handle: UnsafeMutableRawPointer?
    let status = deviceOpen(name, 0, &handle)
    guard status == ok else { throw XCTSkip("\(name): \(lastText)") }
    self.handle = try XCTUnwrap(handle)
  }

  deinit { deviceClose(handle) }

  /// The GPU with `source` compiled; skipped where the simulated one has no compiler.
  static func withKernels() throws -> Caller {
    let caller = try Caller(gpu)
    guard libraryAdd(caller.handle, source) == ok else { throw XCTSkip(lastText) }
    return caller
  }

  func buffer(_ bytes: UInt64) throws -> Int32 {
    var id: Int32 = -1
    XCTAssertEqual(bufferCreate(handle, bytes, MS_MEMORY_SHARED.rawValue, &id), ok, lastText)
    return id
  }

  func floats(_ id: Int32, _ count: Int) throws -> UnsafeMutableBufferPointer<Float> {
    let contents = try XCTUnwrap(bufferContents(handle, id))
    return UnsafeMutableBufferPointer(start: contents.assumingMemoryBound(to: Float.self), count: count)
  }

  func kernel(_ name: String) throws -> Int32 {
    var id: Int32 = -1
    XCTAssertEqual(kernelFind(handle, name, &id), ok, lastText)
    return id
  }

  /// - Returns: the status, and the plan when it is `ok`.
  func plan(
    _ launches: [MSLaunch], _ binds: [MSBind] = [], constants: [Float] = [], maxTokens: UInt32 = 1
  ) -> (status: Int32, plan: UnsafeMutableRawPointer?) {
    var plan: UnsafeMutableRawPointer?
    let status = planCreate(
      handle, launches, UInt32(launches.count), binds, UInt32(binds.count), constants,
      UInt64(constants.count * MemoryLayout<Float>.stride), maxTokens, 1, &plan)
    return (status, plan)
  }

  func wait(_ ticket: UInt64, nanoseconds: Int64 = -1) -> Int32 { ticketWait(handle, ticket, nanoseconds) }
}

extension MSLaunch {
  /// One threadgroup of `threads`.
  init(
    kernel: Int32, threads: UInt32 = 32, binds: Range<UInt32> = 0..<0, constants: Range<UInt32> = 0..<0,
    barrier: UInt32 = 0
  ) {
    self.init()
    self.kernel = kernel
    self.barrier = barrier
    grid = (1, 1, 1)
    self.threads = (threads, 1, 1)
    (bind_first, self.binds) = (binds.lowerBound, UInt32(binds.count))
    (const_first, const_bytes) = (constants.lowerBound, UInt32(constants.count))
  }
}

/// The same numbers in every run.
struct Numbers: RandomNumberGenerator {
  var state: UInt64 = 1

  mutating func next() -> UInt64 {
    state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
    return state ^ state >> 29
  }
}
