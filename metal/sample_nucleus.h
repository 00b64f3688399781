// Draws from a nucleus of any size: a launch weighs a row's tokens by their depth below the largest, in bins; then only
// the tokens of two bins are listed, that in which the nucleus ends and that of the drawn token.
#ifndef METALSTEP_SAMPLE_NUCLEUS_H
#define METALSTEP_SAMPLE_NUCLEUS_H
#include "sample_select.h"

// ---- weighing ---------------------------------------------------------------------------------------------------------
// Bins of a depth of 1. Tokens are as dense in depth as their sum tells, if there is no more to them than a bell: all of
// it lies within the bins, and a thousandth of the tokens in each. Nothing beyond a depth of 31 has a mass (a unit is at
// most 2^45).
inline float ms_bins_per_depth(float sum, uint vocab_size, float scale) {
  const float most = 4.0f * precise::log(float(vocab_size) / sum);
  return scale * (float(MS_DEPTH_BINS - 1) / min(max(most, 0.01f), 31.0f));
}
// Ascends as logits descend: a token's place in the order is in this bin or in one behind all before it.
inline uint ms_depth_bin(float x, float most, float bins_per_depth) {
  const float bin = (most - x) * bins_per_depth;
  return bin < float(MS_DEPTH_BINS - 1) ? uint(bin) : uint(MS_DEPTH_BINS - 1);
}

// A threadgroup's bins hold a mass as three words, of 18 bits and of what is left of each weight: so many of them that no
// sum of a few thousand leaves its word, and nobody waits for what was there before.
inline void ms_add_weight(threadgroup atomic_uint* bin, ulong mass) {
  const uint low = uint(mass) & 0x3ffffu, middle = uint(mass >> 18) & 0x3ffffu, high = uint(mass >> 36);
  atomic_fetch_add_explicit(&bin[0], low, memory_order_relaxed);
  atomic_fetch_add_explicit(&bin[1], middle, memory_order_relaxed);
  if (high) atomic_fetch_add_explicit(&bin[2], high, memory_order_relaxed);
}
inline ulong ms_weight_of(threadgroup const uint* bin) {
  return bin[0] + (ulong(bin[1]) << 18) + (ulong(bin[2]) << 36);
}
// Adds to a number of 64 bits in two words.
inline void ms_add_mass(device uint* words, ulong mass) {
#ifdef MS_CUDA
  atomicAdd((unsigned long long*)words, (unsigned long long)mass);
#else  // whoever makes the low one wrap carries
  device atomic_uint* sum = (device atomic_uint*)words;
  const uint low = uint(mass), before = atomic_fetch_add_explicit(&sum[0], low, memory_order_relaxed);
  const uint high = uint(mass >> 32) + (before + low < before ? 1u : 0u);
  if (high) atomic_fetch_add_explicit(&sum[1], high, memory_order_relaxed);
#endif
}

// ---- the bins of a row --------------------------------------------------------------------------------------------------
struct ms_depths {
  device const uint* masses;  // [MS_DEPTH_BINS] of four words: as filters see them, and as they are drawn (or 0: the same)
  float bins_per_depth;
  bool same;
};
inline ulong ms_bin_mass(thread const ms_depths& d, uint bin, bool drawn) {
  device const uint* words = d.masses + 4 * bin + (drawn && !d.same ? 2 : 0);
  return ulong(words[1]) << 32 | words[0];
}

// The first bin with which the masses come up to `wanted`, and what lies before it. false: none does.
MS_APART inline bool ms_find_depth(thread const ms_depths& d, bool drawn, ulong wanted, ms_group_memory m,
                          thread uint& bin, thread ulong& before) {
  const uint run = MS_DEPTH_BINS / (32 * m.simdgroups), first = m.tid * run;
  ulong own = 0, total;
  for (uint i = first; i < first + run; i++) own += ms_bin_mass(d, i, drawn);
  ulong at = ms_prefix(own, m, total);
  if (at < wanted && wanted <= at + own) {
    uint i = first;
    for (; at + ms_bin_mass(d, i, drawn) < wanted; i++) at += ms_bin_mass(d, i, drawn);
    m.found[0] = i;
    m.found[1] = at;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  bin = uint(m.found[0]);
  before = m.found[1];
  return wanted <= total;
}
inline ulong ms_mass_before(thread const ms_depths& d, uint bin, ms_group_memory m) {
  ulong own = 0;
  for (uint i = m.tid; i < bin; i += 32 * m.simdgroups) own += ms_bin_mass(d, i, true);
  return ms_sum(own, m);
}

inline uint ms_group_first(uint g) { return g / 32 * MS_BLOCK_TOKENS + g % 32; }
// A group's logits, or, if it is not `there`, none.
inline void ms_read_bits(thread uint* bits, thread const ms_tokens& row, uint g, bool there) {
  const uint first = ms_group_first(g), count = there ? row.count : 0;
  MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++)
    bits[j] = first + 32 * j < count ? row.words[first + 32 * j] : uint(MS_BITS_NEG_INFINITY);
}

// Makes a sorted list of a bin's tokens, if they fit; `before` are in the bins before it. false: they do not, or there
// are none.
MS_APART inline bool ms_list_bin(thread const ms_tokens& row, thread ms_tokens& list, device const uint* groups,
                        thread const ms_depths& d, uint bin, ms_group_memory m, thread uint& before) {
  const uint threads = 32 * m.simdgroups, count = ms_blocks(row.count) * 32;
  if (m.tid == 0) atomic_store_explicit(m.counter, 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // The bin's bounds: what is rounded down to it (see ms_depth_bin) lies between. The last one holds all finite depths.
  const float least = float(bin), most = bin < MS_DEPTH_BINS - 1 ? float(bin + 1) : 3.4e38f;
  uint earlier = 0;
  for (uint start = m.tid; start < count; start += threads * MS_GROUPS_AT_ONCE) {
    uint reached = 0;  // groups that have such a token, or one before
    MS_UNROLL for (uint j = 0; j < MS_GROUPS_AT_ONCE; j++) {
      const uint key = start + threads * j < count ? groups[start + threads * j] : uint(MS_KEY_NONE);
      if (key < MS_KEY_NONE && (row.most - ms_logit(key)) * d.bins_per_depth < most) reached |= 1u << j;
    }
    while (reached) {  // two of them at a time: the first one's tokens arrive while the second one's are asked for
      const uint one = start + threads * ctz(reached);
      reached &= reached - 1;
      const uint other = reached ? start + threads * ctz(reached) : one;
      const bool both = reached != 0;
      reached &= reached - 1;
      uint bits[2][MS_GROUP_TOKENS];
      ms_read_bits(bits[0], row, one, true);
      ms_read_bits(bits[1], row, other, both);
      MS_UNROLL for (int i = 0; i < 2; i++) {
        uint listed = 0;
        MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++) {
          const float depth = (row.most - as_type<float>(bits[i][j])) * d.bins_per_depth;
          earlier += depth < least ? 1u : 0u;
          listed |= depth >= least && depth < most ? 1u << j : 0u;
        }
        for (; listed; listed &= listed - 1) {  // few are
          const uint place = atomic_fetch_add_explicit(m.counter, 1u, memory_order_relaxed);
          const uint token = ms_group_first(i == 0 ? one : other) + 32 * ctz(listed);
          if (place < MS_LIST_TOKENS) m.list[place] = ulong(ms_key(row.words[token])) << 32 | token;
        }
      }
    }
  }
  before = uint(ms_sum(earlier, m));
  list = row;
  list.source = MS_SOURCE_LIST;
  list.count = atomic_load_explicit(m.counter, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (list.count == 0 || list.count > MS_LIST_TOKENS) return false;
  ms_sort_list(list.count, m);
  return true;
}

// The first of the listed tokens with which they weigh `wanted`; the last, if they weigh less: a compiler that takes sums
// apart may put a token into one bin here and into the next one there.
MS_APART inline uint ms_find_listed(thread const ms_tokens& a, ulong wanted, ms_group_memory m) {
  const uint run = (a.count - 1) / (32 * m.simdgroups) + 1, first = min(m.tid * run, a.count);
  const uint end = min(first + run, a.count);
  ulong own = 0, total;
  for (uint i = first; i < end; i++) own += ms_mass(a, m.list[i]);
  ulong at = ms_prefix(own, m, total);
  if (m.tid == 0) m.found[0] = a.count - 1;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (at < wanted && wanted <= at + own) {
    uint i = first;
    for (; at + ms_mass(a, m.list[i]) < wanted; i++) at += ms_mass(a, m.list[i]);
    m.found[0] = i;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return uint(m.found[0]);
}

// Where the nucleus of `wanted` units of mass ends. The list holds its last bin then, before which the nucleus weighs
// `before` as it is drawn; bin: its number. false: the row has to be searched.
inline bool ms_nucleus(thread const ms_tokens& row, thread ms_tokens& list, device const uint* groups,
                       thread const ms_depths& d, ulong wanted, bool through_key, ms_group_memory m,
                       thread uint& bin, thread ulong& before, thread uint& count_before) {
  ulong seen;
  if (!ms_find_depth(d, false, wanted, m, bin, seen)) return false;
  if (!ms_list_bin(row, list, groups, d, bin, m, count_before)) return false;
  const ulong last = m.list[ms_find_listed(list, wanted - seen, m)];
  list.end = through_key ? ms_through(uint(last >> 32)) : last;
  before = d.same ? seen : ms_mass_before(d, bin, m);
  return true;
}

// A draw from the nucleus that `ms_nucleus` has found, at a fraction of its mass. scale: of the distribution that is drawn
// from. rank: of the token. false: the row has to be searched.
inline bool ms_draw_listed(thread const ms_tokens& row, thread ms_tokens& list, device const uint* groups,
                           thread const ms_depths& d, float scale, ulong fraction, uint bin, ulong before,
                           uint count_before, ms_group_memory m, thread uint& token, thread uint& rank) {
  ulong own = 0;
  list.scale = scale;
  for (uint i = m.tid; i < list.count; i += 32 * m.simdgroups)
    if (m.list[i] <= list.end) own += ms_mass(list, m.list[i]);
  ulong wanted = ms_multiply_high(before + ms_sum(own, m), fraction) + 1;
  if (wanted <= before) {
    if (!ms_find_depth(d, true, wanted, m, bin, before)) return false;
    if (!ms_list_bin(row, list, groups, d, bin, m, count_before)) return false;
    list.scale = scale;
  }
  const uint found = ms_find_listed(list, wanted - before, m);
  token = uint(m.list[found]);
  rank = 1 + count_before + found;
  return true;
}

#endif
