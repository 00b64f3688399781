"""`metalstep completion`: a script that completes commands, options and their values in bash, zsh or fish."""

from __future__ import annotations

from collections.abc import Callable
from shlex import quote

from metalstep.cli.completion_words import FILE, FOLDER, MODEL, TOP, WORDS, Place, Value, model_names, places
from metalstep.cli.errors import CommandError
from metalstep.cli.parser import Parser

Places = dict[str, Place]


def parser() -> Parser:
    p = Parser(
        "metalstep completion",
        "Print a script that completes commands, options, their values, files and the names of models that are here. It is made from this "
        "version's parsers: print it again after an update.",
        [
            "metalstep completion bash > ~/.local/share/bash-completion/completions/metalstep",
            "metalstep completion zsh > ~/.zfunc/_metalstep",
            "metalstep completion fish > ~/.config/fish/completions/metalstep.fish",
        ],
    )
    p.add_argument("shell", nargs="?", choices=list(SHELLS), help="whose script; in ~/.zshrc, ~/.zfunc belongs to fpath before compinit")
    p.add_argument("--models", action="store_true", help="print the names of models instead, which the scripts ask for")
    return p


def main(argv: list[str]) -> int:
    """print the script that completes metalstep's commands and options in a shell"""
    args = parser().parse_args(argv)
    if args.models:
        print("\n".join(model_names()))
        return 0
    if args.shell is None:
        raise CommandError(f"the following arguments are required: one of {', '.join(SHELLS)}", "metalstep completion --help")
    print(SHELLS[args.shell](places()), end="")
    return 0


def steps(found: Places) -> list[tuple[str, str, str]]:
    """(place, word, place that the word leads to)."""
    return [
        (name, word, word if name in (TOP, "help") else f"{name}/{word}") for name, place in found.items() for word in place.commands
    ]  # fmt: skip


def bash(found: Places) -> str:
    lines = [
        "# bash completion of metalstep, made by `metalstep completion bash`",
        "_metalstep() {",
        '  local place=metalstep cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" i IFS=$\' \\t\\n\'',
        '  if [[ $cur == = ]]; then cur=""; elif [[ $prev == = ]]; then prev="${COMP_WORDS[COMP_CWORD-2]}"; fi',
        "  COMPREPLY=()",
        "  for ((i = 1; i < COMP_CWORD; i++)); do",
        '    case "$place ${COMP_WORDS[i]}" in',
        *(f"      {quote(f'{place} {word}')}) place={quote(to)} ;;" for place, word, to in steps(found)),
        "    esac",
        "  done",
        '  case "$place $prev" in',
    ]
    for name, place in found.items():
        for option in place.options:
            if option.value is not None:
                pattern = "|".join(quote(f"{name} {spelling}") for spelling in option.names)
                lines.append(f"    {pattern}) {bash_value(option.value)} return ;;")
    lines += ["  esac", '  case "$place" in']
    for name, place in found.items():
        options = " ".join(spelling for option in place.options for spelling in option.names)
        lines += [
            f"    {quote(name)})",
            f'      if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W {quote(options)} -- "$cur")); return; fi',
            f"      {bash_value(first_value(place))} ;;",
        ]
    lines += ["  esac", "}", "complete -F _metalstep metalstep"]
    return "\n".join(lines) + "\n"


def first_value(place: Place) -> Value:
    """What stands where no option does: a subcommand, or the first positional."""
    if place.commands:
        return Value(WORDS, list(place.commands))
    return place.positions[0] if place.positions else Value("text")


def bash_value(value: Value) -> str:
    if value.kind == WORDS:
        return f'COMPREPLY=($(compgen -W {quote(" ".join(value.words))} -- "$cur"));'
    if value.kind == MODEL:
        return (
            'compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -W "$(metalstep completion --models 2>/dev/null)" -- "$cur") '
            '$(compgen -f -- "$cur"));'
        )
    if value.kind in (FILE, FOLDER):
        return f'compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -{"f" if value.kind == FILE else "d"} -- "$cur"));'
    return ":;"


def zsh(found: Places) -> str:
    lines = [
        "#compdef metalstep",
        "# zsh completion of metalstep, made by `metalstep completion zsh`",
        "_metalstep() {",
        '  local place=metalstep cur="${words[CURRENT]}" prev="${words[CURRENT-1]}" i',
        "  local -a rows",
        "  for ((i = 2; i < CURRENT; i++)); do",
        '    case "$place ${words[i]}" in',
        *(f"      {quote(f'{place} {word}')}) place={quote(to)} ;;" for place, word, to in steps(found)),
        "    esac",
        "  done",
        '  case "$place $prev" in',
    ]
    for name, place in found.items():
        for option in place.options:
            if option.value is not None:
                pattern = "|".join(quote(f"{name} {spelling}") for spelling in option.names)
                lines.append(f"    {pattern}) {zsh_value(option.value)}; return ;;")
    lines += ["  esac", '  case "$place" in']
    for name, place in found.items():
        rows = " ".join(zsh_row(spelling, option.help) for option in place.options for spelling in option.names)
        commands = " ".join(zsh_row(word, text) for word, text in place.commands.items())
        lines += [
            f"    {quote(name)})",
            f"      if [[ $cur == -* ]]; then rows=({rows}); _describe option rows; return; fi",
            f"      {f'rows=({commands}); _describe command rows' if commands else zsh_value(first_value(place))} ;;",
        ]
    lines += ["  esac", "}", 'if [[ $funcstack[1] == _metalstep ]]; then _metalstep "$@"; else compdef _metalstep metalstep; fi']
    return "\n".join(lines) + "\n"


def zsh_row(word: str, text: str) -> str:
    """A word and its description, as _describe reads them."""
    return quote(word.replace(":", "\\:") + (f":{text}" if text else ""))


def zsh_value(value: Value) -> str:
    if value.kind == WORDS:
        return "compadd -- " + " ".join(quote(word) for word in value.words)
    if value.kind == MODEL:
        return 'compadd -- ${(f)"$(metalstep completion --models 2>/dev/null)"}; _files'
    return "_files -/" if value.kind == FOLDER else "_files" if value.kind == FILE else ":"


def fish(found: Places) -> str:
    lines = [
        "# fish completion of metalstep, made by `metalstep completion fish`",
        "function __metalstep_at",
        "    set -l place metalstep",
        "    for word in (commandline -opc)[2..-1]",
        '        switch "$place $word"',
        *(f"            case {fish_text(f'{place} {word}')}\n                set place {to}" for place, word, to in steps(found)),
        "        end",
        "    end",
        '    test "$place" = "$argv[1]"',
        "end",
        "complete -c metalstep -f",
    ]
    for name, place in found.items():
        at = f"complete -c metalstep -n '__metalstep_at {name}'"
        lines += [f"{at} -a {fish_text(word)} -d {fish_text(text)}" for word, text in place.commands.items()]
        if not place.commands:
            lines += [f"{at} {fish_value(first_value(place))}"] if fish_value(first_value(place)) else []
        for option in place.options:
            spelt = " ".join(fish_option(spelling) for spelling in option.names)
            takes = "" if option.value is None else f" {'-r' if option.value.kind in (FILE, MODEL) else '-x'} {fish_value(option.value)}"
            lines.append(f"{at} {spelt}{takes} -d {fish_text(option.help)}")
    return "\n".join(lines) + "\n"


def fish_option(spelling: str) -> str:
    """-l for --long, -s for -s, -o for a -long of one dash."""
    name = spelling.lstrip("-")
    return f"-l {name}" if spelling.startswith("--") else f"-s {name}" if len(name) == 1 else f"-o {name}"


def fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def fish_value(value: Value) -> str:
    if value.kind == WORDS:
        return f"-a {fish_text(' '.join(value.words))}"
    if value.kind == MODEL:
        return "-F -a '(metalstep completion --models 2>/dev/null)'"
    return "-F" if value.kind == FILE else "-a '(__fish_complete_directories)'" if value.kind == FOLDER else ""


SHELLS: dict[str, Callable[[Places], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
