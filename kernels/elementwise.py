"""Elementwise primitives as row-program instructions. Names and arguments are MLX's primitives'; arithmetic is float32.

No activation is named here: silu, gelu and their relatives arrive as the chains of primitives that mlx-lm writes.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from metalstep.kernels import params
from metalstep.kernels.program import Operand, Program, Register

UNARY = {
    "Abs": params.MS_OP_ABS,
    "Ceil": params.MS_OP_CEIL,
    "Cos": params.MS_OP_COS,
    "Erf": params.MS_OP_ERF,
    "Exp": params.MS_OP_EXP,
    "Expm1": params.MS_OP_EXPM1,
    "Floor": params.MS_OP_FLOOR,
    "Log1p": params.MS_OP_LOG1P,
    "LogicalNot": params.MS_OP_NOT,
    "Negative": params.MS_OP_NEG,
    "Round": params.MS_OP_ROUND,
    "Sigmoid": params.MS_OP_SIGMOID,
    "Sign": params.MS_OP_SIGN,
    "Sin": params.MS_OP_SIN,
    "Square": params.MS_OP_SQUARE,
    "StopGradient": params.MS_OP_COPY,
    "Copy": params.MS_OP_COPY,
    "Tanh": params.MS_OP_TANH,
}
BINARY = {
    "Add": params.MS_OP_ADD,
    "ArcTan2": params.MS_OP_ARCTAN2,
    "Divide": params.MS_OP_DIV,
    "Equal": params.MS_OP_EQ,
    "FloorDivide": params.MS_OP_FLOOR_DIV,
    "Greater": params.MS_OP_GT,
    "GreaterEqual": params.MS_OP_GE,
    "Less": params.MS_OP_LT,
    "LessEqual": params.MS_OP_LE,
    "LogAddExp": params.MS_OP_LOGADDEXP,
    "LogicalAnd": params.MS_OP_AND,
    "LogicalOr": params.MS_OP_OR,
    "Maximum": params.MS_OP_MAX,
    "Minimum": params.MS_OP_MIN,
    "Multiply": params.MS_OP_MUL,
    "NotEqual": params.MS_OP_NE,
    "Power": params.MS_OP_POW,
    "Remainder": params.MS_OP_REMAINDER,
    "Subtract": params.MS_OP_SUB,
}
LOG = (params.MS_OP_LOG2, params.MS_OP_LOG10, params.MS_OP_LOG)  # by the primitive's base argument: two, ten, e
INTEGERS = (mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64)


def is_elementwise(op: str) -> bool:
    """Whether `op`, the name of an MLX primitive, has an instruction here."""
    return op in UNARY or op in BINARY or op in SPECIAL


def emit(
    program: Program, op: str, args: Sequence[Any], operands: Sequence[Operand], dtypes: Sequence[mx.Dtype], result: mx.Dtype, n: int
) -> Register:
    """Append primitive `op` of MLX over `n` elements; returns the result's register.

    args: the primitive's own arguments. dtypes: of the operands in the traced graph; result: of its output.
    Raises: NotImplementedError naming a primitive without an instruction.
    """
    if op in SPECIAL:
        code, operands = SPECIAL[op](args, operands, dtypes, result)
    elif op in UNARY:
        code = UNARY[op]
    elif op == "Divide" and all(d in INTEGERS for d in dtypes):
        code = params.MS_OP_FLOOR_DIV
    elif op in BINARY:
        code = BINARY[op]
    else:
        raise NotImplementedError(f"the primitive {op} has no row-program instruction")
    out = program.register(n)
    program.emit(code, out, *operands, n=n)
    return out


def _sqrt(args: Sequence[Any], operands: Sequence[Operand], *_: Any) -> tuple[int, Sequence[Operand]]:
    return (params.MS_OP_RSQRT if args[0] else params.MS_OP_SQRT), operands


def _log(args: Sequence[Any], operands: Sequence[Operand], *_: Any) -> tuple[int, Sequence[Operand]]:
    return LOG[args[0]], operands


def _select(args: Sequence[Any], operands: Sequence[Operand], *_: Any) -> tuple[int, Sequence[Operand]]:
    return params.MS_OP_SELECT, operands


def _cast(
    args: Sequence[Any], operands: Sequence[Operand], dtypes: Sequence[mx.Dtype], result: mx.Dtype
) -> tuple[int, Sequence[Operand]]:
    """Registers are float32: a cast to a narrower type rounds, a cast to bool tests, a cast to float32 is a copy."""
    if result == mx.bool_:
        return params.MS_OP_NE, [operands[0], 0.0]
    if result in INTEGERS:
        return (params.MS_OP_COPY if dtypes[0] in INTEGERS or dtypes[0] == mx.bool_ else params.MS_OP_TRUNC), operands
    return {mx.float16: params.MS_OP_TO_F16, mx.bfloat16: params.MS_OP_TO_BF16}.get(result, params.MS_OP_COPY), operands


SPECIAL: dict[str, Callable[..., tuple[int, Sequence[Operand]]]] = {
    "AsType": _cast,
    "Log": _log,
    "Select": _select,
    "Sqrt": _sqrt,
}
