"""The structs and constants of metal/params.h and metal/metalstep.h, read from those headers by cffi.

Every enumerator of the headers is an attribute of this module: `params.MS_OP_ADD`. `ffi` knows all of their types.
"""
from __future__ import annotations

import re
from importlib import resources
from typing import Any

import cffi
import numpy as np

HEADERS = ("params.h", "metalstep.h")  # in this order: the second includes the first


def _declarations(header: str) -> str:
    """The header without preprocessor lines and comments, which is plain C that cffi reads."""
    text = (resources.files("metalstep.metal") / header).read_text(encoding="utf-8")
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    return re.sub(r"^[ \t]*#[^\n]*", "", text, flags=re.MULTILINE)


def _enumerators(text: str) -> list[str]:
    bodies = re.findall(r"\benum\b[^{;]*\{([^}]*)\}", text)
    return re.findall(r"\b([A-Z]\w*)\s*=", " ".join(bodies))


ffi = cffi.FFI()
_constants: dict[str, int] = {}
_texts = [_declarations(header) for header in HEADERS]
for _text in _texts:
    ffi.cdef(_text)
_library = ffi.dlopen(None)  # the process itself: cffi gives enumerators as attributes of a library only
_constants = {name: getattr(_library, name) for _text in _texts for name in _enumerators(_text)}
_pointers: dict[str, Any] = {}  # struct name -> its pointer type: parsing a type's name costs more than making a value


def __getattr__(name: str) -> int:
    """An enumerator of the headers."""
    if name in _constants:
        return _constants[name]
    raise AttributeError(f"{' and '.join(HEADERS)} have no constant {name!r}")


def pack(struct: str, **fields: Any) -> bytes:
    """The bytes of a struct of the headers; fields that are not given are 0, arrays take sequences.

    Raises: TypeError for an unknown struct or field, or a value of the wrong type; ValueError for a value that does not
    fit its field.
    """
    value = ffi.new(_pointer(struct))
    for name, field in fields.items():
        try:
            setattr(value, name, field)
        except AttributeError:
            known = ", ".join(name for name, _ in ffi.typeof(value).item.fields)
            raise TypeError(f"{struct} has no field {name!r}; it has {known}") from None
        except (OverflowError, IndexError) as error:
            raise ValueError(f"{struct}.{name} cannot be {field!r}: {error}") from None
        except TypeError as error:
            raise TypeError(f"{struct}.{name} cannot be {field!r}: {error}") from None
    return bytes(ffi.buffer(value))


def size(struct: str) -> int:
    """Bytes of a struct of the headers. Raises: TypeError for an unknown one."""
    return ffi.sizeof(_pointer(struct).item)


def record(struct: str) -> np.dtype:
    """A struct of numbers as numpy's dtype of its records. Raises: TypeError for an unknown struct."""
    fields = _pointer(struct).item.fields
    formats = {"float": "f4", "int32_t": "i4", "uint32_t": "u4"}
    return np.dtype(
        {
            "names": [name for name, _ in fields],
            "formats": [formats[field.type.cname] for _, field in fields],
            "offsets": [field.offset for _, field in fields],
            "itemsize": size(struct),
        }
    )


def _pointer(struct: str) -> Any:
    if struct not in _pointers:
        try:
            ctype = ffi.typeof(f"{struct} *")
        except (cffi.CDefError, cffi.FFIError):
            ctype = None
        if ctype is None or ctype.item.kind != "struct":
            raise TypeError(f"{' and '.join(HEADERS)} have no struct {struct!r}")
        _pointers[struct] = ctype
    return _pointers[struct]
