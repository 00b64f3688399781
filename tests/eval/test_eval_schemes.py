"""Names of `--schemes`: options behind colons, and refusals that list what there is."""
import pytest

from metalstep.eval.schemes import REFERENCES, scheme_of, schemes_of
from metalstep.kv_scheme import NAMES


@pytest.mark.parametrize("name", [*NAMES, *REFERENCES])
def test_every_name_is_known(name):
    scheme = scheme_of(name)
    assert (scheme.label, scheme.name, scheme.options) == (name, name, {})
    assert scheme.is_reference == (name in REFERENCES)


def test_options_are_loads():
    scheme = scheme_of("turbo4:boundary=0:scale=matched/unbiased:norm_dtype=f32:key_center=off")
    assert scheme.name == "turbo4"
    assert scheme.options == {"kv_boundary": 0, "kv_scale": "matched,unbiased", "kv_norm_dtype": "f32", "kv_key_center": "off"}
    assert scheme_of("none:dtype=float32").options == {"kv_dtype": "float32"}


def test_a_scheme_named_twice_is_measured_once():
    assert [scheme.label for scheme in schemes_of(["turbo4", " turbo4", "", "turbo4:boundary=0"])] == ["turbo4", "turbo4:boundary=0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("turbo5", "no scheme 'turbo5', expected one of none, affine8, turbo4, .*, q8_0, q4_0"),
        ("q5_0", "no scheme 'q5_0', expected one of none, .*, q8_0, q4_0"),
        ("turbo4:boundary", "'turbo4:boundary' has the option 'boundary', expected NAME=VALUE with a name of boundary, norm_dtype, scale"),
        ("none:dtype=int8", "kv_dtype is 'int8', expected one of"),
        ("turbo4:bits=4", "has the option 'bits=4', expected NAME=VALUE"),
        ("turbo4:boundary=two", "has the boundary 'two', expected a number of layers"),
        ("q8_0:boundary=0", "'q8_0:boundary=0' has options, and q8_0 has none"),
        ("turbo4:scale=best", "kv_scale is 'best', expected matched, raw, unbiased"),
        ("none:norm_dtype=f32", "kv_norm_dtype is an option of turbo schemes, and kv_scheme is 'none'"),
    ],
)
def test_a_wrong_scheme_says_what_there_is(text, message):
    with pytest.raises(ValueError, match=message):
        scheme_of(text)


def test_no_scheme_at_all_is_refused():
    with pytest.raises(ValueError, match="no scheme to compare, expected some of none, affine8"):
        schemes_of([" ", ""])
