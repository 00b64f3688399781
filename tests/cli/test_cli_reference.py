"""The reference of the command line has every command, option and example of the parsers."""

import pytest

from metalstep.cli.main import COMMANDS
from metalstep.cli.parsers import all_parsers, examples
from metalstep.cli.reference import reference


@pytest.fixture(scope="module")
def sections():
    """The page by heading."""
    parts = ("\n" + reference()).replace("\n### ", "\n## ").split("\n## ")
    return {part.partition("\n")[0]: part for part in parts[1:]}


def test_every_command_has_a_section(sections):
    assert set(COMMANDS) <= set(sections)


@pytest.mark.parametrize("call", list(all_parsers()), ids=" ".join)
def test_a_section_has_every_option_its_help_and_the_examples(sections, call):
    section = sections[" ".join(filter(None, call))]
    parser = all_parsers()[call]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    shown = [action for group in parser._action_groups for action in group._group_actions]
    shown = [action for action in shown if action.help != "==SUPPRESS==" and action.dest != "help"]
    for row, action in zip(rows, shown, strict=True):
        names, text = row.replace("\\|", "|")[3:].split("` | ", 1)
        assert names.startswith(", ".join(action.option_strings))
        assert action.option_strings or str(action.metavar or action.dest).lower() in names.lower() or action.choices
        assert " ".join((action.help or "").replace("%%", "%").split()) == text.removesuffix(" |")
    assert all(f"$ {line}" in section for line in examples(parser))


def test_a_bar_does_not_end_a_cell(sections):
    lines = [line for section in sections.values() for line in section.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in lines)
