"""What goes wrong between here and the hub, each with its own text and what to do."""
from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


class HubError(ValueError):
    """A model that cannot be had from the hub. The text ends with what to do, behind its last semicolon."""


class UnreachableError(HubError):
    """The hub did not answer, or could not: another try may succeed, and a copy in the cache is as good as it can be."""


def explained(error: Exception, repo: str, endpoint: str, revision: str | None = None, file: str | None = None) -> HubError:
    """What an exception of huggingface_hub or of its HTTP client means for a user who asked for `repo`."""
    hub = library("errors")
    if isinstance(error, HubError):
        return error
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = response.headers.get("X-Error-Message") if response is not None else None
    if isinstance(error, hub.GatedRepoError):
        return _gated(repo, endpoint)
    if status == 401 and said and "credentials" in said:
        return HubError(f"the hub does not accept your token, which is {token_source()} (401: {said}); correct it: {LOG_IN}")
    if isinstance(error, hub.RevisionNotFoundError):
        return HubError(f"{repo} has no revision {revision!r}; {endpoint}/{repo}/commits/main lists branches, tags and commits")
    if isinstance(error, hub.EntryNotFoundError) and status == 404 and file is not None:
        return HubError(f"{repo} has no file {file!r}; {endpoint}/{repo}/tree/{revision or 'main'} lists what there is")
    if isinstance(error, hub.DisabledRepoError):
        return HubError(f"{repo} is disabled on the hub; choose another model")
    if isinstance(error, hub.RepositoryNotFoundError) or status in (401, 404):
        if has_token():
            return HubError(
                f"the hub has no model {repo}, or it is private and your token, which is {token_source()}, may not see it; check the "
                "spelling, or use a token with access"
            )
        return HubError(f"the hub has no model {repo}, or it is private and you are not logged in; check the spelling, or {LOG_IN}")
    if status == 403:
        return HubError(f"the hub refuses access to {repo} (403{f': {said}' if said else ''}); use a token that may read it: {LOG_IN}")
    if status == 429:
        wait = retry_after(response)
        when = f"in {wait:.0f} s" if wait else "in some minutes"
        return UnreachableError(f"the hub limits how often you ask (429 Too Many Requests); try again {when}, or {LOG_IN} for more")
    if status is not None and status >= 500:
        return UnreachableError(f"the hub has a fault of its own ({status} from {endpoint}); try again later: what is downloaded is kept")
    if status is not None:
        return HubError(f"{endpoint} answers {status} for {repo}{f' ({said})' if said else ''}; try again later, or check HF_ENDPOINT")
    return _without_answer(error, endpoint)


def _without_answer(error: Exception, endpoint: str) -> HubError:
    hub = library("errors")
    text = " ".join(str(error).split())[:200]
    kind = type(error).__name__
    if isinstance(error, hub.OfflineModeIsEnabled):
        return UnreachableError("HF_HUB_OFFLINE is set; unset it to download")
    if isinstance(error, hub.HFValidationError):
        return HubError(f"the hub has no such names ({text}); check the spelling")
    strange = (ValueError, KeyError, TypeError, AttributeError, RecursionError, hub.FileMetadataError)
    if isinstance(error, strange) or kind == "DecodingError":  # JSON of another kind, or none
        return UnreachableError(
            f"{endpoint} answers, but not as the hub does ({kind}: {text}); check HF_ENDPOINT, and that no login page of your network "
            "is in between"
        )
    if kind == "ProxyError":
        return UnreachableError(f"the proxy does not let a request to {endpoint} through ({text}); check HTTPS_PROXY and NO_PROXY")
    if "CERTIFICATE" in text.upper() or "SSL" in text.upper():
        return UnreachableError(
            f"the secure connection to {endpoint} failed ({text}); set SSL_CERT_FILE to the certificate of a proxy that opens connections, "
            "and check the clock"
        )
    if "Timeout" in kind:
        return UnreachableError(f"{endpoint} does not answer in time; check the network, or try again later")
    if is_transport(error):
        return UnreachableError(f"{endpoint} cannot be reached ({text or kind}); check the network{_proxy_hint()}")
    if isinstance(error, OSError):
        return HubError(f"{kind}: {text}; check that the cache folder can be written to")
    return HubError(f"the download failed ({kind}: {text}); try again")


def _gated(repo: str, endpoint: str) -> HubError:
    reason = f"your token, which is {token_source()}, has no access yet" if has_token() else "you are not logged in"
    then = "wait until it is granted" if has_token() else LOG_IN
    return HubError(f"{repo} is gated: its authors give access on request, and {reason}; ask for access at {endpoint}/{repo}, then {then}")


def _proxy_hint() -> str:
    names = [name for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY") if os.environ.get(name) or os.environ.get(name.lower())]
    return f" and the proxy in {names[0]}" if names else ", or set HTTPS_PROXY where one is needed"


def http() -> Any:
    """The HTTP client's package: httpx2 under huggingface_hub 2, httpx under 1."""
    return sys.modules[library("errors").HTTPError.__module__.partition(".")[0]]


def library(module: str) -> Any:
    """A module of huggingface_hub, which is imported when a download needs it. It names its types only in part."""
    return import_module(f"huggingface_hub.{module}")


def is_transport(error: BaseException) -> bool:
    """Whether no answer came, or only a part of one."""
    return isinstance(error, http().TransportError)


def retry_after(response: Any) -> float | None:
    """Seconds that the hub asks to wait, or None."""
    value = response.headers.get("Retry-After", "") if response is not None else ""
    if value.strip().isdigit():
        return float(value)
    for part in (response.headers.get("RateLimit", "") if response is not None else "").split(";"):
        name, _, number = part.strip().partition("=")
        if name == "t" and number.isdigit():
            return float(number)
    return None


def has_token() -> bool:
    from huggingface_hub import get_token

    return bool(get_token())


def token_source() -> str:
    """Where the token in use comes from."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return "in HF_TOKEN"
    return "of `hf auth login`"
