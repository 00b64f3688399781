"""Wheels written and read: the archive format of Python packages (PEP 427)."""

from __future__ import annotations

import base64
import email
import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

EPOCH = (1980, 1, 1, 0, 0, 0)  # of every member: one input gives one archive
WHEEL = "Wheel-Version: 1.0\nGenerator: metalstep\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def wheel_name(name: str, version: str, build: int | None = None) -> str:
    """The file name of a wheel without compiled code. name: without hyphens."""
    return f"{name}-{version}{f'-{build}' if build else ''}-py3-none-any.whl"


def write_wheel(
    path: Path, name: str, version: str, metadata: str, files: Iterable[tuple[str, bytes]], info: dict[str, bytes] | None = None
) -> Path:
    """Write a wheel without compiled code, through a temporary name; returns path.

    metadata: the text of METADATA. files: names relative to site-packages with `/`, and contents. info: further files of .dist-info.
    """
    folder = f"{name}-{version}.dist-info"
    part = path.with_name(path.name + ".part")
    rows = []

    def add(archive: zipfile.ZipFile, member: str, data: bytes) -> None:
        entry = zipfile.ZipInfo(member, EPOCH)
        entry.compress_type = zipfile.ZIP_DEFLATED
        entry.external_attr = 0o644 << 16
        archive.writestr(entry, data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{quoted(member)},sha256={digest},{len(data)}")

    try:
        with zipfile.ZipFile(part, "w") as archive:
            for member, data in files:
                add(archive, member, data)
            for member, data in {"METADATA": metadata.encode(), "WHEEL": WHEEL.encode(), **(info or {})}.items():
                add(archive, f"{folder}/{member}", data)
            rows.append(f"{folder}/RECORD,,")
            archive.writestr(zipfile.ZipInfo(f"{folder}/RECORD", EPOCH), "\n".join(rows) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def quoted(member: str) -> str:
    """A name as a CSV field."""
    return f'"{member}"' if "," in member else member


def requirements(wheel: Path) -> list[Requirement]:
    """What a wheel requires, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    found = [Requirement(text) for text in fields]
    return [item for item in found if item.marker is None or "extra" not in str(item.marker)]
