"""Requests up to the end of the context, whose runs are queued ahead, on a device whose memory the host does not see."""
import pytest
from engines import load
from split_memory import split_memory  # noqa: F401

from metalstep import Request

CONTEXT = 64


@pytest.mark.parametrize("steps", [1, 8, 32])
@pytest.mark.parametrize("lengths", [(50, 20), (20, 50, 47), (63, 1), (33, 32, 31, 17)], ids=str)
def test_every_request_gets_all_that_the_context_holds(tmp_path, lengths, steps):
    """One ends inside of a run that was queued behind its last one; the tables of the others go on."""
    with load("llama", tmp_path, device="host", max_context=CONTEXT, kv_memory="16MB") as model:
        prompts = [[(7 * i + j) % 90 for j in range(n)] for i, n in enumerate(lengths)]
        streams = [model.engine.submit(Request(prompt, max_tokens=None, decode_steps=steps)) for prompt in prompts]
        assert [len(list(stream)) for stream in streams] == [CONTEXT + 1 - n for n in lengths]
