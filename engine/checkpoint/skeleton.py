"""The mlx-lm model of a checkpoint, without its weights, and the check that the weights fit it."""
from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import utils as mlx_lm_utils

from metalstep.checkpoint import blocks
from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.foreign import foreign_error
from metalstep.checkpoint.tensors import ComputedTensor, FileTensor, Tensor

LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
SHOWN = 4  # names in a message


def directory_skeleton(
    path: Path, config: dict[str, Any], files: Mapping[str, FileTensor], arrays: Mapping[str, mx.array]
) -> tuple[nn.Module, dict[str, Tensor], dict[str, mx.array]]:
    """mlx-lm's model of a directory, its tensors and its lazy arrays, by parameter name. Nothing is evaluated.

    files, arrays: what is on disk, by the names there; mlx-lm's `sanitize` turns them into parameters. An array that it hands on
    as it was is the same bytes under a new name; any other is computed. config: becomes what mlx-lm makes of it.
    Raises: CheckpointError.
    """
    _check_layers(path, config, len(files))
    parameters: dict[str, mx.array] = {}

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        model_class, args_class = mlx_lm_utils._get_classes(config)

        def make(args: Any) -> nn.Module:
            # Stands in for two methods of this one model: mlx-lm's loader then works on the arrays given here and stores nothing.
            model = model_class(args)
            sanitize = getattr(model, "sanitize", dict)
            model.sanitize = lambda _: sanitize(dict(arrays))
            model.load_weights = lambda weights, strict: parameters.update(weights)
            return model

        return make, args_class

    try:
        model, loaded = mlx_lm_utils.load_model(path, lazy=True, strict=False, model_config=config, get_model_classes=classes)
        del model.sanitize, model.load_weights
    except Exception as error:  # whatever mlx-lm's code for this model makes of a config or of names that it does not expect
        raise (foreign_error(path, config, files, error) or _unbuildable(path, config, error)) from error
    config.update(loaded)
    names = {id(array): name for name, array in arrays.items()}
    tensors: dict[str, Tensor] = {}
    for parameter, array in parameters.items():
        source = files.get(names.get(id(array), ""))
        tensors[parameter] = source.renamed(parameter) if source else ComputedTensor(parameter, array)
    try:
        check_parameters(path, model, tensors)
        check_dtypes(path, model, tensors)
    except CheckpointError as error:
        raise (foreign_error(path, config, files, error) or error) from None
    clear_parameters(model, {parameter: array.dtype for parameter, array in parameters.items()})
    return model, tensors, parameters


def gguf_skeleton(path: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """mlx-lm's model of a GGUF file, float32 throughout. Nothing is evaluated. Raises: CheckpointError."""
    _check_layers(path, config, len(tensors))

    def quantised(layer: str, _: nn.Module) -> dict[str, Any] | bool:
        tensor = tensors.get(f"{layer}.weight")
        if tensor is None or tensor.format is None:
            return False
        return {"group_size": blocks.GROUP_SIZE, "bits": blocks.FORMATS[tensor.format].bits, "mode": "affine"}

    try:
        module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
        model = module.Model(module.ModelArgs.from_dict(config))
        if hasattr(model, "sanitize"):  # where mlx-lm takes away layers that the checkpoint has no weights for
            model.sanitize(dict.fromkeys(tensors, mx.zeros(())))
        nn.quantize(model, group_size=blocks.GROUP_SIZE, bits=4, class_predicate=quantised)
        model.eval()
    except Exception as error:  # sizes that mlx-lm or MLX refuse
        raise _unbuildable(path, config, error) from error
    check_parameters(path, model, tensors)
    clear_parameters(model, {})
    return model


def check_parameters(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises: CheckpointError when the names or shapes of `tensors` are not those of the model's parameters."""
    expected = {name: tuple(array.shape) for name, array in _parameters(model).items()}
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing:
        raise CheckpointError(
            f"{path}: the model needs {_some(missing)}, missing from the checkpoint"
            f"{f', which has {_some(extra)} instead' if extra else ''}; download or convert the model again"
        )
    if extra:
        raise CheckpointError(
            f"{path}: the model has no place for {_some(extra)}; config.json belongs to another model, or "
            "the checkpoint is of a kind that mlx-lm does not load"
        )
    wrong = [name for name, tensor in tensors.items() if tensor.parameter_shape != expected[name]]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{path}: {name} has shape {tensors[name].parameter_shape}, expected {expected[name]} from the config"
            f"{f'; {len(wrong) - 1} more do not fit' if len(wrong) > 1 else ''}; the config belongs to another model"
        )


def check_dtypes(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises: CheckpointError for integers where the model has floats, and other integers than it has: MLX would compute with them."""
    for name, array in _parameters(model).items():
        own, stored = str(array.dtype).removeprefix("mlx.core."), tensors[name].dtype
        if mx.issubdtype(array.dtype, mx.floating):
            if "float" not in stored:
                raise CheckpointError(
                    f"{path}: {name} is {stored} (the file's integers or 8-bit floats), expected float32, float16 or bfloat16; take the "
                    "model's unquantised weights, or weights that `metalstep convert` or `mlx_lm.convert` has quantised"
                )
        elif stored != own:
            raise CheckpointError(f"{path}: {name} is {stored}, expected {own} from the config; download or convert the model again")


def clear_parameters(model: nn.Module, dtypes: Mapping[str, mx.Dtype]) -> None:
    """Replace every parameter by lazy zeros; floats are float32 where `dtypes` says nothing."""
    zeros = []
    for name, array in _parameters(model).items():
        own = mx.float32 if mx.issubdtype(array.dtype, mx.floating) else array.dtype
        zeros.append((name, mx.zeros(array.shape, dtypes.get(name, own))))
    model.update(tree_unflatten(zeros))


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def _check_layers(path: Path, config: Mapping[str, Any], tensors: int) -> None:
    """A layer has a tensor at least: refuse a count that lies before a model of that size is built."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in LAYER_COUNTS:
            count = part.get(key)
            if isinstance(count, (int, float)) and count > tensors:
                raise CheckpointError(
                    f"{path}: the config's {key} is {count}, but the checkpoint has {tensors} tensors; they belong to different models"
                )


def _unbuildable(path: Path, config: Mapping[str, Any], error: Exception) -> CheckpointError:
    if isinstance(error, ValueError) and isinstance(error.__cause__, ImportError):
        return CheckpointError(
            f"{path}: mlx-lm cannot make the {config.get('model_type')!r} model of this config: the type is not supported by mlx-lm "
            f"{version('mlx-lm')}; update mlx-lm if a later version has it, or take a model of another type"
        )
    return CheckpointError(
        f"{path}: mlx-lm cannot make the {config.get('model_type')!r} model of this config and these tensors "
        f"({type(error).__name__}: {str(error)[:400]}); check config.json, or convert the model with `mlx_lm.convert`"
    )


def _some(names: set[str]) -> str:
    listed, more = sorted(names)[:SHOWN], len(names) - SHOWN
    return ", ".join(listed) + (f" and {more} more" if more > 0 else "")
