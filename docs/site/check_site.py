"""Check a built site: `python docs/site/check_site.py build/site`.

Links and anchors lead somewhere, nothing is loaded from elsewhere, and no Markdown is left as text. Links to other sites are looked at for
their form alone: the check needs no network.
"""
from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
NOT_LOADED = {"canonical", "prev", "next", "alternate"}  # kinds of <link> that a browser does not fetch
LEFT_OVER = re.compile(r"^\s*(```|[-*] \S|\d+\. \S|\|.*\|\s*$)", re.MULTILINE)
NOT_FOUND = "404.html"  # its links are from the server's root


@dataclass
class Page:
    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    paragraphs: list[str] = field(default_factory=list)


class Reader(HTMLParser):
    """Takes out of a page what is checked."""

    def __init__(self, text: str):
        super().__init__()
        self.page = Page()
        self._in_paragraph = self._in_code = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if identity := given.get("id"):
            self.page.ids.append(identity)
        if tag == "a" and (href := given.get("href")):
            self.page.links.append(href)
        if tag in LOADED and (address := given.get(LOADED[tag])) and not NOT_LOADED & set((given.get("rel") or "").split()):
            self.page.loaded.append(address)
        if tag == "p":
            self._in_paragraph = 1
            self.page.paragraphs.append("")
        if tag == "code":
            self._in_code += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self._in_paragraph = 0
        if tag == "code":
            self._in_code -= 1

    def handle_data(self, data: str) -> None:
        if self._in_paragraph:
            self.page.paragraphs[-1] += "`" if self._in_code else data


def problems(site: Path) -> list[str]:
    """What is wrong with a site, a line each."""
    pages = {path.relative_to(site).as_posix(): Reader(path.read_text(encoding="utf-8")).page for path in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site} has no pages"]
    for name, page in pages.items():
        if name == NOT_FOUND:
            continue
        found += [f"{name}: {link}: {what}" for link in page.links if (what := wrong_link(site, pages, name, link))]
        for address in page.loaded:
            if urlsplit(address).netloc:
                found.append(f"{name}: {address} is loaded from another site")
            elif what := wrong_link(site, pages, name, address):
                found.append(f"{name}: {address}: {what}")
        found += [f"{name}: two elements have the id {one!r}" for one in sorted(set(page.ids)) if page.ids.count(one) > 1]
        found += [f"{name}: Markdown is left as text: {text.strip()[:60]!r}" for text in page.paragraphs if LEFT_OVER.search(text)]
    return found


def wrong_link(site: Path, pages: dict[str, Page], name: str, link: str) -> str | None:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        local = parts.hostname in ("127.0.0.1", "localhost")
        fine = parts.scheme == "mailto" or ((parts.scheme == "https" or local) and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.hostname or ""))
        return None if fine else "expected https://, or a page of the site"
    target = (site / name).parent / unquote(parts.path) if parts.path else site / name
    if target.is_dir():
        target = target / "index.html"
    if not target.is_file():
        return "there is no such file"
    key = target.resolve().relative_to(site.resolve()).as_posix()
    if parts.fragment and parts.fragment != "__skip" and key in pages and unquote(parts.fragment) not in pages[key].ids:
        return "the page has no such anchor"
    return None


def main(argv: list[str]) -> int:
    site = Path(argv[0])
    found = problems(site)
    print("\n".join(found), file=sys.stderr)
    count = len(list(site.rglob("*.html")))
    print(f"{count} pages, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
