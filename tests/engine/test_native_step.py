"""Native means native: between submitting a step and reading its result there is no MLX call."""
import mlx.core as mx
import pytest

import metalstep


@pytest.fixture
def without_mlx(monkeypatch):
    """Every mx.fast op and every way to evaluate an array raises."""

    def refuse(*args, **kwargs):
        raise AssertionError("MLX was called inside the native step")

    for name in ("eval", "async_eval", "compile", "matmul", "quantized_matmul", "softmax", "argmax"):
        monkeypatch.setattr(mx, name, refuse)
    for name in dir(mx.fast):
        if not name.startswith("_"):
            monkeypatch.setattr(mx.fast, name, refuse)


@pytest.mark.parametrize("options", [{}, {"temp": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_fifty_tokens_need_no_mlx(smollm2, without_mlx, options):
    model, tokenizer = smollm2
    tokens = [r.token for r in metalstep.stream_generate(model, tokenizer, "Once upon a time", max_tokens=50, **options)]
    assert len(tokens) == 50


def test_a_decode_step_is_one_native_call(smollm2, monkeypatch):
    model, tokenizer = smollm2
    calls = []
    for plan in model.native.decode_plan._native:
        monkeypatch.setattr(plan, "run", lambda steps, run=plan.run: calls.append(steps) or run(steps))
    produced = list(metalstep.stream_generate(model, tokenizer, "The sea is", max_tokens=12))
    assert sum(calls) == len(produced) - 1  # the first token comes with the prompt


def test_launches_per_token_are_six_a_layer(smollm2):
    model, _ = smollm2
    report = model.explain()
    assert report["native"] and report["fallback_reason"] is None
    assert report["launches_per_token"] <= 6 * len(model.layers) + 4
    assert report["launches_per_token"] == len(report["launches"])
    assert 0 < report["barriers_per_token"] <= report["launches_per_token"]
    assert report["weight_bytes_per_token"] <= 1.02 * report["file_bytes"]
