"""The hub's cache folder: what is whole in it, without a request."""
from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from metalstep.hub import choose
from metalstep.hub.errors import HubError
from metalstep.hub.names import COMMIT, SHORT_COMMIT, HubName

PREFIX = "models--"
PARTIAL = ".incomplete"


@dataclass(frozen=True)
class CachedModel:
    """path: the snapshot's folder, or its .gguf file."""

    path: Path
    commit: str


def storage(cache: Path, repo: str) -> Path:
    """The folder of a repository: refs/, snapshots/ and blobs/."""
    return cache / (PREFIX + repo.replace("/", "--"))


def repositories(cache: Path) -> Iterator[tuple[str, Path]]:
    """The models' repositories in a cache and their folders, by name."""
    if cache.is_dir():
        for folder in sorted(cache.glob(f"{PREFIX}*--*"), key=lambda f: f.name.lower()):
            if folder.is_dir():
                yield folder.name.removeprefix(PREFIX).replace("--", "/", 1), folder


def check_revision(revision: str) -> None:
    """Raises: HubError for what is no name in git."""
    if not revision or revision.startswith(("-", "/", ".")) or ".." in revision or any(c.isspace() or c in "\\~^:?*[\0" for c in revision):
        raise HubError(f"{revision!r} is no revision; name a branch, a tag or a commit, as in --revision main")


def cached_commit(folder: Path, revision: str | None) -> str | None:
    """The commit that `revision` was when it was last downloaded into a repository's folder."""
    revision = revision or "main"
    check_revision(revision)
    if COMMIT.fullmatch(revision):
        return revision
    ref = folder / "refs" / revision
    if ref.is_file():
        commit = ref.read_text("utf-8", errors="replace").strip()
        return commit if COMMIT.fullmatch(commit) else None
    if SHORT_COMMIT.fullmatch(revision):
        found = [path.name for path in (folder / "snapshots").glob(f"{revision}*")]
        return found[0] if len(found) == 1 else None
    return None


def write_ref(folder: Path, revision: str | None, commit: str) -> None:
    """Remember what `revision` is; written when its files are whole, so that what was there before is found until then."""
    revision = revision or "main"
    if COMMIT.fullmatch(revision) or commit.startswith(revision):
        return
    ref = folder / "refs" / revision
    if ref.is_file() and ref.read_text("utf-8", errors="replace") == commit:
        return
    ref.parent.mkdir(parents=True, exist_ok=True)
    fresh = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
    fresh.write_text(commit, "utf-8")
    fresh.replace(ref)


def cached_model(cache: Path, name: HubName, revision: str | None) -> CachedModel | None:
    """The model where all its files are in the cache, else None."""
    folder = storage(cache, name.repo)
    commit = cached_commit(folder, revision)
    return None if commit is None else whole(folder, name, commit)


def whole(folder: Path, name: HubName, commit: str) -> CachedModel | None:
    """The model at `commit` where all its files are in a repository's folder, else None."""
    snapshot = folder / "snapshots" / commit
    names = snapshot_files(snapshot)
    if not names:
        return None
    try:
        if choose.is_gguf(name, names):
            return CachedModel(snapshot / choose.gguf_file(name, names), commit)
    except HubError:  # that file is not here
        return None
    return None if missing_files(snapshot, names) else CachedModel(snapshot, commit)


def snapshot_files(snapshot: Path) -> set[str]:
    """Files with content in a snapshot, by their names in the repository."""
    found = set()
    for root, _, files in os.walk(snapshot):
        for file in files:
            path = Path(root, file)
            if path.is_file():  # a link whose content was removed is not
                found.add(path.relative_to(snapshot).as_posix())
    return found


def missing_files(folder: Path, names: set[str] | None = None) -> list[str]:
    """What keeps a directory of a model in safetensors from being whole, as names of files. A tokenizer counts as one."""
    names = snapshot_files(folder) if names is None else names
    missing = [name for name in ("config.json",) if name not in names]
    if choose.INDEX in names:
        try:
            weights = choose.index_files(str(folder), (folder / choose.INDEX).read_bytes())
        except (HubError, OSError):
            return [*missing, choose.INDEX]
        missing += [name for name in weights if name not in names]
    elif weights := choose.safetensors(names):
        missing += [name for name in choose.shards(weights) if name not in names]
    else:
        missing.append("model.safetensors")
    if not any(fnmatch(name, pattern) for name in names for pattern in choose.TOKENIZERS):
        missing.append("tokenizer.json")
    return missing
