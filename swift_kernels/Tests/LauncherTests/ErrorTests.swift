import CMetalStep
import XCTest

@testable import Launcher

final class ErrorTests: XCTestCase {
  func testDevicesThatDoNotExist() {
    var handle: UnsafeMutableRawPointer?
    for name in ["", "gpu", "Host", "metal-sim "] {
      XCTAssertEqual(deviceOpen(name, 0, &handle), argument)
      XCTAssert(lastText.contains("is unknown"), lastText)
    }
    XCTAssertEqual(deviceOpen(String(repeating: "x", count: 10_000), 0, &handle), argument)
    XCTAssertEqual(deviceOpen(nil, 0, &handle), argument)
    XCTAssertEqual(deviceOpen("host", 0, nil), argument)
    for threads in [-1, Int32.min, Int32.max] { XCTAssertEqual(deviceOpen("host", threads, &handle), argument) }
    XCTAssertEqual(deviceOpen(Caller.gpu, 1, &handle), argument)
    XCTAssertNil(handle)
  }

  func testOfLibrariesThatDoNotServeTheOneThatIsThereIsTold() {
    let missing = ["liba.so", "/b/liba.so"].map { ($0, "\($0): cannot open shared object file: No such file or directory") }
    let needs = ("/c/liba.so", "libneeded.so: cannot open shared object file: No such file or directory")
    XCTAssertEqual(LibraryFolders.firstReason(missing + [needs]), needs.1)
    XCTAssertEqual(LibraryFolders.firstReason(missing), missing[0].1)
  }

  func testTextsBelongToTheThreadThatFailed() throws {
    let device = try Caller("host")
    var id: Int32 = 0
    XCTAssertEqual(kernelFind(device.handle, "mine", &id), argument)
    let other = DispatchQueue(label: "other").sync { () -> String in
      XCTAssertEqual(kernelFind(device.handle, "its", &id), argument)
      return lastText
    }
    XCTAssert(other.contains("its"))
    let group = DispatchGroup()
    DispatchQueue.global().async(group: group) {
      var id: Int32 = 0
      XCTAssertEqual(kernelFind(device.handle, "another's", &id), argument)
    }
    group.wait()
    XCTAssertFalse(lastText.contains("another's"))
  }

  func testNamesThatAreNotText() throws {
    let device = try Caller("host")
    var id: Int32 = 0
    let bytes: [CChar] = [-1, -128, 65, -64, 0]
    XCTAssertEqual(kernelFind(device.handle, bytes, &id), argument)
    XCTAssertEqual(libraryAdd(device.handle, bytes), argument)
    XCTAssertEqual(libraryAdd(device.handle, nil), argument)
    XCTAssertEqual(kernelFind(device.handle, nil, &id), argument)
    XCTAssertEqual(kernelFind(device.handle, "add", nil), argument)
    XCTAssertEqual(deviceInfo(device.handle, nil), argument)
  }

  func testSourcesThatDoNotCompile() throws {
    let device = try Caller.withKernels()
    for source in ["kernel void f(", "kernel void f(device float* x [[buffer(0)]]) { nothing; }"] {
      XCTAssertEqual(libraryAdd(device.handle, source), deviceError)
      XCTAssert(lastText.hasPrefix("library: "), lastText)
    }
    XCTAssertEqual(libraryAdd(device.handle, ""), ok, "no kernels are no mistake")
  }

  func testWeightsThatCannotBe() throws {
    XCTAssertEqual(weightBytes(UInt32.max, UInt32.max, 7, 3, 9), 0)
    XCTAssert(lastText.contains("cannot be packed"), lastText)
    let device = try Caller("host")
    XCTAssertEqual(weightPack(device.handle, nil, 0, 0), argument)
    var source = MSWeightSource()
    (source.n, source.k, source.bits, source.group_size) = (16, 64, 4, 64)
    XCTAssertEqual(weightPack(device.handle, &source, 0, 0), argument)
    let data = [UInt32](repeating: 0, count: 16 * 8)
    data.withUnsafeBytes { data in
      source.data = data.baseAddress
      source.scales = data.baseAddress
      source.biases = data.baseAddress
      source.format = UInt32(MS_WEIGHT_AFFINE.rawValue)
      XCTAssertEqual(weightPack(device.handle, &source, 5, 0), argument)
      XCTAssert(lastText.contains("buffer 5 does not exist"), lastText)
      var id: Int32 = 0
      XCTAssertEqual(bufferCreate(device.handle, 64, 0, &id), ok)
      for offset in [0, 64, 1, UInt64.max, UInt64.max - 63] {
        XCTAssertEqual(weightPack(device.handle, &source, id, offset), argument)
      }
    }
  }

  func testLongTextsAreCut() throws {
    let device = try Caller("host")
    var id: Int32 = 0
    XCTAssertEqual(kernelFind(device.handle, String(repeating: "é", count: 5000), &id), argument)
    XCTAssertLessThan(lastText.utf8.count, 2048)
    XCTAssertFalse(lastText.contains("\u{FFFD}"))
  }

  func testADevicesNameIsCutBeforeACharacterThatDoesNotFit() {
    var info = MSDeviceInfo()
    info.setName(String(repeating: "é", count: 100))
    let bytes = withUnsafeBytes(of: info.name) { Array($0.prefix { $0 != 0 }) }
    XCTAssertEqual(String(decoding: bytes, as: UTF8.self), String(repeating: "é", count: 31))
  }
}
