"""step_load on a GPU: what it makes of a stage."""
import pytest
import step_loads
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metalstep.kernels.gpu import step_load
from metalstep.kernels.launch import Buffer


@given(
    seed=st.integers(0, 9999), words=st.integers(1, 200) | st.sampled_from([255, 256, 257, 700]), place=st.floats(0, 1),
    share=st.floats(0, 1), steps=st.integers(1, 3), max_rows=st.integers(1, 5), thread_order=st.integers(0, 3),
)  # fmt: skip
@example(seed=1, words=700, place=0.3, share=1.0, steps=2, max_rows=5, thread_order=1)
@settings(max_examples=30, deadline=None)
def test_words_are_the_stage_s_and_tokens_their_source_s(g, seed, words, place, share, steps, max_rows, thread_order):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("METALSTEP_SIM_SEED", str(thread_order))
        step_loads.check_words(g, seed, words, place, share, steps, max_rows)


def test_a_source_below_zero_keeps_the_token_and_a_failed_row_gives_zero(g):
    step_loads.check_laws(g)


def test_a_launch_is_refused_as_on_the_host():
    buffers = [Buffer(handle, 0, (64,), "int32") for handle in range(3)]
    with pytest.raises(ValueError, match="step_load: tokens 5 to 9 of 8 words"):
        step_load.launches(*buffers, words=8, tokens_first=5, max_tokens=4)
