"""Each message that docs/troubleshooting.md is headed by stands in the source, and the page's guidance for it is not empty."""
import re
from functools import cache

import pytest
from markdown_blocks import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^### (.+)\n\n((?:(?!^#).*\n)+)", PAGE, re.MULTILINE)
FOLDERS = {"engine": "*.py", "kernels": "*.py", "plugin": "*.py", "swift_kernels/Sources": "*.swift"}
BETWEEN = r".{0,400}?"


@cache
def messages():
    """The text of each source file with literals that follow each other joined, without marks of escaping."""
    texts = []
    for folder, pattern in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob(pattern)):
            text = path.read_text(encoding="utf-8").replace('\\"', '"')
            texts.append(re.sub(r'"\s*\n?\s*\+?\s*f?"', "", text))
    return texts


def said(heading):
    fragments = [part.strip() for part in heading.split("…") if len(part.strip(" ,:;()")) > 1]
    return re.compile(BETWEEN.join(map(re.escape, fragments)))


@pytest.mark.parametrize("heading", [heading for heading, _ in ENTRIES])
def test_the_message_is_in_the_source(heading):
    assert any(said(heading).search(text) for text in messages()), heading


def test_every_entry_says_what_to_do_and_none_is_twice():
    assert len(ENTRIES) == PAGE.count("\n### ") >= 40
    assert all(len(text.split()) >= 2 for _, text in ENTRIES)
    assert len({heading for heading, _ in ENTRIES}) == len(ENTRIES)


def test_a_message_that_is_not_there_is_seen():
    assert not any(said("the moon is …, expected cheese").search(text) for text in messages())
