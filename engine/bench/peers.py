"""Worker processes: metalstep in this Python, the peers in their own virtual environment, all on the same model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from metalstep.bench.json_process import JsonProcess, PeerError
from metalstep.checkpoint import Checkpoint, build_model, load_weights_eager
from metalstep.choices import DEFAULT_DEVICE
from metalstep.choices import PEERS as PEERS
from metalstep.model import eager_dtype

WORKER = Path(__file__).with_name("worker.py")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "METALSTEP_THREADS")


def is_gpu(device: str | None) -> bool:
    """Whether `device`, one of load's names, is a GPU, and no simulated one: mlx-lm's users run it on the same."""
    name = device or DEFAULT_DEVICE
    return name == "metal" or name.partition(":")[0] == "cuda"


class Peer(JsonProcess):
    """An engine in a process of its own. It loads once and idles between measurements. `wait` before the first one.

    head: what it says of itself: engine, version, load_s; metalstep's also weight_bytes and kv_bytes per token, kv_tokens (what its cache
    holds) and gpu (its name, or None).
    """

    def __init__(
        self, engine: str, python: str, model: str, threads: int, max_context: int, options: dict[str, Any] | None = None
    ):
        """options: what the engine loads with beyond that; see worker.py."""
        # -m would put this package's folder out of reach of a peer's Python; run as a file, its folder must not shadow modules.
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)), "PYTHONSAFEPATH": "1"}
        command = [python, str(WORKER), engine, model, str(threads), str(max_context), json.dumps(options or {})]
        super().__init__(engine, command, environment)
        self.head: dict[str, Any] = {}

    def wait(self) -> None:
        """Until it has loaded. Raises: PeerError with the engine's own text."""
        if not self.head:
            self.head = self.answer()

    def measure(self, prompts: list[list[int]], tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
        """One greedy run of `prompts` together: ttft_s, steps_s, step_tokens and ids, see worker.py.

        settings: the engine's own. Raises: PeerError with the engine's own text.
        """
        return self.ask({**settings, "prompts": prompts, "tokens": tokens})

    def device_steps(self, prompts: list[list[int]], tokens: int) -> list[float]:
        """Seconds of a decode step on the device alone, see device_step.py. Raises: as `measure`."""
        return list(self.ask({"device_step": True, "prompts": prompts, "tokens": tokens})["device_step_s"])


def peers_python(engine: str, given: str | None) -> str:
    """The Python that runs `engine`: `given`, or .venv-peers of the checkout or the working directory.

    mlx-lm is a dependency of metalstep's own, so without .venv-peers it runs in this Python. Raises: PeerError for llama.cpp.
    """
    if engine == "metalstep":
        return sys.executable
    folders = [Path.cwd(), Path(__file__).resolve().parents[2]]
    candidates = [given] if given else [str(folder / ".venv-peers" / "bin" / "python") for folder in dict.fromkeys(folders)]
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    if engine == "mlx-lm" and not given:
        return sys.executable
    raise PeerError(
        f"no Python with {engine}: looked for {' and '.join(candidates)}", "make peers, or pass --peers-python PATH"
    )


def model_for(engine: str, checkpoint: Checkpoint, given: str, scratch: Path, device: str | None = None) -> str:
    """The model in a form that `engine` reads, written into `scratch` where it has to be converted.

    given: the model's name as the user wrote it. device: metalstep's. mlx-lm gets the same quantised weights as safetensors, with the other
    arrays in `eager_dtype`; on a GPU its directories as they are. Raises: PeerError for a model it cannot read.
    """
    if engine == "metalstep":
        return given
    if engine == "mlx-lm" and is_gpu(device) and checkpoint.path.is_dir():
        return str(checkpoint.path)
    if engine == "llama.cpp":
        if checkpoint.path.suffix != ".gguf":
            raise PeerError(f"llama.cpp reads .gguf files, and {given} is none", "leave llama.cpp out of --against")
        return str(checkpoint.path)
    folder = scratch / "mlx-lm"
    folder.mkdir()
    model = build_model(checkpoint)
    load_weights_eager(model, checkpoint, eager_dtype())
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    (folder / "config.json").write_text(json.dumps(checkpoint.config, default=str))
    return str(folder)
