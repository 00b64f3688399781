import CMetalStep
import XCTest

@testable import Launcher

/// Whatever number a caller passes for a handle, it gets an error and nothing is touched.
final class HandleTests: XCTestCase {
  private func assertUnknown(_ handle: UnsafeMutableRawPointer?, line: UInt = #line) {
    var info = MSDeviceInfo()
    var id: Int32 = 0
    var ticket: UInt64 = 0
    var plan: UnsafeMutableRawPointer?
    var page = [UInt8](repeating: 0, count: 64)
    let statuses = [
      deviceInfo(handle, &info), bufferCreate(handle, 64, 0, &id), bufferWrap(handle, &page, 64, &id),
      bufferDestroy(handle, 0), libraryAdd(handle, ""), kernelFind(handle, "add", &id),
      planCreate(handle, nil, 0, nil, 0, nil, 0, 1, 1, &plan), planRun(handle, 1, &ticket), ticketWait(handle, 1, 0),
      planProfile(handle, &ticket), weightPack(handle, nil, 0, 0),
    ]
    XCTAssertEqual(statuses, [Int32](repeating: argument, count: statuses.count), line: line)
    XCTAssertNil(bufferContents(handle, 0), line: line)
    deviceClose(handle)
    planDestroy(handle)
  }

  func testHandlesThatNobodyGaveOut() throws {
    let device = try Caller("host")
    var numbers = Numbers()
    assertUnknown(nil)
    for bits in [1, 2, 15, 16, UInt.max, 1 << 63, 0xffff_fff0] {
      assertUnknown(UnsafeMutableRawPointer(bitPattern: bits))
    }
    for _ in 0..<500 {
      let bits = UInt(truncatingIfNeeded: numbers.next())
      assertUnknown(UnsafeMutableRawPointer(bitPattern: bits & ~15))  // of no kind that exists
      // Near a handle that does exist: another slot, generation or kind.
      let near = UInt(bitPattern: device.handle) ^ (1 << (bits % 64))
      assertUnknown(UnsafeMutableRawPointer(bitPattern: near))
    }
    var info = MSDeviceInfo()
    XCTAssertEqual(deviceInfo(device.handle, &info), ok)
  }

  func testAHandleOfAnotherKind() throws {
    let device = try Caller("host")
    let plan = try XCTUnwrap(device.plan([]).plan)
    var (ticket, id): (UInt64, Int32) = (0, 0)
    XCTAssertEqual(planRun(device.handle, 1, &ticket), argument)
    XCTAssertEqual(bufferCreate(plan, 64, 0, &id), argument)
    deviceClose(plan)
    planDestroy(device.handle)
    XCTAssertEqual(planRun(plan, 1, &ticket), ok)
    XCTAssertEqual(device.wait(ticket), ok)
  }

  func testAHandleAfterItsObject() throws {
    for name in Caller.names {
      var device: Caller? = try Caller(name)
      let (stale, handle) = (try XCTUnwrap(device?.plan([]).plan), try XCTUnwrap(device?.handle))
      planDestroy(stale)
      planDestroy(stale)
      let other = try XCTUnwrap(device?.plan([]).plan)
      XCTAssertNotEqual(stale, other, "the slot is taken again, the handle is not")
      assertUnknown(stale)
      device = nil
      assertUnknown(handle)
      assertUnknown(other)
    }
  }

  func testATableGivesEachObjectBackOnce() {
    let table = HandleTable<Caller.Object>(kind: 3)
    var numbers = Numbers()
    var held: [(handle: UnsafeMutableRawPointer, object: Caller.Object)] = []
    var gone: [UnsafeMutableRawPointer] = []
    for _ in 0..<2000 {
      if held.isEmpty || Bool.random(using: &numbers) {
        let object = Caller.Object()
        held.append((table.insert(object), object))
      } else {
        let (handle, object) = held.remove(at: Int.random(in: 0..<held.count, using: &numbers))
        XCTAssert(table.remove(handle) === object)
        gone.append(handle)
      }
    }
    for (handle, object) in held { XCTAssert(table.find(handle) === object) }
    for handle in gone { XCTAssertNil(table.find(handle)) }
    XCTAssertEqual(table.removeAll { _ in true }.count, held.count)
    for (handle, _) in held { XCTAssertNil(table.remove(handle)) }
  }

  func testThreadsMayOpenAndCloseAtOnce() {
    DispatchQueue.concurrentPerform(iterations: 8) { _ in
      for _ in 0..<20 {
        guard let device = try? Caller("host"), let plan = device.plan([]).plan else { return XCTFail(lastText) }
        var ticket: UInt64 = 0
        XCTAssertEqual(planRun(plan, 1, &ticket), ok)
        XCTAssertEqual(device.wait(ticket), ok)
      }
    }
  }
}

extension Caller {
  final class Object {}
}
