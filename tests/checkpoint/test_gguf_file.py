"""The GGUF header: damaged files are refused with the field that is wrong, before anything large is made."""
import os
import struct

import numpy as np
import pytest
from checkpoint_files import ARRAY, F32, STRING, U64, gguf, llama_gguf, llama_metadata, llama_tensors, string
from hypothesis import given, settings
from hypothesis import strategies as st

from metalstep.checkpoint import CheckpointError, build_model, open_checkpoint
from metalstep.checkpoint.gguf.file import read_gguf
from metalstep.checkpoint.mapped_file import MappedFile

VALID = llama_gguf()


def metadata_with(entry):
    return gguf({"a": entry, **llama_metadata()}, llama_tensors())


def nested(depth):
    return struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", U64, 0)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "the file is empty"),
        (b"GG", "begins with b'GG', expected b'GGUF'"),
        (b"PK\3\4" + VALID[4:], "this is not a GGUF file"),
        (b"GGUF", "ends inside the version"),
        (VALID[:10], "ends inside the number of tensors"),
        (gguf({}, [], version=1), "GGUF version 1, expected 2 or 3; convert"),
        (gguf({}, [], version=3 << 24), "it is big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "1152921504606846976 tensors are said to follow, more than"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "metadata keys are said to follow, more than"),
        (metadata_with(struct.pack("<IIQ", ARRAY, STRING, 1 << 60)), "strings of 'a' are said to follow"),
        (metadata_with(struct.pack("<IIQ", ARRAY, U64, 1 << 60)), "elements of 'a' are said to follow"),
        (metadata_with(struct.pack("<IIQ", ARRAY, ARRAY, 1 << 60)), "arrays of 'a' are said to follow"),
        (metadata_with(struct.pack("<IQ", STRING, 1 << 63)), "the value of 'a' is said to be 9223372036854775808 bytes long"),
        (metadata_with(struct.pack("<IIQQ", ARRAY, STRING, 1, 1 << 63)), "a string of 'a' is said to be"),
        (metadata_with(struct.pack("<I", STRING) + string(b"\xff")), "the value of 'a' is not UTF-8"),
        (metadata_with(struct.pack("<IIQ", ARRAY, STRING, 1) + string(b"\xff")), "a string of 'a' is not UTF-8"),
        (metadata_with(struct.pack("<I", 13)), "'a' has value type 13, expected 0 to 12"),
        (metadata_with(struct.pack("<IIQ", ARRAY, 77, 1)), "'a' has element type 77"),
        (metadata_with(nested(5)), "arrays nested more than 4 deep"),
        (gguf({"general.alignment": 3}, []), "general.alignment is 3, expected a power of two"),
        (gguf({}, [("a", (4,), F32, bytes(16))], offsets={"a": 1 << 40}), "tensor 'a' ends at byte .*, but the file has"),
        (gguf({}, [("a", (4,), F32, bytes(16)), ("b", (4,), F32, bytes(16))], offsets={"b": 8}), "tensors 'a' and 'b' overlap"),
        (VALID[:-1000], "ends at byte .*, but the file has .*download or convert it again"),
    ],
)
def test_damaged_headers_are_refused_by_name(tmp_path, data, text):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(path)


@pytest.mark.parametrize("version", [2, 3])
def test_every_kind_of_metadata_is_read(tmp_path, version):
    scalars = {
        **{0: ("<B", 255), 1: ("<b", -1), 2: ("<H", 65535), 3: ("<h", -1), 4: ("<I", 1 << 31), 5: ("<i", -1)},
        **{6: ("<f", 0.5), 7: ("<?", True), 10: ("<Q", 1 << 63), 11: ("<q", -1), 12: ("<d", 0.1)},
    }
    entries = {str(kind): struct.pack("<I", kind) + struct.pack(*item) for kind, item in scalars.items()}
    entries["strings"] = ["", "é", "a\nb"]
    entries["numbers"] = [1, -2, 3]
    entries["nested"] = nested(2)
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(entries, [], version=version))
    file = MappedFile(path)
    metadata = read_gguf(file).metadata
    file.close()
    assert {kind: metadata[str(kind)] for kind in scalars} == {kind: item[1] for kind, item in scalars.items()}
    assert metadata["strings"] == ["", "é", "a\nb"]
    np.testing.assert_array_equal(metadata["numbers"], [1, -2, 3])
    assert len(metadata["nested"][0][0]) == 0


def opens_or_refuses(path, data):
    """Open, build and read: anything but success or CheckpointError is a bug."""
    path.write_bytes(data)
    try:
        with open_checkpoint(path) as checkpoint:
            build_model(checkpoint)
            checkpoint.tokenizer()
            for tensor in checkpoint.tensors.values():
                tensor.numpy()
                tensor.drop_pages()
    except CheckpointError as error:
        assert str(error)


HEADER_END = VALID.index(b"output_norm.weight") + 64
EDGES = (0, 1, 0x7F, 0x80, 0xFF)


@settings(max_examples=150)
@given(cut=st.integers(0, len(VALID)))
def test_truncated_files_never_crash(tmp_path_factory, cut):
    opens_or_refuses(tmp_path_factory.getbasetemp() / "cut.gguf", VALID[:cut])


@settings(max_examples=300)
@given(
    changes=st.lists(st.tuples(st.integers(0, HEADER_END), st.sampled_from(EDGES) | st.integers(0, 255)), min_size=1, max_size=6),
)
def test_mutated_headers_never_crash(tmp_path_factory, changes):
    data = bytearray(VALID)
    for at, byte in changes:
        data[at] = byte
    opens_or_refuses(tmp_path_factory.getbasetemp() / "mutated.gguf", bytes(data))


@settings(max_examples=100)
@given(at=st.integers(4, HEADER_END), word=st.sampled_from([0, 1, 1 << 31, 1 << 32, 1 << 60, (1 << 64) - 1]))
def test_lying_lengths_never_crash(tmp_path_factory, at, word):
    data = VALID[:at] + struct.pack("<Q", word) + VALID[at + 8 :]
    opens_or_refuses(tmp_path_factory.getbasetemp() / "lying.gguf", data)


def test_refused_files_leave_no_descriptor_open(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(VALID[:-1000])
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for _ in range(5):
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
