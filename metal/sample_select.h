// Exact selections among a row's tokens: the shortest front of the order (key, index) that holds a count or a mass. Few
// tokens are listed and sorted; a row never is: there, histograms lead to few tokens, or by digits to the very one.
// Masses are integers, so that sums do not depend on who adds first.
#ifndef METALSTEP_SAMPLE_SELECT_H
#define METALSTEP_SAMPLE_SELECT_H
#include "sample.h"

// Memory of a threadgroup, and a thread's place in it. Bins lie in the list's place: who has a list needs none.
struct ms_group_memory {
  threadgroup ulong* list;        // [MS_LIST_TOKENS], key << 32 | token
  threadgroup atomic_uint* low;   // [MS_BINS]
  threadgroup atomic_uint* high;  // [MS_BINS]
  threadgroup ulong* sums;        // [simdgroups]
  threadgroup ulong* found;       // [4]
  threadgroup atomic_uint* counter;
  uint tid;
  uint lane;
  uint sg;
  uint simdgroups;  // up to 32
};

enum ms_source {
  MS_SOURCE_LIST = 0,  // the list's first `count`, in order
  MS_SOURCE_ROW = 1,   // [count] logits
  MS_SOURCE_KEYS = 2,  // [count] keys
};

// The tokens that are left: of the front through `end`, without those before `drop` that are not special. Their weights
// are e^((x - most) * scale).
struct ms_tokens {
  device const uint* words;
  uint count;
  int source;
  uint vocab_size;
  ulong end;
  uint drop;  // a key; 0: none
  device const MSTokenBias* special;
  uint specials;
  float most;
  float scale;
  float unit;  // of masses: how many are 1. All tokens together are less than 2^63
};

// ---- over a threadgroup ---------------------------------------------------------------------------------------------
// The last lane's value of each simdgroup, that of simdgroup i to all lanes i; `none` to those that have no simdgroup.
inline ulong ms_exchange(ulong value, ulong none, ms_group_memory m) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // others may read what was there
  if (m.lane == 31) m.sums[m.sg] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return m.lane < m.simdgroups ? m.sums[m.lane] : none;
}
inline ulong ms_lane(ulong value, ushort lane) {
  return ulong(simd_shuffle(uint(value >> 32), lane)) << 32 | simd_shuffle(uint(value), lane);
}
// The sum of the values of the lanes up to this one.
inline ulong ms_simd_prefix(ulong sum, uint lane) {
  MS_UNROLL for (ushort d = 1; d < 32; d *= 2) {
    const uint low = simd_shuffle_up(uint(sum), d), high = simd_shuffle_up(uint(sum >> 32), d);
    if (lane >= d) sum += ulong(high) << 32 | low;
  }
  return sum;
}
// The sum of the values of the threads before this one, and of all.
MS_APART inline ulong ms_prefix(ulong value, ms_group_memory m, thread ulong& total) {
  const ulong sum = ms_simd_prefix(value, m.lane);
  const ulong sums = ms_simd_prefix(ms_exchange(sum, 0, m), m.lane);
  total = ms_lane(sums, 31);
  const ulong before = ms_lane(sums, ushort(max(m.sg, 1u) - 1));
  return (m.sg > 0 ? before : 0) + sum - value;
}
inline ulong ms_sum(ulong value, ms_group_memory m) {
  ulong total;
  ms_prefix(value, m, total);
  return total;
}
inline uint ms_least(uint value, ms_group_memory m) {
  return simd_min(uint(ms_exchange(simd_min(value), 0xffffffffu, m)));
}
inline uint ms_largest(uint value, ms_group_memory m) { return ~ms_least(~value, m); }

// ---- tokens ---------------------------------------------------------------------------------------------------------
inline bool ms_is_left(thread const ms_tokens& a, ulong at) {
  if (at > a.end) return false;
  if (uint(at >> 32) >= a.drop) return true;
  for (uint j = 0; j < a.specials; j++)
    if (uint(a.special[j].token) == uint(at)) return true;
  return false;
}
// The i-th token's place in the order; false: it is not left.
inline bool ms_token(thread const ms_tokens& a, threadgroup const ulong* list, uint i, thread ulong& at) {
  if (a.source == MS_SOURCE_LIST) {
    at = list[i];
  } else {
    const uint word = a.words[i];
    at = ulong(a.source == MS_SOURCE_ROW ? ms_key(word) : word) << 32 | i;
  }
  return ms_is_left(a, at);
}
inline ulong ms_mass(thread const ms_tokens& a, ulong at) {
  return ulong(ms_weight(ms_logit(uint(at >> 32)) - a.most, a.scale) * a.unit);
}

// 64 bits in two words: whoever makes the low one wrap carries.
inline void ms_add(ms_group_memory m, uint bin, ulong value) {
  const uint low = uint(value), before = atomic_fetch_add_explicit(&m.low[bin], low, memory_order_relaxed);
  const uint high = uint(value >> 32) + (before + low < before ? 1u : 0u);
  if (high) atomic_fetch_add_explicit(&m.high[bin], high, memory_order_relaxed);
}
inline ulong ms_bin(ms_group_memory m, uint bin) {
  return ulong(atomic_load_explicit(&m.high[bin], memory_order_relaxed)) << 32 |
         atomic_load_explicit(&m.low[bin], memory_order_relaxed);
}

inline void ms_clear_bins(ms_group_memory m) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // others may read the list
  for (uint i = m.tid; i < MS_BINS; i += 32 * m.simdgroups) {
    atomic_store_explicit(&m.low[i], 0u, memory_order_relaxed);
    atomic_store_explicit(&m.high[i], 0u, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// The first bin with which the sum comes up to `wanted`: the bin, what lies before it, what it holds. false: none does.
inline bool ms_find_bin(ulong wanted, ms_group_memory m, thread uint& bin, thread ulong& before,
                        thread ulong& holds) {
  const uint bins = MS_BINS / (32 * m.simdgroups), first = m.tid * bins;
  ulong own = 0, total;
  for (uint i = 0; i < bins; i++) own += ms_bin(m, first + i);
  ulong at = ms_prefix(own, m, total);
  if (at < wanted && wanted <= at + own) {
    uint i = first;
    for (; at + ms_bin(m, i) < wanted; i++) at += ms_bin(m, i);
    m.found[0] = i;
    m.found[1] = at;
    m.found[2] = ms_bin(m, i);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  bin = uint(m.found[0]);
  before = m.found[1];
  holds = m.found[2];
  return wanted <= total;
}

enum ms_precision {
  MS_TO_TOKEN = 0,  // the very token
  MS_TO_KEY = 1,    // and all that are as likely
  MS_TO_ABOUT = 2,  // and all whose keys have the same 22 high bits
};

// The last token of the shortest front that holds `wanted` >= 1 tokens, or units of mass; `end` where all hold less.
// Digit by digit, with a pass for each.
MS_APART inline ulong ms_select_digits(thread const ms_tokens& a, ulong wanted, bool weighed, int precision,
                              ms_group_memory m) {
  const uint threads = 32 * m.simdgroups;
  uint known = 64, low = 64 - MS_DIGIT_BITS;  // bits of a place are known from here up; this digit's lowest
  ulong prefix = 0, at;                       // what is known
  for (;;) {
    ms_clear_bins(m);
    const uint mask = (1u << (known - low)) - 1u;
    for (uint i = m.tid; i < a.count; i += threads * MS_GROUP_TOKENS) {
      uint words[MS_GROUP_TOKENS];  // read together
      MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++)
        words[j] = i + threads * j < a.count ? a.words[i + threads * j] : 0xffffffffu;
      MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++) {
        at = ulong(a.source == MS_SOURCE_ROW ? ms_key(words[j]) : words[j]) << 32 | (i + threads * j);
        if (ms_is_left(a, at) && (known == 64 || at >> known == prefix))
          ms_add(m, uint(at >> low) & mask, weighed ? ms_mass(a, at) : 1);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint bin;
    ulong before, holds;
    if (!ms_find_bin(wanted, m, bin, before, holds)) return a.end;
    wanted -= before;
    prefix = prefix << (known - low) | bin;
    if (low == 0) return prefix;
    if (precision == MS_TO_ABOUT && low < 44) return ((prefix + 1) << low) - 1;
    known = low;
    if (low > 32) {
      low = max(low - MS_DIGIT_BITS, 32u);
      continue;
    }
    if (low == 32) {
      // The key is known. Of equal ones, which are equally heavy, it is the one of this number.
      if (precision == MS_TO_KEY) return ms_through(uint(prefix));
      const ulong each = weighed ? ms_mass(a, prefix << 32) : 1;
      wanted = (wanted + each - 1) / each;
      weighed = false;
      if (holds == each) {
        for (uint i = m.tid; i < a.count; i += threads)
          if (ms_token(a, m.list, i, at) && at >> 32 == prefix) m.found[3] = at;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        return m.found[3];
      }
      known = 32 - clz(a.vocab_size - 1);
      prefix <<= 32 - known;
    }
    low = known > MS_DIGIT_BITS ? known - MS_DIGIT_BITS : 0;
  }
}

// ---- rows by their groups: most of them have nothing among the largest ----------------------------------------------
// The places of a group's tokens; none behind the last.
struct ms_places {
  ulong at[MS_GROUP_TOKENS];
};
inline void ms_read_group(thread ms_places& places, device const uint* logits, uint vocab_size, uint g) {
  const uint first = g / 32 * MS_BLOCK_TOKENS + g % 32;
  MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++) {
    const uint token = first + 32 * j, bits = token < vocab_size ? logits[token] : uint(MS_BITS_NEG_INFINITY);
    places.at[j] = ulong(ms_key(bits)) << 32 | token;
  }
}

// The mass, or the count, of the tokens that are left.
MS_APART inline ulong ms_total(thread const ms_tokens& a, device const uint* groups, bool weighed, ms_group_memory m) {
  ulong sum = 0, at;
  if (a.source == MS_SOURCE_LIST) {
    for (uint i = m.tid; i < a.count; i += 32 * m.simdgroups)
      if (ms_token(a, m.list, i, at)) sum += weighed ? ms_mass(a, at) : 1;
  } else {
    for (uint g = m.tid; g < ms_blocks(a.count) * 32; g += 32 * m.simdgroups) {
      if (groups[g] > a.end >> 32) continue;
      ms_places places;
      ms_read_group(places, a.words, a.count, g);
      MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++)
        if (ms_is_left(a, places.at[j])) sum += weighed ? ms_mass(a, places.at[j]) : 1;
    }
  }
  return ms_sum(sum, m);
}

// Ascending, by bitonic exchanges. Those of up to 64 places in a row stay within a simdgroup.
MS_APART inline void ms_sort_list(uint count, ms_group_memory m) {
  const uint threads = 32 * m.simdgroups;
  uint size = 2;
  while (size < count) size *= 2;
  for (uint i = count + m.tid; i < size; i += threads) m.list[i] = 0xffffffffffffffffu;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint span = 2; span <= size; span *= 2) {
    for (uint stride = span / 2; stride > 0; stride /= 2) {
      for (uint i = m.tid; i < size / 2; i += threads) {
        const uint one = 2 * i - (i & (stride - 1)), other = one + stride;
        const ulong x = m.list[one], y = m.list[other];
        if ((x > y) == ((one & span) == 0)) {
          m.list[one] = y;
          m.list[other] = x;
        }
      }
      // The next exchanges are over span (with stride 1 behind this) or over half the stride.
      if ((stride > 1 ? stride : span) > 32)
        threadgroup_barrier(mem_flags::mem_threadgroup);
      else
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Makes a sorted list of the row's tokens from `first` to `limit`, if they fit. Else `a` stays the row.
MS_APART inline bool ms_list(thread ms_tokens& a, device const uint* groups, ulong first, ulong limit,
                    ms_group_memory m) {
  if (m.tid == 0) atomic_store_explicit(m.counter, 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint g = m.tid; g < ms_blocks(a.count) * 32; g += 32 * m.simdgroups) {
    if (groups[g] > limit >> 32) continue;
    ms_places places;
    ms_read_group(places, a.words, a.count, g);
    MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++) {
      if (places.at[j] >= first && places.at[j] <= limit && ms_is_left(a, places.at[j])) {
        const uint place = atomic_fetch_add_explicit(m.counter, 1u, memory_order_relaxed);
        if (place < MS_LIST_TOKENS) m.list[place] = places.at[j];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint count = atomic_load_explicit(m.counter, memory_order_relaxed);
  if (count <= MS_LIST_TOKENS) {
    a.source = MS_SOURCE_LIST;
    a.count = count;
    ms_sort_list(count, m);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return a.source == MS_SOURCE_LIST;
}

// As ms_select_digits, of a list.
inline ulong ms_select_listed(thread const ms_tokens& a, ulong wanted, bool weighed, int precision,
                              ms_group_memory m) {
  const uint run = a.count / (32 * m.simdgroups) + 1, first = min(m.tid * run, a.count);
  const uint end = min(first + run, a.count);
  ulong own = 0, total, place;
  for (uint i = first; i < end; i++)
    if (ms_token(a, m.list, i, place)) own += weighed ? ms_mass(a, place) : 1;
  ulong at = ms_prefix(own, m, total);
  if (at < wanted && wanted <= at + own) {
    for (uint i = first; at < wanted; i++)
      if (ms_token(a, m.list, i, place)) at += weighed ? ms_mass(a, place) : 1;
    m.found[0] = place;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (wanted > total) return a.end;
  return precision == MS_TO_KEY ? ms_through(uint(m.found[0] >> 32)) : m.found[0];
}

// As ms_select_digits, of a list or of a row whose least key this is: mostly two passes, the histogram's and that which
// lists the tokens of the bin. The list is then another.
MS_APART inline ulong ms_select(thread const ms_tokens& a, device const uint* groups, uint least, ulong wanted, bool weighed,
                       int precision, ms_group_memory m) {
  if (a.source == MS_SOURCE_LIST) return ms_select_listed(a, wanted, weighed, precision, m);
  ms_clear_bins(m);
  for (uint g = m.tid; g < ms_blocks(a.count) * 32; g += 32 * m.simdgroups) {
    if (groups[g] > a.end >> 32 || (groups[g] - least) >> MS_BOUND_BITS >= MS_BINS) continue;
    ms_places places;
    ms_read_group(places, a.words, a.count, g);
    MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++) {
      const uint bin = (uint(places.at[j] >> 32) - least) >> MS_BOUND_BITS;
      if (bin < MS_BINS && ms_is_left(a, places.at[j])) ms_add(m, bin, weighed ? ms_mass(a, places.at[j]) : 1);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint bin;
  ulong before, holds;
  if (ms_find_bin(wanted, m, bin, before, holds)) {
    ms_tokens some = a;
    const ulong first = (ulong(least) + (ulong(bin) << MS_BOUND_BITS)) << 32;
    if (ms_list(some, groups, first, first + ((1ul << MS_BOUND_BITS) << 32) - 1, m))
      return ms_select_listed(some, wanted - before, weighed, precision, m);
  }
  return ms_select_digits(a, wanted, weighed, precision, m);
}

// How many logits come before this place in the order.
MS_APART inline uint ms_count_before(thread const ms_tokens& row, device const uint* groups, ulong place,
                            ms_group_memory m) {
  ulong count = 0;
  for (uint g = m.tid; g < ms_blocks(row.count) * 32; g += 32 * m.simdgroups) {
    if (groups[g] > place >> 32) continue;
    ms_places places;
    ms_read_group(places, row.words, row.count, g);
    MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++) count += places.at[j] < place ? 1 : 0;
  }
  return uint(ms_sum(count, m));
}

// A place that at least `wanted` of a row's logits reach, and not many more: what their groups' largest reach. least:
// the row's least key, from which most groups' differ by less than eight octaves: 2048 bins.
MS_APART inline ulong ms_bound(device const uint* groups, uint vocab_size, uint least, ulong wanted, ms_group_memory m) {
  const uint count = ms_blocks(vocab_size) * 32;
  ms_clear_bins(m);
  for (uint g = m.tid; g < count; g += 32 * m.simdgroups) {
    const uint key = groups[g], bin = (key - least) >> MS_BOUND_BITS;
    if (key < MS_KEY_NONE && bin < MS_BINS) atomic_fetch_add_explicit(&m.low[bin], 1u, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint bin;
  ulong before, holds;
  if (ms_find_bin(wanted, m, bin, before, holds)) 
    return ((ulong(least) + ((bin + 1) << MS_BOUND_BITS)) << 32) - 1;
  ms_tokens keys;
  keys.words = groups;
  keys.count = count;
  keys.source = MS_SOURCE_KEYS;
  keys.vocab_size = vocab_size;
  keys.end = (ulong(MS_KEY_NONE) << 32) - 1;
  keys.drop = 0;
  keys.specials = 0;
  return ms_select_digits(keys, wanted, false, MS_TO_ABOUT, m);
}

#endif
