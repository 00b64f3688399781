"""The real model, loaded once on the host device and once as MLX's float32 oracle."""
import pytest
from mlx_lm.utils import dequantize_model

import metalstep


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct on the host device: (model, tokenizer)."""
    model, tokenizer = metalstep.load("smollm2", strict=True, max_context=4096)
    with model:
        yield model, tokenizer


@pytest.fixture(scope="session")
def oracle():
    """The same weights in MLX float32, dequantised: MLX's quantised matmuls take seconds per token on a CPU."""
    model, _ = metalstep.load("smollm2", device="eager")
    return dequantize_model(model.eager)
