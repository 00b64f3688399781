"""The epilogue of a linear's segment over products that lie in memory: a kernel per epilogue, four columns of a row per thread."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from metalstep.kernels import params
from metalstep.kernels.gpu.generated import named
from metalstep.kernels.gpu.linear_text import Access, Bindings, Epilogue, accesses_of, epilogue_of, row_stride
from metalstep.kernels.launch import DTYPE_BYTES, Buffer, Launch
from metalstep.kernels.linear import Segment
from metalstep.kernels.step import StepBuffers

THREADS = 256
COLUMNS = 4  # of a thread
DTYPES = {"float": "float32", "int": "int32", "half": "float16", "bfloat": "bfloat16"}


@dataclass(frozen=True)
class Products:
    """Of columns [first, first + n) of a segment, a multiple of four: float32 [rows, parts * n], part p's in columns p * n and on."""

    buffer: Buffer
    first: int
    n: int


def takes(segment: Segment) -> bool:
    """Whether a launch can run the epilogue: its loads come before its stores, and none is of a sampled row."""
    epilogue = epilogue_of(segment)
    late = any(isinstance(step, Access) and not step.store for step in epilogue.steps)
    return not late and all(i.get("rows", params.MS_ROW_SAME) != params.MS_ROW_SAMPLED for i in accesses_of(segment))


def launch(segment: Segment, products: Products, step: StepBuffers, buffer_of: Callable[[int], Buffer], max_rows: int) -> Launch:
    """Run the epilogue of a segment that this file `takes` on each row of the step. buffer_of: what a slot names."""
    epilogue, parts = epilogue_of(segment), range(len(segment.weights))
    bindings = Bindings()
    bindings.name(step.step, "MSStep")
    bindings.name(products.buffer, "float")
    constants = [params.pack("MSGpuFinishParams", n=products.n, c_row_stride=products.n * len(parts))]
    places: list[str] = []  # of the accesses, as arguments of ms_read_columns and ms_write_columns
    for index, (access, i) in enumerate(zip(_accesses(epilogue), accesses_of(segment), strict=True)):
        buffer, offset, stride = buffer_of(i["slot"]), i.get("offset", 0) + products.first, row_stride(i)
        constants.append(params.pack("MSGpuLinearAccess", offset=offset, row_stride=stride))
        whole = buffer.offset % (COLUMNS * DTYPE_BYTES[DTYPES[access.type]]) == 0 and offset % COLUMNS == 0 and stride % COLUMNS == 0
        name = bindings.name(buffer, access.type, written=access.store)
        row = f" + ulong(row) * access[{index}].row_stride" if stride else ""
        places.append(f"<{COLUMNS if whole else 1}>({name} + access[{index}].offset{row} + column")
    stores = [step for step in epilogue.steps if isinstance(step, Access)]
    lines = [
        f"[[kernel, max_total_threads_per_threadgroup({THREADS})]] void KERNEL_NAME(",
        *bindings.declared(),
        f"    constant MSGpuFinishParams* p [[buffer({len(bindings.buffers)})]],",
        "    uint3 tg [[threadgroup_position_in_grid]],",
        "    uint tid [[thread_index_in_threadgroup]]) {",
        "  constant MSGpuLinearAccess* access = (constant MSGpuLinearAccess*)(p + 1);",
        *bindings.wait(),
        f"  const uint column = (tg.x * {THREADS} + tid) * {COLUMNS};",
        "  const uint row = tg.y;",
        "  if (row >= b0->num_tokens || column >= p->n) return;",
        "  device const float* c = b1 + ulong(row) * p->c_row_stride + column;",
        *(f"  const ms_columns c{part} = ms_read_columns<{COLUMNS}>(c + {part} * p->n);" for part in parts),
        *(f"  const ms_columns l{access.index} = ms_read_columns{places[access.index]});" for access in epilogue.early),
        *(f"  ms_columns s{access.index};" for access in stores),
        f"  MS_UNROLL for (int i = 0; i < {COLUMNS}; i++) {{",
        *(f"    float r{part} = c{part}.at[i];" for part in parts),
        *(f"    float {access.register} = l{access.index}.at[i];" for access in epilogue.early),
        *(f"    {f's{step.index}.at[i] = {step.register};' if isinstance(step, Access) else step}" for step in epilogue.steps),
        "  }",
        *(f"  ms_write_columns{places[access.index]}, s{access.index});" for access in stores),
        "}",
    ]
    name, code = named("linear_finish", lines)
    grid = (-(-products.n // (THREADS * COLUMNS)), max_rows, 1)
    return Launch(name, bindings.buffers, b"".join(constants), grid=grid, threads=(THREADS, 1, 1), code=code)


def _accesses(epilogue: Epilogue) -> list[Access]:
    """In the order of their indices."""
    found = [*epilogue.early, *(step for step in epilogue.steps if isinstance(step, Access))]
    return sorted(found, key=lambda access: access.index)
