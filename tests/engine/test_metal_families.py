"""Every family that must run natively, on the Metal device (simulated off Apple): the real launcher and the real shaders, from a
directory on disk to tokens, against MLX in float32."""
import numpy as np
import pytest
from families import BASE, FAMILIES, VOCAB, build
from gpu_device import DEVICE, KIND, LOGITS
from steps import reference
from tiny import write_model

import metalstep
from metalstep import Request, SamplingParams
from metalstep.plan.gpu_target import GpuTarget

NATIVE = [name for name, family in FAMILIES.items() if family.native]
LENGTHS = (41, 19, 6)  # both sides of every window (8) and original_max_position_embeddings (16) of the configurations
TEXTS = [[(7 * i + 13 * j) % VOCAB for j in range(n)] for i, n in enumerate(LENGTHS)]
RANGE = {"apple": 4 * LOGITS, "nvidia": LOGITS}[KIND]  # of a row's range of logits, with a cache in float32
NEW = 9  # tokens of a generation
LOGPROB, SAME = 5e-2, 0.7  # of the same request run otherwise, where bits may differ: apart at most, part of the tokens at least


def within(got, want):
    spread = want.max(-1, keepdims=True) - want.min(-1, keepdims=True)
    return (np.abs(got - want) / spread).max()


@pytest.fixture(scope="module", params=NATIVE)
def family(request, tmp_path_factory):
    """(model on the Metal device, mlx-lm's model, directory): 4-bit, cache in float32."""
    name = request.param
    model = build(name, quantized=True)
    config = {"model_type": FAMILIES[name].model_type, **BASE, **FAMILIES[name].config}
    directory = write_model(tmp_path_factory.mktemp(name), model, config, {"group_size": 32, "bits": 4})
    with pytest.MonkeyPatch.context() as patch:  # plans are made when they are needed: not all of each family's kernels are compiled
        patch.setattr(GpuTarget, "warm_shapes", lambda *_: [])
        native, _ = metalstep.load(directory, strict=True, device=DEVICE, kv_dtype="float32", kv_memory="16MB", max_context=192)
    with native:
        yield native, model, directory


def test_logits_of_prompts_are_mlx_s(family):
    native, model, _ = family
    for text in TEXTS:
        assert within(native.engine.logits(text), reference(model, text)) <= RANGE


def test_greedy_tokens_are_mlx_s_wherever_two_tokens_are_further_apart_than_rounding(family):
    """Decode steps of several sequences, several steps a call; the step's own tokens feed the next one."""
    native, model, _ = family
    requests = [Request(text, SamplingParams(), NEW, decode_steps=steps) for text, steps in zip(TEXTS, (4, 4, 4), strict=True)]
    streams = [native.engine.submit(request) for request in requests]
    for text, stream in zip(TEXTS, streams, strict=True):
        tokens = [output.token for output in stream]
        assert len(tokens) == NEW
        logits = reference(model, [*text, *tokens])[len(text) - 1 : -1]
        for token, row in zip(tokens, logits, strict=True):
            assert row.max() - row[token] <= RANGE * (row.max() - row.min())


def test_several_steps_of_a_call_give_what_single_steps_give(family):
    native, _, _ = family
    sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=11, repetition_penalty=1.2)

    def tokens(steps):
        streams = [native.engine.submit(Request(text, sampling, NEW, decode_steps=steps)) for text in TEXTS]
        return [[(o.token, o.logprob) for o in stream] for stream in streams]

    if KIND == "apple":
        assert tokens(1) == tokens(4)
        return
    same = 0
    for one, other in zip(tokens(1), tokens(4), strict=True):  # kernels differ by rows, and with them the last digits
        for (token, logprob), (again, logprob_again) in zip(one, other, strict=True):
            if token != again:
                break  # a draw on the edge of two tokens
            same += 1
            assert abs(logprob - logprob_again) < LOGPROB
    assert same > SAME * NEW * len(TEXTS)
