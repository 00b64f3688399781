"""batch_generate: mlx-lm's arguments and result; every prompt's text is what generate gives it alone."""
import inspect

import mlx.core as mx
import numpy as np
import pytest
from families import BASE, FAMILIES, VOCAB, build
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import BatchGenerator
from mlx_lm.generate import batch_generate as mlx_batch_generate
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from tiny import write_model
from workload import watched

import metalstep
from metalstep import BatchResponse, SamplingParams, batch_generate, generate, stream_generate
from metalstep.grammar import ChoiceGrammar
from metalstep.models.cache import make_prompt_cache, trim_prompt_cache

TEXT = [(17 * i + 7) % (VOCAB - 1) + 1 for i in range(120)]
PROMPTS = [TEXT[i : i + 3 + 2 * i] for i in range(9)]


def loaded(name, directory, **options):
    config = {"model_type": FAMILIES[name].model_type, **BASE, **FAMILIES[name].config}
    path = write_model(directory, build(name, quantized=False), config)
    return (*metalstep.load(path, strict=True, **options), path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model, tokenizer) of a few thousand weights."""
    model, tokenizer, _ = loaded("llama", tmp_path_factory.mktemp("llama"))
    with model:
        yield model, tokenizer


def alone(tiny, prompt, **options):
    """(text, ids, logprobs) of what stream_generate gives, without a stop token."""
    responses = list(stream_generate(*tiny, prompt, **options))
    ids = [r.token for r in responses if r.finish_reason != "stop"]
    return "".join(r.text for r in responses), ids, [r.logprob for r in responses][: len(ids)]


def everything(response):
    return list(zip(response.texts, response.token_ids, response.logprobs, strict=True))


def batch(tiny, prompts, *args, **options):
    return batch_generate(*tiny, prompts, *args, return_token_ids=True, return_logprobs=True, **options)


# ---- what mlx-lm's has ---------------------------------------------------------------------------------------------------------


def test_the_arguments_are_mlx_lms():
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (batch_generate, mlx_batch_generate))
    assert [(p.name, p.default) for p in ours[: len(theirs) - 1]] == [(p.name, p.default) for p in theirs[:-1]]


@pytest.mark.parametrize("name", sorted(set(inspect.signature(BatchGenerator.__init__).parameters) - {"self", "model", "stop_tokens"}))
def test_the_batch_generators_options_are_taken(tiny, name):
    values = {
        "max_tokens": 5,
        "sampler": make_sampler(0.0),
        "logits_processors": make_logits_processors({5: 1.0}),
        "completion_batch_size": 2,
        "prefill_batch_size": 2,
        "prefill_step_size": 4,
        "max_kv_size": 100,
        "stream": None,
    }
    options = {"max_tokens": 5, name: values[name]}
    single = {k: v for k, v in options.items() if not k.endswith("batch_size")}
    assert everything(batch(tiny, PROMPTS, **options)) == [alone(tiny, prompt, **single) for prompt in PROMPTS]


def test_the_documented_call(smollm2):
    model, tokenizer = smollm2
    texts = ["Write a story about Einstein.", "Why is the sky blue?", "What time is it?"]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True) for text in texts
    ]
    response = batch_generate(model, tokenizer, prompts, verbose=False, max_tokens=12)
    assert response.texts == [generate(model, tokenizer, prompt, max_tokens=12) for prompt in prompts]


@settings(max_examples=10)
@given(
    count=st.integers(1, 90),
    temp=st.sampled_from([0.0, 1.0]),
    steps=st.sampled_from([1, 8, 32]),
    sizes=st.sampled_from([{}, {"completion_batch_size": 3, "prefill_batch_size": 1}, {"prefill_batch_size": 4}]),
)
def test_texts_ids_and_logprobs_are_those_of_each_prompt_alone(tiny, count, temp, steps, sizes):
    prompts = [TEXT[i % 40 : i % 40 + 1 + i % 7] for i in range(count)]
    limits = [1 + i % 11 for i in range(count)]
    params = [SamplingParams(temperature=temp, seed=i, processed_logprobs=True) for i in range(count)]
    got = batch(tiny, prompts, max_tokens=limits, sampling=params, decode_steps=steps, **sizes)
    want = [alone(tiny, p, max_tokens=n, temp=temp, seed=i) for i, (p, n) in enumerate(zip(prompts, limits, strict=True))]
    assert everything(got) == want
    assert got.errors is None and got.caches is None
    assert got.stats.prompt_tokens == sum(map(len, prompts))
    assert sum(len(ids) for _, ids, _ in want) <= got.stats.generation_tokens <= sum(limits)


def test_batch_sizes_bound_what_runs_at_once(tiny):
    for options, running, chunks in (({}, 9, 9), ({"completion_batch_size": 2}, 2, 2), ({"prefill_batch_size": 1}, 9, 1)):
        seen = []
        with watched(tiny[0].engine) as calls:
            run = tiny[0].engine._run

            def note(run=run, seen=seen):
                worked = run()
                scheduler = tiny[0].engine._scheduler
                seen.append((len(scheduler.running), sum(s.computed <= s.prompt_len for s in scheduler.running)))
                return worked

            tiny[0].engine._run = note
            batch_generate(*tiny, PROMPTS, max_tokens=12, banned_token_ids=[0], decode_steps=1, **options)
        assert calls and max(count for count, _ in seen) <= running
        assert options or max(count for count, _ in seen) == 9
        assert max(count for _, count in seen) <= chunks


# ---- per prompt ----------------------------------------------------------------------------------------------------------------


def test_lists_are_one_entry_per_prompt(tiny):
    mx.random.seed(3)
    own = lambda logprobs: mx.argmin(logprobs, axis=-1)  # noqa: E731
    samplers = [None, own, make_sampler(0.0), None]
    processors = [None, [], make_logits_processors({9: 50.0}), [lambda tokens, logits: logits.at[:, 4].add(60.0)]]
    got = batch(tiny, PROMPTS[:4], max_tokens=[3, 4, 5, 6], sampler=samplers, logits_processors=processors)
    want = [
        alone(tiny, prompt, max_tokens=3 + i, sampler=samplers[i], logits_processors=processors[i])
        for i, prompt in enumerate(PROMPTS[:4])
    ]
    assert everything(got) == want
    assert got.token_ids[2] == [9] * 5 and got.token_ids[3] == [4] * 6


def test_one_seed_gives_every_prompt_a_stream_of_its_own(tiny):
    got = batch(tiny, [PROMPTS[3]] * 8, max_tokens=10, temp=1.2, seed=5)
    assert everything(got) == everything(batch(tiny, [PROMPTS[3]] * 8, max_tokens=10, temp=1.2, seed=5))
    assert len({tuple(ids) for ids in got.token_ids}) > 4
    assert everything(got)[0] == alone(tiny, PROMPTS[3], max_tokens=10, temp=1.2, seed=5)
    mx.random.seed(11)
    first = batch(tiny, [PROMPTS[3]] * 8, max_tokens=10, sampler=make_sampler(1.2)).token_ids
    mx.random.seed(11)
    assert batch(tiny, [PROMPTS[3]] * 8, max_tokens=10, sampler=make_sampler(1.2)).token_ids == first
    assert len({tuple(ids) for ids in first}) > 4


def test_grammars_are_one_per_prompt(tiny):
    grammars = [ChoiceGrammar([[5, 6, 7], [8, 9]]), None, ChoiceGrammar([[20]])]
    got = batch(tiny, PROMPTS[:3], max_tokens=6, grammars=grammars)
    assert got.token_ids[0] in ([5, 6, 7], [8, 9]) and got.token_ids[2] == [20]
    assert everything(got)[1] == alone(tiny, PROMPTS[1], max_tokens=6)
    again = ChoiceGrammar([[5, 6, 7]])
    for options, text in (
        (dict(grammars=[again, again]), "grammars has one object twice"),
        (dict(grammars=[again]), "grammars has 1 entries for 2 prompts"),
        (dict(grammars=[again, None], sampler=lambda x: x), "grammars and a sampler"),
        (dict(grammars=[7, None]), "grammar is 7"),
    ):
        with pytest.raises(ValueError, match=text):
            batch(tiny, PROMPTS[:2], **options)


def test_prompt_caches_are_copied_and_handed_back(tiny):
    caches = [make_prompt_cache(tiny[0]), None, make_prompt_cache(tiny[0])]
    for cache, prompt in ((caches[0], TEXT[:20]), (caches[2], TEXT[20:53])):
        list(stream_generate(*tiny, prompt, max_tokens=3, prompt_cache=cache))
    held = [list(cache.tokens) if cache is not None else [] for cache in caches]
    got = batch(tiny, PROMPTS[:3], caches, 7, return_prompt_caches=True)
    assert [cache.tokens if cache is not None else [] for cache in caches] == held
    assert everything(got) == [alone(tiny, h + p, max_tokens=7) for h, p in zip(held, PROMPTS[:3], strict=True)]
    for i, cache in enumerate(got.caches):
        assert cache.tokens[: len(held[i]) + len(PROMPTS[i])] == held[i] + PROMPTS[i]
        assert cache.tokens[len(held[i]) + len(PROMPTS[i]) :][: len(got.token_ids[i])] == got.token_ids[i]
        text = list(cache.tokens)
        assert alone(tiny, [7], max_tokens=4, prompt_cache=cache) == alone(tiny, [*text, 7], max_tokens=4)
    assert trim_prompt_cache(got.caches[0], 2) == 2


# ---- text, output, ends ---------------------------------------------------------------------------------------------------------


def test_prompts_may_be_text_or_arrays(tiny):
    ids = [3, 9, 27]
    want = alone(tiny, ids, max_tokens=5)
    got = batch(tiny, ["3 9 27", ids, tuple(ids), np.array(ids), mx.array(ids)], max_tokens=np.int64(5))
    assert everything(got) == [want] * 5
    assert everything(batch(tiny, mx.array([ids, ids]), max_tokens=np.array([5, 5]))) == [want] * 2


def test_no_prompts_give_no_texts(tiny):
    got = batch(tiny, [], [], [], return_prompt_caches=True, temp=0.5, raise_errors=False)
    assert got == BatchResponse([], got.stats, [], [], [], [])
    assert (got.stats.prompt_tokens, got.stats.generation_tokens) == (0, 0)


def test_stop_tokens_are_no_part_of_the_result(tiny):
    got = batch(tiny, PROMPTS[:2], max_tokens=9, logits_processors=[make_logits_processors({0: 100.0}), None])
    assert (got.texts[0], got.token_ids[0], got.logprobs[0]) == ("", [], [])
    assert got.stats.generation_tokens >= 1


def test_verbose_tells_how_far_it_is_and_how_fast_it_was(tiny, capsys):
    batch_generate(*tiny, PROMPTS[:3], max_tokens=4, verbose=True, banned_token_ids=[0])
    output = capsys.readouterr().out
    for line in (
        *(f"[batch_generate] Finished processing {done}/3 ..." for done in range(4)),
        f"[batch_generate] Prompt: {sum(map(len, PROMPTS[:3]))} tokens, ",
        "[batch_generate] Generation: 12 tokens, ",
        "[batch_generate] Peak memory: ",
    ):
        assert line in output
    batch_generate(*tiny, PROMPTS[:3], max_tokens=4)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("prompts", "options", "text"),
    [
        ([[1], []], {}, "the prompt is empty"),
        ([[1], [VOCAB]], {}, f"token id {VOCAB}"),
        ([[1], [1.5]], {}, "expected text or a flat list of token ids"),
        ([[1], [5] * 300], {}, "300 tokens do not fit into the context of 256"),
        ("text", {}, "prompts is 'text'"),
        (5, {}, "prompts is 5"),
        ([[1], [2]], {"max_tokens": [3, 0]}, "max_tokens is 0"),
        ([[1], [2]], {"max_tokens": [3]}, "max_tokens has 1 entries for 2 prompts"),
        ([[1], [2]], {"prompt_caches": [None]}, "prompt_caches has 1 entries for 2 prompts"),
        ([[1], [2]], {"sampler": [None]}, "sampler has 1 entries for 2 prompts"),
        ([[1], [2]], {"sampler": "greedy"}, "sampler is 'greedy'"),
        ([[1], [2]], {"logits_processors": [[]]}, "logits_processors has 1 entries for 2 prompts"),
        ([[1], [2]], {"logits_processors": [[5], []]}, "a logits processor is 5"),
        ([[1], [2]], {"logits_processors": make_sampler(1.0)}, "logits_processors is "),
        ([[1], [2]], {"sampling": [SamplingParams()]}, "sampling has 1 entries for 2 prompts"),
        ([[1], [2]], {"sampling": [SamplingParams(), 3]}, "sampling has 3, expected SamplingParams"),
        ([[1], [2]], {"sampling": SamplingParams(), "temp": 1}, "sampling and temp both say"),
        ([[1], [2]], {"sampling": SamplingParams(), "sampler": make_sampler(1.0)}, "sampling and sampler or logits_processors both say"),
        ([[1], [2]], {"temp": -1}, "temperature is -1"),
        ([], {"temp": -1}, "temperature is -1"),
        ([[1], [2]], {"decode_steps": 0}, "decode_steps is 0"),
        ([[1], [2]], {"prefill_step_size": 0}, "prefill_step_size is 0"),
        ([[1], [2]], {"completion_batch_size": 0}, "completion_batch_size is 0"),
        ([[1], [2]], {"prefill_batch_size": 1.5}, "prefill_batch_size is 1.5"),
        ([[1], [2]], {"max_kv_size": 3}, "max_kv_size is 3"),
        ([[1], [2]], {"banned_token_ids": [VOCAB]}, f"banned_token_ids has token id {VOCAB}"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(tiny, prompts, options, text):
    before = tiny[0].engine.stats()
    with pytest.raises(ValueError, match=text):
        batch_generate(*tiny, prompts, **options)
    assert tiny[0].engine.stats() == before


def test_other_arguments_are_refused_by_name(tiny):
    with pytest.raises(TypeError, match="batch_generate got an unexpected argument 'colour'"):
        batch_generate(*tiny, [[1]], colour="red")
    with pytest.raises(NotImplementedError, match=r"draft_model: .*; leave it out, or .* decode_steps of batch_generate and Request"):
        batch_generate(*tiny, [[1]], draft_model=tiny[0])
    for name in ("draft_model", "kv_bits", "stream"):
        with pytest.raises(NotImplementedError, match=name):
            batch_generate(*tiny, [[1]], **{name: 4})


@pytest.mark.parametrize("steps", [1, 8])
def test_logprobs_that_were_asked_for_are_handed_out(tiny, steps):
    prompts, asked = PROMPTS[2:5], [dict(logprobs=3, prompt_logprobs=2), dict(), dict(logprobs=1)]
    sampling = [SamplingParams(seed=1, processed_logprobs=True, **fields) for fields in asked]
    got = batch(tiny, prompts, max_tokens=6, sampling=sampling, decode_steps=steps)
    for i, fields in enumerate(asked):
        responses = list(stream_generate(*tiny, prompts[i], max_tokens=6, **fields))
        want = [r.top_logprobs for r in responses][: len(got.token_ids[i])] if "logprobs" in fields else None
        assert got.top_logprobs[i] == want
        assert got.prompt_logprobs[i] == responses[0].prompt_logprobs
        if want is not None:
            assert [len(top) for top in want] == [fields["logprobs"]] * len(got.token_ids[i])
            assert [top[0] for top in want] == list(zip(got.token_ids[i], got.logprobs[i], strict=True))  # greedy: the most likely
    assert [p and len(p) for p in got.prompt_logprobs] == [len(prompts[0]), None, None]
    plain = batch(tiny, prompts, max_tokens=6)
    assert plain.top_logprobs is None and plain.prompt_logprobs is None
    one = batch(tiny, prompts, max_tokens=6, logprobs=3, prompt_logprobs=0)
    assert one.top_logprobs[0] == got.top_logprobs[0] and one.prompt_logprobs[2][0] is None


# ---- prompts that fail ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A model of which token 90 makes logits that are not finite."""
    model = build("llama_untied", quantized=False)
    weight = model.model.embed_tokens.weight
    weight[90] = float("nan")
    config = {"model_type": "llama", **BASE, **FAMILIES["llama_untied"].config}
    model, tokenizer = metalstep.load(write_model(tmp_path_factory.mktemp("nan"), model, config), strict=True)
    with model:
        yield model, tokenizer


def test_what_ends_one_prompt_leaves_the_others_alone(poisoned):
    prompts = [[1, 2], [1, 90], [3], [4]]
    banned = [None, None, [lambda tokens, logits: logits - mx.inf], None]
    got = batch(poisoned, prompts, max_tokens=5, logits_processors=banned, raise_errors=False)
    assert [type(error) for error in got.errors] == [type(None), RuntimeError, ValueError, type(None)]
    assert "not finite" in str(got.errors[1]) and "left no token" in str(got.errors[2])
    for i in (0, 3):
        assert everything(got)[i] == alone(poisoned, prompts[i], max_tokens=5)
    assert got.texts[1:3] == ["", ""] and got.token_ids[1:3] == [[], []]
    with pytest.raises(RuntimeError, match="not finite"):
        batch(poisoned, prompts, max_tokens=5)
    stats = poisoned[0].engine.stats()
    assert stats.running == stats.waiting == 0 and stats.free_blocks == stats.total_blocks


class Dead:
    """A grammar that allows nothing from the third token on."""

    def __init__(self):
        self.count, self.is_terminated = 0, False

    def fill_bitmask(self, row):
        row[:] = 0xFFFFFFFF if self.count < 2 else 0

    def accept(self, token):
        self.count += 1

    def reset(self):
        self.count = 0


def test_a_text_that_no_token_may_follow_is_reported_with_what_came_before(tiny):
    got = batch(tiny, PROMPTS[:2], max_tokens=6, grammars=[Dead(), None], raise_errors=False, banned_token_ids=[0])
    assert got.errors[1] is None and "no token is allowed" in str(got.errors[0])
    assert len(got.token_ids[0]) == 2
    assert got.token_ids[0] == alone(tiny, PROMPTS[0], max_tokens=2, banned_token_ids=[0])[1]
    with pytest.raises(RuntimeError, match="no token is allowed"):
        batch(tiny, PROMPTS[:2], max_tokens=6, grammars=[Dead(), None])


def test_an_interrupt_leaves_nothing_behind(tiny):
    def interrupting(tokens, logits):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch(tiny, PROMPTS, max_tokens=5, logits_processors=[interrupting])
    stats = tiny[0].engine.stats()
    assert stats.running == stats.waiting == 0 and stats.free_blocks == stats.total_blocks
    assert everything(batch(tiny, PROMPTS[:2], max_tokens=5)) == [alone(tiny, p, max_tokens=5) for p in PROMPTS[:2]]


# ---- a model that runs eagerly ------------------------------------------------------------------------------------------------


def test_an_eager_model_batches_with_mlx_lms_own(tmp_path):
    model, tokenizer, path = loaded("llama", tmp_path / "llama")
    model.close()
    eager, _ = metalstep.load(path, device="eager")
    want = mlx_batch_generate(eager.eager, tokenizer, PROMPTS, max_tokens=6, return_token_ids=True, return_logprobs=True)
    got = batch_generate(eager, tokenizer, PROMPTS, max_tokens=6, return_token_ids=True, return_logprobs=True, return_prompt_caches=True)
    assert isinstance(got, BatchResponse)
    assert (got.texts, got.token_ids, got.logprobs) == (want.texts, want.token_ids, want.logprobs)
    assert got.caches[2][0].offset == len(PROMPTS[2]) + 6
    assert got.stats.generation_tokens == want.stats.generation_tokens and got.errors is None
    as_text, as_ids = (batch_generate(eager, tokenizer, prompts, max_tokens=3).texts for prompts in (["3 4"], [[3, 4]]))
    assert as_text == as_ids
    for options, text in (
        (dict(sampler=[make_sampler(1.0), make_sampler(0.5)]), "sampler"),
        (dict(grammars=[None, Dead()]), "grammars"),
        (dict(raise_errors=False), "raise_errors"),
        (dict(max_tokens=-1), "max_tokens=-1"),
        (dict(banned_token_ids=[3]), "banned_token_ids"),
    ):
        with pytest.raises(NotImplementedError, match=text):
            batch_generate(eager, tokenizer, PROMPTS[:2], **options)
    with pytest.raises(ValueError, match=f"token id {VOCAB}"):
        batch_generate(eager, tokenizer, [[VOCAB]])
