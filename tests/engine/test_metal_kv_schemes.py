"""KV schemes on the Metal device (simulated off Apple): what the host device gives with the same scheme, alone and in a batch."""
import mlx.core as mx
import numpy as np
import pytest
from gpu_device import KIND
from metal_models import ALL, build, load
from tiny import write_model

from metalstep import Request, SamplingParams

# Keys of NVIDIA's GPUs are products of float16: more of them round to the next code. Bytes that are others at most, and how far logits are
# apart of what the scheme changes.
FLIPPED, APART = {"apple": (1e-3, 0.5), "nvidia": (3e-2, 0.8)}[KIND]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Tiny models: grouped heads of 64 with a norm, heads of 80 with windows."""
    found = {}
    for name, changes in (("qwen3", dict(head_dim=64, num_hidden_layers=4)), ("mistral_windows", dict(head_dim=80))):
        network, config, _ = build(name, **changes)
        found[name] = write_model(tmp_path_factory.mktemp(name), network, config)
    return found


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("qwen3", "turbo4v2"), ("qwen3", "turbo8v4"), ("qwen3", "affine8"), ("mistral_windows", "turbo4v2"), ("mistral_windows", "turbo0v3")],
)
def test_logits_are_the_host_devices(directories, name, scheme):
    """Less apart than what the scheme changes: a first layer's codes are the same bits; behind it roundings flip a few of the next one's by
    a whole step, and the host rounds the codebook of keys."""
    ids = mx.array([[token % 90 for token in ALL[:70]]])

    def logits(scheme, **options):
        with load(directories[name], kv_dtype="float16", kv_scheme=scheme, **options) as model:
            return np.array(model(ids))[0]

    options = dict(kv_boundary=1) if scheme == "turbo4v2" else {}
    here, there, plain = logits(scheme, device="host", **options), logits(scheme, **options), logits("none", device="host")
    rms = [float(np.sqrt(np.mean((other - here) ** 2))) for other in (there, plain)]
    assert rms[1] > 0 and rms[0] < APART * rms[1], rms


@pytest.mark.parametrize("scheme", ["turbo4v2", "turbo8v4", "affine8"])
def test_the_first_layers_codes_are_the_host_devices(directories, scheme):
    found = []
    for device in ("host", None):
        with load(directories["qwen3"], **({"device": device} if device else {}), kv_dtype="float16", kv_scheme=scheme, kv_boundary=0
                  if scheme == "turbo4v2" else None) as model:  # fmt: skip
            model(mx.array([[token % 90 for token in ALL[:48]]]))
            blocks = model.native.cache.read_blocks(0, [1, 2, 3])
            found.append(blocks[min(blocks)])
    for here, there in zip(*found, strict=True):
        assert here.any() and (here != there).mean() < FLIPPED


@pytest.mark.parametrize(("scheme", "invariant"), [("turbo4v2", True), ("affine8", False)])
def test_requests_of_one_batch_give_what_each_gives_alone(directories, scheme, invariant):
    """Decodes in a batch and alone, prompts in chunks and whole: the same tokens; the same bits with batch_invariant."""
    with load(directories["qwen3"], kv_dtype="float16", kv_scheme=scheme, batch_invariant=invariant) as model:
        wanted = [
            Request([token % 90 for token in ALL[9 * i : 9 * i + 3 + 11 * i]], SamplingParams(logprobs=2), 6, prefill_rows=7 + 9 * i)
            for i in range(4)
        ]
        lone = [[(o.token, o.logprob) for o in model.engine.submit(request)] for request in wanted]
        streams = [model.engine.submit(request) for request in wanted]
        together = [[(o.token, o.logprob) for o in stream] for stream in streams]
    if invariant:
        assert together == lone
    for one, other in zip(together, lone, strict=True):
        np.testing.assert_allclose([p for _, p in one], [p for _, p in other], atol=2e-2)
