"""Which files of a repository a model needs. Pure: file names in, file names out."""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from fnmatch import fnmatch

from metalstep.hub.errors import HubError
from metalstep.hub.names import HubName

INDEX = "model.safetensors.index.json"
# Beside the weights: configuration, tokenizer, chat template, a model's own Python code. Top-level files only.
SMALL = ("*.json", "*.jinja", "*.py", "*.txt", "*.jsonl", "*.model", "*.tiktoken", "kv_key_means.safetensors")
NOT_SMALL = ("*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json", INDEX, "README*", "LICENSE*", "NOTICE*", "requirements*.txt")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "*.tiktoken")
OTHER_WEIGHTS = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.npz", "*.onnx")
# Of GGUF files where none is named: llama.cpp's default first, then the next smallest that loses little.
QUANT_ORDER = (
    *("Q4_K_M", "Q8_0", "Q4_K_S", "Q4_0", "Q4_1", "Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1", "Q6_K"),
    *("BF16", "F16", "F32", "Q3_K_M", "Q3_K_L", "Q3_K_S", "Q2_K"),
)
QUANT = re.compile(r"(?:^|[-_.])(?P<quant>(?:UD-)?(?:I?Q\d|TQ\d|BF16|FP16|F16|F32|MXFP4)\w*)(?=[-.]|$)", re.IGNORECASE)
SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def is_small(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, p) for p in SMALL) and not any(fnmatch(name, p) for p in NOT_SMALL)


def safetensors(names: Collection[str]) -> list[str]:
    """Files of weights as metalstep.checkpoint.directory takes them where no index says which. Empty: not such a repository."""
    top = sorted(n for n in names if "/" not in n and n.endswith(".safetensors") and not is_small(n) and not n.startswith("adapter_"))
    return [n for n in top if n.startswith("model")] or top


def shards(names: Collection[str]) -> list[str]:
    """All files of the sets that `names` are numbered parts of, as model-00001-of-00002.safetensors."""
    found = (re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.safetensors)", name) for name in names)
    return sorted({f"{m[1]}{part:05}{m[2]}" for m in found if m for part in range(1, int(m[3]) + 1)})


def directory_files(repo: str, names: Collection[str], index: Callable[[], bytes]) -> tuple[list[str], list[str]]:
    """(small files, files of weights) of a model in safetensors. index: reads the repository's index, called where it has one.

    Raises: HubError for an index that is damaged or names what is not there.
    """
    if "config.json" not in names:
        raise HubError(f"{repo} has .safetensors files but no config.json, so it is no model of transformers or mlx-lm; choose another")
    small = sorted(n for n in names if is_small(n))
    if INDEX not in names:
        return small, safetensors(names)
    weights = index_files(repo, index())
    if missing := [name for name in weights if name not in names]:
        raise HubError(f"{repo}: its {INDEX} names {missing[0]}, which is not in the repository; choose another revision")
    return [*small, INDEX], weights


def index_files(where: str, data: bytes) -> list[str]:
    """The files that an index of safetensors names. Raises: HubError."""
    try:
        names = sorted(set(json.loads(data)["weight_map"].values()))
        if names and all(isinstance(name, str) and "/" not in name and ".." not in name for name in names):
            return names
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise HubError(f"{where}: {INDEX} names no files of weights in its folder; tell its authors, or choose another revision")


def is_gguf(name: HubName, names: Collection[str]) -> bool:
    """Whether `name` means a GGUF file. Raises: HubError for a repository that has no weights of either kind."""
    if name.quant or name.file:
        return True
    if safetensors(names):
        return False
    if gguf_files(names):
        return True
    raise HubError(f"{name.repo} {_what_instead(names)}")


def _what_instead(names: Collection[str]) -> str:
    if "adapter_config.json" in names:
        return "is an adapter (LoRA), not a whole model; fuse it into its base model with `mlx_lm.fuse` and pass the result's directory"
    others = sorted({p for n in names for p in OTHER_WEIGHTS if fnmatch(n, p)})
    if others:
        return (
            f"has weights as {' and '.join(others)} only, and these are not loaded: unpacking such a file may run code in it; choose a "
            "repository with .safetensors or .gguf files, or convert it on a machine with PyTorch (transformers' `save_pretrained`)"
        )
    return "has neither .safetensors nor .gguf files; check that it is a model, and the revision"


def gguf_files(names: Collection[str]) -> list[str]:
    """GGUF files that may be a language model: no projectors of images, no importance matrices."""
    kept = (n for n in names if n.endswith(".gguf"))
    return sorted(n for n in kept if not re.search(r"(^|/)mmproj|imatrix", n, re.IGNORECASE))


def quant_label(file: str) -> str:
    """The quantisation in a GGUF file's name, as Q4_K_M; empty where it says none."""
    found = [match["quant"].upper() for match in QUANT.finditer(SPLIT.sub(".gguf", file.rpartition("/")[2]).removesuffix(".gguf"))]
    return found[-1] if found else ""


def gguf_file(name: HubName, names: Collection[str]) -> str:
    """The one GGUF file that `name` means. Raises: HubError naming what there is."""
    files = gguf_files(names)
    if name.file:
        if name.file not in names:
            raise HubError(f"{name.repo} has no file {name.file!r}; {_there_are(name, files)}")
        return _whole(name, name.file, files)
    if not files:
        raise HubError(f"{name.repo} has no .gguf files, so no {name.quant}; leave `:{name.quant}` out, or choose another repository")
    if name.quant:
        return _whole(name, _by_quant(name, name.quant, files), files)
    by_label = {quant_label(file): file for file in sorted(files, key=lambda f: (-len(f), f))}
    for quant in QUANT_ORDER:
        if quant in by_label and not SPLIT.search(by_label[quant]):
            return by_label[quant]
    if len(files) == 1:
        return _whole(name, files[0], files)
    raise HubError(f"{name.repo} has {len(files)} .gguf files and none of a usual kind; {_there_are(name, files)}")


def _by_quant(name: HubName, quant: str, files: list[str]) -> str:
    wanted = quant.upper()
    ranked = sorted(files, key=lambda f: (quant_label(f) != wanted, len(f), f))
    parts = re.compile(rf"(?:^|[-_./]){re.escape(quant)}(?:[-.]|$)", re.IGNORECASE)
    for file in ranked:
        if quant_label(file) == wanted or parts.search(file):
            return file
    raise HubError(f"{name.repo} has no {quant}; {_there_are(name, files)}")


def _whole(name: HubName, file: str, files: list[str]) -> str:
    """`file`, unless it is a part of a model that is split over files."""
    if split := SPLIT.search(file):
        others = [f for f in files if not SPLIT.search(f)]
        hint = "download them with `hf download` and join them with `llama-gguf-split --merge`"
        raise HubError(
            f"{name.repo}: {file} is split over {int(split[1])} files, which is not loaded; {hint}"
            + (f", or use one that is whole: {_listed(name, others)}" if others else "")
        )
    return file


def _there_are(name: HubName, files: list[str]) -> str:
    return f"there are {_listed(name, files)}" if files else "the repository has no .gguf files"


def _listed(name: HubName, files: list[str]) -> str:
    labels = list(dict.fromkeys(quant_label(file) for file in files))
    shown = [f"{name.repo}:{label}" for label in labels] if all(labels) else [f"{name.repo}/{file}" for file in files]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")
