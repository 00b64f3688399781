"""The commands of the pages for a Mac's owner exist and take the options that they are printed with, and what the pages name is there."""

import re
import shlex
from pathlib import Path

import pytest
from printed_commands import check

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "docs" / name for name in ("not_run_on_a_mac.md", "metal.md")]
FOLDERS = ("docs", "engine", "kernels", "metal", "scripts", "swift_kernels", "tests")


def commands(page):
    """The lines behind `$ ` of a page's console blocks."""
    blocks = re.findall(r"^ *```console\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [line.strip()[2:] for block in blocks for line in block.splitlines() if line.strip().startswith("$ ")]


CASES = [(page.name, line) for page in PAGES for line in commands(page)]


def words(line):
    """A command without its variables, and the file that it writes, or None."""
    parts = [part for part in shlex.split(line) if part != "2>&1"]
    while re.fullmatch(r"[A-Z_]+=\S*", parts[0]):
        parts.pop(0)
    if ">" in parts:
        at = parts.index(">")
        return parts[:at], parts[at + 1]
    return parts, parts[parts.index("--report") + 1] if "--report" in parts else None


@pytest.mark.parametrize(("page", "line"), CASES, ids=lambda value: value[:60])
def test_a_printed_command_exists(page, line, monkeypatch, tmp_path):
    check(line, monkeypatch, tmp_path)


def test_every_step_of_the_first_hour_leaves_a_file_of_its_own():
    lines = [line for line in commands(PAGES[0]) if words(line)[0][0] not in ("make",) or ">" in line]
    files = [file for line in lines if (file := words(line)[1])]
    assert len(files) - files.count("doctor.json") == len(set(files) - {"doctor.json"})
    for step in ("doctor", "pytest", "explain", "bench decode", "bench launches", "bench quality"):
        assert all(words(line)[1] for line in lines if step in line), step


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    """Files and folders in backquotes, and pages behind links."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`([\w./*-]+)`", text):
        folder, slash, _ = name.partition("/")
        if slash and folder in FOLDERS:
            assert list(ROOT.glob(name.rstrip("/"))), name
    for link in re.findall(r"\]\(([\w./-]+\.md)\)", text):
        assert (page.parent / link).exists(), link


def test_the_tables_that_a_tuner_edits_are_where_the_page_says():
    text = (ROOT / "docs" / "metal.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+) in `([\w./]+\.(?:py|json))` \|", text, re.MULTILINE)
    assert len(rows) == 6
    for names, path in rows:
        module = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf'^(?:{name}\b.*=|  "{name}":)', module, re.MULTILINE), f"{name} in {path}"


def test_the_kernels_of_the_table_are_all_kernels():
    """Every family of metal/ and every module of kernels/gpu that makes launches is in the table."""
    text = (ROOT / "docs" / "metal.md").read_text(encoding="utf-8")
    for path in (ROOT / "metal").glob("*.metal"):
        assert f"`{path.name}`" in text or path.name == "add_rms_norm.metal", path.name
    for path in (ROOT / "kernels" / "gpu").glob("*.py"):
        if re.search(r"^def launches\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert f"`{path.name}`" in text, path.name
