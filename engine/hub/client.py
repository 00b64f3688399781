"""Requests to the hub, with huggingface_hub's own endpoint, token, cache folder and HTTP session."""
from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from metalstep.hub.errors import HubError, UnreachableError, explained, is_transport, library, retry_after
from metalstep.hub.names import COMMIT

Answer = TypeVar("Answer")
TRIES = 5
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries; whom the hub tells to wait longer is told so and not kept waiting
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # a terminal would obey some of them
BUSY = (408, 429, 500, 502, 503, 504)


def _constant(name: str) -> Any:
    return getattr(library("constants"), name)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at a commit. etag: the name of its content in the cache, sha256 of a large file or git's sha1 of a small
    one; None where the hub does not say."""

    name: str
    size: int | None
    etag: str | None


@dataclass(frozen=True)
class Listing:
    """What a repository holds at a commit."""

    commit: str
    files: dict[str, RemoteFile]


@dataclass(frozen=True)
class Hub:
    """endpoint: of HF_ENDPOINT. cache: of HF_HUB_CACHE or HF_HOME. offline: of HF_HUB_OFFLINE."""

    endpoint: str = field(default_factory=lambda: _constant("ENDPOINT"))
    cache: Path = field(default_factory=lambda: Path(_constant("HF_HUB_CACHE")).expanduser())
    offline: bool = field(default_factory=lambda: _constant("HF_HUB_OFFLINE"))

    def listing(self, repo: str, revision: str | None, tries: int = 1) -> Listing:
        """The commit that `revision` is now and its files. Raises: HubError."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint, library_name="metalstep")
        timeout = _constant("HF_HUB_ETAG_TIMEOUT")

        def ask() -> Listing:
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
            if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
                raise TypeError(f"the commit of {repo} is {info.sha!r:.80}")
            found = (_remote_file(s.rfilename, s.size, s.lfs.sha256 if s.lfs else s.blob_id) for s in info.siblings or ())
            return Listing(info.sha, {file.name: file for file in found})

        try:
            return self.patiently(ask, tries)
        except Exception as error:  # of huggingface_hub, of its HTTP client, of the JSON parser
            raise self._no_revision(repo, revision, explained(error, repo, self.endpoint, revision)) from error

    def _no_revision(self, repo: str, revision: str | None, error: HubError) -> HubError:
        """`error`, with the names of branches and tags where it is about one that does not exist."""
        from huggingface_hub import HfApi

        if "has no revision" not in str(error):
            return error
        try:
            refs = HfApi(endpoint=self.endpoint).list_repo_refs(repo)
        except Exception:  # the first error is the one to tell
            return error
        names = [ref.name for ref in [*refs.branches, *refs.tags]]
        return HubError(f"{repo} has no revision {revision!r}; there are {', '.join(names[:12])}, and commits at {self.endpoint}/{repo}")

    def small(self, repo: str, commit: str, file: str, limit: int = 64 << 20) -> bytes:
        """The content of a small file. Raises: HubError."""

        def ask() -> bytes:
            with self.stream(repo, commit, file) as response:
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > limit:
                        raise HubError(f"{repo}: {file} is larger than {limit} bytes; choose another revision")
                return bytes(data)

        try:
            return self.patiently(ask, TRIES)
        except Exception as error:
            raise explained(error, repo, self.endpoint, commit, file) from error

    @contextmanager
    def stream(self, repo: str, commit: str, file: str, start: int = 0) -> Iterator[Any]:
        """A response with the bytes of `file` from `start` on, or all of them where the server has no ranges (status 200)."""
        from huggingface_hub import hf_hub_url

        utils = library("utils")
        url = hf_hub_url(repo, file, revision=commit, endpoint=self.endpoint)
        headers = utils.build_hf_headers(library_name="metalstep", headers={"Accept-Encoding": "identity"})  # for ranges
        if start:
            headers["Range"] = f"bytes={start}-"
        timeout = _constant("HF_HUB_DOWNLOAD_TIMEOUT")
        with utils.get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            if response.status_code >= 400:
                response.read()
            utils.hf_raise_for_status(response)
            yield response

    def patiently(self, ask: Callable[[], Answer], tries: int) -> Answer:
        """`ask`, again where the hub is busy or the connection broke."""
        for number in range(1, tries + 1):
            try:
                return ask()
            except Exception as error:
                wait = wait_before(error, number)
                if number == tries or wait is None:
                    raise
                time.sleep(wait)
        raise AssertionError("unreachable")


def _remote_file(name: Any, size: Any, etag: Any) -> RemoteFile:
    """As the hub says it. Names and hashes become paths here: what would leave its folder is no answer of the hub's. Raises: TypeError."""
    if not isinstance(name, str) or CONTROL.search(name) or any(part in ("", ".", "..") for part in name.split("/")):
        raise TypeError(f"a file is called {name!r:.80}")
    known = isinstance(size, int) and size >= 0
    return RemoteFile(name, size if known else None, etag if isinstance(etag, str) and HASH.fullmatch(etag) else None)


def wait_before(error: Exception, number: int) -> float | None:
    """Seconds before another try after the `number`th failed, or None where one makes no sense."""
    response = getattr(error, "response", None)
    if response is not None:
        if response.status_code not in BUSY:
            return None
        told = retry_after(response)
        if told is not None:
            return told if told <= LONGEST_WAIT else None
    elif not is_transport(error) or isinstance(error, UnreachableError):
        return None
    return min(FIRST_WAIT * float(2 ** (number - 1)), LONGEST_WAIT)
