"""SmolLM2-135M on the tests' GPU against the host device: prompts, decode steps of a batch, and batches that must not matter."""
import numpy as np
import pytest
from gpu_device import DEVICE, KIND

import metalstep
from metalstep import Request, SamplingParams

# Simulated, a step takes seconds: a few tokens of few texts there.
LENGTHS, NEW = ((160, 37, 5), 24) if KIND == "nvidia" else ((7, 4), 2)
# Of a row's range of logits, at most and root mean square. Caches are float16; NVIDIA's kernels keep the inputs of linears in float16 too.
RANGE, RMS = (1e-2, 1e-3) if KIND == "nvidia" else (1e-3, 1e-4)


@pytest.fixture(scope="module")
def texts():
    return [[(7 * i + 13 * j * j) % 49000 + 100 for j in range(n)] for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def models(smollm2):
    """The packaged model on both devices, and on the GPU with batch_invariant."""
    loaded = {"host": smollm2[0]}
    for name, invariant in (("gpu", False), ("invariant", True)):
        options = {"device": DEVICE, "kv_memory": "128MB", "max_context": 512, "batch_invariant": invariant}
        loaded[name] = metalstep.load("smollm2", strict=True, **options)[0]
    yield loaded
    for name in ("gpu", "invariant"):
        loaded[name].close()


@pytest.mark.parametrize("kind", ["gpu", "invariant"])
def test_logits_of_prompts_agree(models, texts, kind):
    for text in texts:
        got, want = models[kind].engine.logits(text), models["host"].engine.logits(text)
        apart = np.abs(got - want) / np.ptp(want, axis=-1, keepdims=True)
        assert apart.max() < RANGE and np.sqrt(np.mean(apart**2)) < RMS


def test_greedy_tokens_of_a_batch_are_the_hosts_wherever_rounding_does_not_decide(models, texts):
    streams = [models["gpu"].engine.submit(Request(text, SamplingParams(), NEW, decode_steps=4)) for text in texts]
    for text, stream in zip(texts, streams, strict=True):
        tokens = [output.token for output in stream]
        assert len(tokens) == NEW
        logits = models["host"].engine.logits([*text, *tokens])[len(text) - 1 : -1]
        for token, row in zip(tokens, logits, strict=True):
            assert row.max() - row[token] <= 2 * RANGE * np.ptp(row)


def test_batch_invariant_tokens_are_the_same_bits_alone_and_together(models, texts):
    engine = models["invariant"].engine
    sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=3, logprobs=2)
    requests = [Request(text, sampling, NEW) for text in texts]

    def answers(streams):
        return [[(output.token, output.logprob, output.top) for output in stream] for stream in streams]

    together = answers([engine.submit(request) for request in requests])
    assert together == [answers([engine.submit(request)])[0] for request in requests]
