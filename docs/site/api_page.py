"""The API reference: every public name of the package with its signature and its docstring, as Markdown."""
from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import metalstep
from metalstep import grammar
from metalstep.batch import BatchStats
from metalstep.models import cache
from metalstep.request import PromptLogprob
from metalstep.sample_utils import make_logits_processors, make_sampler

GROUPS: dict[str, list[str]] = {
    "Loading": ["load", "Model"],
    "Generating": ["generate", "stream_generate", "GenerationResponse", "batch_generate", "BatchResponse"],
    "The engine": ["Engine", "EngineStats", "Request", "SamplingParams", "Stream", "TokenOutput"],
    "Errors": ["CheckpointError", "CaptureError"],
}
MORE: dict[str, list[Callable[..., Any]]] = {
    "metalstep.batch": [BatchStats],
    "metalstep.request": [PromptLogprob],
    "metalstep.grammar": [grammar.Grammar, grammar.ChoiceGrammar, grammar.XGrammarMatcher, grammar.LLGuidanceMatcher],
    "metalstep.sample_utils": [make_sampler, make_logits_processors],
    "metalstep.models.cache": [
        cache.make_prompt_cache, cache.save_prompt_cache, cache.load_prompt_cache, cache.trim_prompt_cache, cache.can_trim_prompt_cache
    ],
}  # fmt: skip
SPECIAL = ("__call__", "__iter__", "__next__")  # methods of their own that are part of a class's face
WIDTH = 110  # columns of a signature


def api_page() -> str:
    """Raises: ValueError for a public name that no group has."""
    listed = {name for names in GROUPS.values() for name in names}
    if missing := set(metalstep.__all__) - listed:
        raise ValueError(f"api_page: {', '.join(sorted(missing))} is public and in no group; add it to GROUPS")
    lines: list[str] = []
    for title, names in GROUPS.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += entry(name, getattr(metalstep, name), "metalstep.")
    for module, functions in MORE.items():
        lines += [f"## {module}", ""]
        for function in functions:
            lines += entry(function.__name__, function, f"{module}.")
    return "\n".join(lines)


def entry(name: str, thing: Any, prefix: str) -> list[str]:
    lines = [f"### {name}", ""]
    if isinstance(thing, type):
        return [*lines, *class_lines(name, thing, prefix)]
    return [*lines, *code(signature(f"{prefix}{name}", thing)), *prose(thing, parameters(thing))]


def class_lines(name: str, thing: type, prefix: str) -> list[str]:
    if issubclass(thing, Exception):
        bases = ", ".join(base.__name__ for base in thing.__bases__)
        return [*code(f"class {prefix}{name}({bases})"), *prose(thing, [])]
    fields = [field for field in dataclasses.fields(thing) if not field.name.startswith("_")] if dataclasses.is_dataclass(thing) else []
    said = re.findall(r"(?:^|\n|[.;] )((?:\w+, )*\w+)(?: \([^)]*\))?: ", inspect.getdoc(thing) or "")
    names = {part for parts in said for part in parts.split(", ") if part[0].islower()} | {field.name for field in fields}
    lines = [*code(f"class {prefix}{name}"), *prose(thing, sorted(names))]
    if fields:
        comments = field_comments(thing)
        lines += ["| field | type | default | |", "|---|---|---|---|"]
        for field in fields:
            cells = (f"`{field.name}`", f"`{field.type}`".replace("|", "\\|"), f"`{default(field)}`", escaped(comments.get(field.name, "")))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    for member, value in members(thing):
        lines += [f"#### {name}.{escaped(member)}", ""]
        if isinstance(value, property) or not callable(value):
            getter = getattr(value, "fget", None) or getattr(value, "func", None)
            kind = inspect.signature(getter).return_annotation
            lines += [*code(f"{member}: {annotation(kind)}"), *prose(getter, [])]
        else:
            lines += [*code(signature(member, value, skip_self=True)), *prose(value, parameters(value))]
    return lines


def members(thing: type) -> Iterator[tuple[str, Any]]:
    """Documented public methods and properties, as they stand in the source."""
    for name, value in vars(thing).items():
        getter = getattr(value, "fget", None) or getattr(value, "func", None) or value
        if (not name.startswith("_") or name in SPECIAL) and callable(getter) and inspect.getdoc(getter):
            yield name, value


def field_comments(thing: type) -> dict[str, str]:
    """What stands behind `#` on the line of each field."""
    lines = inspect.getsource(thing).splitlines()
    found = (re.match(r"    (\w+): .*?  # (.*)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return "needed" if field.default_factory is dataclasses.MISSING else f"{field.default_factory.__name__}()"


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def signature(name: str, function: Any, skip_self: bool = False) -> str:
    """The call with a parameter per line where it is long."""
    found = inspect.signature(function)
    shown, keyword_only = [], False
    for parameter in found.parameters.values():
        if skip_self and parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            shown.append("*")
            keyword_only = True
        shown.append(re.sub(r": '([^']*)'", r": \1", str(parameter)))
    result = annotation(found.return_annotation)
    line = f"{name}({', '.join(shown)})"
    if len(line) + len(result) > WIDTH:
        line = f"{name}(\n" + "".join(f"    {one},\n" for one in shown) + ")"
    return f"{line} -> {result}" if result else line


def annotation(kind: Any) -> str:
    if kind is inspect.Signature.empty:
        return ""
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def code(text: str) -> list[str]:
    return ["```python", text, "```", ""]


def prose(thing: Any, names: list[str]) -> list[str]:
    """The docstring: what it says of a parameter, of a result and of errors begins a line of its own."""
    text = escaped(inspect.getdoc(thing) or "")
    for label in ("Returns", "Raises"):
        text = re.sub(rf"(?<!^)\s*\b{label}(, while iterating)?: ", lambda match, label=label: f"\n\n**{label}**{match[1] or ''}: ", text)
    if names:
        known = "|".join(sorted((re.escape(escaped(name)) for name in names), key=len, reverse=True))
        heads = rf"(^|\n|(?<=[.;)] ))((?:{known})(?:(?:,| and) (?:{known}))*): "
        text = re.sub(heads, lambda match: "\n\n`{}`: ".format(match[2].replace("\\", "")), text)
    return [text.strip(), ""]


def escaped(text: str) -> str:
    """Plain text as Markdown, what is in backquotes left alone."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if i % 2 else re.sub(r"([\\*_<>\[\]|])", r"\\\1", part) for i, part in enumerate(parts))
