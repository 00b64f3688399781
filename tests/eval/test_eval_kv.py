"""`metalstep eval kv` on SmolLM2: distances that must be zero, small and in order, and wrong calls."""
import json

import numpy as np
import pytest

import metalstep
from metalstep.cli import main as command
from metalstep.cli.eval import describe
from metalstep.eval import kv as module
from metalstep.eval import reference_codecs as codecs
from metalstep.eval.kv import compare, windows
from metalstep.eval.schemes import kv_bytes_per_token, load_scheme, scheme_of
from metalstep.models.cache import make_prompt_cache
from metalstep.request import Request

TOKENS = 200
SCHEMES = "none,affine8,turbo8v4,turbo4,turbo4:boundary=0,turbo2,q8_0,q4_0"


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("METALSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def result(prose, tmp_path_factory, own_cache):
    """What the command prints as JSON, and the picture that it draws."""
    plot = tmp_path_factory.mktemp("plot") / "quality.svg"
    argv = ["eval", "kv", "--schemes", SCHEMES, "--text", str(prose), "--tokens", str(TOKENS), "--context", "128", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        written = []
        patch.setattr("builtins.print", lambda *args, **_: written.append(args))
        assert command.main([*argv, "--needle-lengths", "128", "--json", "--plot", str(plot)]) == 0
    return json.loads(next(text for (text,) in written if text.startswith("{"))), plot


def rows(result):
    return {row["scheme"]: row for row in result[0]["rows"]}


def test_the_same_cache_is_at_no_distance(result):
    none = rows(result)["none"]
    assert (none["kld_max"], none["top1"], none["perplexity_ratio"], none["ratio"]) == (0.0, 1.0, 1.0, 1.0)
    assert none["needle"]["logprob_difference"] == 0.0
    assert none["needle"]["results"] == result[0]["reference"]["needle"]["results"]


def test_fewer_bits_are_further_away(result):
    found = rows(result)
    order = ["affine8", "turbo8v4", "turbo4", "turbo2"]
    klds = [found[name]["kld_mean"] for name in order]
    assert klds == sorted(klds) and klds[0] > 0
    assert found["q8_0"]["kld_mean"] < found["q4_0"]["kld_mean"]
    assert found["affine8"]["kld_mean"] < 2e-3 and found["turbo4"]["kld_mean"] < 0.2
    assert found["affine8"]["top1"] > 0.95


def test_every_position_counts_once(result):
    for row in result[0]["rows"]:
        assert row["positions"] == TOKENS == result[0]["tokens"]
        assert row["kld_median"] <= row["kld_p95"] <= row["kld_p99"] <= row["kld_max"]
        assert row["perplexity_reference"] == result[0]["reference"]["perplexity"]
        assert row["needle"]["cases"] == 5 == len(row["needle"]["results"])
    assert result[0]["windows"] == 2


def test_bytes_are_the_formats(result):
    """30 layers of 3 KV heads of 64: float16 256 bytes per head and token, affine8 136, turbo4 68, q8_0 136, q4_0 72."""
    found = {name: row["kv_bytes_per_token"] / 90 for name, row in rows(result).items()}
    assert found == {
        "none": 256, "affine8": 136, "turbo8v4": 102, "turbo4:boundary=0": 68, "q8_0": 136, "q4_0": 72,
        "turbo4": (26 * 68 + 4 * 136) / 30, "turbo2": (26 * 36 + 4 * 136) / 30,
    }  # fmt: skip
    assert rows(result)["q8_0"]["ratio"] == pytest.approx(256 / 136)


def test_the_table_has_a_line_for_each_scheme_and_fits_a_terminal(result):
    lines = describe(result[0])
    for name in (*SCHEMES.split(","), "float16"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    assert max(map(len, lines)) <= 160
    assert result[1].read_text().count("<circle") == len(SCHEMES.split(",")) - 1


def test_chunks_of_a_window_do_not_matter(smollm2, prose, monkeypatch, own_cache):
    """A row's bits do not depend on its step, so what is summed up does not either; a reference codec rounds within a chunk too."""
    model, tokenizer = smollm2
    cut = windows([], tokenizer.encode(prose.read_text())[:96], 64)
    other, _ = load_scheme("smollm2", scheme_of("q4_0"), threads=1, max_context=128)
    with other:
        whole = compare(model, other, cut)
        monkeypatch.setattr(module, "CHUNK", 10)
        assert compare(model, other, cut) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("name", sorted(codecs.BLOCK_BYTES))
def test_a_reference_codecs_cache_holds_rounded_vectors(smollm2, prose, name, own_cache):
    """The first layer's keys and values do not depend on any cache: there they are those of a float32 cache, rounded."""
    ids = smollm2[1].encode(prose.read_text())[:40]
    states = []
    for load in (
        lambda: metalstep.load("smollm2", strict=True, threads=1, max_context=64, kv_dtype="float32"),
        lambda: load_scheme("smollm2", scheme_of(name), threads=1, max_context=64),
    ):
        model, _ = load()
        with model:
            cache = make_prompt_cache(model)
            model.engine.collect(Request(ids, max_tokens=0, prompt_cache=cache))
            states.append([np.array(part) for part in cache[0].state[:2]])
            last = [np.array(part) for part in cache[29].state[:2]]
            assert model.native.cache.bytes_per_token == 4 * 90 * 128
            nbytes = kv_bytes_per_token(model)
    for plain, rounded in zip(*states, strict=True):
        np.testing.assert_array_equal(rounded, codecs.reference(name, plain))
    for part in last:  # what is rounded is a fixed point, but for q4_0's lopsided range
        if name == "q8_0":
            np.testing.assert_allclose(codecs.reference(name, part), part, rtol=1e-3, atol=1e-4)
        assert all(len(np.unique(block)) <= 16 for block in part.reshape(-1, 32)) or name == "q8_0"
    assert nbytes == 90 * 2 * codecs.vector_bytes(name, 64)


def test_a_reference_codec_is_of_the_host_device_and_not_a_scheme_of_load():
    with pytest.raises(NotImplementedError, match="q8_0 runs on the host device alone"):
        load_scheme("smollm2", scheme_of("q8_0"), device="metal-sim")
    with pytest.raises(ValueError, match="kv_scheme is 'q8_0', expected one of none, affine8"):
        metalstep.load("smollm2", kv_scheme="q8_0")


def test_help_has_examples(capsys):
    assert command.main(["eval"]) == 0
    assert "metalstep eval kv --model smollm2 --schemes" in capsys.readouterr().out
    assert command.main(["eval", "kv", "--help"]) == 0
    assert "\nexamples:\n  metalstep eval kv" in capsys.readouterr().out
    assert command.main(["--help"]) == 0
    assert "\n  eval " in (text := capsys.readouterr().out) and "\n  calibrate " in text


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["vk"], "no evaluation 'vk', expected one of kv", "metalstep eval --help"),
        (["kv"], "--text is needed", "--text FILE, or --text - for stdin"),
        (["kv", "--text", "/nowhere/x"], "--text /nowhere/x: No such file or directory", "the name of a text file"),
        (["kv", "--schemes", "turbo9", "--text", "TEXT"], "--schemes: no scheme 'turbo9', expected one of none", "metalstep eval"),
        (["kv", "--schemes", ",", "--text", "TEXT"], "--schemes: no scheme to compare", "metalstep eval kv --help"),
        (["kv", "--text", "TEXT", "--plot", "a.pdf"], "--plot a.pdf: expected a name that ends in .svg or .png", None),
        (["kv", "--text", "TEXT", "--device", "eager"], "--device eager keeps mlx-lm's own cache", "leave --device out"),
        (["kv", "--text", "TEXT", "--context", "9000"], "--context is 9000, and this model takes at most 8192", "--context 8192"),
        (["kv", "--text", "TEXT", "--needle-lengths", "8192"], "--needle-lengths is 8192, and this model takes at most 8176", "--needle-l"),
        (["kv", "--text", "TEXT", "--no-needles", "--needle-lengths", "64"], "--no-needles and --needle-lengths exclude", "leave one"),
        (["kv", "--text", "TEXT", "--tokens", "9999", "--threads", "1", "--no-needles"], "expected at least 9999", "or fewer tokens"),
    ],
)
def test_a_wrong_call_says_what_is_wrong_and_what_to_do(capsys, prose, argv, message, hint):
    assert command.main(["eval", *(str(prose) if part == "TEXT" else part for part in argv)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert hint is None or ("hint:" in error and hint in error)


def test_a_text_that_is_none_is_refused(capsys, tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00\xd8")
    assert command.main(["eval", "kv", "--text", str(tmp_path / "x")]) == 2
    assert "not UTF-8 text" in capsys.readouterr().err
