"""What mlx-lm's documentation and examples call, called the same way: the imports and the model's name are ours, the rest is theirs.

Sources: the README of ml-explore/mlx-lm ("Python API", "Streaming", "Sampling"), mlx_lm/cache_prompt.py, mlx_lm/chat.py and, of its
examples, generate_response.py, batch_generate_response.py, chat.py and tool_use.py.
"""
import json

import mlx.core as mx
import pytest

from metalstep import batch_generate, generate, load, stream_generate
from metalstep.generate import generate_step
from metalstep.models.cache import (
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from metalstep.sample_utils import make_logits_processors, make_sampler

CHECKPOINT = "smollm2"


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load(CHECKPOINT)
    yield model, tokenizer
    model.close()


def test_readme_generate(capsys):
    model, tokenizer = load(CHECKPOINT)
    prompt = "Write a story about Einstein"
    messages = [{"role": "user", "content": prompt}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    text = generate(model, tokenizer, prompt=prompt, verbose=True, max_tokens=20)
    assert "Einstein" in text
    output = capsys.readouterr().out
    assert text in output and "tokens-per-sec" in output and "Peak memory" in output


def test_readme_tokenizer_options():
    model, tokenizer = load(CHECKPOINT, tokenizer_config={"eos_token": "<|endoftext|>", "trust_remote_code": True})
    assert tokenizer.eos_token_id in tokenizer.eos_token_ids
    assert tokenizer.eos_token == "<|endoftext|>"
    model.close()


def test_readme_streaming(loaded):
    model, tokenizer = loaded
    messages = [{"role": "user", "content": "Write a story about Einstein"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    text = ""
    for response in stream_generate(model, tokenizer, prompt, max_tokens=30):
        text += response.text
    assert text == generate(model, tokenizer, prompt, max_tokens=30)
    assert response.finish_reason in ("length", "stop") and response.generation_tokens == 30
    assert response.prompt_tokens == len(prompt) and response.logprobs.shape == (model.args.vocab_size,)


def test_readme_sampling(loaded):
    """Any callable from logprobs to tokens; a list of callables from tokens and logits to logits, applied in order."""
    model, tokenizer = loaded
    greedy = generate(model, tokenizer, prompt="The sky is", max_tokens=8)
    assert generate(model, tokenizer, prompt="The sky is", max_tokens=8, sampler=lambda logits: mx.argmax(logits, axis=-1)) == greedy
    word = tokenizer.encode(" green", add_special_tokens=False)[0]
    histories = []

    def raise_word(tokens, logits):
        histories.append(tokens.size)
        logits[:, word] += 100
        return logits

    def raise_another(tokens, logits):
        return mx.where(mx.arange(logits.shape[-1]) == word, logits - 200, logits)

    text = generate(model, tokenizer, prompt="The sky is", max_tokens=3, logits_processors=[raise_word])
    assert text.split() == ["green"] * 3
    assert generate(model, tokenizer, prompt="The sky is", max_tokens=3, logits_processors=[raise_word, raise_another]) != text
    assert histories[:3] == [3, 4, 5]

    sampler = make_sampler(temp=0.7, top_p=0.9, min_p=0.02, top_k=50)
    processors = make_logits_processors(logit_bias={word: 5.0}, repetition_penalty=1.2, repetition_context_size=20)
    mx.random.seed(0)
    text = generate(model, tokenizer, prompt="The sky is", max_tokens=8, sampler=sampler, logits_processors=processors)
    mx.random.seed(0)
    assert generate(model, tokenizer, prompt="The sky is", max_tokens=8, sampler=sampler, logits_processors=processors) == text


def test_generate_response(capsys):
    model, tokenizer = load(path_or_hf_repo=CHECKPOINT)
    conversation = [{"role": "user", "content": "Why is the sky blue?"}]
    prompt = tokenizer.apply_chat_template(conversation=conversation, add_generation_prompt=True)
    response = generate(model=model, tokenizer=tokenizer, prompt=prompt, max_tokens=20, verbose=True)
    assert response and response in capsys.readouterr().out
    as_text = tokenizer.apply_chat_template(conversation=conversation, tokenize=False, add_generation_prompt=True)
    assert generate(model=model, tokenizer=tokenizer, prompt=as_text, max_tokens=20) == response
    model.close()


def test_batch_generate_response(loaded):
    model, tokenizer = loaded
    prompts = ["Write a story about Einstein.", "Why is the sky blue?", "What time is it?", "How tall is Mt Everest?"]
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True) for p in prompts]
    result = batch_generate(model, tokenizer, prompts, verbose=False, return_prompt_caches=True, max_tokens=16)
    assert result.texts == [generate(model, tokenizer, prompt, max_tokens=16) for prompt in prompts]

    more = ["Could you summarize that?", "And what about the sea?", "Try again?", "And Mt Olympus?"]
    more = [tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True) for p in more]
    second = batch_generate(model, tokenizer, more, verbose=False, prompt_caches=result.caches, max_tokens=16)
    for prompt, first, again, text in zip(prompts, result.caches, more, second.texts, strict=True):
        assert first.tokens[: len(prompt)] == prompt
        assert text == generate(model, tokenizer, first.tokens + again, max_tokens=16)


def test_chat_with_a_prompt_cache(loaded, tmp_path, capsys):
    model, tokenizer = loaded
    prompt_cache = make_prompt_cache(model)
    messages = [{"role": "user", "content": "Hi my name is <Name>."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    response = generate(model, tokenizer, prompt=prompt, verbose=True, max_tokens=16, prompt_cache=prompt_cache)
    assert response in capsys.readouterr().out
    first = list(prompt_cache.tokens)

    messages = [{"role": "user", "content": "What's my name?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    response = generate(model, tokenizer, prompt=prompt, verbose=True, max_tokens=16, prompt_cache=prompt_cache)
    assert response == generate(model, tokenizer, first + prompt, max_tokens=16)

    save_prompt_cache(str(tmp_path / "chat.safetensors"), prompt_cache)
    again = load_prompt_cache(str(tmp_path / "chat.safetensors"))
    assert again[0].offset == prompt_cache[0].offset
    text = generate(model, tokenizer, prompt=prompt, max_tokens=16, prompt_cache=again)
    assert text == generate(model, tokenizer, prompt=prompt, max_tokens=16, prompt_cache=prompt_cache)


def test_cache_prompt_and_what_reads_it(loaded, tmp_path):
    """A long text computed once and saved with metadata, then continued in another program."""
    model, tokenizer = loaded
    path = str(tmp_path / "prompt.safetensors")
    cache = make_prompt_cache(model, None)
    y = mx.array(tokenizer.encode("Metal shaders run on the GPU. " * 20))
    calls = []

    def callback(processed, total_tokens):
        calls.append((processed, total_tokens))

    for _ in generate_step(y, model, max_tokens=0, prompt_cache=cache, prompt_progress_callback=callback):
        raise AssertionError("no token is wanted")
    assert calls[0] == (0, y.size) and calls[-1] == (y.size, y.size)
    metadata = {"model": CHECKPOINT, "tokenizer_config": json.dumps({"trust_remote_code": None})}
    save_prompt_cache(path, cache, metadata)

    prompt_cache, metadata = load_prompt_cache(path, return_metadata=True)
    assert json.loads(metadata["tokenizer_config"]) == {"trust_remote_code": None} and metadata["model"] == CHECKPOINT
    question = tokenizer.encode("\nSummarize the above text.")
    text = generate(model, tokenizer, question, max_tokens=12, prompt_cache=prompt_cache)
    assert text == generate(model, tokenizer, y.tolist() + question, max_tokens=12)


def test_the_chat_command(loaded):
    """Its loop: a cache with max_kv_size, text piece by piece, XTC with the newline and the stop tokens spared."""
    model, tokenizer = loaded
    mx.random.seed(1)
    prompt_cache = make_prompt_cache(model, 64)
    for query in ("Tell me a joke.", "Another one.", "Thanks."):
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": query}], add_generation_prompt=True)
        before = prompt_cache[0].offset
        for response in stream_generate(
            model,
            tokenizer,
            prompt,
            max_tokens=24,
            sampler=make_sampler(
                0.6,
                0.9,
                xtc_threshold=0.1,
                xtc_probability=0.5,
                xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
            ),
            prompt_cache=prompt_cache,
            prefill_step_size=2048,
        ):
            assert isinstance(response.text, str)
        assert prompt_cache[0].offset == before + len(prompt) + response.generation_tokens


def test_tool_use(loaded):
    """The tool's result goes into the same cache. The model here is too small to call tools, so its call is written for it."""
    model, tokenizer = loaded

    def multiply(a: float, b: float):
        """
        Multiply two numbers

        Args:
            a: the first number
            b: the second number
        """
        return a * b

    tools = {"multiply": multiply}
    messages = [{"role": "user", "content": "Multiply 12 and 48."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=list(tools.values()))
    prompt_cache = make_prompt_cache(model)
    generate(model=model, tokenizer=tokenizer, prompt=prompt, max_tokens=8, verbose=True, prompt_cache=prompt_cache)
    call = {"name": "multiply", "arguments": {"a": 12, "b": 48}}
    result = tools[call["name"]](**call["arguments"])
    messages = [{"role": "user", "name": call["name"], "content": str(result)}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    before = list(prompt_cache.tokens)
    text = generate(model=model, tokenizer=tokenizer, prompt=prompt, max_tokens=12, verbose=True, prompt_cache=prompt_cache)
    assert text == generate(model, tokenizer, before + prompt, max_tokens=12)


def test_taking_back_a_turn(loaded):
    """Trim to where a conversation went another way."""
    model, tokenizer = loaded
    cache = make_prompt_cache(model)
    generate(model, tokenizer, "One two three", max_tokens=4, prompt_cache=cache)
    kept = cache[0].offset
    generate(model, tokenizer, " and then", max_tokens=6, prompt_cache=cache)
    assert can_trim_prompt_cache(cache)
    assert trim_prompt_cache(cache, cache[0].offset - kept) > 6
    assert cache[0].offset == kept
    text = generate(model, tokenizer, " or else", max_tokens=6, prompt_cache=cache)
    whole = make_prompt_cache(model)
    generate(model, tokenizer, "One two three", max_tokens=4, prompt_cache=whole)
    assert generate(model, tokenizer, " or else", max_tokens=6, prompt_cache=whole) == text
