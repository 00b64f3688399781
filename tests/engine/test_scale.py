"""Many more requests than run at once, and more tokens than the cache holds."""
from dataclasses import replace

import pytest
from families import BASE, FAMILIES, build
from tiny import write_model
from workload import alone, answers, requests, watched

import metalstep


def tiny_model(name, directory, **options):
    config = {"model_type": FAMILIES[name].model_type, **BASE, **FAMILIES[name].config, "max_position_embeddings": 512}
    return metalstep.load(write_model(directory, build(name, quantized=False), config), strict=True, **options)


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2"])
def family(request, tmp_path_factory):
    """(a model with room, the same with a cache that 64 running requests overfill): one group of layers, one with a window, both."""
    directory = tmp_path_factory.mktemp(request.param)
    large, _ = tiny_model(request.param, directory)
    need = large.native.cache.bytes_per_token * 16
    small, _ = tiny_model(request.param, directory, max_context=128, kv_memory=need * 60)
    with large, small:
        yield large, small


def test_two_hundred_and_fifty_six_queued_requests(family):
    large, small = family
    made = requests(256, large.native.vocab_size, longest=70, seed=3, tokens=(1, 40))
    wanted = [replace(request, decode_steps=1 + i % 8) for i, request in enumerate(made)]
    lone = alone(large.engine, wanted)
    with watched(small.engine) as calls:
        got = answers(small.engine, wanted)
    stats = small.engine.stats()
    assert got == lone
    assert max(rows for rows, _ in calls) > 64
    assert stats.free_blocks == stats.total_blocks and stats.running == stats.waiting == 0
    assert stats.preemptions > 0


def test_a_prompt_as_long_as_the_context_beside_another_request(family):
    """512 tokens fill the block tables to the last entry; the token behind them needs no place."""
    engine, vocab_size = family[0].engine, family[0].native.vocab_size
    (short,) = requests(1, vocab_size, longest=9, seed=8, tokens=(20, 20))
    full = replace(short, prompt=[3 + i % (vocab_size - 3) for i in range(512)], max_tokens=None, decode_steps=8)
    lone = alone(engine, [short, full])
    assert len(lone[1]) == 1 and lone[1][0][4] == "length"
    with watched(engine):
        assert answers(engine, [replace(short, decode_steps=8), full]) == lone
