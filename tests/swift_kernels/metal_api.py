"""Apple's Metal API as Swift shows it, derived from the metal-cpp headers, and what of it MetalSim declares.

Selectors come from MTLHeaderBridge.hpp, classes and C++ types from the inline bodies, raw values from _MTL_ENUM and _MTL_OPTIONS.
Names follow Swift's importer (SE-0005) and Metal's API notes as far as those are regular: `new...` is `make...`, `atIndex:` is
`index:`, a trailing `error:` is `throws`. Irregular names stand in IRREGULAR. The headers are silent on optionals, defaults,
`@Sendable` and availability, and so is the table.

    python tests/swift_kernels/metal_api.py > tests/swift_kernels/metal_api.txt    # from the headers of the wheel WHEEL
"""
from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEEL = "mlx-metal==0.32.4"  # its macOS wheels carry metal-cpp
TABLE = Path(__file__).with_suffix(".txt")
CLASSES = [
    "Allocation", "Resource", "Buffer", "Function", "Library", "ComputePipelineState", "ComputePipelineDescriptor",
    "ComputePipelineReflection", "CompileOptions", "BinaryArchive", "BinaryArchiveDescriptor", "ResidencySet", "ResidencySetDescriptor",
    "CommandEncoder", "ComputeCommandEncoder", "CommandBuffer", "CommandBufferDescriptor", "CommandBufferEncoderInfo", "CommandQueue",
    "Device",
]  # fmt: skip
ENUMS = [
    "ResourceOptions", "BarrierScope", "PipelineOption", "CommandBufferErrorOption", "DispatchType", "CommandBufferStatus",
    "CommandEncoderErrorState", "MathMode", "MathFloatingPointFunctions", "LanguageVersion",
]  # fmt: skip
# Names that no rule gives, from Apple's documentation.
IRREGULAR = {
    "commandBufferWithDescriptor:": "makeCommandBuffer(descriptor:)",
    "serializeToURL:error:": "serialize(to:)",
    "memoryBarrierWithResources:count:": "memoryBarrier(resources:)",
}
TYPES = {
    "NS::UInteger": "Int", "NS::Integer": "Int", "bool": "Bool", "uint64_t": "UInt64", "uint32_t": "UInt32", "double": "Double",
    "CFTimeInterval": "CFTimeInterval", "NS::String*": "String", "void*": "UnsafeMutableRawPointer", "void": "Void",
    "const void*": "UnsafeRawPointer", "NS::Array*": "Array", "NS::Error*": "Error", "NS::Dictionary*": "Dictionary", "NS::URL*": "URL",
}  # fmt: skip
# An argument that metal-cpp declares const, and Apple's header does not.
MUTABLE = {"newBufferWithBytesNoCopy:length:options:deallocator:"}


@dataclass
class Member:
    """A property (arguments is None) or a method; its name has the argument labels."""

    result: str
    arguments: list[str] | None = None
    throws: bool = False
    settable: bool = False

    def __str__(self) -> str:
        if self.arguments is None:
            return f": {self.result}{' set' if self.settable else ''}"
        return f" ({', '.join(self.arguments)}){' throws' if self.throws else ''} -> {self.result}"


@dataclass
class Type:
    """base: of a class, the protocol it refines; of an enum, its raw type. values: of an enum or a set of options."""

    base: str = ""
    members: dict[str, Member] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)


Api = dict[str, Type]


# ---- the table --------------------------------------------------------------------------------------------------------
def write(api: Api) -> str:
    """The table as text: a line for each type and, below it, for each member or value."""
    lines = []
    for name, entry in sorted(api.items()):
        lines.append(f"{name} {entry.base}".rstrip())
        lines += [f"  {member}{what}" for member, what in sorted(entry.members.items())]
        lines += [f"  {case} = {value}" for case, value in sorted(entry.values.items(), key=lambda pair: (pair[1], pair[0]))]
    return "\n".join(lines) + "\n"


def read(text: str) -> Api:
    """The inverse of `write`."""
    api: Api = {}
    for line in text.splitlines():
        if not line.startswith(" "):
            name, _, base = line.partition(" ")
            entry = api[name] = Type(base)
        elif match := re.fullmatch(r"  (\w+) = (-?\d+)", line):
            entry.values[match[1]] = int(match[2])
        elif match := re.fullmatch(r"  (\w+): (\S+)( set)?", line):
            entry.members[match[1]] = Member(match[2], settable=bool(match[3]))
        elif match := re.fullmatch(r"  (\S+) \((.*)\)( throws)? -> (\S+)", line):
            entry.members[match[1]] = Member(match[4], [a for a in match[2].split(", ") if a], bool(match[3]))
        else:
            raise ValueError(f"{TABLE.name}: not a line of the table: {line!r}")
    return api


# ---- from the headers -------------------------------------------------------------------------------------------------
def headers(folder: Path) -> Path:
    """The wheel's metal-cpp headers below `folder`, downloaded unless they are there. Raises: RuntimeError with pip's text."""
    found = folder / "mlx" / "include" / "metal_cpp" / "Metal"
    if not found.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--platform", "macosx_14_0_arm64", "--dest", str(folder), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if "/metal_cpp/" in name])
        wheel.unlink()
    return found


def derive(folder: Path) -> Api:
    """What Swift's `import Metal` shows of CLASSES and ENUMS, from the headers in `folder`."""
    texts = {path.name: path.read_text(errors="replace") for path in sorted(folder.glob("MTL*.hpp"))}
    selectors = dict(re.findall(r'_MTL_PRIVATE_DEF_SEL\((\w+),\s*"([^"]+)"\)', texts["MTLHeaderBridge.hpp"]))
    api: Api = {}
    methods: dict[str, dict[str, tuple[str, list[str], bool]]] = {name: {} for name in CLASSES}
    for text in texts.values():
        for name, base in re.findall(r"^class (\w+) : public NS::\w+<\w+(?:,\s*(?:MTL::)?(\w+))?>", text, re.M):
            if name in CLASSES:
                api["MTL" + name] = Type("MTL" + base if base else "")
        for raw, name, body in re.findall(r"^_MTL_(?:ENUM|OPTIONS)\(([\w:]+), (\w+)\) \{(.*?)\};", text, re.M | re.S):
            if name in ENUMS:
                api["MTL" + name] = Type({"NS::UInteger": "UInt", "NS::Integer": "Int"}[raw], values=dict(_values(name, body)))
        for function in re.finditer(r"^_MTL_INLINE ([^\n]*?)\bMTL::(\w+)::\w+\(([^\n]*)\)( const)?\n\{(.*?)^\}", text, re.M | re.S):
            result, name, arguments, const, body = function.groups()
            used = re.search(r"_MTL_PRIVATE_SEL\((\w+)\)", body)
            if name in CLASSES and used and used[1] in selectors:
                split = [part.strip() for part in re.split(r",(?![^()]*\))", arguments) if part.strip()]
                methods[name][selectors[used[1]]] = (result.strip(), split, bool(const))  # metal-cpp: only properties are const
    for name, found in methods.items():
        api["MTL" + name].members = dict(_members(found))
    return api


def _values(enum: str, body: str) -> Iterator[tuple[str, int]]:
    values: dict[str, int] = {}
    for name, text in re.findall(r"(\w+)\s*(?:=\s*([^,\n]+))?,", body):
        if not text:
            value = max(values.values(), default=-1) + 1
        elif text.strip() in values:
            value = values[text.strip()]
        elif number := re.fullmatch(r"(\d+|0x[0-9a-fA-F]+)[uUlL]*", text.strip()):
            value = int(number[1], 0)
        elif shift := re.fullmatch(r"(\d+)[uUlL]* << (\d+)", text.strip()):
            value = int(shift[1]) << int(shift[2])
        else:
            continue  # a mask or a name of another enum: not among those that are simulated
        values[name] = value
        yield _case(enum, name), value


def _case(enum: str, name: str) -> str:
    """`ResourceStorageModeShared` of `ResourceOptions` is `storageModeShared`."""
    stem = enum if name.startswith(enum) else re.sub(r"(Options|s)$", "", enum)
    name = name.removeprefix(stem).lstrip("_")
    return _lower(f"version{name}" if name[:1].isdigit() else name)


def _members(found: dict[str, tuple[str, list[str], bool]]) -> Iterator[tuple[str, Member]]:
    for selector, (result, arguments, const) in found.items():
        if selector.startswith("set") and selector.count(":") == 1 and _getter(selector) in found:
            continue
        if const and ":" not in selector:
            settable = any(_getter(setter) == selector for setter in found)
            yield _lower(selector), Member(_type(result), settable=settable)
            continue
        throws = any("NS::Error**" in argument for argument in arguments)
        types = [_type(_without_name(argument)) for argument in arguments if "NS::Error**" not in argument]
        if selector in MUTABLE:
            types[0] = "UnsafeMutableRawPointer"
        value = _type(result)
        yield _method(selector, value), Member("Void" if throws and value == "Bool" else value, types, throws)


def _getter(setter: str) -> str:
    return setter[3:4].lower() + setter[4:].removesuffix(":") if setter.startswith("set") and setter.count(":") == 1 else ""


def _method(selector: str, result: str) -> str:
    if selector in IRREGULAR:
        return IRREGULAR[selector]
    parts = selector.split(":")
    if selector.endswith("error:"):
        parts = [*parts[:-2], ""] if len(parts) > 2 else [parts[0].replace("WithError", ""), ""]
    makes = result.startswith("MTL")
    if ":" not in selector:
        if selector.startswith("new"):
            return f"make{selector[3:]}()"
        if makes and re.search(r"(CommandEncoder|^commandBuffer(With\w+)?)$", selector):
            return f"make{selector[0].upper()}{selector[1:]}()"
        return f"{selector}()"
    first, rest = parts[0], parts[1:-1]
    match = re.match(r"(.*?)With([A-Z]\w*)$", first)
    base, label = (match[1], _lower(match[2])) if match else (first, "_")
    if base.startswith("new"):
        base = "make" + base[3:]
    elif makes and re.search(r"(CommandEncoder|CommandBuffer)$", base) and not base.startswith("add"):
        base = f"make{base[0].upper()}{base[1:]}"
    labels = [label, *(_lower(re.sub(r"^at(?=Index)", "", part)) for part in rest)]
    return f"{base}({''.join(part + ':' for part in labels)})"


def _lower(word: str) -> str:
    return re.sub(r"^[A-Z]+(?=[A-Z][a-z]|$|\d)|^[A-Z]", lambda m: m[0].lower(), word)


def _without_name(argument: str) -> str:
    return argument if "(^" in argument else re.sub(r"\s*\w+(\[\])?$", "", argument) if " " in argument else argument


def _type(text: str) -> str:
    if "(^" in text:
        return "closure"
    text = re.sub(r"\b(?:class|const)\b(?! void)", "", text).strip().replace(" *", "*")
    match = re.match(r"(?:MTL::)?(\w+)\*?$", text)
    return TYPES.get(text) or ("MTL" + match[1] if match else text.replace(" ", ""))


# ---- what MetalSim declares -------------------------------------------------------------------------------------------
def declared(texts: Iterable[str]) -> Api:
    """The public declarations named MTL... in Swift sources. Raises: ValueError for one that is not understood."""
    api: Api = {}
    for source in texts:
        text = re.sub(r"//[^\n]*", "", source)
        for match in re.finditer(r"^public ((?:final )?\w+) (MTL\w+)([^{\n]*)(\{\}|\{\n.*?^\}|\{ \w+\(\) \}|)", text, re.M | re.S):
            kind, name, rest, body = match.groups()
            if kind == "protocol":
                base = rest.strip(": ")
                api[name] = Type("" if base == "AnyObject" else base, dict(_protocol_members(body)))
            elif kind == "final class":
                api[name] = Type("", dict(_class_members(body)))
            elif kind == "enum":
                raw = rest.strip(": ").split(",")[0]
                api[name] = Type(raw, values={case: int(value) for case, value in re.findall(r"case (\w+) = (\d+)", body)})
            elif kind == "struct" and "OptionSet" in rest:
                raw_type = re.search(r"let rawValue: (\w+)", body)
                cases = re.findall(r"static let (\w+)(?:: \w+)? = (?:\w+\(rawValue: (\d+)\)|\[\])", body)
                api[name] = Type(raw_type[1] if raw_type else "", values={case: int(value or 0) for case, value in cases})
            elif (kind, name) not in OTHERS:
                raise ValueError(f"public {kind} {name}: not compared with Apple's; say so in OTHERS after looking it up")
        known = len(re.findall(r"^public ", text, re.M))
        if known != len(re.findall(r"^public (?:final )?\w+ MTL\w+", text, re.M)):
            raise ValueError("a public declaration whose name is not MTL...")
    return api


# What the headers say in another form, compared by eye with Apple's documentation.
OTHERS = {
    ("struct", "MTLSize"), ("typealias", "MTLCommandBufferHandler"), ("typealias", "MTLAutoreleasedComputePipelineReflection"),
    ("let", "MTLCommandBufferEncoderInfoErrorKey"), ("let", "MTLCommandBufferErrorDomain"), ("func", "MTLCreateSystemDefaultDevice"),
}  # fmt: skip


def _protocol_members(body: str) -> Iterator[tuple[str, Member]]:
    pattern = r"var (\w+): ([^{\n]+) \{ get( set)? \}|func (\w+)\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)( throws)?(?: -> ([^\n]+))?"
    for match in re.finditer(pattern, body):
        property_name, type_name, settable, function, arguments, throws, result = match.groups()
        if property_name:
            yield property_name, Member(_plain(type_name), settable=bool(settable))
            continue
        pairs = [part.strip().split(":", 1) for part in re.split(r",(?![^()]*\))", arguments) if part.strip()]
        labels = "".join(label.split()[0] + ":" for label, _ in pairs)
        yield f"{function}({labels})", Member(_plain(result or "Void"), [_plain(type_name) for _, type_name in pairs], bool(throws))
    if len(re.findall(r"\b(?:var|func) ", body)) != len(list(re.finditer(pattern, body))):
        raise ValueError(f"a member of a protocol that is not understood, in:\n{body}")


def _class_members(body: str) -> Iterator[tuple[str, Member]]:
    for name, type_name, value in re.findall(r"public var (\w+)(?:: ([^={\n]+))?(?: = ([\w.]+))?", body):
        guess = {"true": "Bool", "false": "Bool", "0": "Int"}.get(value, value.split(".")[0])
        yield name, Member(_plain(type_name or guess), settable=True)


def _plain(text: str) -> str:
    """A Swift type without what the headers do not tell: optionals, `any`, attributes, what a collection holds."""
    text = re.sub(r"@\w+ |\bany |[?]", "", text).strip()
    if "->" in text:
        return "closure"
    text = re.sub(r"AutoreleasingUnsafeMutablePointer<(\w+)>", r"\1", text.strip("() "))
    return re.sub(r"^\[.*: .*\]$", "Dictionary", re.sub(r"^\[[^:]*\]$", "Array", text))


# ---- the comparison ---------------------------------------------------------------------------------------------------
def differences(simulated: Api, apple: Api) -> list[str]:
    """What MetalSim declares and Apple's headers do not, or declare otherwise. What is not simulated is no difference."""
    found = []
    for name, entry in simulated.items():
        if name not in apple:
            found.append(f"{name}: not in the headers")
            continue
        if entry.base != apple[name].base:
            found.append(f"{name}: {entry.base or 'nothing'} here, {apple[name].base or 'nothing'} in the headers")
        for case, value in entry.values.items():
            if apple[name].values.get(case) != value:
                found.append(f"{name}.{case}: {value} here, {apple[name].values.get(case, 'missing')} in the headers")
        for member, here in entry.members.items():
            there = apple[name].members.get(member)
            if there is None:
                near = [other for other in apple[name].members if other.split("(")[0] == member.split("(")[0]]
                found.append(f"{name}.{member}: not in the headers; near: {', '.join(near) or 'nothing'}")
            elif str(Member(here.result, here.arguments, here.throws, here.settable and there.settable)) != str(
                Member(there.result, there.arguments, there.throws, here.settable and there.settable)
            ) or (here.settable and not there.settable):
                found.append(f"{name}.{member}:{here} here,{there} in the headers")
    return found


if __name__ == "__main__":
    sys.stdout.write(write(derive(headers(ROOT / "build" / "metal-cpp"))))
