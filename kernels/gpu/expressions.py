"""Elementwise instructions (ms_instr_op) as Metal expressions, for generated kernels. They need metal/expressions.h.

The functions of the language's library are taken as `precise::` where it has both: float32 accuracy in any maths mode.
"""
from __future__ import annotations

import struct
from collections.abc import Sequence

from metalstep.kernels import params

# By opcode; {0}, {1}, {2} are the operands a, b, c.
EXPRESSIONS = {
    params.MS_OP_COPY: "{0}",
    params.MS_OP_NEG: "-({0})",
    params.MS_OP_ABS: "fabs({0})",
    params.MS_OP_SIGN: "ms_sign({0})",
    params.MS_OP_SQUARE: "ms_square({0})",
    params.MS_OP_SQRT: "precise::sqrt({0})",
    params.MS_OP_RSQRT: "precise::rsqrt({0})",
    params.MS_OP_EXP: "precise::exp({0})",
    params.MS_OP_EXPM1: "ms_expm1({0})",
    params.MS_OP_LOG: "precise::log({0})",
    params.MS_OP_LOG2: "precise::log2({0})",
    params.MS_OP_LOG10: "precise::log10({0})",
    params.MS_OP_LOG1P: "ms_log1p({0})",
    params.MS_OP_SIGMOID: "ms_sigmoid({0})",
    params.MS_OP_TANH: "precise::tanh({0})",
    params.MS_OP_ERF: "ms_erf({0})",
    params.MS_OP_SIN: "precise::sin({0})",
    params.MS_OP_COS: "precise::cos({0})",
    params.MS_OP_FLOOR: "floor({0})",
    params.MS_OP_CEIL: "ceil({0})",
    params.MS_OP_ROUND: "rint({0})",
    params.MS_OP_TRUNC: "trunc({0})",
    params.MS_OP_TO_F16: "ms_to_f16({0})",
    params.MS_OP_TO_BF16: "ms_to_bf16({0})",
    params.MS_OP_NOT: "ms_truth({0} == 0.0f)",
    params.MS_OP_ADD: "{0} + {1}",
    params.MS_OP_SUB: "{0} - {1}",
    params.MS_OP_MUL: "{0} * {1}",
    params.MS_OP_DIV: "{0} / {1}",
    params.MS_OP_MAX: "ms_max({0}, {1})",
    params.MS_OP_MIN: "ms_min({0}, {1})",
    params.MS_OP_POW: "precise::pow({0}, {1})",
    params.MS_OP_REMAINDER: "ms_remainder({0}, {1})",
    params.MS_OP_LOGADDEXP: "ms_logaddexp({0}, {1})",
    params.MS_OP_ARCTAN2: "precise::atan2({0}, {1})",
    params.MS_OP_GT: "ms_truth({0} > {1})",
    params.MS_OP_GE: "ms_truth({0} >= {1})",
    params.MS_OP_LT: "ms_truth({0} < {1})",
    params.MS_OP_LE: "ms_truth({0} <= {1})",
    params.MS_OP_EQ: "ms_truth({0} == {1})",
    params.MS_OP_NE: "ms_truth({0} != {1})",
    params.MS_OP_AND: "ms_truth({0} != 0.0f && {1} != 0.0f)",
    params.MS_OP_OR: "ms_truth({0} != 0.0f || {1} != 0.0f)",
    params.MS_OP_FLOOR_DIV: "floor({0} / {1})",
    params.MS_OP_SELECT: "({0} != 0.0f ? {1} : {2})",
}


def literal(value: float) -> str:
    """`value`, rounded to float32, as a Metal literal of exactly its bits (any NaN is the quiet one)."""
    single: float = struct.unpack("f", _float32_bytes(value))[0]
    if single != single:
        return "as_type<float>(0x7fc00000u)"
    if single in (float("inf"), float("-inf")):
        return f"as_type<float>({'0x7f800000u' if single > 0 else '0xff800000u'})"
    digits = f"{single:.9g}"
    return digits + ("f" if "." in digits or "e" in digits else ".0f")


def _float32_bytes(value: float) -> bytes:
    try:
        return struct.pack("f", value)
    except OverflowError:  # beyond the largest float32
        return struct.pack("f", float("inf") if value > 0 else float("-inf"))


def arity(op: int) -> int:
    """How many operands the elementwise instruction `op` has. Raises: ValueError for any other opcode."""
    if op not in EXPRESSIONS:
        raise ValueError(f"opcode {op} is not elementwise")
    return 3 if op == params.MS_OP_SELECT else 2 if op >= params.MS_OP_ADD else 1


def expression(op: int, operands: Sequence[str]) -> str:
    """The float expression of the elementwise instruction `op`.

    operands: a, b, c in order, as many as the instruction has: names, literals (see `literal`), or expressions, which are put in
    parentheses. Scalar exponents 2 and 3 are products, as on the host device. Raises: ValueError for an opcode that is not
    elementwise, or a wrong number of operands.
    """
    if len(operands) != arity(op):
        raise ValueError(f"opcode {op} takes {arity(op)} operands, not {len(operands)}")
    if op == params.MS_OP_POW and operands[1] in POWERS:
        return POWERS[operands[1]].format(operands[0])
    return EXPRESSIONS[op].format(*(_atom(operand) for operand in operands))


POWERS = {literal(2.0): "ms_square({0})", literal(3.0): "ms_cube({0})"}


def _atom(operand: str) -> str:
    """`operand` such that it can stand beside any operator."""
    return f"({operand})" if " " in operand or operand.startswith("-") else operand
