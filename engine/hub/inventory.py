"""The models on this machine: in the hub's cache, in packages, in a folder."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from metalstep.hub import choose
from metalstep.hub.cache import PARTIAL, repositories, snapshot_files
from metalstep.hub.describe import Description, describe_directory, describe_gguf
from metalstep.packaged_models import PACKAGED, packaged_file

DEEPEST = 3  # folders below the one that is searched


@dataclass(frozen=True)
class LocalModel:
    """name: what MODEL is called. where: packaged, hub or folder. commit and refs: of the hub. partial: bytes of a download that was
    interrupted."""

    name: str
    where: str
    path: Path
    about: Description
    commit: str | None = None
    refs: tuple[str, ...] = ()
    partial: int = 0


def packaged() -> Iterator[LocalModel]:
    """Installed models that come as Python packages."""
    for name in PACKAGED:
        if path := packaged_file(name):
            yield LocalModel(name, "packaged", path, describe_gguf(path))


def cached(cache: Path) -> Iterator[LocalModel]:
    """Models in the hub's cache, each commit, and each GGUF file for itself."""
    for repo, folder in repositories(cache):
        partial = sum(file.stat().st_size for file in folder.glob(f"blobs/*{PARTIAL}"))
        refs = _refs(folder)
        snapshots = [path for path in sorted(folder.glob("snapshots/*")) if path.is_dir() and snapshot_files(path)]
        for snapshot in snapshots:
            names = tuple(name for name, commit in refs.items() if commit == snapshot.name)
            found = list(_in_snapshot(repo, snapshot))
            for name, path, about in found:
                unfinished = partial if about.problem or len(snapshots) == len(found) == 1 else 0
                yield LocalModel(name, "hub", path, about, snapshot.name, names, unfinished)
        if not snapshots and partial:
            nothing = Description("unknown", None, None, None, None, 0, "nothing is whole yet")
            yield LocalModel(repo, "hub", folder, nothing, partial=partial)


def _in_snapshot(repo: str, snapshot: Path) -> Iterator[tuple[str, Path, Description]]:
    names = snapshot_files(snapshot)
    ggufs = choose.gguf_files(names)
    labels = [choose.quant_label(file) for file in ggufs]
    for file, label in zip(ggufs, labels, strict=True):
        name = f"{repo}:{label}" if label and labels.count(label) == 1 else f"{repo}/{file}"
        yield name, snapshot / file, describe_gguf(snapshot / file)
    if choose.safetensors(names) or (not ggufs and "config.json" in names):
        yield repo, snapshot, describe_directory(snapshot)


def _refs(folder: Path) -> dict[str, str]:
    refs = folder / "refs"
    found = (path for path in sorted(refs.rglob("*")) if path.is_file() and path.suffix != ".tmp")
    return {path.relative_to(refs).as_posix(): path.read_text("utf-8", errors="replace").strip() for path in found}


def in_folder(folder: Path) -> Iterator[LocalModel]:
    """Models in a folder of the user's and in those below it."""
    yield from _in_folder(folder, DEEPEST)


def _in_folder(folder: Path, depth: int) -> Iterator[LocalModel]:
    entries = sorted(folder.iterdir(), key=lambda path: path.name.lower())
    if (folder / "config.json").is_file() and any(path.suffix == ".safetensors" for path in entries):
        yield LocalModel(str(folder), "folder", folder, describe_directory(folder))
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_file() and path.suffix == ".gguf":
            yield LocalModel(str(path), "folder", path, describe_gguf(path))
        elif path.is_dir() and depth:
            yield from _in_folder(path, depth - 1)
