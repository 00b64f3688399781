"""What a user of mlx-lm asks of the Metal device (simulated off Apple): every kind of request, long contexts, cramped memory, interrupts.
Compared with the host device and with MLX in float32."""
import copy
import random
import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from engines import CHOICES, check, kinds
from families import VOCAB
from gpu_device import KIND
from interrupt_at import InterruptAt
from metal_models import ALL, CONTEXT, DEVICE, RANGE, build, load
from mlx_lm.models.cache import make_prompt_cache as mlx_prompt_cache
from tiny import write_model
from workload import answers, requests, watched

import metalstep
from metalstep import Request, SamplingParams
from metalstep import sample_utils as samplers
from metalstep.grammar import ChoiceGrammar
from metalstep.kernels.native import KernelError, NativeDevice
from metalstep.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache, trim_prompt_cache
from metalstep.plan.gpu_target import SPLIT_LEN

# Nats between host and GPU: the host's activations have 16 bits, on NVIDIA's GPUs linears read float16.
LOGPROB = {"apple": 2e-5, "nvidia": 5e-2}[KIND]
SAME = {"apple": 0.95, "nvidia": 0.6}[KIND]  # part of the tokens at least
RANKS = {"apple": 0, "nvidia": 2}[KIND]  # places that a token's rank is apart: others are as likely


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    model, config, _ = build("qwen3", max_position_embeddings=4096, num_hidden_layers=1)
    return write_model(tmp_path_factory.mktemp("qwen3"), model, config), model


@pytest.fixture(scope="module")
def models(directory):
    """The same dense weights on the host, on the Metal device, and there with batch_invariant."""
    kinds = {"host": {"device": "host"}, "metal": {}, "invariant": {"batch_invariant": True}}
    loaded = {kind: load(directory[0], max_context=CONTEXT, **options) for kind, options in kinds.items()}
    yield loaded
    for model in loaded.values():
        model.close()


def outputs(stream):
    return [(o.token, o.logprob, o.rank, o.top, o.finish_reason) for o in stream]


def submit(model, prompt, count=6, pick=None, sampling=None, **fields):
    request = Request(list(prompt), SamplingParams(**(sampling or {})), count, hand_out_logits=pick is not None, **fields)
    return model.engine.submit(request, pick)


def many(model):
    """As many as run at once, several steps a call, of lengths that leave one after the other: every size of plan is needed."""
    return [submit(model, ALL[i : i + 5 + 3 * i % 50], 2 + i % 9, sampling={"seed": i, "temperature": 0.7 * (i % 2)}, decode_steps=4)
            for i in range(64)]  # fmt: skip


def beside(model):
    """Prompts in chunks while others decode."""
    early = [submit(model, ALL[i : i + 4], 20, sampling={"seed": i, "temperature": 0.8, "repetition_penalty": 1.2}) for i in range(5)]
    first = [next(stream) for stream in early]
    late = {"logit_bias": {5: 3.0, 7: -9.0}, "min_tokens": 3, "frequency_penalty": 0.2, "logprobs": 3}
    more = [submit(model, ALL[i : i + 150], 6, sampling={"seed": i, **late}, prefill_rows=40, stop_token_ids={5}) for i in range(3)]
    return [[output, *stream] for output, stream in zip(first, early, strict=True)] + more


def windows(model):
    return [
        submit(model, ALL[:n], 12, max_kv_size=size, decode_steps=k, prefill_rows=rows)
        for n, k, rows, size in ((5, 1, 512, 20), (70, 4, 7, 20), (1300, 3, 512, 1100))
    ]


def grammars(model):
    return [
        submit(model, ALL[:n], 12, sampling={"temperature": t, "seed": 3}, grammar=ChoiceGrammar(CHOICES)) for n, t in ((5, 0), (9, 1.0))
    ]


def picked(model):
    def second(tokens, logits):
        token = int(np.argsort(logits)[-2])
        return token, float(logits[token]), logits

    return [submit(model, ALL[:9], pick=second)]


def prompts_reported(model):
    stream = submit(model, ALL[:40], 4, sampling={"prompt_logprobs": 5, "logprobs": 3}, prefill_rows=13)
    found = outputs(stream)
    return [found, [(p.token, p.logprob, p.rank, p.top, None) for p in stream.prompt_logprobs if p is not None]]


def caches(model):
    """Continued, copied, trimmed; with a bound on what a row sees."""
    cache, bounded = make_prompt_cache(model), make_prompt_cache(model, 24)
    found = [outputs(submit(model, ALL[:37], prompt_cache=cache)), outputs(submit(model, ALL[:60], prompt_cache=bounded, prefill_rows=11))]
    other = copy.deepcopy(cache)
    found += [outputs(submit(model, ALL[37:50], prompt_cache=cache)), outputs(submit(model, ALL[9:12], prompt_cache=bounded))]
    trim_prompt_cache(other, 9)
    return [*found, outputs(submit(model, ALL[60:63], prompt_cache=other))]


def taken(found):
    """What a stream, or what is taken of it already, gave: rows as `outputs` makes them."""
    if isinstance(found, list) and isinstance(found[0], tuple):
        return found
    return outputs(found)


ASKS = [beside, windows, grammars, picked, prompts_reported, caches]
ASKED = [(many, "metal"), *((ask, kind) for kind in ("metal", "invariant") for ask in ASKS)]


@pytest.mark.parametrize(("ask", "kind"), ASKED, ids=lambda value: getattr(value, "__name__", value))
def test_requests_are_answered_as_on_the_host(models, ask, kind):
    same = total = 0
    for ours, hosts in zip(*(map(taken, ask(models[of])) for of in (kind, "host")), strict=True):
        assert len(ours) == len(hosts) > 0
        total += len(ours)
        for mine, host in zip(ours, hosts, strict=True):
            if mine[0] != host[0]:
                break  # a draw on the edge of two tokens; what follows is another text
            same += 1
            assert abs(mine[2] - host[2]) <= RANKS and mine[4] == host[4]
            tops = [[(mine[0], mine[1]), *(mine[3] or [])], [(host[0], host[1]), *(host[3] or [])]]
            np.testing.assert_allclose(*([pair[1] for pair in top] for top in tops), atol=LOGPROB)
    assert same > SAME * total


def test_input_embeddings_of_a_prompt_are_the_prompt(models, directory):
    rows = np.array(directory[1].model.embed_tokens(mx.array([ALL[:30]]))[0])
    for kind in ("metal", "invariant"):
        streams = [submit(models[kind], prompt, embeddings=own, decode_steps=3)
                   for prompt, own in ((ALL[:30], None), ([], rows), (ALL[:30], rows))]  # fmt: skip
        plain, *embedded = [outputs(stream) for stream in streams]
        for found in embedded:
            assert [o[0] for o in found] == [o[0] for o in plain]
            np.testing.assert_allclose([o[1] for o in found], [o[1] for o in plain], atol=LOGPROB)


def test_mlx_lm_s_arguments_do_what_they_do_on_the_host(models, directory, tmp_path):
    tokenizer = metalstep.load(directory[0], device="eager")[1]
    options = [
        dict(sampler=samplers.make_sampler(temp=0.7, top_p=0.9), seed=4),
        dict(sampler=lambda logprobs: mx.argmin(logprobs, -1)),
        dict(logits_processors=[lambda tokens, logits: logits * 0.5]),
        dict(logits_processors=samplers.make_logits_processors(logit_bias={4: 5.0}, repetition_penalty=1.3), max_kv_size=16),
        dict(prefill_step_size=3),
    ]
    for option in options:
        ours, hosts = ([(r.token, float(r.logprobs[r.token]), r.finish_reason)
                        for r in metalstep.stream_generate(models[kind], tokenizer, list(ALL[:12]), max_tokens=5, **option)]
                       for kind in ("metal", "host"))  # fmt: skip
        assert [(o[0], o[2]) for o in ours] == [(o[0], o[2]) for o in hosts], option
        np.testing.assert_allclose([o[1] for o in ours], [o[1] for o in hosts], atol=LOGPROB)


def test_prompt_caches_go_between_devices_with_what_they_hold(models, tmp_path):
    for source, target in (("metal", "host"), ("host", "metal"), ("invariant", "metal")):
        cache = make_prompt_cache(models[source])
        outputs(submit(models[source], ALL[:33], prompt_cache=cache))
        save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
        moved = load_prompt_cache(str(tmp_path / "cache.safetensors"))
        here, there = (outputs(submit(models[kind], ALL[40:45], prompt_cache=c)) for kind, c in ((source, cache), (target, moved)))
        assert [o[0] for o in here] == [o[0] for o in there]
        np.testing.assert_allclose([o[1] for o in here], [o[1] for o in there], atol=LOGPROB)


# ---- contexts, batches, dtypes -------------------------------------------------------------------------------------------------
def test_contexts_of_several_pieces_are_mlx_s(models, directory, held):
    """Behind a prompt of more than one piece; K steps that cross from one piece to the next."""
    for length in (SPLIT_LEN - 2, CONTEXT - 12):
        text = list(ALL[:length])
        for kind in ("metal", "invariant"):
            tokens = [o[0] for o in outputs(submit(models[kind], text[-1:], 9, prompt_cache=held(length - 1), decode_steps=4))]
            cache = mlx_prompt_cache(directory[1])
            directory[1](mx.array([text[:-1]]), cache=cache)
            rows = np.array(directory[1](mx.array([text[-1:] + tokens[:-1]]), cache=cache)[0])
            for token, row in zip(tokens, rows, strict=True):
                assert row.max() - row[token] < RANGE * np.ptp(row)


@pytest.fixture(scope="module")
def held(models, tmp_path_factory):
    """Makes a prompt cache with the first tokens of ALL, computed on the host."""
    path = str(tmp_path_factory.mktemp("held") / "cache.safetensors")

    def make(tokens):
        cache = make_prompt_cache(models["host"])
        models["host"].engine.collect(Request(list(ALL[:tokens]), max_tokens=0, prompt_cache=cache))
        save_prompt_cache(path, cache)
        return load_prompt_cache(path)

    return make


def test_batch_invariant_requests_do_not_see_a_long_one_beside_them(models, held):
    """Its context needs plans with more pieces, for all rows of the step."""
    model = models["invariant"]
    wanted = requests(7, VOCAB, longest=40, seed=9, tokens=(4, 9))
    long = Request([5], SamplingParams(seed=1, temperature=0.9, logprobs=2), 7, decode_steps=3, prompt_cache=held(SPLIT_LEN + 6))
    lone = [answers(model.engine, [replace(r, decode_steps=1)])[0] for r in wanted]
    alone = answers(model.engine, [replace(long, prompt_cache=copy.deepcopy(long.prompt_cache), decode_steps=1)])
    with watched(model.engine) as calls:
        got = answers(model.engine, [long, *(replace(r, decode_steps=3, prefill_rows=5 + i) for i, r in enumerate(wanted))])
    assert max(rows for rows, _ in calls) > 8 and got == alone + lone


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("invariant", [False, True])
def test_narrow_caches_in_memory_for_a_few_give_what_one_alone_gets(directory, models, kv_dtype, invariant):
    """Requests push each other out and compute their tokens again. Without batch_invariant that is another order of sums."""
    token_bytes = 2 * 2 * 16 * 2  # keys and values of two heads
    options = {"kv_dtype": kv_dtype, "max_context": 96, "kv_memory": 9 * 16 * token_bytes, "batch_invariant": invariant}
    with load(directory[0], **options) as model:
        wanted = [replace(r, max_tokens=30, stop_token_ids=frozenset()) for r in requests(8, VOCAB, longest=24, seed=2)]
        lone = [answers(model.engine, [request])[0] for request in wanted]
        with watched(model.engine):
            got = answers(model.engine, [replace(request, decode_steps=4, prefill_rows=9) for request in wanted])
        assert model.engine.stats().preemptions > 0
        check(model)
        if invariant:
            assert got == lone
        same = sum(a[0] == b[0] for x, y in zip(got, lone, strict=True) for a, b in zip(x, y, strict=True))
        assert same > 0.7 * sum(map(len, lone))  # one early draw on an edge changes the rest of a text


@pytest.mark.parametrize("invariant", [False, True])
def test_numbers_that_are_not_finite_stay_where_they_are(directory, invariant):
    """In blocks that nobody has written yet or any more, and in requests of the same step whose activations overflow."""
    found = []
    for poisoned in (False, True):
        with load(directory[0], kv_dtype="float16", batch_invariant=invariant) as model:
            wanted = [submit(model, ALL[40 * i : 40 * i + n], decode_steps=1 + i % 3, prefill_rows=11, max_kv_size=size)
                      for i, (n, size) in enumerate(((5, None), (33, None), (23, 10)))]  # fmt: skip
            if poisoned:
                for planes in model.native.cache._views.values():
                    for plane in planes:
                        blocks = list(range(plane.buffer.shape[0]))
                        plane.write(blocks, np.full_like(plane.read(blocks), np.nan))
                huge = np.where(np.arange(64) % 2, 3e38, -2e38) * np.ones((9, 1))
                wanted.append(submit(model, [], embeddings=huge))
            found.append([outputs(stream) for stream in wanted[:3]])
    assert found[0] == found[1]


# ---- one engine, or two, and who interrupts them -------------------------------------------------------------------------------
@pytest.fixture
def invariant(directory):
    with load(directory[0], batch_invariant=True) as model:
        yield model


def test_an_interrupt_at_any_point_leaves_other_requests_alone(invariant):
    """Also while a plan is made that the batch needs first."""
    wanted = requests(9, VOCAB, longest=20, seed=4, tokens=(3, 6))
    lone = [answers(invariant.engine, [request])[0] for request in wanted]
    assert answers(invariant.engine, wanted) == lone
    counting, streams = InterruptAt(), [invariant.engine.submit(request) for request in wanted]
    with counting:
        list(streams[0])
    assert [outputs(stream) for stream in streams[1:]] == lone[1:]
    draw = random.Random(3)
    for _ in range(12):
        streams = [invariant.engine.submit(request) for request in wanted]
        with pytest.raises(KeyboardInterrupt), InterruptAt([draw.randint(1, counting.count)]):
            list(streams[0])
        assert [outputs(stream) for stream in streams[1:]] == lone[1:]
        streams[0].close()
        del streams
        check(invariant)
    kept = dict(invariant.native._plans)
    shape = max(kept, key=lambda shape: (shape.decode, shape.tokens))
    for point in (5, 2000, 9000):
        invariant.native._plans.pop(shape, None)
        with pytest.raises(KeyboardInterrupt), InterruptAt([point]):
            invariant.native.plan(shape)
        assert answers(invariant.engine, wanted) == lone


def test_threads_on_two_models_get_their_own_answers(models, invariant):
    wanted = requests(6, VOCAB, longest=30, seed=8, tokens=(3, 8))
    loaded = (invariant, models["invariant"])
    lone = [answers(invariant.engine, [request])[0] for request in wanted]
    got = {}

    def work(model, i):
        got[id(model), i] = answers(model.engine, [wanted[i]])[0]

    threads = [threading.Thread(target=work, args=(model, i)) for model in loaded for i in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(got[id(model), i] == lone[i] for model in loaded for i in range(len(wanted)))


def test_every_kind_of_request_can_be_cancelled(models):
    model = models["metal"]
    for start in kinds(model, 12):
        stream = start(model.engine, None)
        next(stream)
        stream.close()
        del stream
    check(model)


def test_closing_ends_what_runs_and_leaves_what_was_handed_out(directory):
    model = load(directory[0])
    kept = next(submit(model, ALL[:9], keep_logits=True)).logits
    cache, values = make_prompt_cache(model), kept.numpy().copy()
    stream = submit(model, ALL[:9], 30, prompt_cache=cache)
    next(stream)
    model.close()
    for use in (lambda: list(stream), lambda: submit(model, ALL[:3]), model.native.warmup, lambda: cache[0].state):
        with pytest.raises(ValueError, match="the model is closed; load it again"):
            use()
    np.testing.assert_array_equal(kept.numpy(), values)
    model.close()


def test_batch_invariant_is_refused_where_it_cannot_be(directory):
    with pytest.raises(ValueError, match="batch_invariant is 1, expected True or False"):
        load(directory[0], batch_invariant=1)
    with pytest.raises(ValueError, match="batch_invariant is True on eager"):
        load(directory[0], "eager", batch_invariant=True)


# ---- plans ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("invariant", [False, True])
def test_nothing_is_compiled_behind_warmup(directory, monkeypatch, invariant):
    """A first request, of any length and to the end of the context, waits for no compiler; nor do several, if they were announced."""
    added = []
    add = NativeDevice._add_source  # add_library is not for CUDA's plans
    monkeypatch.setattr(NativeDevice, "_add_source", lambda device, source: added.append(source) or add(device, source))
    with load(directory[0], max_context=4096, kv_memory="8MB", batch_invariant=invariant) as model:
        for rows in (1, 64):
            model.native.warmup(rows)
            warm = len(added)
            for count in range(1, rows + 1):
                for context in (count, 1030, 4096):
                    model.native.plan_for(count, decode=True, context=context)
            for count in (1, 9, 65, 129, 512):
                for context in (count, 4096):
                    model.native.plan_for(count, context=context)
            assert len(added) == warm > 0


def test_plans_share_their_memory_and_logits_lent_from_it_stay(directory, monkeypatch):
    made, create = [], NativeDevice.create_buffer
    with load(directory[0]) as model:
        model.native.warmup(64)
        record = lambda device, nbytes, **how: made.append(nbytes) or create(device, nbytes, **how)  # noqa: E731
        monkeypatch.setattr(NativeDevice, "create_buffer", record)
        model.native._plans.clear()
        model.native.warmup(64)
        assert sum(made) == 2 * 4 * VOCAB  # of the plan of one row, whose logits stay for longer
        streams = [submit(model, ALL[i : i + 9], 4, keep_logits=True) for i in range(3)]
        lent = [next(stream).logits for stream in streams]
        values = [logits.numpy().copy() for logits in lent]
        for length in (1, 60, 100):  # other plans
            outputs(submit(model, ALL[:length], 2))
        list(streams[0])
        for logits, value in zip(lent, values, strict=True):
            np.testing.assert_array_equal(logits.numpy(), value)


@pytest.mark.simulator  # elsewhere the kernels of one row may serve four
def test_ctrl_c_in_the_compiler_is_no_end_of_a_kernel(directory, monkeypatch):
    """Ctrl-C while a plan's kernels are compiled: they are compiled when they are needed next."""
    with load(directory[0]) as model:
        add, calls = NativeDevice.add_library, []

        def pressed(device, source):
            calls.append(source)
            if len(calls) == 1:
                raise KeyboardInterrupt
            add(device, source)

        monkeypatch.setattr(NativeDevice, "add_library", pressed)
        streams = [submit(model, ALL[i : i + 4], 3) for i in range(4)]  # the plan for up to 4 rows is not there yet
        with pytest.raises(KeyboardInterrupt):
            list(streams[0])
        for i, stream in enumerate(streams[1:], 1):
            assert [o[0] for o in outputs(stream)] == [o[0] for o in outputs(submit(model, ALL[i : i + 4], 3))]
        assert len(calls) > 1


@pytest.mark.simulator
def test_a_kernel_that_the_compiler_refuses_leaves_the_model_eager(directory, monkeypatch):
    """As on a Mac whose compiler does not take the text; of the simulator it is an error, since nothing else was wanted."""
    open_device = NativeDevice.open

    def refuses(device, source):
        raise KernelError("library: program_source:1:1: error: unknown type name 'kernal'")

    monkeypatch.setattr(NativeDevice, "add_library", refuses)
    with pytest.raises(KernelError, match="unknown type name"):
        load(directory[0], "metal-sim", strict=False)
    monkeypatch.setattr(NativeDevice, "open", lambda name, threads=0: open_device(DEVICE, threads))
    with pytest.warns(RuntimeWarning, match="unknown type name 'kernal'"), load(directory[0], "metal", strict=False) as model:
        assert model.native is None and "bug to report" in model.fallback_reason
    with pytest.raises(KernelError, match="unknown type name"):
        load(directory[0], "metal", strict=True)


@pytest.mark.simulator
def test_a_gpu_that_the_weights_fill_says_so(directory, monkeypatch):
    monkeypatch.setenv("METALSTEP_SIM_MEMORY", "100000")
    with pytest.raises(ValueError, match=r"the weights take [\d,]+ bytes and .* has 100,000 left; use a smaller model"):
        load(directory[0], "metal-sim")
