"""Simulated Metal declares what Apple's does, so that the launcher's Metal files compile on a Mac unchanged."""
import difflib
import re
from pathlib import Path

import metal_api
import pytest

SOURCES = metal_api.ROOT / "swift_kernels" / "Sources"
FILES = ["MetalTypes.swift", "MetalDescriptors.swift", "MetalProtocols.swift"]
APPLE = metal_api.read(metal_api.TABLE.read_text())


def simulated() -> dict[str, str]:
    return {name: (SOURCES / "MetalSim" / name).read_text() for name in FILES}


def test_what_is_simulated_is_apples():
    """Names, labels and their order, types, throws, what can be set, protocols, raw types and raw values."""
    assert metal_api.differences(metal_api.declared(simulated().values()), APPLE) == []


def test_nothing_is_declared_outside_the_files_that_are_compared():
    for path in (SOURCES / "MetalSim").glob("*.swift"):
        if path.name not in FILES:
            assert not re.findall(r"^\s*public .*\bMTL\w+", path.read_text(), re.MULTILINE), path.name


def test_the_table_is_what_the_headers_give():
    folder = metal_api.ROOT / "build" / "metal-cpp"
    try:
        headers = metal_api.headers(folder)
    except RuntimeError as error:
        pytest.skip(f"{metal_api.WHEEL} cannot be downloaded: {error}")
    derived = metal_api.write(metal_api.derive(headers)).splitlines()
    assert list(difflib.unified_diff(metal_api.TABLE.read_text().splitlines(), derived, lineterm="")) == []


def test_the_table_is_read_as_it_is_written():
    assert metal_api.write(APPLE) == metal_api.TABLE.read_text()
    with pytest.raises(ValueError, match="not a line of the table"):
        metal_api.read("MTLDevice\n  name String\n")


@pytest.mark.parametrize(
    "here, planted, text",
    [
        ("offset: Int, index: Int)", "index: Int, offset: Int)", r"setBuffer\(_:index:offset:\): not in the headers; near: setBuffer"),
        ("(_ offset: Int, index: Int)", "(_ offset: Int, at index: Int)", r"setBufferOffset\(_:at:\): not in the headers"),
        ("(_ offset: Int, index: Int)", "(offset: Int, index: Int)", r"setBufferOffset\(offset:index:\): not in the headers"),
        ("func setBufferOffset", "func setOffset", r"setOffset\(_:index:\): not in the headers"),
        ("(_ threadgroupsPerGrid: MTLSize", "(_ threadgroupsPerGrid: Int", r"dispatchThreadgroups.*: \(Int, MTLSize\) -> Void here"),
        ("serialize(to url: URL) throws", "serialize(to url: URL)", r"serialize\(to:\): \(URL\) -> Void here, \(URL\) throws -> Void"),
        ("func requestResidency()", "func requestResidency() throws", r"requestResidency\(\): \(\) throws -> Void here"),
        ("options: MTLCompileOptions?) throws", "options: MTLCompileOptions?)", r"makeLibrary.* throws -> MTLLibrary in the headers"),
        ("bytesNoCopy pointer: UnsafeMutableRawPointer", "bytesNoCopy pointer: UnsafeRawPointer", r"makeBuffer\(bytesNoCopy:.* here"),
        ("makeCommandQueue(maxCommandBufferCount: Int)", "makeCommandQueue(maxCount: Int)", r"near: .*maxCommandBufferCount"),
        ("var allocatedSize: UInt64", "var allocatedSize: Int", r"MTLResidencySet.allocatedSize:: Int here,: UInt64 in the headers"),
        ("var status: MTLCommandBufferStatus { get }", "var status: MTLCommandBufferStatus { get set }", "MTLCommandBuffer.status"),
        ("var gpuStartTime", "var GPUStartTime", "MTLCommandBuffer.GPUStartTime: not in the headers"),
        ("protocol MTLBuffer: MTLResource", "protocol MTLBuffer: AnyObject", "MTLBuffer: nothing here, MTLResource in the headers"),
        ("var retainedReferences = true", "var retainReferences = true", "MTLCommandBufferDescriptor.retainReferences: not in"),
        ("var errorOptions: MTLCommandBufferErrorOption", "var errorOptions: MTLPipelineOption", "errorOptions:: MTLPipelineOption"),
        ("case concurrent = 1", "case concurrent = 2", "MTLDispatchType.concurrent: 2 here, 1 in the headers"),
        ("case version3_1 = 196609", "case version3_1 = 196610", "MTLLanguageVersion.version3_1: 196610 here, 196609"),
        ("Miss = MTLPipelineOption(rawValue: 4)", "Miss = MTLPipelineOption(rawValue: 3)", "failOnBinaryArchiveMiss: 3 here, 4"),
        ("case faulted = 4", "case failed = 4", "MTLCommandEncoderErrorState.failed: 4 here, missing in the headers"),
        ("enum MTLMathMode: Int", "enum MTLMathMode: UInt", "MTLMathMode: UInt here, Int in the headers"),
        ("struct MTLBarrierScope: OptionSet, Sendable {\n  public let rawValue: UInt",
         "struct MTLBarrierScope: OptionSet, Sendable {\n  public let rawValue: Int", "MTLBarrierScope: Int here, UInt in"),
        ("enum MTLDispatchType", "enum MTLDispatchKind", "MTLDispatchKind: not in the headers"),
    ],
)  # fmt: skip
def test_a_planted_mistake_is_found(here, planted, text):
    texts = simulated()
    (name,) = [name for name in texts if here in texts[name]]
    texts[name] = texts[name].replace(here, planted, 1)
    found = metal_api.differences(metal_api.declared(texts.values()), APPLE)
    assert any(re.search(text, difference) for difference in found), found


@pytest.mark.parametrize(
    "declaration, text",
    [
        ("public protocol MTLHeap: AnyObject {\n  subscript(i: Int) -> Int { get }\n  var size: Int\n}", "not understood"),
        ("public struct MTLRegion {\n  public var size: MTLSize\n}", "public struct MTLRegion: not compared"),
        ("public func makeDevice() {}", "a public declaration whose name is not MTL"),
    ],
)
def test_a_declaration_that_cannot_be_compared_is_an_error(declaration, text):
    with pytest.raises(ValueError, match=text):
        metal_api.declared([declaration])


def test_nothing_but_the_import_tells_the_metal_device_where_it_is():
    """One text for both: the only condition in it is which module `Metal` is."""
    paths = list((SOURCES / "Launcher").glob("Metal*.swift"))
    assert len(paths) > 5
    for path in paths:
        conditions = re.findall(r"^\s*#(?:if|elseif) (.*)$", path.read_text(), re.MULTILINE)
        assert conditions in ([], ["canImport(Metal)"]), path.name
        assert imports(path) <= {"CMetalStep", "Metal", "Foundation", "MetalSim", "Glibc"}, path.name


def imports(path: Path) -> set[str]:
    return set(re.findall(r"^import (\w+)$", path.read_text(), re.MULTILINE))
