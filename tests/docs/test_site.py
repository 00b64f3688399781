"""The site's own code: what its check finds, and that its nav and its links are those of the repository. `make docs` builds it."""
import re
import sys

import pytest
import yaml
from markdown_blocks import PAGES, ROOT

sys.path.insert(0, str(ROOT / "docs" / "site"))
from check_site import problems

GOOD = '<html><body><h1 id="top">A</h1><p>text</p><a href="b.html#there">b</a><a href="https://example.org/x">x</a></body></html>'
OTHER = '<html><body><h2 id="there">B</h2><a href="a.html">a</a></body></html>'


def site(folder, a=GOOD):
    (folder / "a.html").write_text(a)
    (folder / "b.html").write_text(OTHER)
    return folder


def test_a_good_site_has_no_problem(tmp_path):
    assert problems(site(tmp_path)) == []


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("b.html#there", "c.html", "there is no such file"),
        ("b.html#there", "b.html#nowhere", "the page has no such anchor"),
        ("b.html#there", "#nowhere", "the page has no such anchor"),
        ("https://example.org/x", "http://example.org/x", "expected https://"),
        ("https://example.org/x", "https://example", "expected https://"),
        ("<p>text</p>", '<script src="https://cdn.example.org/x.js"></script>', "is loaded from another site"),
        ("<p>text</p>", '<link rel="stylesheet" href="https://fonts.example.org/x.css">', "is loaded from another site"),
        ("<p>text</p>", '<img src="none.svg">', "there is no such file"),
        ("<p>text</p>", '<p id="top">text</p>', "two elements have the id 'top'"),
        ("<p>text</p>", "<p>so:\n- one\n- two</p>", "Markdown is left as text"),
        ("<p>text</p>", "<p>```console</p>", "Markdown is left as text"),
    ],
)
def test_what_is_wrong_is_found(tmp_path, old, new, text):
    found = problems(site(tmp_path, GOOD.replace(old, new)))
    assert len(found) == 1 and text in found[0]


def test_an_empty_folder_is_no_site(tmp_path):
    assert problems(tmp_path)


def test_every_page_is_in_the_nav_once():
    text = (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    nav = re.findall(r": (\S+\.md)$", text.partition("\nnav:")[2], re.MULTILINE)
    assert sorted(nav) == sorted(page.name for page in PAGES)


def test_the_site_asks_nothing_of_other_servers():
    text = (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    plain = yaml.safe_load(re.sub(r"!!python\S+.*", "", text))
    assert plain["theme"]["font"] is False
    assert not any("://" in str(address) for address in plain["extra"]["polyfills"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_in_the_repository_too(page):
    """As GitHub shows the pages: relative to the file."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link
