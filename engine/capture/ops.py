"""What each MLX primitive of a graph computes, in MLX. `args` is the primitive's state in C++ order, enums as integers."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from metalstep.capture.graph import Node
from metalstep.kernels.elementwise import INTEGERS

Interpretation = Callable[..., Any]  # (node, cache, *operands) -> array, or one per output

QUANT_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")  # by the primitive's argument
RESHAPES = ("Reshape", "Flatten", "Unflatten", "Squeeze", "ExpandDims")

PLAIN: dict[str, Callable[..., mx.array]] = {
    "Abs": mx.abs,
    "Add": mx.add,
    "ArcTan2": mx.arctan2,
    "Ceil": mx.ceil,
    "Copy": lambda a: a,
    "Cos": mx.cos,
    "Equal": mx.equal,
    "Erf": mx.erf,
    "ErfInv": mx.erfinv,
    "Exp": mx.exp,
    "Expm1": mx.expm1,
    "Floor": mx.floor,
    "FloorDivide": mx.floor_divide,
    "GatherMM": mx.gather_mm,
    "Greater": mx.greater,
    "GreaterEqual": mx.greater_equal,
    "Less": mx.less,
    "LessEqual": mx.less_equal,
    "Log1p": mx.log1p,
    "LogAddExp": mx.logaddexp,
    "LogicalAnd": mx.logical_and,
    "LogicalNot": mx.logical_not,
    "LogicalOr": mx.logical_or,
    "Maximum": mx.maximum,
    "Minimum": mx.minimum,
    "Multiply": mx.multiply,
    "Negative": mx.negative,
    "NotEqual": mx.not_equal,
    "Power": mx.power,
    "Remainder": mx.remainder,
    "Round": mx.round,
    "Select": mx.where,
    "Sigmoid": mx.sigmoid,
    "Sign": mx.sign,
    "Sin": mx.sin,
    "Square": mx.square,
    "StopGradient": lambda a: a,
    "Subtract": mx.subtract,
    "Tanh": mx.tanh,
}


def args(node: Node) -> Any:
    """The primitive's own arguments."""
    return node.attrs["args"]


def plain(function: Callable[..., mx.array]) -> Interpretation:
    """A primitive without arguments, that MLX has a function for."""
    return lambda node, _, *operands: function(*operands)


def matmul(node: Node, _: Any, a: mx.array, b: mx.array) -> mx.array:
    """attrs["transpose"]: b is [n, k] and the product is a · bᵀ."""
    return a @ (b.swapaxes(-1, -2) if node.attrs["transpose"] else b)


def gather(node: Node, _: Any, a: mx.array, *indices: mx.array) -> mx.array:
    """args: [axes, slice_sizes]; the output is index shape + slice sizes."""
    axes, sizes = args(node)
    if not axes:
        return a[tuple(slice(0, k) for k in sizes)].reshape(node.out.shape)
    if any(sizes[axis] != 1 for axis in axes):
        raise NotImplementedError(f"a gather of slices along an indexed axis: {node}")
    rest = [i for i in range(a.ndim) if i not in axes]
    a = a[tuple(slice(0, a.shape[i] if i in axes else sizes[i]) for i in range(a.ndim))]
    return a.transpose([*axes, *rest])[tuple(indices)].reshape(node.out.shape)


def slice_update(node: Node, _: Any, a: mx.array, update: mx.array) -> mx.array:
    """args: [max min sum prod assign, start, stop, step]."""
    kind, *where = args(node)
    window = tuple(slice(*bounds) for bounds in zip(*where, strict=True))
    if kind < 4:
        return getattr(a.at[window], ("maximum", "minimum", "add", "multiply")[kind])(update)
    a = a + mx.zeros_like(a)  # a copy: the assignment below is in place
    a[window] = update
    return a


def reduce(node: Node, _: Any, a: mx.array) -> mx.array:
    """args: [and or sum prod min max, axes]."""
    function = (mx.all, mx.any, mx.sum, mx.prod, mx.min, mx.max)[args(node)[0]]
    return function(a, args(node)[1], keepdims=True).reshape(node.out.shape).astype(node.out.dtype)


def scan(node: Node, _: Any, a: mx.array) -> mx.array:
    """args: [max min sum prod logaddexp, axis, reverse, inclusive]."""
    kind, axis, reverse, inclusive = args(node)
    function = (mx.cummax, mx.cummin, mx.cumsum, mx.cumprod, mx.logcumsumexp)[kind]
    return function(a, axis=axis, reverse=reverse, inclusive=inclusive)


def quantization(node: Node) -> dict[str, Any]:
    """The keyword arguments of mx.quantized_matmul and its relatives."""
    return {k: node.attrs[k] for k in ("group_size", "bits", "mode", "transpose")}


def quantized_matmul(node: Node, _: Any, x: mx.array, w: mx.array, scales: mx.array, biases: mx.array | None = None) -> mx.array:
    return mx.quantized_matmul(x, w, scales, biases, **quantization(node))


def gather_qmm(node: Node, _: Any, x: mx.array, w: mx.array, scales: mx.array, *rest: mx.array) -> mx.array:
    """The last two operands are the rows of x and the experts."""
    biases = rest[0] if len(rest) == 3 else None
    return mx.gather_qmm(x, w, scales, biases, lhs_indices=rest[-2], rhs_indices=rest[-1], **quantization(node))


def divide(node: Node, _: Any, a: mx.array, b: mx.array) -> mx.array:
    return a // b if a.dtype in INTEGERS else a / b


def arange(node: Node, _: Any) -> mx.array:
    start, stop, step = args(node)
    return mx.arange(start, stop, step, dtype=node.out.dtype)


def reshape(node: Node, _: Any, a: mx.array) -> mx.array:
    return a.reshape(node.out.shape)


def broadcast(node: Node, _: Any, a: mx.array, *shapes: mx.array) -> mx.array:
    return mx.broadcast_to(a, node.out.shape)


PRIMITIVES: dict[str, Interpretation] = {
    **{name: plain(function) for name, function in PLAIN.items()},
    **dict.fromkeys(RESHAPES, reshape),
    "AddMM": lambda node, _, a, b, c: mx.addmm(c, a, b, *args(node)),  # args: [alpha, beta]
    "Arange": arange,
    "ArgPartition": lambda node, _, a: mx.argpartition(a, *args(node)),  # args: [kth, axis]
    "ArgReduce": lambda node, _, a: (mx.argmin, mx.argmax)[args(node)[0]](a, args(node)[1], keepdims=True),
    "ArgSort": lambda node, _, a: mx.argsort(a, args(node)[0]),
    "AsType": lambda node, _, a: a.astype(node.out.dtype),
    "BitwiseBinary": lambda node, _, a, b: (
        (mx.bitwise_and, mx.bitwise_or, mx.bitwise_xor, mx.left_shift, mx.right_shift)[args(node)[0]](a, b)
    ),
    "Broadcast": broadcast,
    "BroadcastAxes": broadcast,
    "Concatenate": lambda node, _, *operands: mx.concatenate(list(operands), args(node)[0]),
    "Convolution": lambda node, _, a, w: (  # args: [stride, pad_lo, pad_hi, dilation, input_dilation, groups, flip]
        mx.conv_general(a, w, args(node)[0], (args(node)[1], args(node)[2]), *args(node)[3:])
    ),
    "Divide": divide,
    "Full": lambda node, _, a: mx.broadcast_to(a, node.out.shape).astype(node.out.dtype),
    "Gather": gather,
    "GatherAxis": lambda node, _, a, indices: mx.take_along_axis(a, indices, args(node)[0]),
    "GatherQMM": gather_qmm,
    "Log": lambda node, _, a: (mx.log2, mx.log10, mx.log)[args(node)[0]](a),  # args: [two, ten, e]
    "LogSumExp": lambda node, _, a: mx.logsumexp(a, -1, keepdims=True),
    "Matmul": matmul,
    "Partition": lambda node, _, a: mx.partition(a, *args(node)),  # args: [kth, axis]
    "QuantizedMatmul": quantized_matmul,
    "Reduce": reduce,
    "Scan": scan,
    "ScatterAxis": lambda node, _, a, indices, update: mx.put_along_axis(a, indices, update, args(node)[1]),  # [sum assign, axis]
    "Slice": lambda node, _, a: a[tuple(slice(*bounds) for bounds in zip(*args(node), strict=True))],  # args: [start, stop, step]
    "SliceUpdate": slice_update,
    "Softmax": lambda node, _, a: mx.softmax(a, axis=-1, precise=args(node)[0]),
    "Sort": lambda node, _, a: mx.sort(a, args(node)[0]),
    "Split": lambda node, _, a: mx.split(a, list(args(node)[0]), args(node)[1]),
    "Sqrt": lambda node, _, a: mx.rsqrt(a) if args(node)[0] else mx.sqrt(a),  # args: [reciprocal]
    "Transpose": lambda node, _, a: a.transpose(args(node)[0]),
    "View": lambda node, _, a: a.view(node.out.dtype),
}
