"""The pages of reference are complete: every public name, every option of load, of the command line and of a server."""
import inspect
import re
import sys
from importlib import import_module

from markdown_blocks import ROOT

import metalstep
from metalstep.cli.generate import parser
from metalstep.cli.main import COMMANDS, plugins
from metalstep.plugin.options import PluginOptions

sys.path.insert(0, str(ROOT / "docs" / "site"))
from api_page import api_page

CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
OF_LOAD, _, OF_SERVER = CONFIGURATION.partition("## A server's own")
ROWS = {name: re.split(r" ?\| ?", rest) for name, rest in re.findall(r"^\| `(\w+)` \| (.+)$", OF_LOAD.partition("|---")[2], re.MULTILINE)}


def words(text):
    """Its words alone, without line breaks, marks of Markdown and quotes."""
    return " ".join(re.findall(r"\w+", text.replace("\\", "")))


def test_every_option_of_load_is_there_with_its_default():
    parameters = inspect.signature(metalstep.load).parameters
    assert list(ROWS.keys() - parameters.keys()) == list(parameters.keys() - ROWS.keys()) == []
    for name, parameter in parameters.items():
        shown = ROWS[name][0]
        assert shown == ("needed" if parameter.default is parameter.empty else f"`{parameter.default!r}`"), name


def test_the_command_line_has_the_options_that_the_table_names():
    known = {option for action in parser()._actions for option in action.option_strings}
    for name, row in ROWS.items():
        for option in re.findall(r"`(--[\w-]+)`", row[1]):
            assert option in known, f"{name}: {option}"


def test_every_key_of_a_server_is_there():
    of_table = {key for row in ROWS.values() for key in re.findall(r"`(\w+)`", row[2])}
    of_own = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", OF_SERVER, re.MULTILINE))))
    keys = set(PluginOptions.__dataclass_fields__)
    assert keys <= of_table | of_own
    assert of_table - {"MODEL"} <= keys


def test_what_other_libraries_names_become_exists():
    """The second column of docs/coming-from.md."""
    page = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    column = " ".join(re.findall(r"^\| .*? \| (.*?) \|", page, re.MULTILINE))
    known = {option for action in parser()._actions for option in action.option_strings}
    options = set(re.findall(r"(?<![\w-])--[\w-]+", column))
    assert len(options) >= 10 and options <= known
    for name in re.findall(r"`metalstep\.([\w.]+)`", column):
        assert name in metalstep.__all__ or import_module(f"metalstep.{name}"), name
    for name in re.findall(r"`metalstep (\w+)", column):
        assert name in COMMANDS or name in plugins(), name


def test_every_public_name_has_its_parameters_and_its_text():
    page = api_page()
    for name in metalstep.__all__:
        section = re.search(rf"^### {name}\n(.*?)(?=^###? |\Z)", page, re.DOTALL | re.MULTILINE)
        assert section, name
        thing = getattr(metalstep, name)
        first = inspect.getdoc(thing).partition(".")[0]
        assert words(first) in words(section[1]), name
        if not isinstance(thing, type):
            assert all(parameter in section[1] for parameter in inspect.signature(thing).parameters), name
            assert "**Raises**" in section[1] or name == "generate"


def test_every_environment_variable_that_is_read_is_listed():
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    read = set()
    for folder in ("engine", "kernels", "plugin"):
        for path in (ROOT / folder).rglob("*.py"):
            read |= set(re.findall(r"""["'](METALSTEP_\w+)["']""", path.read_text(encoding="utf-8")))
    assert [name for name in sorted(read) if f"`{name}`" not in page] == []
