// The sampler's first launch: bias, penalties, stop tokens and masks, then maxima and sums of each part of a row.
#ifndef METALSTEP_SAMPLE_PROCESS_H
#define METALSTEP_SAMPLE_PROCESS_H
#include "sample.h"

enum ms_mark : uint {
  MS_MARK_REPEATED = 0x80000000u,
  MS_MARK_PRESENT = 0x40000000u,
  MS_MARK_COUNT = 0x3fffffffu,
};

// A thread's 16 logits: those of tokens first + 32 j.
struct ms_group {
  uint bits[MS_GROUP_TOKENS];
};

// As integers that ascend with the logits, -0 just below +0, and back: two instructions for each, where a key takes five.
inline int ms_ascending(uint bits) { return int(bits) ^ (int(bits) >> 31 & 0x7fffffff); }
inline uint ms_least_key(thread const ms_group& x) {
  int most = ms_ascending(x.bits[0]);
  MS_UNROLL for (int j = 1; j < MS_GROUP_TOKENS; j++) most = max(most, ms_ascending(x.bits[j]));
  return ms_key(uint(most ^ (most >> 31 & 0x7fffffff)));
}
inline uint ms_any_bad(thread const ms_group& x) {
  uint size = 0;
  MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++) size = max(size, x.bits[j] & 0x7fffffffu);
  if (size < 0x7f800000u) return 0;
  bool bad = false;
  MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++) bad = bad || ms_is_bad(x.bits[j]);
  return bad ? 1u : 0u;
}
inline float ms_sum_weights(thread const ms_group& x, float most, float scale) {
  float sum = 0.0f;
  MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++)
    if (x.bits[j] != MS_BITS_NEG_INFINITY) sum += ms_weight(as_type<float>(x.bits[j]) - most, scale);
  return sum;
}

inline void ms_clear_cells(threadgroup atomic_uint* cells, uint count, uint tid, uint threads) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // others may read what was there
  for (uint i = tid; i < count; i += threads) atomic_store_explicit(&cells[i], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// The first position of the history that a penalty's window takes: a window of 0 takes what the counts do not hold yet.
inline uint ms_window_start(bool used, uint window, uint counted, uint length) {
  return !used ? length : window ? length - min(window, length) : min(counted, length);
}

// Marks of a part's tokens, window by window: whether they are repeated, whether they are present, how often they
// occur. false: nothing to mark, the same for all threads.
inline bool ms_mark_history(device const MSSampling& s, device const int* history, uint length, uint part_first,
                            uint part_tokens, threadgroup atomic_uint* marks, uint tid, uint threads) {
  const bool repetition = s.repetition_penalty != 1.0f && s.repetition_penalty != 0.0f;
  const uint repeated = ms_window_start(repetition, s.repetition_window, s.counted, length);
  const uint present = ms_window_start(s.presence_penalty != 0.0f, s.presence_window, s.counted, length);
  const uint counted = ms_window_start(s.frequency_penalty != 0.0f, s.frequency_window, s.counted, length);
  const uint start = min(repeated, min(present, counted));
  if (start == length) return false;
  ms_clear_cells(marks, part_tokens, tid, threads);
  for (uint at = start + tid; at < length; at += threads) {
    const uint token = uint(history[at]) - part_first;  // a caller's own embedding, below 0, is no token
    if (token >= part_tokens) continue;
    const uint flags = (at >= repeated ? MS_MARK_REPEATED : 0u) | (at >= present ? MS_MARK_PRESENT : 0u);
    if (flags) atomic_fetch_or_explicit(&marks[token], flags, memory_order_relaxed);
    if (at >= counted) atomic_fetch_add_explicit(&marks[token], 1u, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return true;
}

// Repetition, presence, frequency, in this order. counts: what the state's counts hold; mark: what the history does.
inline uint ms_penalise(uint bits, device const MSSampling& s, uint count, uint mark) {
  const bool repetition = s.repetition_penalty != 1.0f && s.repetition_penalty != 0.0f;
  const bool repeated = (mark & MS_MARK_REPEATED) || (repetition && s.repetition_window == 0 && count != 0);
  const bool present = (mark & MS_MARK_PRESENT) ||
                       (s.presence_penalty != 0.0f && s.presence_window == 0 && (count & MS_MARK_COUNT) != 0);
  const uint times =
      (mark & MS_MARK_COUNT) + (s.frequency_penalty != 0.0f && s.frequency_window == 0 ? count & MS_MARK_COUNT : 0u);
  if (!repeated && !present && times == 0) return bits;
  float x = as_type<float>(bits);
  if (repeated) x = bits >> 31 ? x * s.repetition_penalty : x / s.repetition_penalty;
  if (present) x -= s.presence_penalty;
  if (times) x = fma(float(times), -s.frequency_penalty, x);
  return as_type<uint>(x);
}

// A part's logits after all that the row's record asks for. All threads come here. first: the token of x.bits[0].
inline void ms_process(thread ms_group& x, uint first, uint part_first, uint part_tokens, uint n,
                       thread const ms_sample_row& r, device const MSSampling& s, device const MSTokenBias* biases,
                       device const uint* masks, device const int* history, device const uint* counts,
                       threadgroup atomic_uint* cells, uint tid, uint threads) {
  const uint here = first - part_first;
  if (s.bias_count > 0) {
    ms_clear_cells(cells, part_tokens, tid, threads);
    for (uint i = tid; i < s.bias_count; i += threads) {
      const uint token = uint(biases[s.bias_first + i].token) - part_first;
      if (token < part_tokens)
        atomic_store_explicit(&cells[token], as_type<uint>(biases[s.bias_first + i].bias), memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++) {
      const uint bias = atomic_load_explicit(&cells[here + 32 * j], memory_order_relaxed);
      if (bias) x.bits[j] = as_type<uint>(as_type<float>(x.bits[j]) + as_type<float>(bias));
    }
  }
  if (r.penalised) {
    const bool marked = ms_mark_history(s, history, r.length, part_first, part_tokens, cells, tid, threads);
    MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++) {
      const uint token = first + 32 * j;
      if (token < n) {
        const uint mark = marked ? atomic_load_explicit(&cells[here + 32 * j], memory_order_relaxed) : 0u;
        x.bits[j] = ms_penalise(x.bits[j], s, counts[token], mark);
      }
    }
  }
  if (r.stopped) {
    ms_clear_cells(cells, part_tokens / 32, tid, threads);
    for (uint i = tid; i < s.stop_count; i += threads) {
      const uint token = uint(biases[s.stop_first + i].token) - part_first;
      if (token < part_tokens) atomic_fetch_or_explicit(&cells[token / 32], 1u << token % 32, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS;
                   j++) if (atomic_load_explicit(&cells[here / 32 + j], memory_order_relaxed) >> here % 32 & 1u)
        x.bits[j] = MS_BITS_NEG_INFINITY;
  }
  if (r.masked) {
    const ulong words = (n - 1) / 32 + 1;
    device const uint* mask = masks + ((s.mask ? s.mask : s.grammar) - 1) * words;
    device const uint* other = masks + ((s.grammar ? s.grammar : s.mask) - 1) * words;
    MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++) {
      const uint token = first + 32 * j;
      if (token < n && !((mask[token / 32] & other[token / 32]) >> token % 32 & 1u)) x.bits[j] = MS_BITS_NEG_INFINITY;
    }
  }
}

// The sum of a part's partial sums, one per simdgroup, in their order.
inline float ms_sum_simdgroups(threadgroup const float* sums, int simdgroups) {
  float sum = 0.0f;
  for (int i = 0; i < simdgroups; i++) sum += sums[i];
  return sum;
}

#endif
