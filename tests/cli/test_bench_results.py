"""The shapes of what `metalstep bench` and `metalstep explain` print, from made-up measurements."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists

from metalstep.bench import prefill
from metalstep.bench.decode import case_row, over, rate, ratios
from metalstep.bench.quality import compare
from metalstep.bench.rounds import Case, Contender, contenders
from metalstep.bench.sampling import row
from metalstep.bench.statistics import better, common_prefixes, ratio, summary
from metalstep.cli.bench import describe_quality
from metalstep.cli.bench_peers import describe_decode, describe_prefill
from metalstep.cli.bench_steps import describe_launches, describe_sampling
from metalstep.cli.explain import describe, operations

# Two sequences, three steps. The quicker of the peer's settings decodes at half our speed, the other one has the first token earlier.
CASE = Case(2, 18, 3)
OURS, ON, OFF = contenders(["metalstep", "llama.cpp"])
RUN = {"ttft_s": 0.05, "steps_s": [0.01, 0.02, 0.01], "step_tokens": [2, 2, 2], "ids": [[1, 2, 3, 4], [5, 6, 7, 8, 0]]}
SLOW = {"ttft_s": 0.2, "steps_s": [0.02, 0.04, 0.02], "step_tokens": [2, 2, 2], "ids": [[1, 2, 9, 4], [5, 6, 7, 8]]}
SLOWER = {**SLOW, "ttft_s": 0.15, "steps_s": [0.03, 0.04, 0.04]}
RUNS = {(CASE, OURS): [RUN, RUN], (CASE, ON): [SLOW, SLOW], (CASE, OFF): [SLOWER, SLOWER]}
HEAD = {"engine": "metalstep", "version": "0", "load_s": 0.5, "weight_bytes": 1000, "kv_bytes": 10}
LAUNCH = {"kernel": "linear", "ops": ["rms_norm", "linear", "linear"], "barrier": True, "weight_bytes": 2048}
PLAN = {
    "model": "tiny",
    "model_type": "llama",
    "native": True,
    "fallback_reason": None,
    "file_bytes": 1 << 20,
    "device_description": "host (avx2, 2 threads)",
    "arithmetic": "int16",
    "launches_per_token": 2,
    "barriers_per_token": 1,
    "weight_bytes_per_token": 4096,
    "kv_bytes_per_token": 256,
    "kv": {
        "scheme": "turbo4", "effective": "turbo4, 1+1 layers affine8", "bytes_per_token": 376, "float16_bytes_per_token": 1024,
        "capacity": 1024 / 376, "centred_layers": 4,
        "layers": [{"layer": i, "keys": c, "values": c, "bytes_per_token": n}
                   for i, (c, n) in enumerate([("affine8", 136), ("turbo4", 68), ("turbo4", 68), ("affine8", 136)])],
    },
    "arena_bytes": 512,
    "max_context": 128,
    "launches": [LAUNCH, {**LAUNCH, "barrier": False}],
}


def test_a_summary_of_rates_and_of_times():
    assert summary([1.0, 2.0, 3.0]) | {"samples": 0} == {
        "best": 3.0,
        "median": 2.0,
        "mean": 2.0,
        "sigma": 1.0,
        "spread": 1.0,
        "n": 3,
        "samples": 0,
    }
    assert summary([5.0, 4.0], best="min")["best"] == 4.0
    assert summary([5.0])["sigma"] == 0.0


def test_a_ratio_above_one_is_faster_than_the_better_setting():
    result = ratios(CASE, OURS, [OURS, ON, OFF], "llama.cpp", RUNS)
    assert result["decode"] == {
        "setting": "flash on",
        "of_medians": pytest.approx(2.0),
        "median_of_pairs": pytest.approx(2.0),
    }
    assert result["ttft"]["setting"] == "flash off"
    assert result["ttft"]["of_medians"] == pytest.approx(3.0)
    assert result["same_ids"] == {"median": 3.0, "min": 2, "whole": 0.5}
    assert ratio([2.0, 8.0, 3.0], [1.0, 1.0, 3.0]) == {"of_medians": 3.0, "median_of_pairs": 2.0}


def test_the_better_has_the_higher_median_and_the_first_wins_a_tie():
    rates = {"lucky": [9.0, 1.0, 1.0], "steady": [3.0, 3.0, 3.0], "alike": [3.0, 3.0, 3.0]}
    assert better(list(rates), rates.__getitem__) == "steady"


@given(lists(lists(integers(0, 3), min_size=4, max_size=4), min_size=1))
def test_texts_agree_with_themselves(texts):
    assert common_prefixes(texts, texts) == {"median": 4, "min": 4, "whole": 1.0}


def test_texts_agree_up_to_the_first_difference():
    assert common_prefixes([[1, 2, 3]] * 3, [[1, 2, 3], [0, 2, 3], [1, 2, 0]]) == {"median": 2, "min": 0, "whole": 1 / 3}


def test_a_rate_counts_the_tokens_of_all_sequences():
    assert rate(RUN) == pytest.approx(6 / 0.04)
    assert case_row(CASE, OURS, [RUN], HEAD)["best_step_tok_s"] == pytest.approx(2 / 0.01)


def test_bytes_per_token_are_a_share_of_the_weights_and_the_cache_at_half_way():
    row = case_row(CASE, OURS, [RUN], HEAD)
    assert row["bytes_per_token"] == round(1000 / 2 + 10 * (18 + 1 + 1.5))
    assert row["gb_s"]["median"] == pytest.approx(rate(RUN) * 705 / 1e9)
    assert "gb_s" not in case_row(CASE, ON, [RUN], HEAD)


def test_decode_results_as_lines():
    result = {
        "engines": [HEAD, {**HEAD, "engine": "llama.cpp"}],
        "not_timed": "loading",
        "cases": [case_row(case, contender, runs, HEAD) for (case, contender), runs in RUNS.items()],
        "ratios": [ratios(CASE, OURS, [OURS, ON, OFF], "llama.cpp", RUNS)],
    }
    lines = describe_decode(result)
    assert (
        "metalstep / llama.cpp, batch 2, prompt 18: decode 2.00× (of medians; of pairs 2.00×, against flash on), "
        "TTFT 3.00× (of medians; of pairs 3.00×, against flash off); the same first 3 tokens (median; 50% of the texts wholly)"
    ) in lines
    head = next(i for i, line in enumerate(lines) if line.startswith("engine "))
    ends = [line.index(cell) + len(cell) for line, cell in zip(lines[head:], ("decode tok/s", "150.0 ± 0.0"), strict=False)]
    assert ends[0] == ends[1]


def test_variants_busy_time_and_left_out_cases_as_lines():
    other = Contender("metalstep", "invariant", variant="invariant")
    runs = {(CASE, OURS): [RUN, RUN], (CASE, other): [SLOW, SLOW]}
    result = {
        "engines": [HEAD],
        "not_timed": "loading",
        "cases": [case_row(CASE, OURS, [RUN], HEAD, [0.01, 0.011, 0.0102])],
        "ratios": [],
        "also": [{"setting": "invariant", "batch": 2, "prompt_tokens": 18, **over(CASE, other, OURS, runs)}],
        "left_out": [{"batch": 64, "prompt_tokens": 8192, "reason": "no time was left"}],
    }
    lines = describe_decode(result)
    assert lines[-4].startswith("invariant / metalstep, batch 2, prompt 18: decode 0.50× (of medians; of pairs 0.50×), TTFT 0.25×")
    # 6 tokens of two sequences in 40 ms are 3 steps: 10.2 of each 13.3 ms.
    assert lines[-3] == "batch 2, prompt 18: a step takes 10200.0 µs on the device alone, so it is busy for 76.5% of a decode"
    assert lines[-1] == "left out: batch 64, prompt 8192: no time was left"


def test_prefill_results_as_lines():
    case = Case(1, 512, 0)
    first = {"steps_s": [], "step_tokens": [], "ids": [[7]]}
    ours, on, off = [{**first, "ttft_s": 0.5}], [{**first, "ttft_s": 2.0}], [{**first, "ttft_s": 4.0, "ids": [[8]]}]
    runs = {(case, OURS): ours, (case, ON): on, (case, OFF): off}
    result = {
        "engines": [HEAD],
        "not_timed": "loading",
        "cases": [
            {"engine": c.engine, "setting": c.setting, "prompt_tokens": 512, "prompt_tok_s": summary(prefill.rates(k, r))}
            for (k, c), r in runs.items()
        ],
        "ratios": [prefill.ratios(case, [OURS, ON, OFF], "llama.cpp", runs)],
    }
    lines = describe_prefill(result)
    assert lines[-1] == (
        "metalstep / llama.cpp, prompt 512: 4.00× (of medians; of pairs 4.00×, against flash on); the same first token in 100%"
    )
    assert any(line.startswith("metalstep ") and "1024.0 ± 0.0" in line for line in lines)


def test_launch_results_as_lines():
    rates = {"weight_bytes": 3000, "gb_s": 0.1, "macs": 6_000_000, "gmac_s": 200.0}
    rows = [{"kernel": "linear", "ops": "linear", "count": 3, "us": 30.0, **rates}]
    lines = describe_launches({"device": "host", "rows": rows, "total_us": 30.0})
    assert lines[2].split() == ["count", "kernel", "µs", "share", "GB/s", "GMAC/s", "what", "it", "computes"]
    assert lines[3].split() == ["3", "linear", "30.0", "100.0%", "0.1", "200.0", "linear"]
    step = {"batch": 32, "step_us": 30000.0, "host_us": 300.0, "host_share": 0.01}
    lines = describe_launches({"device": "host", "rows": rows, "total_us": 30.0, "generation": step})
    assert lines[-1].startswith("a step of 32 sequences at a short context: 30000 µs, of which 300 µs (1.0%) outside")


def test_columns_of_launches_stand_under_their_names_whatever_kernels_are_called():
    rates = {"weight_bytes": 0, "gb_s": 0.0, "macs": 0, "gmac_s": 0.0}
    rows = [{"kernel": "k" * n, "ops": f"op{n}", "count": 1, "us": 30.0, **rates} for n in (3, 62)]
    _, _, *table, total = describe_launches({"device": "metal", "rows": rows, "total_us": 60.0})
    assert len({line.index(cell) for line, cell in zip(table, ("what", "op3", "op62"), strict=True)}) == 1
    assert len({line.index(cell) + len(cell) for line, cell in zip([*table, total], ("µs", "30.0", "30.0", "60.0"), strict=True)}) == 1


def test_sampling_results_as_lines():
    samples = {"greedy": [100.0, 100.0], "filters": [150.0, 150.0]}
    rows = [row("greedy", {}, samples), row("filters", {"top_p": 0.9, "top_k": 5}, samples)]
    lines = describe_sampling({"device": "host", "rows": rows})
    assert lines[3].endswith("1.00×    1.00×")
    assert lines[4].endswith("50.0  1.50×    1.50×  top_p, top_k")


def test_equal_logits_have_no_distance():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((130, 50)).astype(np.float32)
    ids = rng.integers(0, 50, 130)
    result = compare(logits, logits.copy(), ids)
    assert (result["tokens"], result["kld_mean"], result["top1"], result["perplexity_ratio"]) == (130, 0.0, 1.0, 1.0)
    assert any("top-1 agreement   1.0000" in line for line in describe_quality({"device": "host", **result}))


def test_a_shifted_distribution_has_the_divergence_of_its_definition():
    expected = np.log(np.array([[0.5, 0.5], [0.5, 0.5]], np.float32))
    got = np.log(np.array([[0.25, 0.75], [0.5, 0.5]], np.float32))
    result = compare(expected, got, np.array([0, 1]))
    assert result["kld_max"] == pytest.approx(0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75), rel=1e-6)
    assert result["perplexity"] == pytest.approx(1 / 0.75, rel=1e-6)
    assert result["perplexity_mlx_f32"] == pytest.approx(2.0, rel=1e-6)


def test_a_plan_in_lines():
    text = "\n".join(describe(PLAN))
    assert "launches per token  2, 1 of them behind a barrier" in text
    assert "     2  linear " in text
    assert len(describe(PLAN, every=True)) == len(describe(PLAN)) + 1
    assert operations(LAUNCH) == "rms_norm linear×2"
    assert "turbo4, 1+1 layers affine8, keys of 4 layers centred: 2.72x the tokens of float16" in text
    assert "layers 0 to 0: keys affine8" in text and "layers 1 to 2: keys turbo4, values turbo4" in text
    plain = {**PLAN, "kv": {**PLAN["kv"], "scheme": "none"}}
    assert not any("the tokens of float16" in line for line in describe(plain))


def test_an_eager_model_says_why():
    text = "\n".join(describe({**PLAN, "native": False, "fallback_reason": "no kernel for fft", "launches": []}))
    assert "runs eagerly        no kernel for fft" in text
