"""MODEL of `metalstep serve` as vLLM reads models: a folder with config, tokenizer and chat template, and the weights apart from it.

vLLM reads the folders and Hugging Face ids of mlx-lm models itself. A .gguf file has all of it inside, so it is written out beside the
caches. That takes MLX, which the server's process must not load: it happens in a process of its own, and once per file.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalstep import __version__
from metalstep.cache_folder import cache_folder
from metalstep.cli.errors import CommandError, report, split_hint
from metalstep.hub.cache import cached_model
from metalstep.hub.client import Hub
from metalstep.hub.describe import damage
from metalstep.hub.download import find
from metalstep.hub.errors import HubError
from metalstep.hub.names import expected, hub_name
from metalstep.packaged_models import PACKAGED, not_installed, packaged_file

FAILED = 3  # exit status of this module as a program when the file cannot be used; stderr has the error


@dataclass(frozen=True)
class ServeModel:
    """path: what vLLM takes for the model. weights: the file that the engine loads, or None if it is path too. name: what requests call
    the model unless --served-model-name says otherwise; None: path."""

    path: str
    weights: str | None = None
    name: str | None = None


def find_model(name: str) -> ServeModel:
    """What the user calls a model: smollm2, a .gguf file, a directory of an mlx-lm model, or a Hugging Face id.

    Writes the folder of a .gguf file if it is not there yet. Raises: CommandError saying what to install or correct.
    """
    if name in PACKAGED:
        file = packaged_file(name)
        if file is None:
            raise CommandError(*split_hint(not_installed(name)))
        return ServeModel(str(model_folder(file)), str(file), name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            gguf = sorted(path.glob("*.gguf"))
            hint = f"pass the file {gguf[0]} itself" if gguf else "pass the directory of an mlx-lm model"
            raise CommandError(f"{path}: no config.json", hint)
        if problem := damage(path):  # told here in a line, before vLLM has started all that would fail
            raise CommandError(f"{path}: {problem}", "the model is damaged or not complete: download or convert it again")
        return ServeModel(str(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise CommandError(f"{path} is neither a .gguf file nor a directory", "pass the directory that holds the model's config.json")
        return ServeModel(str(model_folder(path)), str(path.resolve()), path.stem)
    found = hub_name(name)
    if found is None:
        raise CommandError(
            f"{name!r} does not exist", f"MODEL is {', '.join(PACKAGED)}, a .gguf file, a directory of an mlx-lm model, or {expected(name)}"
        )
    if not (found.quant or found.file):
        cached = cached_model(Hub().cache, found, None)
        if cached is None or cached.path.is_dir():
            return ServeModel(name)
    try:  # vLLM reads no GGUF file by such a name: it is downloaded first
        file = find(found).path
    except HubError as error:
        raise CommandError(*split_hint(str(error))) from error
    return ServeModel(str(model_folder(file)), str(file), name)


def model_folder(file: Path) -> Path:
    """The folder with what vLLM reads of a .gguf file; another one when the file or metalstep changes. Raises: CommandError."""
    stem, file = file.stem, file.resolve()  # a file in the hub's cache is a link to one that is called by its hash
    status = file.stat()
    key = f"{file}\n{status.st_size}\n{status.st_mtime_ns}\n{__version__}"
    folder = cache_folder() / "serve" / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        written = subprocess.run([sys.executable, "-m", __name__, str(file), str(folder)], stderr=subprocess.PIPE, text=True)
        if written.returncode == FAILED:
            lines = dict(line.split(": ", 1) for line in written.stderr.splitlines() if line.startswith(("error: ", "hint: ")))
            raise CommandError(lines.get("error", f"{file} cannot be read"), lines.get("hint"))
        if written.returncode:
            raise RuntimeError(f"{file}: its tokenizer could not be written out: {written.stderr.strip()}")
    return folder


def write_folder(file: Path, folder: Path) -> None:
    """Write config.json, generation_config.json, tokenizer and chat template of a .gguf file to `folder`, whole or not at all.

    Imports MLX. Raises: CheckpointError for a file that cannot be used; OSError where the folder cannot be made.
    """
    from metalstep.checkpoint import open_checkpoint

    folder.parent.mkdir(parents=True, exist_ok=True)
    with open_checkpoint(file) as checkpoint:
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            checkpoint.tokenizer()._tokenizer.save_pretrained(made)
            _write_json(made / "config.json", model_config(checkpoint.config))
            _write_json(made / "generation_config.json", {k: v for k, v in checkpoint.config.items() if k.endswith("_token_id")})
            made.chmod(0o755)
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)


def model_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json for vLLM from a checkpoint's config. Weights are the engine's own matter, so nothing is said of their quantisation."""
    from metalstep.plugin.models import ARCHITECTURES

    model_type = config["model_type"]
    kept = {key: value for key, value in config.items() if not key.startswith("quantization")}
    return {"architectures": list(ARCHITECTURES.get(model_type, (model_type,))[:1]), **kept}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, default=_plain) + "\n", "utf-8")


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays, which GGUF metadata has, as JSON takes them."""
    return value.tolist()


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # of missing torch, which is not needed here
    try:
        write_folder(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, OSError) as error:
        report(error)
        sys.exit(FAILED)
