"""Names of models on the hub: `owner/name`, `owner/name:Q4_K_M`, `owner/name/file.gguf`."""
from __future__ import annotations

import re
from dataclasses import dataclass

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NAME = re.compile(rf"(?P<repo>{HUB_ID.pattern})(?::(?P<quant>[A-Za-z0-9][\w.-]*)|/(?P<file>(?:[^/:]+/)*[^/:]+\.gguf))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHORT_COMMIT = re.compile(r"[0-9a-f]{7,40}")
ADDRESS = re.compile(rf"https?://[^/]+/({HUB_ID.pattern})")
EXPECTED = "a Hugging Face id (owner/name, or owner/name:Q4_K_M and owner/name/file.gguf of GGUF files)"


@dataclass(frozen=True)
class HubName:
    """repo: owner/name. quant: which of its GGUF files, as Q4_K_M. file: a .gguf file in the repository. At most one of both is given."""

    repo: str
    quant: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}:{self.quant}" if self.quant else f"{self.repo}/{self.file}" if self.file else self.repo


def hub_name(text: str) -> HubName | None:
    """What `text` names on the hub; None where it cannot be the name of a model there."""
    match = NAME.fullmatch(text)
    if match is None or match["repo"].endswith(".gguf") or ".." in match["repo"] or "--" in match["repo"]:
        return None
    if match["file"] and any(part in (".", "..") for part in match["file"].split("/")):
        return None
    return HubName(match["repo"], match["quant"], match["file"])


def expected(text: str) -> str:
    """What names of the hub look like, to whoever wrote `text`; of a page's address the model on it."""
    page = ADDRESS.match(text)
    return f"the model of that page as {page[1]}" if page and hub_name(page[1]) else EXPECTED
