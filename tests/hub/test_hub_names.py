"""What a name means, and which files of a repository it stands for: no network, no files."""
from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalstep.hub import choose
from metalstep.hub.errors import HubError
from metalstep.hub.names import EXPECTED, HubName, expected, hub_name

WORD = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.]{0,12}[A-Za-z0-9]", fullmatch=True).filter(lambda w: ".." not in w)
REPO = st.builds("{}/{}".format, WORD, WORD).filter(lambda r: not r.endswith(".gguf"))
QUANTS = st.sampled_from([*choose.QUANT_ORDER, "IQ4_XS", "UD-Q4_K_XL", "MXFP4"])


@given(REPO, st.none() | WORD, st.none() | st.lists(WORD, min_size=1, max_size=3))
def test_a_name_and_its_text_are_the_same(repo, quant, parts):
    file = None if quant or not parts else "/".join(parts) + ".gguf"
    name = HubName(repo, quant, file)
    assert hub_name(str(name)) == name


@pytest.mark.parametrize(
    "text",
    ["", "name", "./a/b", "/a/b", "~/a", "a/b/c", "a/b.gguf", "a/b:", "a/b:Q4:x", "a/b/../c.gguf", "a//b", "a..b/c", "a--b/c", "-a/b"],
)
def test_what_is_no_name_on_the_hub_is_none(text):
    assert hub_name(text) is None


@given(REPO, st.sampled_from(["", "/", "/tree/main", "?x=1", "#model-card"]))
def test_of_an_address_the_model_is_named(repo, rest):
    assert expected(f"https://hub.example/{repo}{rest}") == f"the model of that page as {repo}"
    assert expected(repo + rest) == EXPECTED


@given(QUANTS, st.sampled_from(["{}.gguf", "m-{}.gguf", "m.{}.gguf", "sub/m-7b-{}.gguf", "F16-m-{}.gguf"]), st.booleans())
def test_a_quantisation_is_read_from_a_file_name_in_either_case(quant, pattern, lower):
    assert choose.quant_label(pattern.format(quant.lower() if lower else quant)) == quant


@given(st.sets(QUANTS, min_size=1), st.data())
def test_each_quantisation_picks_its_own_file(quants, data):
    files = [f"sub/model-{quant}.gguf" for quant in data.draw(st.permutations(sorted(quants)))]
    for quant in quants:
        assert choose.gguf_file(hub_name(f"a/b:{quant.lower()}"), files) == f"sub/model-{quant}.gguf"
    usual = [quant for quant in choose.QUANT_ORDER if quant in quants]
    if usual:
        assert choose.gguf_file(hub_name("a/b"), files) == f"sub/model-{usual[0]}.gguf"
    elif len(files) > 1:
        with pytest.raises(HubError, match=r"none of a usual kind; there are a/b:"):
            choose.gguf_file(hub_name("a/b"), files)


def test_a_plain_file_comes_before_one_with_a_longer_label():
    files = ["m-UD-Q4_K_M.gguf", "m-Q4_K_M.gguf"]
    assert choose.gguf_file(hub_name("a/b:Q4_K_M"), files) == "m-Q4_K_M.gguf"
    assert choose.gguf_file(hub_name("a/b:UD-Q4_K_M"), files) == "m-UD-Q4_K_M.gguf"


@given(st.integers(1, 12), st.data())
def test_parts_without_an_index_are_counted_by_their_names(count, data):
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    some = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    assert choose.shards(some) == names


@given(st.dictionaries(st.text(min_size=1), st.sampled_from(["model-1.safetensors", "model-2.safetensors"]), min_size=1))
def test_the_files_of_an_index_are_those_it_names_once(weight_map):
    data = json.dumps({"weight_map": weight_map}).encode()
    assert choose.index_files("a/b", data) == sorted(set(weight_map.values()))


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": "../x"}}', b"[" * 10**5]
)
def test_a_damaged_index_is_refused(data):
    with pytest.raises(HubError, match=r"names no files of weights in its folder; "):
        choose.index_files("a/b", data)


def test_an_index_that_names_what_is_not_there_is_refused_before_a_download():
    index = json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode()
    with pytest.raises(HubError, match=r"names model-1\.safetensors, which is not in the repository"):
        choose.directory_files("a/b", ["config.json", choose.INDEX], lambda: index)


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(HubError, match=r"\.safetensors files but no config\.json"):
        choose.directory_files("a/b", ["model_index.json", "unet.safetensors"], bytes)
