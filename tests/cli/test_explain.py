"""`metalstep explain` on paper: a public shape or a model, planned for an Apple GPU on a machine without one."""

import itertools
import json
import re

import families
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from metalstep.cli import explain
from metalstep.cli import main as command
from metalstep.explain import explain_on_paper
from metalstep.launch_model import LABEL
from metalstep.plan.gpu_target import GpuTarget
from metalstep.shapes import ShapeCheckpoint


def run(capsys, *argv):
    """Exit status, stdout and stderr of `metalstep explain ARGV`."""
    status = command.main(["explain", *argv])
    out, err = capsys.readouterr()
    return status, out, err


def report(capsys, *argv):
    status, out, err = run(capsys, *argv, "--json")
    assert status == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Models of two layers: one that has kernels, one that has not."""
    made = {}
    for family in ("qwen3", "qwen3_moe"):
        config = {"model_type": family, **families.BASE, **families.FAMILIES[family].config}
        made[family] = write(tmp_path_factory.mktemp(family), families.build(family, quantized=False), config)
    return made


def write(directory, model, config):
    (directory / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"})
    return str(directory)


def test_qwen3_decodes_in_at_most_150_launches_five_a_layer(capsys):
    plan = report(capsys, "--shape", "qwen3-0.6b", "--device", "metal", "--chip", "m4-max", "--batch", "1", "--context", "1024")
    assert plan["launches_per_token"] == len(plan["launches"]) <= 150
    assert plan["barriers_per_token"] <= plan["launches_per_token"]
    attention = [i for i, launch in enumerate(plan["launches"]) if "attention" in launch["ops"]]
    assert len(attention) == 28
    assert {b - a for a, b in itertools.pairwise(attention)} == {5}
    assert plan["prediction"]["label"] == LABEL
    assert plan["prediction"]["tokens_per_s"] == pytest.approx(1e6 / plan["prediction"]["step_us"])


def test_text_calls_every_time_predicted(capsys):
    status, out, _ = run(capsys, "--shape", "smollm2-135m", "--chip", "M2")
    assert status == 0
    assert LABEL in out
    head, table = out.split("\n\n")
    timed = [line for line in head.splitlines() if " ms" in line or "tokens/s" in line]
    assert timed[0].startswith("predicted ")
    assert all(line.startswith(("predicted ", "  each alone ")) for line in timed)
    assert "predicted µs" in table.splitlines()[0]


def test_without_a_chip_no_time_is_predicted(capsys):
    status, out, _ = run(capsys, "--shape", "smollm2-135m", "--all")
    assert status == 0
    assert "predict" not in out
    assert " ms" not in out
    assert out.count("attention") >= 30


def test_json_and_text_agree(capsys):
    plan = report(capsys, "--shape", "smollm2-135m", "--chip", "m1", "--batch", "4")
    _, out, _ = run(capsys, "--shape", "smollm2-135m", "--chip", "m1", "--batch", "4")
    assert f"launches per step   {plan['launches_per_token']}, {plan['barriers_per_token']} of them" in out
    assert f"{plan['prediction']['step_us'] / 1e3:.2f} ms a step" in out
    assert "4 sequences" in out


def test_batch_invariance_is_planned_too(capsys):
    shape = ["--shape", "smollm2-135m", "--device", "metal"]
    plan, other = report(capsys, *shape, "--batch-invariant"), report(capsys, *shape)
    expected = explain_on_paper(ShapeCheckpoint("smollm2-135m"), GpuTarget(batch_invariant=True))
    assert plan["launches"] == expected["launches"]
    assert plan["launches_per_token"] > other["launches_per_token"]
    assert (plan["batch_invariant"], other["batch_invariant"]) == (True, False)
    assert "\nbatch-invariant " in run(capsys, *shape, "--batch-invariant")[1]
    assert "batch-invariant" not in run(capsys, *shape)[1]


def test_one_is_singular_and_thousands_have_commas(capsys):
    _, out, _ = run(capsys, "--shape", "qwen3-32b", "--batch", "64", "--context", "1")
    assert "a token for each of 64 sequences with 1 token, KV" in out
    assert re.search(r"moved per step      1\d,\d{3}\.\d\d MiB of weights", out)


def test_a_models_own_bits_are_not_an_option_on_any_chip(capsys):
    """What a hint proposes is no error of its own."""
    hints = {run(capsys, "smollm2", "--bits", "4", *more)[2].splitlines()[1] for more in ([], ["--chip", "m4"])}
    assert hints == {"hint: leave it out, or use --shape NAME in place of MODEL"}


def test_a_model_is_planned_from_its_files(capsys, directories):
    plan = report(capsys, directories["qwen3"], "--chip", "m3-ultra")
    assert plan["native"]
    assert plan["paper"]
    assert plan["context"] == families.BASE["max_position_embeddings"]  # less than the default
    assert plan["weight_bytes_per_token"] < plan["file_bytes"]
    assert {"kernel", "ops", "barrier", "weight_bytes", "kv_bytes", "other_bytes", "flops", "predicted_us"} == set(plan["launches"][0])


def test_metal_without_a_mac_is_planned_on_paper(capsys, directories, monkeypatch):
    monkeypatch.setattr(explain.sys, "platform", "linux")
    assert report(capsys, directories["qwen3"], "--device", "metal")["paper"]


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_step_is_planned_for_nvidias_kernels_where_there_is_none(capsys, device):
    cuda, metal = (report(capsys, "--shape", "qwen3-0.6b", "--device", name, "--batch", "8") for name in (device, "metal"))
    assert (cuda["device"], cuda["device_description"]) == ("cuda", "cuda, planned on paper")
    assert cuda["weight_bytes_per_token"] == metal["weight_bytes_per_token"]
    assert {launch["kernel"] for launch in cuda["launches"]} != {launch["kernel"] for launch in metal["launches"]}


def test_a_model_without_kernels_says_why(capsys, directories):
    status, out, _ = run(capsys, directories["qwen3_moe"], "--chip", "m4")
    assert status == 0
    assert "runs eagerly        qwen3_moe" in out
    status, out, err = run(capsys, directories["qwen3_moe"], "--chip", "m4", "--strict")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["smollm2", "--shape", "qwen3-0.6b"], "MODEL and --shape exclude each other"),
        (["--shape", "qwen3-0.5b"], "shape is 'qwen3-0.5b'"),
        (["--shape", "qwen3-0.6b", "--chip", "m9"], "chip is 'm9'"),
        (["--shape", "qwen3-0.6b", "--device", "host"], "--device host cannot be planned on paper"),
        (["--shape", "qwen3-0.6b", "--device", "cuda", "--chip", "m4-max"], "--chip is of --device metal, and --device is cuda"),
        (["--shape", "qwen3-0.6b", "--threads", "2"], "--threads has no meaning on paper"),
        (["--shape", "qwen3-0.6b", "--kv-memory", "1GB"], "--kv-memory has no meaning on paper"),
        (["--shape", "qwen3-0.6b", "--max-context", "64"], "--max-context has no meaning on paper"),
        (["--shape", "qwen3-0.6b", "--arithmetic", "int8"], "--arithmetic is of the host device"),
        (["--shape", "qwen3-0.6b", "--batch", "65"], "batch is 65"),
        (["--shape", "qwen3-0.6b", "--context", "40961"], "context is 40961"),
        (["--shape", "qwen3-0.6b", "--bits", "7"], "bits is 7"),
        (["smollm2", "--device", "host", "--batch", "2"], "--batch needs a plan on paper: --chip"),
        (["smollm2", "--device", "host", "--bits", "8"], "--bits is of a shape's weights"),
        (["smollm2", "--chip", "m4", "--bits", "8"], "--bits is of a shape's weights"),
    ],
)
def test_a_wrong_call_is_one_line_and_a_hint(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    error, hint = err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")


@pytest.mark.parametrize(("option", "known"), [("--shape", "llama-3.2-1b"), ("--chip", "m4-max")])
def test_an_unknown_name_lists_the_known_ones(capsys, option, known):
    argv = [option, "nothing"] if option == "--shape" else ["--shape", "qwen3-0.6b", option, "nothing"]
    assert known in run(capsys, *argv)[2]
