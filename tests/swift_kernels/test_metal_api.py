"""Simulated Metal declares what Apple's does: labels, types and throws, so that MetalDevice.swift compiles on a Mac unchanged.

The table was derived from Apple's metal-cpp headers (in the wheel mlx-metal 0.32.4) by the rules of Swift's importer: a
selector's pieces are the labels, `new...` is `make...`, a trailing `error:` is `throws`. It does not know optionals.
"""
import re
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "swift_kernels" / "Sources"
# protocol: member: (types of the arguments, type of the result or property, throws)
API: dict[str, dict[str, tuple[list[str], str, bool]]] = {
    "MTLBuffer": {
        "length": ([], "Int", False),
        "contents()": ([], "UnsafeMutableRawPointer", False),
    },
    "MTLFunction": {
        "name": ([], "String", False),
    },
    "MTLLibrary": {
        "functionNames": ([], "[String]", False),
        "makeFunction(name:)": (["String"], "MTLFunction", False),
    },
    "MTLComputePipelineState": {
        "maxTotalThreadsPerThreadgroup": ([], "Int", False),
        "threadExecutionWidth": ([], "Int", False),
    },
    "MTLCommandEncoder": {
        "endEncoding()": ([], "Void", False),
    },
    "MTLComputeCommandEncoder": {
        "setComputePipelineState(_:)": (["MTLComputePipelineState"], "Void", False),
        "setBuffer(_:offset:index:)": (["MTLBuffer", "Int", "Int"], "Void", False),
        "dispatchThreadgroups(_:threadsPerThreadgroup:)": (["MTLSize", "MTLSize"], "Void", False),
        "memoryBarrier(scope:)": (["MTLBarrierScope"], "Void", False),
    },
    "MTLCommandBuffer": {
        "status": ([], "MTLCommandBufferStatus", False),
        "error": ([], "Error", False),
        "gpuStartTime": ([], "CFTimeInterval", False),
        "gpuEndTime": ([], "CFTimeInterval", False),
        "makeComputeCommandEncoder(dispatchType:)": (["MTLDispatchType"], "MTLComputeCommandEncoder", False),
        "addCompletedHandler(_:)": (["MTLCommandBufferHandler"], "Void", False),
        "commit()": ([], "Void", False),
        "waitUntilCompleted()": ([], "Void", False),
    },
    "MTLCommandQueue": {
        "makeCommandBuffer()": ([], "MTLCommandBuffer", False),
    },
    "MTLDevice": {
        "name": ([], "String", False),
        "recommendedMaxWorkingSetSize": ([], "UInt64", False),
        "maxBufferLength": ([], "Int", False),
        "makeCommandQueue()": ([], "MTLCommandQueue", False),
        "makeBuffer(length:options:)": (["Int", "MTLResourceOptions"], "MTLBuffer", False),
        "makeLibrary(source:options:)": (["String", "MTLCompileOptions"], "MTLLibrary", True),
        "makeComputePipelineState(function:)": (["MTLFunction"], "MTLComputePipelineState", True),
    },
}


def declared() -> dict[str, dict[str, tuple[list[str], str, bool]]]:
    """The same of MetalProtocols.swift."""
    text = (SOURCES / "MetalSim" / "MetalProtocols.swift").read_text()
    found = {}
    for name, body in re.findall(r"public protocol (\w+): \w+ \{(.*?)\n\}", text, re.DOTALL):
        members = found[name] = {}
        for member, type_name in re.findall(r"var (\w+): (.+?) \{ get \}", body):
            members[member] = ([], plain(type_name), False)
        for member, arguments, throws, result in re.findall(r"func (\w+)\(((?:[^()]|\([^()]*\))*)\)( throws)?(?: -> (.*))?", body):
            pairs = [argument.split(": ") for argument in arguments.split(", ") if argument]
            labels = "".join(label.split()[0] + ":" for label, _ in pairs)
            types = [plain(type_name) for _, type_name in pairs]
            members[f"{member}({labels})"] = (types, plain(result or "Void"), bool(throws))
    return found


def plain(type_name: str) -> str:
    return re.sub(r"@escaping |\bany |[()?]", "", type_name)


def test_protocols_are_apples():
    assert declared() == API


def test_raw_values_are_apples():
    text = (SOURCES / "MetalSim" / "MetalTypes.swift").read_text()
    values = {
        "MTLDispatchType": {"serial": 0, "concurrent": 1},
        "MTLCommandBufferStatus": {
            "notEnqueued": 0, "enqueued": 1, "committed": 2, "scheduled": 3, "completed": 4, "error": 5,
        },
        "MTLMathMode": {"safe": 0, "relaxed": 1, "fast": 2},
    }  # fmt: skip
    for name, expected in values.items():
        body = re.search(rf"public enum {name}: .*?\{{(.*?)\n\}}", text, re.DOTALL)[1]
        assert {case: int(value) for case, value in re.findall(r"case (\w+) = (\d+)", body)} == expected


def test_nothing_but_the_import_tells_the_metal_device_where_it_is():
    """One text for both: the only condition in it is which module `Metal` is."""
    for path in (SOURCES / "Launcher").glob("Metal*.swift"):
        conditions = re.findall(r"^#if (.*)$", path.read_text(), re.MULTILINE)
        assert conditions in ([], ["canImport(Metal)"]), path.name
