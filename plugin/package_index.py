"""A source archive from the package index that pip is set up for.

pip has no command that downloads an sdist without running its build, and vLLM's build needs a compiler, so this reads the index itself:
the simple repository API (PEP 503, PEP 691) with pip's settings for indexes, links, certificates and a proxy.
"""

from __future__ import annotations

import base64
import hashlib
import json
import netrc
import os
import shutil
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from metalstep.cli.errors import CommandError
from metalstep.plugin.environment import pip_default_index

ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
CHUNK = 1 << 20  # bytes
SECONDS = 60.0  # that a server may be silent


def fetch(project: str, filename: str, sha256: str, folder: Path, settings: dict[str, list[str]]) -> Path:
    """Download an archive to `folder` and return its path. settings: as pip_settings() gives them.

    Raises: CommandError where no index has it, none can be reached, or the file is another than the one of this digest.
    """
    opener = make_opener(settings)
    target = folder / filename
    problems = []
    for place in places(project, settings):
        try:
            url = find(opener, place, filename)
            if url is None:
                problems.append(f"{without_password(place)} does not list it")
                continue
            download(opener, url, target)
        except (OSError, ValueError) as error:  # urllib's errors are OSErrors
            problems.append(f"{without_password(place)}: {getattr(error, 'reason', error)}")
            continue
        check_digest(target, sha256)
        return target
    raise CommandError(
        f"cannot download {filename}: {'; '.join(problems) or 'pip is set up without an index'}",
        f"check the network and `pip config list`, or download {filename} elsewhere and pass --sdist FILE",
    )


def check_digest(path: Path, sha256: str) -> None:
    """Raises: CommandError for a file of another digest."""
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != sha256:
        raise CommandError(f"{path.name} has the sha256 {got}, expected {sha256}", "it is damaged, or not what was published: delete it")


def places(project: str, settings: dict[str, list[str]]) -> list[str]:
    """Pages and folders that may list the project's files, in pip's order: its links first."""
    links = settings.get("find-links", [])
    if settings.get("no-index", ["0"])[0].lower() in ("1", "true", "yes", "on"):
        return links
    indexes = (settings.get("index-url") or pip_default_index()) + settings.get("extra-index-url", [])
    return [*links, *(f"{index.rstrip('/')}/{project}/" for index in indexes)]


def find(opener: urllib.request.OpenerDirector, place: str, filename: str) -> str | None:
    """The URL of a file that a page or a folder lists, or None."""
    local = Path(urllib.request.url2pathname(urllib.parse.urlsplit(place).path) if place.startswith("file:") else place)
    if "://" not in place or place.startswith("file:"):
        if (local / filename).is_file():
            return (local / filename).absolute().as_uri()
        if not (local / "index.html").is_file():
            return None
        place = (local / "index.html").absolute().as_uri()
    with open_url(opener, place) as response:
        base, kind, body = response.geturl(), response.headers.get_content_type(), response.read()
    if kind.endswith("+json"):
        links = [file["url"] for file in json.loads(body)["files"]]
    else:
        parser = Links()
        parser.feed(body.decode("utf-8", "replace"))
        links = parser.found
    for link in links:
        url = urllib.parse.urljoin(base, link)
        if urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2] == filename:
            return with_password_of(url, place)
    return None


class Links(HTMLParser):
    """The targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def download(opener: urllib.request.OpenerDirector, url: str, target: Path) -> None:
    """Write a URL's body to `target`, through a temporary name, with the size on stderr."""
    part = target.with_name(target.name + ".part")
    try:
        with open_url(opener, url) as response, part.open("wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            print(f"  downloading {target.name}" + (f" ({size / 1e6:.0f} MB)" if size else ""), file=sys.stderr, flush=True)
            shutil.copyfileobj(response, file, CHUNK)
            if size and file.tell() != size:
                raise OSError(f"the connection ended after {file.tell():,} of {size:,} bytes")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


# ---- the connection


def make_opener(settings: dict[str, list[str]]) -> urllib.request.OpenerDirector:
    """A URL opener with pip's certificates and proxy; without settings, those of the system and the environment."""
    certificate = settings.get("cert", [None])[0]
    context = ssl.create_default_context(cafile=certificate)
    if certificate is None:
        try:  # python.org's Python for macOS comes without certificates of its own
            import certifi  # type: ignore[import-not-found, import-untyped, unused-ignore]

            context.load_verify_locations(certifi.where())
        except ImportError:
            pass
    if client := settings.get("client-cert"):
        context.load_cert_chain(client[0])
    handlers: list[Any] = [urllib.request.HTTPSHandler(context=context)]
    if proxy := settings.get("proxy"):
        handlers.append(urllib.request.ProxyHandler({"http": proxy[0], "https": proxy[0]}))
    return urllib.request.build_opener(*handlers)


def open_url(opener: urllib.request.OpenerDirector, url: str) -> Any:
    """The response of a URL. A name and password come from the URL itself or from ~/.netrc, as pip takes them."""
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(url, headers={"Accept": ACCEPT})
    user, password = urllib.parse.unquote(parts.username or ""), urllib.parse.unquote(parts.password or "")
    if user:
        request = urllib.request.Request(without_password(url), headers={"Accept": ACCEPT})
    elif parts.hostname:
        user, password = netrc_login(parts.hostname)
    if user:
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return opener.open(request, timeout=SECONDS)


def netrc_login(host: str) -> tuple[str, str]:
    """Name and password of a host in the user's netrc file, or empty texts."""
    try:
        entry = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return "", ""
    return (entry[0], entry[2] or "") if entry else ("", "")


def without_password(url: str) -> str:
    """The same URL without a name and password."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "://" in url else url


def with_password_of(url: str, page: str) -> str:
    """A link with the name and password of the page that has it, where both are of one host."""
    ours, theirs = urllib.parse.urlsplit(page), urllib.parse.urlsplit(url)
    if "@" not in ours.netloc or "@" in theirs.netloc or ours.netloc.rpartition("@")[2] != theirs.netloc:
        return url
    return urllib.parse.urlunsplit(theirs._replace(netloc=ours.netloc))
