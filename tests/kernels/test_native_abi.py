"""The C ABI below Python's checks: wild handles, NULL pointers and garbage are errors, never a crash."""
import mmap
import threading

import pytest
from harness import Harness
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metalstep.kernels import native_library, params
from metalstep.kernels.native import NativeDevice
from metalstep.kernels.params import ffi

LIB = native_library.loaded()
GARBAGE = st.sampled_from([0, 1, 2, 17, 0x1_0000_0001, 0x7FFF_FFFF_FFFF, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)
SIZED_BY_CONSTANTS = (b"step_load", b"add_rms_norm", b"limits")  # buffers must be as long as their constants and grid say
SMALL = st.integers(0, 4) | st.sampled_from([2**31 - 1, 2**31, 2**32 - 1])


@pytest.fixture
def h():
    with Harness() as harness:
        yield harness


@given(handle=GARBAGE)
def test_a_wild_handle_is_an_error(handle):
    """Handles of other tests may be open, so only those of no kind that exists are sure to be wild."""
    wild = ffi.cast("void *", handle & ~0xF)
    info, word, ticket, out = ffi.new("MSDeviceInfo *"), ffi.new("int32_t *"), ffi.new("uint64_t *"), ffi.new("void **")
    codes = [
        LIB.ms_device_info(wild, info),
        LIB.ms_buffer_create(wild, 64, 0, word),
        LIB.ms_buffer_wrap(wild, ffi.cast("void *", 4096), 64, word),
        LIB.ms_buffer_destroy(wild, 0),
        LIB.ms_buffer_write(wild, 0, 0, b"", 0),
        LIB.ms_buffer_read(wild, 0, 0, ffi.NULL, 0),
        LIB.ms_buffer_copy(wild, 0, 0, 0, 0, 0),
        LIB.ms_library_add(wild, b""),
        LIB.ms_kernel_find(wild, b"linear", word),
        LIB.ms_plan_create(wild, ffi.NULL, 0, ffi.NULL, 0, ffi.NULL, 0, 1, 1, out),
        LIB.ms_plan_run(wild, 1, ticket),
        LIB.ms_ticket_wait(wild, 1, 0),
        LIB.ms_plan_profile(wild, ticket),
        LIB.ms_plan_limit_threads(wild, 1),
        LIB.ms_weight_pack(wild, ffi.NULL, 0, 0),
    ]
    assert codes == [params.MS_ERROR_ARGUMENT] * len(codes)
    assert LIB.ms_buffer_contents(wild, 0) == ffi.NULL
    LIB.ms_device_close(wild)
    LIB.ms_plan_destroy(wild)


def test_null_pointers_are_errors(h):
    device, plan = h.device._session.pointer, h.device.create_plan([], 1, 1)._handle
    buffer = h.device.create_buffer(64).handle
    codes = [
        LIB.ms_device_open(ffi.NULL, 1, ffi.new("void **")),
        LIB.ms_device_open(b"host", 1, ffi.NULL),
        LIB.ms_device_info(device, ffi.NULL),
        LIB.ms_buffer_create(device, 64, 0, ffi.NULL),
        LIB.ms_buffer_wrap(device, ffi.NULL, 64, ffi.new("int32_t *")),
        LIB.ms_buffer_wrap(device, ffi.cast("void *", 1 << 16), 64, ffi.NULL),
        LIB.ms_buffer_write(device, buffer, 0, ffi.NULL, 1),
        LIB.ms_buffer_read(device, buffer, 0, ffi.NULL, 1),
        LIB.ms_folder_add(ffi.NULL),
        LIB.ms_library_add(device, ffi.NULL),
        LIB.ms_kernel_find(device, ffi.NULL, ffi.new("int32_t *")),
        LIB.ms_kernel_find(device, b"linear", ffi.NULL),
        LIB.ms_plan_create(device, ffi.NULL, 1, ffi.NULL, 0, ffi.NULL, 0, 1, 1, ffi.new("void **")),
        LIB.ms_plan_create(device, ffi.NULL, 0, ffi.NULL, 1, ffi.NULL, 0, 1, 1, ffi.new("void **")),
        LIB.ms_plan_create(device, ffi.NULL, 0, ffi.NULL, 0, ffi.NULL, 1, 1, 1, ffi.new("void **")),
        LIB.ms_plan_create(device, ffi.NULL, 0, ffi.NULL, 0, ffi.NULL, 0, 1, 1, ffi.NULL),
        LIB.ms_plan_run(plan, 1, ffi.NULL),
        LIB.ms_plan_profile(plan, ffi.NULL),
        LIB.ms_weight_pack(device, ffi.NULL, 0, 0),
    ]
    assert codes == [params.MS_ERROR_ARGUMENT] * len(codes)


def test_handles_of_another_kind_and_stale_ones_are_errors(h):
    device, plan, ticket = h.device._session.pointer, h.device.create_plan([], 1, 1), ffi.new("uint64_t *")
    stale = plan._handle
    assert LIB.ms_plan_run(device, 1, ticket) == params.MS_ERROR_ARGUMENT
    assert LIB.ms_ticket_wait(stale, 1, 0) == params.MS_ERROR_ARGUMENT
    plan.close()
    other = h.device.create_plan([], 1, 1)  # takes the slot, not the handle
    assert LIB.ms_plan_run(stale, 1, ticket) == params.MS_ERROR_ARGUMENT
    assert b"destroyed" in ffi.string(LIB.ms_last_error())
    LIB.ms_plan_destroy(stale)
    other.wait(other.run(1))


def test_messages_belong_to_the_thread_that_failed(h):
    with pytest.raises(ValueError):
        h.device.kernel("mine")
    other = []
    thread = threading.Thread(target=lambda: other.append(ffi.string(LIB.ms_last_error())))
    thread.start()
    thread.join()
    assert other == [b""] and b"mine" in ffi.string(LIB.ms_last_error())


def test_a_long_message_is_cut_between_characters(h):
    for pad in range(4):
        LIB.ms_kernel_find(h.device._session.pointer, b"x" * pad + "é€𝄞".encode() * 2000, ffi.new("int32_t *"))
        text = ffi.string(LIB.ms_last_error())
        assert 2000 < len(text) < 2048 and text.decode()


@given(address=GARBAGE | st.integers(0, 2**52).map(lambda n: n * mmap.PAGESIZE), nbytes=GARBAGE)
def test_memory_that_is_wrapped_is_not_touched(fuzzed, address, nbytes):
    """Nothing may be mapped there: only what a plan reads is."""
    word = ffi.new("int32_t *")
    code = LIB.ms_buffer_wrap(fuzzed, ffi.cast("void *", address), nbytes, word)
    fits = address and address % mmap.PAGESIZE == 0 and nbytes and address + nbytes < 2**63 - mmap.PAGESIZE
    assert code == (params.MS_OK if fits else params.MS_ERROR_ARGUMENT)
    if not code:
        assert LIB.ms_buffer_contents(fuzzed, word[0]) == ffi.cast("void *", address)
        assert LIB.ms_buffer_destroy(fuzzed, word[0]) == params.MS_OK


LAUNCH = st.fixed_dictionaries(
    {
        "kernel": st.integers(-1, 7) | st.sampled_from([-(2**31), 2**31 - 1]),
        "barrier": st.integers(0, 2),
        "grid": st.lists(SMALL, min_size=3, max_size=3),
        "threads": st.lists(SMALL, min_size=3, max_size=3),
        "bind_first": SMALL,
        "binds": st.integers(0, 12) | SMALL,
        "const_first": SMALL,
        "const_bytes": st.integers(0, 400) | SMALL,
    }
)
BIND = st.tuples(st.integers(-1, 4), st.just(0), st.sampled_from([0, 4, 64, 4096, 65_535, 65_536, 2**64 - 1]))
WORDS = st.lists(st.integers(0, 8) | st.integers(0, 128) | st.just(params.MS_NONE) | st.integers(0, 2**32 - 1), max_size=120)


@settings(max_examples=400)
@given(launches=st.lists(LAUNCH, max_size=4), binds=st.lists(BIND, max_size=12), words=WORDS, rows=st.tuples(SMALL, SMALL))
@example(launches=[dict(kernel=1, barrier=0, grid=[1] * 3, threads=[1] * 3, bind_first=2**32 - 1, binds=2, const_first=0,
                        const_bytes=0)], binds=[(0, 0, 0)] * 3, words=[], rows=(1, 1))  # fmt: skip
def test_garbage_is_refused_or_runs(fuzzed, launches, binds, words, rows):
    """Buffers are zero, so a plan that is accepted has no rows to run on, but for kernels whose sizes are constants."""
    native_launches, native_binds = ffi.new("MSLaunch[]", launches), ffi.new("MSBind[]", binds)
    constants, out, ticket = ffi.new("uint32_t[]", words), ffi.new("void **"), ffi.new("uint64_t *")
    code = LIB.ms_plan_create(
        fuzzed, native_launches, len(launches), native_binds, len(binds), constants, 4 * len(words), *rows, out
    )
    if code:
        assert code in (params.MS_ERROR_ARGUMENT, params.MS_ERROR_MEMORY) and ffi.string(LIB.ms_last_error())
        return
    if not {launch["kernel"] for launch in launches} & {kernel(fuzzed, name) for name in SIZED_BY_CONSTANTS}:
        assert LIB.ms_plan_run(out[0], 2, ticket) == params.MS_OK
        assert LIB.ms_ticket_wait(fuzzed, ticket[0], -1) == params.MS_OK
    LIB.ms_plan_destroy(out[0])


def kernel(device, name):
    """The id that plans name it by."""
    word = ffi.new("int32_t *")
    assert LIB.ms_kernel_find(device, name, word) == params.MS_OK
    return word[0]


@pytest.fixture(scope="module")
def fuzzed():
    """A device with five zeroed buffers, as the C ABI sees it."""
    with NativeDevice.open("host", 2) as device:
        for _ in range(5):
            device.create_buffer(65_536)
        yield device._session.pointer
