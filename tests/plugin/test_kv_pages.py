"""What vLLM knows of an encoded cache: pages of as many bytes as the engine takes, and so many requests as fit."""
from __future__ import annotations

import random

import hash_worker
import pytest
from hash_engine import VOCAB, Job, greedy, hash_engine
from hash_forward import LOWEST
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.request import Request

from metalstep.explain import explain_cache
from metalstep.kernels.native import NativeDevice
from metalstep.kv_cache import BLOCK_SIZE, CacheGroup, LayerShape, PagedKVCache, with_scheme
from metalstep.kv_scheme import NAMES, parse
from metalstep.plugin.kv_pages import cache_lines, divide, part_name

TOKENS = 2048  # of a request
SCHEMES = ["turbo4v2", "turbo8v4", "affine8"]
WITHIN = 0.03

shapes = st.sampled_from([LayerShape(1, 64, 64), LayerShape(2, 64, 64), LayerShape(1, 128, 64), LayerShape(1, 64, 64, shiftable=False)])


@st.composite
def models(draw):
    """Groups of up to three windows with up to eight layers each, of up to four shapes, with any scheme."""
    windows = draw(st.lists(st.sampled_from([None, 48, 512]), min_size=1, max_size=3, unique=True))
    layers = [(draw(st.sampled_from(windows)), draw(shapes)) for _ in range(draw(st.integers(len(windows), 8 * len(windows))))]
    groups: dict = {}
    for layer, (window, shape) in enumerate(layers):
        groups.setdefault(window, {})[layer] = shape
    plain = [CacheGroup(window, part) for window, part in groups.items()]
    return with_scheme(plain, parse(draw(st.sampled_from(NAMES))))


lengths = st.sampled_from([64, 2048, 131_072])


@pytest.fixture(scope="module")
def device():
    with NativeDevice.open("host", 1) as opened:
        yield opened


@given(groups=models(), context=lengths, blocks=st.integers(1, 3))
def test_a_page_has_the_bytes_that_the_engine_takes(device, groups, context, blocks):
    """No more and no fewer: vLLM's memory is the engine's."""
    pages = divide(groups, context=context, in_flight=512)
    cache = PagedKVCache(device, pages.parts, [blocks] * len(pages.parts), one_pool=True)
    assert cache.nbytes == blocks * BLOCK_SIZE * pages.token_bytes
    assert 0 < pages.used <= 1


@given(groups=models(), context=lengths)
def test_each_layer_is_in_one_part_with_those_that_see_as_much(groups, context):
    parts = divide(groups, context=context, in_flight=512).parts
    given, found = ([(g.window, layer, shape) for g in some for layer, shape in g.layers.items()] for some in (groups, parts))
    assert sorted(found, key=lambda entry: entry[1]) == sorted(given, key=lambda entry: entry[1])
    assert all(part.layers for part in parts)
    assert len({part_name(part) for part in parts}) == len(parts)
    assert min(sum(part.window == group.window for part in parts) for group in groups) == 1


@given(groups=models(), context=lengths)
def test_layers_that_all_see_as_much_waste_nothing(groups, context):
    for group in groups:
        pages = divide([group], context=context, in_flight=512)
        assert pages.parts == [group]
        assert pages.token_bytes == group.token_bytes


@given(groups=models(), blocks=st.integers(1, 3))
def test_no_plane_holds_vectors_of_two_codecs_or_two_layers_of_a_part(device, groups, blocks):
    parts = divide(groups, context=2048, in_flight=512).parts
    cache = PagedKVCache(device, parts, [blocks] * len(parts), one_pool=True)
    held: dict[int, set] = {}
    for part in parts:
        keys = [cache.planes[layer].k.handle for layer in part.layers]
        assert len(set(keys)) == len(keys)
        for layer, shape in part.layers.items():
            held.setdefault(cache.planes[layer].k.handle, set()).add((shape.heads, shape.key_dim, shape.k_codec))
    assert all(len(kinds) == 1 for kinds in held.values())


def test_a_model_without_a_kv_cache_has_no_pages():
    assert divide([], context=64, in_flight=64).parts == []


def test_windows_take_turns_in_the_layers_of_others():
    """Gemma 3's 4 and 22 layers, as vLLM itself divides those of one size."""
    pages = divide(hash_worker.GROUPS["gemma3"], context=32_768, in_flight=512)
    assert [len(part.layers) for part in pages.parts] == [4, 4, 4, 4, 4, 3, 3]
    assert pages.token_bytes == 4 * hash_worker.GEMMA3.token_bytes


def fit(engine) -> int:
    """Requests of TOKENS tokens that vLLM's own block pool holds at once; all are given back."""
    manager = engine.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    held = []
    while True:
        request = Request(f"r{len(held)}", [7] * TOKENS, SamplingParams(max_tokens=1), None)
        if manager.allocate_slots(request, TOKENS) is None:
            break
        held.append(request)
    for request in held:
        manager.free(request)
    return len(held)


@pytest.mark.parametrize("worker", [hash_worker.SmolLM2HashWorker, hash_worker.Gemma3HashWorker])
def test_as_many_requests_fit_as_the_schemes_bytes_say(tmp_path, monkeypatch, worker):
    """In the memory that holds 44 of them in float16. With windows, pages have to be padded: the padding counts."""
    groups = hash_worker.GROUPS[worker.layers]
    plain = divide(groups, context=TOKENS, in_flight=TOKENS)
    memory = 45 * TOKENS * len(plain.parts) * plain.token_bytes
    found, bytes_of, lines = {}, {}, {}
    for name in ["none", *SCHEMES]:
        scheme = parse(name)
        with hash_engine(
            tmp_path,
            monkeypatch,
            worker=worker,
            additional_config={"device": "host", "kv_scheme": name},
            kv_cache_memory_bytes=memory,
            max_model_len=TOKENS,
            max_num_batched_tokens=TOKENS,
            max_num_seqs=4,
            enable_prefix_caching=False,
        ) as engine:
            found[name] = fit(engine)
            lines[name] = engine.llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        pages = divide(with_scheme(groups, scheme), context=TOKENS, in_flight=TOKENS)
        bytes_of[name] = len(pages.parts) * pages.token_bytes  # a request of so few tokens has as many pages in every part
        assert found[name] == pytest.approx(lines[name] / TOKENS, rel=WITHIN), "what vLLM's log says"
    assert found["none"] >= 40
    for name in SCHEMES:
        assert found[name] / found["none"] == pytest.approx(bytes_of["none"] / bytes_of[name], rel=WITHIN), name
        if worker.layers == "smollm2":
            stored = explain_cache(parse(name), with_scheme(groups, parse(name)))
            assert found[name] / found["none"] == pytest.approx(stored["capacity"], rel=WITHIN), name
    print({name: (count, round(count / found["none"], 3)) for name, count in found.items()})


def test_that_many_requests_run_without_preemption_and_more_do_not(tmp_path, monkeypatch):
    """vLLM's scheduler, with requests that all grow to their ends together, in float16 and with a scheme."""
    draw = random.Random(1)
    for name in ("none", "turbo4v2"):
        scheme = parse(name)
        token_bytes = sum(group.token_bytes for group in with_scheme(hash_worker.GROUPS["smollm2"], scheme))
        room = 40 if name == "none" else 160
        with hash_engine(
            tmp_path,
            monkeypatch,
            worker=hash_worker.SmolLM2HashWorker,
            additional_config={"device": "host", "kv_scheme": name},
            kv_cache_memory_bytes=(room * 4 + 1) * BLOCK_SIZE * token_bytes,
            max_model_len=64,
            max_num_batched_tokens=512,
            max_num_seqs=256,
            enable_prefix_caching=False,
        ) as engine:
            before = 0
            for count, preempted in ((room, False), (room + room // 8, True)):
                jobs = [Job([draw.randrange(LOWEST, VOCAB) for _ in range(8)], greedy(56)) for _ in range(count)]
                engine.check(jobs)
                after = engine.stats()["preemptions"]
                assert (after > before) == preempted, (name, count)
                before = after
            engine.check_idle()


@pytest.mark.parametrize("scheme", ["turbo4v2", "turbo8v4"])
@pytest.mark.parametrize("block_size", [16, 32])
def test_parts_of_a_model_with_windows_and_a_scheme_keep_their_tokens(tmp_path, monkeypatch, scheme, block_size):
    """Every part reads what it wrote, in too few blocks, with prefix hits: first and last layers have another size than the others."""
    draw = random.Random(block_size)
    prefix = [draw.randrange(LOWEST, VOCAB) for _ in range(70)]
    ends = [[draw.randrange(LOWEST, VOCAB) for _ in range(1 + 9 * i)] for i in range(10)]
    jobs = [Job(prefix + end, greedy(60), arrives=draw.randrange(20)) for end in ends]
    with hash_engine(
        tmp_path,
        monkeypatch,
        worker=hash_worker.Gemma3HashWorker,
        additional_config={"device": "host", "kv_scheme": scheme},
        block_size=block_size,
        max_model_len=256,
        num_gpu_blocks_override=220 * 16 // block_size,
        max_num_batched_tokens=48,
    ) as engine:
        assert len(engine.windows) > 2 and set(engine.windows) == {None, 48}
        engine.check(jobs)
        assert engine.stats()["preemptions"] > 0
        engine.check_idle()


def test_without_groups_of_their_own_windowed_layers_see_everything_kept(tmp_path, monkeypatch):
    draw = random.Random(5)
    jobs = [Job([draw.randrange(LOWEST, VOCAB) for _ in range(20 + 30 * i)], greedy(20)) for i in range(4)]
    with hash_engine(
        tmp_path,
        monkeypatch,
        worker=hash_worker.Gemma3HashWorker,
        additional_config={"device": "host", "kv_scheme": "turbo4v2"},
        disable_hybrid_kv_cache_manager=True,
        num_gpu_blocks_override=60,
        max_model_len=256,
    ) as engine:
        assert engine.windows == [None]
        engine.check(jobs)
        engine.check_idle()


def test_the_log_says_what_each_layer_has_what_that_gains_and_what_is_padding():
    plain = divide(hash_worker.GROUPS["gemma3"], context=32_768, in_flight=512)
    groups = with_scheme(hash_worker.GROUPS["gemma3"], parse("turbo4v2"))
    about = {**explain_cache(parse("turbo4v2"), groups), "keys_can_be_centred": True}
    pages = divide(groups, context=32_768, in_flight=512)
    first, second, third = cache_lines(about, pages, plain)
    gained = f"{about['bytes_per_token']:,} bytes per token, {about['capacity']:.2f} times the tokens of float16"
    assert first.startswith(f"KV cache turbo4v2, 2+2 layers affine8: {gained}")
    assert "layers 0 to 1: keys affine8, values affine8; layers 2 to 23: keys turbo4, values turbo2; layers 24 to 25" in first
    assert "metalstep calibrate" in second
    assert f"{len(pages.parts)} parts of the layers take turns in pages of {pages.token_bytes:,} bytes per token" in third
    assert 1 < plain.longest_bytes / pages.longest_bytes < about["capacity"], "padding is counted"
    assert f"{plain.longest_bytes / pages.longest_bytes:.2f} times as many tokens fit" in third
    whole = divide(groups[:1], context=64, in_flight=64)
    assert cache_lines({**about, "centred_layers": 26}, whole, whole)[1:] == ["KV cache: keys of 26 layers are centred"]
    (only,) = cache_lines({**explain_cache(parse(), hash_worker.GROUPS["smollm2"]), "keys_can_be_centred": False}, whole, whole)
    assert only.startswith("KV cache float16: 23,040 bytes per token, 1.00 times")
