"""The shapes of what `metalstep bench` and `metalstep explain` print, from made-up measurements."""

import numpy as np
import pytest

from metalstep.bench.decode import case, rate, ratios
from metalstep.bench.quality import TEXT, compare
from metalstep.bench.statistics import ratio, summary
from metalstep.cli.bench import describe_decode, describe_launches, describe_quality
from metalstep.cli.explain import describe, operations

RUN = {"ttft_s": 0.05, "steps_s": [0.01, 0.02, 0.01], "ids": [1, 2, 3, 4]}
SLOW = {"ttft_s": 0.2, "steps_s": [0.02, 0.04, 0.02], "ids": [1, 2, 9, 4]}
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


def test_a_ratio_above_one_is_faster():
    result = ratios(18, "llama.cpp", [RUN, RUN], [SLOW, SLOW])
    assert result["decode"]["of_medians"] == pytest.approx(2.0)
    assert result["ttft"]["median_of_pairs"] == pytest.approx(4.0)
    assert result["same_ids"] == 2
    assert ratio([2.0, 8.0, 3.0], [1.0, 1.0, 3.0]) == {"of_medians": 3.0, "median_of_pairs": 2.0}


def test_bytes_per_token_are_weights_and_the_cache_at_half_way():
    row = case("metalstep", 18, [RUN], HEAD)
    assert row["bytes_per_token"] == round(1000 + 10 * (18 + 1 + 1.5))
    assert row["gb_s"]["median"] == pytest.approx(rate(RUN) * 1205 / 1e9)
    assert "gb_s" not in case("llama.cpp", 18, [RUN], HEAD)


def test_decode_results_as_lines():
    cases = [case("metalstep", 18, [RUN, RUN], HEAD), case("llama.cpp", 18, [SLOW, SLOW], HEAD)]
    result = {
        "engines": [HEAD, {**HEAD, "engine": "llama.cpp"}],
        "not_timed": "loading",
        "cases": cases,
        "ratios": [ratios(18, "llama.cpp", [RUN], [SLOW])],
    }
    lines = describe_decode(result)
    assert any(line.startswith("metalstep / llama.cpp, prompt 18: decode 2.00×, TTFT 4.00×") for line in lines)
    assert any("75.0 ± 0.0" in line for line in lines)


def test_launch_results_as_lines():
    rows = [{"kernel": "linear", "ops": "linear", "count": 3, "us": 30.0, "weight_bytes": 3000, "gb_s": 0.1}]
    lines = describe_launches({"device": "host", "rows": rows, "total_us": 30.0})
    assert "100.0%" in lines[3]


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


def test_the_text_is_long_enough_for_800_tokens():
    assert len(TEXT) > 4000


def test_a_plan_in_lines():
    text = "\n".join(describe(PLAN))
    assert "launches per token  2, 1 of them behind a barrier" in text
    assert "     2  linear " in text
    assert len(describe(PLAN, every=True)) == len(describe(PLAN)) + 1
    assert operations(LAUNCH) == "rms_norm linear×2"


def test_an_eager_model_says_why():
    text = "\n".join(describe({**PLAN, "native": False, "fallback_reason": "no kernel for fft", "launches": []}))
    assert "runs eagerly        no kernel for fft" in text
