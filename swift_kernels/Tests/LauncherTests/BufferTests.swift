import CMetalStep
import XCTest

@testable import Launcher

final class BufferTests: XCTestCase {
  func testMemoryIsZeroedAlignedAndWritable() throws {
    for name in Caller.names {
      let device = try Caller(name)
      for bytes: UInt64 in [1, 63, 64, 4097, 1 << 20] {
        let contents = try XCTUnwrap(bufferContents(device.handle, try device.buffer(bytes)))
        XCTAssertEqual(UInt(bitPattern: contents) % (name == "metal-sim" ? 16 : 64), 0)
        let memory = UnsafeMutableRawBufferPointer(start: contents, count: Int(bytes))
        XCTAssert(memory.allSatisfy { $0 == 0 })
        for i in memory.indices { memory[i] = 0xa5 }
      }
      XCTAssertNotNil(bufferContents(device.handle, try device.buffer(0)), "no bytes have an address too")
    }
  }

  func testSizesThatCannotBe() throws {
    for name in Caller.names {
      let device = try Caller(name)
      var id: Int32 = 7
      for bytes in [UInt64.max, UInt64(Int.max), UInt64(Int.max) + 1, 1 << 62] {
        XCTAssertEqual(bufferCreate(device.handle, bytes, 0, &id), memory)
        XCTAssert(lastText.hasPrefix("buffer:"), lastText)
      }
      XCTAssertEqual(id, 7)
      XCTAssertEqual(bufferCreate(device.handle, 64, 0, nil), argument)
    }
  }

  func testADestroyedBufferIsUnknownAndItsIdIsNotUsedAgain() throws {
    for name in Caller.names {
      let device = try Caller(name)
      let first = try device.buffer(64)
      XCTAssertEqual(bufferDestroy(device.handle, first), ok)
      let second = try device.buffer(64)
      XCTAssertNotEqual(first, second)
      for id in [first, -1, Int32.min, Int32.max, second + 1] {
        XCTAssertNil(bufferContents(device.handle, id))
        XCTAssertEqual(bufferDestroy(device.handle, id), argument)
        XCTAssert(lastText.contains("buffer \(id) does not exist"), lastText)
        var bind = MSBind()
        bind.buffer = id
        XCTAssertEqual(device.plan([], [bind]).status, argument)
      }
    }
  }

  func testWrappedMemoryIsTheCallers() throws {
    let page = Int(getpagesize())
    let address = try XCTUnwrap(mmap(nil, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0))
    defer { munmap(address, 2 * page) }
    for name in Caller.names {
      let device = try Caller(name)
      var id: Int32 = -1
      XCTAssertEqual(bufferWrap(device.handle, address, UInt64(page) + 5, &id), ok, lastText)
      XCTAssertEqual(bufferContents(device.handle, id), address)
      var bind = MSBind()
      (bind.buffer, bind.offset) = (id, UInt64(page) + 4)
      XCTAssertEqual(device.plan([], [bind]).status, ok)
      bind.offset += 1
      XCTAssertEqual(device.plan([], [bind]).status, argument, "the rest of the page is not the buffer's")
      XCTAssertEqual(bufferDestroy(device.handle, id), ok)
      let refused: [(UnsafeMutableRawPointer?, UInt64)] = [
        (nil, 64), (address + 8, 64), (address, 0), (address, UInt64.max), (address, UInt64(Int.max)),
        (UnsafeMutableRawPointer(bitPattern: UInt.max - UInt(page) + 1), 64),
      ]
      for (at, bytes) in refused {
        XCTAssertEqual(bufferWrap(device.handle, at, bytes, &id), argument, "\(String(describing: at)) \(bytes)")
      }
      XCTAssertEqual(bufferWrap(device.handle, address, 64, nil), argument)
    }
    let gpu = try Caller(Caller.gpu)
    var id: Int32 = -1
    XCTAssertEqual(bufferWrap(gpu.handle, address, 1 << 50, &id), memory)
    XCTAssert(lastText.contains("copy them into several buffers"), lastText)
  }

  func testAPlanKeepsItsBuffers() throws {
    let device = try Caller.withKernels()
    let id = try device.buffer(4 * 32)
    let values = try device.floats(id, 32)
    var bind = MSBind()
    bind.buffer = id
    let launch = MSLaunch(kernel: try device.kernel("add"), binds: 0..<1, constants: 0..<4)
    let plan = try XCTUnwrap(device.plan([launch], [bind], constants: [2]).plan)
    XCTAssertEqual(bufferDestroy(device.handle, id), ok)
    var ticket: UInt64 = 0
    XCTAssertEqual(planRun(plan, 3, &ticket), ok)
    XCTAssertEqual(device.wait(ticket), ok, lastText)
    XCTAssert(values.allSatisfy { $0 == 6 })
    planDestroy(plan)
  }

  func testIdsRunOutWithAnError() throws {
    var table = BufferTable()
    let id = try table.insert(HostBuffer(bytes: 1))
    XCTAssertNotNil(table[id])
    XCTAssertNotNil(table.remove(id))
    XCTAssertNil(table.remove(id))
    XCTAssertNil(table[id])
  }
}
