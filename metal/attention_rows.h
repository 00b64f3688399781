// What kernels share that attend with matrices of several rows. kv_codec.h and attention.h have to come before this.
#ifndef METALSTEP_ATTENTION_ROWS_H
#define METALSTEP_ATTENTION_ROWS_H

// What all threads know of what the rows of a run see: rows of a tile that follow one another, of one sequence.
struct ms_span {
  int lo;          // first position that any row sees, kept ones aside
  int hi;
  int whole_lo;    // positions [whole_lo, whole_hi) are seen by all of them
  int whole_hi;
  int keep_lo;
  int keep_hi;
};

inline ms_span ms_no_span() {
  ms_span s;
  s.lo = 0x7fffffff;
  s.hi = 0;
  s.whole_lo = 0;
  s.whole_hi = 0x7fffffff;
  s.keep_lo = 0x7fffffff;
  s.keep_hi = 0;
  return s;
}

// With one more row.
inline void ms_join(thread ms_span& s, ms_view v) {
  s.whole_lo = max(s.whole_lo, v.lo);
  s.whole_hi = min(s.whole_hi, v.hi);
  if (v.hi == 0) return;
  s.lo = min(s.lo, v.lo);
  s.hi = max(s.hi, v.hi);
  if (v.keep_lo == v.keep_hi) return;
  s.keep_lo = min(s.keep_lo, v.keep_lo);
  s.keep_hi = max(s.keep_hi, v.keep_hi);
}

#define MS_HALF_MOST 65504.0f

// As half: what is finite stays so.
inline half ms_half_of(float x) { return half(ms_is_finite(x) ? clamp(x, -MS_HALF_MOST, MS_HALF_MOST) : x); }

// A result, or two neighbouring ones.
inline void ms_leave_result(device float* to, float x) { *to = x; }
inline void ms_leave_result(device half* to, float x) { *to = ms_half_of(x); }
inline void ms_leave_results(device float* to, float a, float b) { *(device vec<float, 2>*)to = vec<float, 2>(a, b); }
inline void ms_leave_results(device half* to, float a, float b) { *(device vec<half, 2>*)to = vec<half, 2>(ms_half_of(a), ms_half_of(b)); }

// Over the lanes that hold one row of a tile: their numbers differ in bits that leave ms_frag_coord's row as it is.
inline float ms_row_max(float x) {
  MS_UNROLL for (ushort bit = 1; bit < 32; bit *= 2)
    if (ms_frag_coord(bit).x == 0) x = max(x, simd_shuffle_xor(x, bit));
  return x;
}
inline float ms_row_sum(float x) {
  MS_UNROLL for (ushort bit = 1; bit < 32; bit *= 2)
    if (ms_frag_coord(bit).x == 0) x += simd_shuffle_xor(x, bit);
  return x;
}

#endif
