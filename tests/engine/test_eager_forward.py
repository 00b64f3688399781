"""Steps through mlx-lm's own graph: its logits and tokens, sampled and restricted as native ones are."""
from __future__ import annotations

import importlib
from random import Random

import mlx.core as mx
import numpy as np
import pytest
from engines import CHOICES, TEXT
from families import VOCAB, build
from hypothesis import given, settings
from hypothesis import strategies as st
from session_driver import Driver, outputs
from workload import requests

from metalstep import Request, SamplingParams
from metalstep.eager_forward import cache_dtype, cache_groups, eager_session
from metalstep.grammar import ChoiceGrammar
from metalstep.kernels import params
from metalstep.kernels.native import NativeUnavailable
from metalstep.kv_cache import BLOCK_SIZE, LayerShape
from metalstep.step_session import Span

CONTEXT, SEQS, BLOCKS = 128, 3, 96
EAGER = ["gemma3_text", "qwen3_next", "gpt_oss", "deepseek_v3", "mamba2"]  # windows, states, sinks, latents, states alone
WANTED = requests(6, VOCAB, longest=50, tokens=(3, 9))  # of most kinds of sampling
SEEDS = st.integers(0, 2**32 - 1)  # of a server's choices
generate_step = importlib.import_module("mlx_lm.generate").generate_step


def mamba2():
    module = importlib.import_module("mlx_lm.models.mamba2")
    mx.random.seed(0)
    config = dict(
        model_type="mamba2",
        num_heads=4,
        head_dim=16,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        state_size=16,
        num_hidden_layers=2,
        layer_norm_epsilon=1e-5,
        conv_kernel=4,
        n_groups=1,
        use_bias=False,
        use_conv_bias=True,
        tie_word_embeddings=True,
        time_step_limit=(0.0, 100.0),
        time_step_rank="auto",
    )
    return module.Model(module.ModelArgs.from_dict(config))


@pytest.fixture(scope="module", params=EAGER)
def eager(request):
    """(mlx-lm's model, session)."""
    model = mamba2() if request.param == "mamba2" else build(request.param, quantized=False)
    session = eager_session(model, {"model_type": request.param}, max_context=CONTEXT, max_seqs=SEQS)
    yield model, session
    session.close()


def greedy(model, prompt, count):
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=count)]


GREEDY = [Request(TEXT[5 * i : 7 * i + 4], SamplingParams(), 7) for i in range(5)]


def test_greedy_tokens_are_mlx_lms(eager):
    model, session = eager
    want = [greedy(model, request.prompt, request.max_tokens) for request in GREEDY]
    for whole in (True, False):  # the tiny models' best tokens are further apart than rounding
        got = outputs(Driver(session, BLOCKS, Random(9), whole_prompts=whole, preempts=True), GREEDY)
        assert [[output[0] for output in tokens] for tokens in got] == want


@settings(max_examples=5)
@given(seed=SEEDS, lag=st.integers(0, 4))
def test_an_eager_sequence_does_not_see_who_runs_beside_it(eager, seed, lag):
    """Every kind of sampling, bit for bit; MLX rounds a divided prompt otherwise, so prompts run whole."""
    _, session = eager
    want = [outputs(Driver(session, BLOCKS, Random(0), lag=0, whole_prompts=True), [request])[0] for request in WANTED]
    assert outputs(Driver(session, BLOCKS, Random(seed), lag=lag, whole_prompts=True), WANTED) == want


def test_eager_logprobs_and_logits_are_mlx_lms_also_of_divided_prompts(eager):
    model, session = eager
    wanted = [Request(TEXT[i : i + 30], SamplingParams(seed=1, prompt_logprobs=2, logprobs=3), 4, keep_logits=True) for i in range(4)]
    for request, running in zip(wanted, Driver(session, BLOCKS, Random(1), rows=7).run(wanted), strict=True):
        logits = np.array(model(mx.array([running.tokens[:-1]]))[0])
        spread = np.ptp(logits)
        np.testing.assert_allclose(np.stack(running.logits), logits[len(request.prompt) - 1 :], atol=1e-4 * spread)
        logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
        rows = [*running.prompt, *(output[:4] for output in running.outputs)]
        assert [row[0] for row in rows] == running.tokens[1:]
        np.testing.assert_allclose([row[1] for row in rows], logprobs[np.arange(len(rows)), running.tokens[1:]], atol=1e-4 * spread)
        assert [len(row[3]) for row in rows] == [2] * 29 + [3] * 4


def test_eager_masks_restrict(eager):
    _, session = eager
    wanted = [Request(TEXT[:6], SamplingParams(seed=3, temperature=1.0), 12, grammar=ChoiceGrammar(CHOICES)) for _ in range(2)]
    for running in Driver(session, BLOCKS, Random(2)).run(wanted):
        assert running.tokens[6:] in CHOICES


def test_a_sequence_that_is_gone_leaves_no_cache(eager):
    _, session = eager
    assert not session.forward._sequences
    slot = session.acquire()
    session.fill(slot, SamplingParams(), [5], 1, frozenset())
    session.sample(session.begin([Span(slot, 0, [5], known=1)]))
    assert list(session.forward._sequences) == [slot]
    session.release(slot)  # while its step is under way
    assert not session.forward._sequences
    session.settle()


def test_a_span_that_does_not_go_on_where_the_cache_ends_is_refused(eager):
    _, session = eager
    slot = session.acquire()
    with pytest.raises(ValueError, match=f"slot {slot} begins at position 16 and its cache has 0 tokens; go on where"):
        session.begin([Span(slot, 16, [5])])
    session.release(slot)


@pytest.mark.parametrize("bad", [VOCAB, 10**6])
def test_a_token_that_the_model_has_not_fails_its_own_sequence(eager, bad):
    """MLX would read beyond its table."""
    model, session = eager
    slots = [session.acquire(), session.acquire()]
    prompts = [[5, bad, 7], TEXT[:3]]
    for slot, prompt in zip(slots, prompts, strict=True):
        session.fill(slot, SamplingParams(), prompt, 3, frozenset())
    step = session.begin([Span(s, 0, p, known=3) for s, p in zip(slots, prompts, strict=True)])
    session.sample(step)
    session.collect(step)
    assert step.sampled["status"].tolist() == [params.MS_SAMPLE_NOT_FINITE, params.MS_SAMPLE_OK]
    assert step.sampled["token"][1] == greedy(model, prompts[1], 1)[0]
    for slot in slots:
        session.release(slot)


def test_cache_groups_count_what_mlx_lm_keeps_per_token():
    """Windows are not counted on: one group."""
    per_layer = {
        "gemma3_text": {0: LayerShape(2, 16, 16), 1: LayerShape(2, 16, 16)},
        "qwen3_next": {1: LayerShape(2, 16, 16)},  # the other layer's state does not grow
        "deepseek_v3": {0: LayerShape(1, 32, 32), 1: LayerShape(1, 32, 32)},  # the latent, and the part that is rotated
    }
    for name, layers in per_layer.items():
        (group,) = cache_groups(build(name, quantized=False), "float16")
        assert group.window is None and group.layers == layers, name
    (group,) = cache_groups(mamba2(), "float16")
    (shape,) = group.layers.values()
    state = 2 * (3 * (4 * 16 + 2 * 16) + 4 * 16 * 16)  # per layer: the convolution's last inputs, and the heads'
    assert shape.token_bytes // 2 * BLOCK_SIZE == state


def test_an_eager_cache_has_the_dtype_that_the_model_computes_with():
    model = build("llama", quantized=False)
    assert cache_dtype(model, mx.float32) == "float32"
    model.set_dtype(mx.bfloat16)
    assert cache_dtype(model, None) == "bfloat16"
    assert cache_dtype(mamba2(), None) == "float32"


def test_without_the_launcher_an_error_says_what_to_install(monkeypatch):
    def missing(*_):
        raise NativeUnavailable("the native launcher is not built: run `make build` in a checkout, or install a wheel")

    monkeypatch.setattr("metalstep.eager_forward.NativeDevice.open", missing)
    with pytest.raises(NativeUnavailable, match=r"llama runs through eager MLX, but its tokens are sampled by .*install a wheel"):
        eager_session(build("llama", quantized=False), {"model_type": "llama"}, max_context=CONTEXT, max_seqs=1)
