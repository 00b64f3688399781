// Weights as float16 matrices, for a library that multiplies those. kernels/gpu/linear_library.py writes the kernels, one per set
// of formats, from what is here. Reference: kernels/linear.py.
//
// A weight is one run of chunks of C elements, read and written by consecutive threads: nothing in here knows its rows.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"
#include "linear_weights.h"

// A thread's chunks of a weight: `first` + tid and every THREADS-th after it. Of those behind the last one, that one.
template <int C, int COUNT, typename Weight>
struct ms_weight_run {
  typename ms_chunk_of<Weight, C>::type chunk[COUNT];
};

template <int THREADS, int C, int COUNT, typename Weight>
inline void ms_read_run(thread ms_weight_run<C, COUNT, Weight>& run, Weight weight, uint first, uint chunks, uint tid) {
  MS_UNROLL for (int i = 0; i < COUNT; i++)
    ms_read(run.chunk[i], weight, min(first + i * THREADS + tid, chunks - 1) * C, C);
}

inline uint ms_half_bits(float a, float b) { return as_type<uint>(half2(half(a), half(b))); }

// out: the weight's first element, at a multiple of 16 bytes.
template <int THREADS, int C, int COUNT, typename Weight>
inline void ms_write_run(
    device half* out, thread const ms_weight_run<C, COUNT, Weight>& run, uint first, uint chunks, uint tid) {
  static_assert(C % 8 == 0, "16 bytes are written at once");
  MS_UNROLL for (int i = 0; i < COUNT; i++) {
    const uint at = first + i * THREADS + tid;
    if (at >= chunks) continue;
    device vec<uint, 4>* to = (device vec<uint, 4>*)(out + ulong(at) * C);
    MS_UNROLL for (int e = 0; e < C; e += 8)
      to[e / 8] = vec<uint, 4>(
          ms_half_bits(ms_value(run.chunk[i], e), ms_value(run.chunk[i], e + 1)),
          ms_half_bits(ms_value(run.chunk[i], e + 2), ms_value(run.chunk[i], e + 3)),
          ms_half_bits(ms_value(run.chunk[i], e + 4), ms_value(run.chunk[i], e + 5)),
          ms_half_bits(ms_value(run.chunk[i], e + 6), ms_value(run.chunk[i], e + 7)));
  }
}
