"""`metalstep convert` as a command, and `--quantize` of the commands that load."""
import json

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.models import llama
from tiny import write_model

from metalstep import convert as library
from metalstep.checkpoint.quantized import Quantization, parse_quantize
from metalstep.cli import convert
from metalstep.cli.main import main

CONFIG = dict(
    model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=192, rms_norm_eps=1e-5, torch_dtype="float16",
)  # fmt: skip


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    model.update(tree_map(lambda a: a.astype(mx.float16), model.parameters()))
    return write_model(tmp_path_factory.mktemp("floats") / "model", model, CONFIG)


def asked(*argv):
    return convert.quantization(convert.parser().parse_args(["model", *argv]))


def test_options_of_mlx_lm_mean_what_they_do_there():
    assert asked() is None
    assert asked("-q") == Quantization("affine", 4, 64)
    assert asked("-q", "--q-bits", "8", "--q-group-size", "32") == asked("--quantize", "8bit:32") == Quantization("affine", 8, 32)
    assert asked("-q", "--q-mode", "mxfp8", "--q-bits", "8") == asked("-q", "mxfp8") == Quantization("mxfp8", 8, 32)
    assert asked("-q", "--quant-predicate", "mixed_3_6", "--q-group-size", "128") == Quantization("affine", 3, 128, "mixed_3_6")
    assert asked("-q", "mixed_3_6") == parse_quantize("mixed_3_6")


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--q-bits", "4"], "--q-bits is given without --quantize"),
        (["-q", "4bit", "--q-bits", "4"], "--quantize 4bit says what --q-bits says too"),
        (["-q", "--q-mode", "nvfp4", "--q-bits", "8"], "--q-mode nvfp4 has 4 bits in groups of 16"),
        (["-q", "--quant-predicate", "mixed_3_6", "--q-bits", "8"], "--q-bits is given with --quant-predicate"),
        (["-q", "--q-bits", "7"], "quantize is '7bit:64', expected one of"),
        (["-q", "four"], "quantize is 'four', expected one of"),
        (["--model", "other"], "MODEL is given twice"),
    ],
)
def test_options_that_do_not_go_together(argv, text, capsys):
    assert main(["convert", "model", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and text in err and "hint: " in err


def test_a_converted_model_answers(floats, tmp_path, capsys):
    target = tmp_path / "small"
    assert main(["convert", str(floats), "-q", "8bit:32", "-o", str(target), "--json"]) == 0
    out, _ = capsys.readouterr()
    done = json.loads(out)
    assert done["path"] == str(target) and done["quantization"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert 9 < done["bits"] < 10 and done["weight_bytes"] < done["source_bytes"]
    answer = ["--prompt", "5 6 7", "--ignore-chat-template", "--max-tokens", "4", "--verbose", "false"]
    texts = []
    for chosen in (["--model", str(target)], ["--model", str(floats), "--quantize", "8bit:32"]):
        assert main(["generate", *chosen, *answer]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].strip()
    assert main(["convert", str(floats), "-o", str(target)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_dtype_that_was_asked_for_outlasts_the_next_conversion(floats, tmp_path, capsys):
    """The config says float16 at first, and of two conversions the second asks for nothing."""
    for source, target, *options in ((floats, "wide", "--dtype", "bfloat16"), (tmp_path / "wide", "small", "-q", "4bit:32")):
        assert main(["convert", str(source), *options, "-o", str(tmp_path / target)]) == 0
        assert json.loads((tmp_path / target / "config.json").read_text())["torch_dtype"] == "bfloat16"
        arrays = mx.load(str(tmp_path / target / "model.safetensors"))
        assert {array.dtype for array in arrays.values()} - {mx.uint32} == {mx.bfloat16}


def test_a_place_that_cannot_be_written_is_told_before_the_model_is_read(floats, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(library, "open_checkpoint", None)
    assert main(["convert", str(floats), "-o", str(tmp_path / "file" / "a" / "b")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file'} is a file\nhint: ")
    monkeypatch.setattr(library.os, "access", lambda path, mode: False)
    assert main(["convert", str(floats), "-o", str(tmp_path / "a" / "b")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} cannot be written to\nhint: ")


def test_the_result_says_how_to_run_it(floats, tmp_path, capsys):
    assert main(["convert", "--model", str(floats), "--mlx-path", str(tmp_path / "same")]) == 0
    out, _ = capsys.readouterr()
    assert f"metalstep chat --model {tmp_path / 'same'}" in out and "16.00 bits per weight" in out and "[INFO]" not in out
