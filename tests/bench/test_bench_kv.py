"""`metalstep bench kv`: every scheme in every case, against the plain cache."""
import json

import pytest

from metalstep.bench.kv import bench_kv
from metalstep.cli.bench_kv import describe, kv
from metalstep.cli.errors import CommandError


def test_every_case_has_a_row_per_scheme_and_one_of_the_plain_cache():
    result = bench_kv("smollm2", ["turbo4v2", "affine8"], batches=[1, 2], contexts=[37], prompts=[20], rounds=2, steps=2)
    assert [(row["what"], row["batch"], row["context"], row["scheme"]) for row in result["rows"]] == [
        (what, batch, context, scheme)
        for what, batch, context in (("decode", 1, 37), ("decode", 2, 37), ("ttft", 1, 20))
        for scheme in ("none", "turbo4v2", "affine8")
    ]
    assert {name: about["bytes_per_token"] for name, about in result["schemes"].items()} == {
        "none": 23_040, "turbo4v2": 5_688, "affine8": 12_240
    }  # fmt: skip
    for row in result["rows"]:
        assert row["n"] == 2 and min(row["samples"]) > 0
        if row["scheme"] == "none":
            assert row["speed"] == {"of_medians": 1.0, "median_of_pairs": 1.0}
    plain, turbo = (result["rows"][i] for i in (6, 7))  # times: less is faster
    assert turbo["speed"]["of_medians"] == pytest.approx(plain["median"] / turbo["median"])
    assert len(describe(result)) == 1 + len(result["rows"])


def test_its_json_is_all_there_is_on_stdout(capsys):
    assert kv(["--schemes", "turbo8v4", "--context", "20", "--rounds", "1", "--steps", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["scheme"] for row in result["rows"]] == ["none", "turbo8v4"]


@pytest.mark.parametrize(
    ("argv", "error", "text"),
    [
        (["--schemes", "turbo5"], ValueError, "kv_scheme is 'turbo5', expected one of none, affine8"),
        (["--device", "eager"], CommandError, "--device eager has no KV schemes"),
        (["--batch", "65"], CommandError, "--batch is 65, and at most 64"),
        (["--context", "1"], CommandError, "need 2 tokens or more"),
    ],
)
def test_what_it_cannot_measure_is_refused_first(argv, error, text):
    with pytest.raises(error, match=text):
        kv(argv)
