// What the attention kernels share: which positions a row sees, where they lie, and what becomes of a finished softmax.
// Scores are in units of log2: e^x is 2^(x log2 e), and exp2 is what the hardware has.
#ifndef METALSTEP_ATTENTION_H
#define METALSTEP_ATTENTION_H

#define MS_LOG2_E 1.44269504088896340736f

// Positions [keep_lo, keep_hi), which are none unless a window leaves a gap behind them, and [lo, hi).
struct ms_view {
  int keep_lo;
  int keep_hi;
  int lo;
  int hi;
};

inline int ms_seen(ms_view v) { return (v.keep_hi - v.keep_lo) + (v.hi - v.lo); }

inline bool ms_sees(ms_view v, int position) {
  return (position >= v.lo && position < v.hi) || (position >= v.keep_lo && position < v.keep_hi);
}

// Nothing for a position or a sequence that the block tables do not have: such a row's result is NaN.
inline ms_view ms_view_of(int position, int seq, constant MSStep& step, device const MSSequence* sequences,
                          constant MSGpuAttentionParams& p) {
  ms_view v;
  v.keep_lo = 0;
  v.keep_hi = 0;
  v.lo = 0;
  v.hi = 0;
  const bool known = position >= 0 && seq >= 0 && uint(seq) < step.num_seqs &&
                     (uint(position) >> p.block_shift) < step.max_blocks;
  if (!known) return v;
  v.hi = position + 1;
  if (p.window > 0 && uint(v.hi) > p.window) v.lo = v.hi - int(p.window);
  const uint window = sequences[seq].window, keep = sequences[seq].keep;
  if (window == 0 || uint(v.hi) <= window) return v;
  const int begin = v.hi - (window > keep ? int(window - keep) : 1);  // itself at least
  if (begin <= v.lo || uint(begin) <= keep) return v;                 // no gap
  if (uint(v.lo) < keep) {
    v.keep_lo = v.lo;
    v.keep_hi = int(keep);
  }
  v.lo = begin;
  return v;
}

// Positions in tiles of MS_TILE that begin at multiples of it, each in one block: those of what is kept, then the others.
#define MS_TILE 16
#define MS_TILE_SHIFT 4

inline int ms_tiles_of(int lo, int hi) { return lo < hi ? ((hi - 1) >> MS_TILE_SHIFT) - (lo >> MS_TILE_SHIFT) + 1 : 0; }
inline int ms_kept_tiles(ms_view v) { return ms_tiles_of(v.keep_lo, v.keep_hi); }
inline int ms_tiles(ms_view v) { return ms_kept_tiles(v) + ms_tiles_of(v.lo, v.hi); }

// Where the positions of one sequence are.
struct ms_pages {
  device const int* table;  // block by position in the sequence
  ulong heads;              // kv heads: from a block to the next
  uint shift;               // log2 of the positions in a block
};

inline ms_pages ms_pages_of(device const int* table, constant MSGpuAttentionParams& p) {
  ms_pages pages;
  pages.table = table;
  pages.heads = p.num_kv_heads;
  pages.shift = p.block_shift;
  return pages;
}

// Where a position is, counted in vectors of a plane from the head's part of block 0 on.
inline ulong ms_place(ms_pages pages, int position) {
  const ulong block = ulong(uint(pages.table[position >> pages.shift]));
  return ((block * pages.heads) << pages.shift) + ulong(position & ((1 << pages.shift) - 1));
}

// Four elements; rows start at multiples of 8, so that they are aligned.
template <typename T>
inline void ms_read4(device const T* from, thread float* to) {
  const vec<T, 4> four = *(device const vec<T, 4>*)from;
  to[0] = float(four.x);
  to[1] = float(four.y);
  to[2] = float(four.z);
  to[3] = float(four.w);
}

// What a query is multiplied by so that its scores come out in log2, or in the unit that a softcap is in.
inline float ms_query_scale(constant MSGpuAttentionParams& p) {
  return p.softcap != 0.0f ? p.scale : p.scale * MS_LOG2_E;
}

inline float ms_capped(float score, float softcap) {
  return softcap != 0.0f ? precise::tanh(score / softcap) * (softcap * MS_LOG2_E) : score;
}

// 2^(x - most); nothing was seen while most is MS_NEG.
inline float ms_weight(float x, float most) { return fast::exp2(x - (most <= MS_NEG ? 0.0f : most)); }

// What sums of weighted values are multiplied by in the end; m, s: maximum and sum of the weights, which a sink joins.
inline float ms_last_factor(float m, float s, bool has_sink, float sink) {
  if (!has_sink) return 1.0f / s;
  const float logit = sink * MS_LOG2_E, most = max(m, logit), left = fast::exp2(m - most);
  return left / fma(s, left, fast::exp2(logit - most));
}

inline float ms_nan() { return as_type<float>(0x7fc00000u); }

#endif
