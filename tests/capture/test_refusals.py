"""Models that cannot be captured: the error names the model, the place and the reason, and everything is put back."""
import mlx.core as mx
import mlx.nn as nn
import pytest
from families import BASE
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from metalstep.capture import CaptureError, capture


class Toy(nn.Module):
    """One attention layer of two heads; subclasses override a part."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.layers = [None]

    def make_cache(self):
        return [KVCache()]

    def __call__(self, ids, cache):
        return self.head(self.attend(self.embed(ids), cache[0]))

    def attend(self, x, cache):
        q = x.reshape(*x.shape[:2], 2, 4).swapaxes(1, 2)
        q = mx.fast.rope(q, 4, traditional=False, base=100.0, scale=1.0, offset=cache.offset)
        keys, values = cache.update_and_fetch(q, q)
        return self.mix(q, keys, values).swapaxes(1, 2).reshape(x.shape)

    def mix(self, q, keys, values):
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.5)


class BranchesOnAValue(Toy):
    def attend(self, x, cache):
        if mx.max(x) > 1.0:
            x = x / 2
        return super().attend(x, cache)


class AsksForAnItem(Toy):
    def attend(self, x, cache):
        return super().attend(x * cache.offset.max().item(), cache)


class RotatesByAConstant(Toy):
    def attend(self, x, cache):
        return super().attend(mx.fast.rope(x, 8, traditional=False, base=100.0, scale=1.0, offset=3), cache)


class KeepsAnUnknownCache(Toy):
    def make_cache(self):
        return [QuantizedKVCache()]


class KeepsTheFirstTokens(Toy):
    def make_cache(self):
        return [RotatingKVCache(max_size=8, keep=4)]


class ComputesItsMask(Toy):
    def mix(self, q, keys, values):
        mask = mx.arange(keys.shape[2]) * 0.5
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.5, mask=mask)


class AveragesItsCache(Toy):
    def mix(self, q, keys, values):
        return q + keys.mean(axis=2, keepdims=True)


class AttendsToItself(Toy):
    def mix(self, q, keys, values):
        return mx.fast.scaled_dot_product_attention(q, q, q, scale=0.5)


class CountsRows(Toy):
    def attend(self, x, cache):
        x = x + 1 if x.shape[0] > 2 else x
        return super().attend(x, cache)


class Fails(Toy):
    def attend(self, x, cache):
        raise KeyError("rope_theta")


REFUSALS = {
    BranchesOnAValue: r"asks for the value of an array.*line \d+: if mx.max\(x\) > 1.0:",
    AsksForAnItem: r"asks for the value of an array.*\.item\(\)",
    RotatesByAConstant: r"rope with the constant offset 3; expected the cache's offset",
    KeepsAnUnknownCache: r"layer 0 keeps its state in a QuantizedKVCache; known caches are KVCache,",
    KeepsTheFirstTokens: r"layer 0 has a rotating cache that keeps the first 4 tokens",
    ComputesItsMask: r"attention with a mask that the model computes",
    AveragesItsCache: r"Reduce over all cached tokens outside of attention",
    AttendsToItself: r"attention over keys that do not come from a cache",
    CountsRows: r"something else for 3 rows .* than for 2",
    Fails: r"KeyError: 'rope_theta' \(in test_refusals line \d+: raise KeyError",
}


def test_the_toy_itself_can_be_captured():
    assert capture(Toy(), "toy").graph(4, 2).launches


@pytest.mark.parametrize("kind", REFUSALS, ids=lambda kind: kind.__name__)
def test_a_model_that_cannot_be_captured_says_why_and_is_left_as_it_was(kind):
    model = kind()
    before = dict(tree_flatten(model.parameters()))
    functions = {name: getattr(mx.fast, name) for name in dir(mx.fast)}
    others = (mx.dequantize, mx.contiguous, mx.metal.is_available, mx.default_device())
    with pytest.raises(CaptureError, match=r"^toy cannot be captured: ") as refusal:
        capture(model, "toy")
    refusal.match(REFUSALS[kind])
    after = dict(tree_flatten(model.parameters()))
    assert all(after[name] is weight for name, weight in before.items())
    assert functions == {name: getattr(mx.fast, name) for name in dir(mx.fast)}
    assert others == (mx.dequantize, mx.contiguous, mx.metal.is_available, mx.default_device())


def test_a_value_branch_deep_in_mlx_lm_is_placed_there():
    config = {**BASE, "model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    with pytest.raises(CaptureError, match=r"llama cannot be captured: .*rope_utils line \d+: seq_len = max"):
        capture(llama.Model(llama.ModelArgs.from_dict(config)), "llama")
