"""What `metalstep models` says of files, against what the engine's own readers find in them."""
from __future__ import annotations

import dataclasses
import json
import shutil

import mlx.core as mx
import pytest
from checkpoint_files import LLAMA_CONFIG, llama_gguf, make_model, parameters, save_model
from hub_models import SHARDS, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metalstep.checkpoint.gguf.file import read_gguf
from metalstep.checkpoint.mapped_file import MappedFile
from metalstep.cli.errors import CommandError
from metalstep.cli.main import main
from metalstep.hub.cache import missing_files, storage
from metalstep.hub.describe import damage, describe_directory, describe_gguf
from metalstep.hub.download import find
from metalstep.hub.errors import HubError
from metalstep.hub.gguf_header import read_facts
from metalstep.hub.inventory import cached, in_folder, packaged
from metalstep.hub.names import hub_name
from metalstep.hub.remove import removal
from metalstep.plugin import serve_model

WHOLE = llama_gguf()


def plain(metadata):
    return {key: value for key, value in metadata.items() if isinstance(value, str | int | float)}


def test_facts_of_a_header_are_those_that_the_engine_reads(tmp_path):
    files = [tmp_path / "made.gguf", *(model.path for model in packaged())]
    files[0].write_bytes(llama_gguf(general__name="x" * 70_000, general__flag=True, general__number=1.5))
    for path in files:
        file = MappedFile(path)
        header = read_gguf(file)
        expected, tensors = plain(header.metadata), header.tensors
        file.close()
        found, end = read_facts(path)
        assert end == max(tensor.end for tensor in tensors.values())
        assert found.keys() == expected.keys()
        assert all(value == expected[key] or len(str(expected[key])) > 1 << 16 for key, value in found.items())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 4000) | st.integers(0, len(WHOLE)), noise=st.binary(max_size=40))
def test_what_is_damaged_or_cut_off_is_a_problem_and_no_exception(tmp_path, cut, noise):
    path = tmp_path / "model-Q4_1.gguf"
    path.write_bytes(WHOLE[:cut] + noise)
    about = describe_gguf(path)
    assert about.size == cut + len(noise) and about.quantization == "Q4_1"
    assert about.problem if cut + len(noise) < len(WHOLE) else cut < len(WHOLE) or about.problem is None


@pytest.mark.parametrize(
    ("entry", "label", "bits"),
    [
        ({"quantization": {"bits": 4, "group_size": 64}}, "4 bit", 4),
        ({"quantization": {"bits": 4, "group_size": 64, "a.b": {"bits": 6, "group_size": 64}, "c": False}}, "4-6 bit", 4),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "mxfp4", 4),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq", 4),
        ({"torch_dtype": "bfloat16"}, "bfloat16", 16),
        ({}, None, None),
    ],
)
def test_a_directory_is_described_by_its_config(tmp_path, entry, label, bits):
    save_model(tmp_path, {**LLAMA_CONFIG, **entry}, parameters(make_model(LLAMA_CONFIG)), shards=2)
    (tmp_path / "tokenizer.json").write_text("{}")
    about = describe_directory(tmp_path)
    assert (about.architecture, about.quantization, about.bits, about.context_length) == ("llama", label, bits, 128)
    assert about.problem is None and about.size == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("harm", ["remove", "cut", "index", "config"])
def test_what_is_missing_or_cut_off_is_named(tmp_path, shards, harm):
    save_model(tmp_path, LLAMA_CONFIG, parameters(make_model(LLAMA_CONFIG)), shards)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert describe_directory(tmp_path).problem is None
    last = max(tmp_path.glob("*.safetensors"))
    if harm == "remove":
        last.unlink()
    elif harm == "cut":
        last.write_bytes(last.read_bytes()[:-1])
    elif harm == "index":
        (tmp_path / "model.safetensors.index.json").write_bytes(b"{")
    else:
        (tmp_path / "config.json").write_bytes(b"{")
    named = {"remove": last.name, "cut": last.name, "index": "model.safetensors.index.json", "config": "config.json"}[harm]
    assert named in (describe_directory(tmp_path).problem or "")
    assert (named in (damage(tmp_path) or "")) == (harm == "cut" or (harm, shards) == ("remove", 2))


def test_a_part_without_its_siblings_and_index_is_not_whole(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / max(SHARDS)).write_bytes(weights(10, 0))
    assert missing_files(tmp_path) == [min(SHARDS)]


def test_the_cache_is_listed_by_the_names_that_load(stub, hub, monkeypatch):
    for name in ("own/sharded", "own/ggufs:Q4_1", "own/ggufs:F16"):
        find(hub_name(name), hub=hub)
    found = {model.name: model for model in cached(hub.cache)}
    assert set(found) == {"own/sharded", "own/ggufs:Q4_1", "own/ggufs:F16"}
    for name, model in found.items():
        assert find(hub_name(name), hub=dataclasses.replace(hub, offline=True)).path == model.path
        assert model.refs == ("main",) and model.about.problem is None and model.partial == 0
    assert found["own/sharded"].about.quantization == "4 bit"


def test_an_interrupted_download_is_listed_as_incomplete(stub, hub, monkeypatch):
    monkeypatch.setattr("metalstep.hub.transfer.TRIES", 1)
    stub.faults.cut = {min(SHARDS): 100_000}
    with pytest.raises(HubError):
        find(hub_name("own/sharded"), hub=hub)
    (model,) = cached(hub.cache)
    assert model.name == "own/sharded" and min(SHARDS) in (model.about.problem or "") and model.partial >= 100_000


def test_a_folder_is_searched_with_those_below_it(tmp_path):
    save_model(tmp_path / "a" / "b", LLAMA_CONFIG, parameters(make_model(LLAMA_CONFIG)))
    (tmp_path / "a" / "m-Q8_0.gguf").write_bytes(llama_gguf())
    (tmp_path / ".hidden").mkdir()
    shutil.copy(tmp_path / "a" / "m-Q8_0.gguf", tmp_path / ".hidden")
    names = [model.name for model in in_folder(tmp_path)]
    assert names == [str(tmp_path / "a" / "b"), str(tmp_path / "a" / "m-Q8_0.gguf")]


def test_removing_a_model_leaves_the_others(stub, hub):
    """Also those that have the same commits, as a copy of a repository has."""
    for name in ("own/sharded", "own/single"):
        find(hub_name(name), hub=hub)
    copies = ["own/copy-1", "own/copy-2", "own/copy-3"]
    for name in copies:
        shutil.copytree(storage(hub.cache, "own/sharded"), storage(hub.cache, name), symlinks=True)
    before = sum(path.stat().st_size for path in storage(hub.cache, "own/sharded").rglob("*") if path.is_file() and not path.is_symlink())
    planned = removal(hub.cache, "own/sharded")
    assert 0 < planned.freed <= before and storage(hub.cache, "own/sharded").exists()
    planned.execute()
    assert [model.name for model in cached(hub.cache)] == [*copies, "own/single"]
    assert all(model.about.problem is None for model in cached(hub.cache)) and not storage(hub.cache, "own/sharded").exists()


@pytest.mark.parametrize("name", ["own/none", "smollm2", "./here", "own/ggufs:Q4_1"])
def test_what_is_not_a_repository_in_the_cache_is_not_removed(hub, name):
    with pytest.raises(HubError, match="; "):
        removal(hub.cache, name)


def test_values_of_other_types_are_left_out(tmp_path, capsys):
    config = {"model_type": ["a"], "max_position_embeddings": "many", "quantization": {"bits": 10**400}, "text_config": 5}
    save_model(tmp_path / "model", {}, {"a": mx.zeros(1)})
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "red\x1b[31m.gguf").write_bytes(llama_gguf(llama__context_length="x", general__architecture=5))
    assert main(["models", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "red\N{REPLACEMENT CHARACTER}[31m.gguf" in out and len(out.splitlines()) == 3


def test_json_of_a_config_that_is_no_object_is_a_problem(tmp_path):
    save_model(tmp_path, LLAMA_CONFIG, parameters(make_model(LLAMA_CONFIG)))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps([1]))
    assert describe_directory(tmp_path).problem == "config.json cannot be read"


def test_serve_downloads_a_gguf_file_and_leaves_directories_to_vllm(stub, hub, monkeypatch):
    """Also that endpoint and cache are those of huggingface_hub."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", stub.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", stub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.cache))
    monkeypatch.setattr(serve_model, "model_folder", lambda file: file.parent)
    served = serve_model.find_model("own/ggufs:q4_1")
    assert served.name == "own/ggufs:q4_1" and (served.weights or "").endswith("tiny-Q4_1.gguf")
    assert serve_model.find_model("own/sharded") == serve_model.ServeModel("own/sharded")
    find(hub_name("own/ggufs"), hub=hub)
    assert (serve_model.find_model("own/ggufs").weights or "").endswith("tiny-Q8_0.gguf")
    with pytest.raises(CommandError, match="own/ggufs has no Q6_K") as error:
        serve_model.find_model("own/ggufs:Q6_K")
    assert "own/ggufs:Q8_0" in (error.value.hint or "")
