// Draws of the sampler's second launch: among all tokens by their parts' sums, or among those that pass top_p, min_p,
// xtc and top_k. A draw inverts the cumulative distribution, in the order of tokens or of (key, index), at one number.
#ifndef METALSTEP_SAMPLE_DRAW_H
#define METALSTEP_SAMPLE_DRAW_H
#include "sample_nucleus.h"
#include "sample_select.h"

// A share of a mass; share is below 1.
inline ulong ms_share(ulong mass, float share) {
  return ms_multiply_high(mass, ulong(share * 18446744073709551616.0f));
}

// The largest key whose logit weighs at least e^limit (or, with `more`, more than that); 0: there is none.
MS_APART inline uint ms_reach(thread const ms_tokens& a, float limit, bool more) {
  if (more ? !(0.0f > limit) : !(0.0f >= limit)) return 0;
  uint reaches = ms_key(as_type<uint>(a.most)), fails = MS_KEY_NONE;
  while (fails - reaches > 1) {
    const uint middle = reaches + (fails - reaches) / 2;
    const float depth = ms_logit(middle) - a.most, weight = depth == 0.0f ? 0.0f : depth * a.scale;
    if (more ? weight > limit : weight >= limit)
      reaches = middle;
    else
      fails = middle;
  }
  return reaches;
}

// xtc: drops what is more likely than the least likely of the tokens above the threshold. Those that are left are then
// weighed relative to the largest of them: it may be far below the row's. sum: of the weights before.
MS_APART inline void ms_exclude(thread ms_tokens& a, device const uint* groups, float threshold, float sum,
                       ms_group_memory m) {
  const uint reach = ms_reach(a, threshold > 0.0f ? precise::log(threshold * sum) : -3.4e38f, true);
  uint last = 0;
  ulong at;
  if (a.source == MS_SOURCE_LIST) {
    for (uint i = m.tid; i < a.count; i += 32 * m.simdgroups)
      if (ms_token(a, m.list, i, at) && uint(at >> 32) <= reach) last = max(last, uint(at >> 32));
  } else {
    for (uint g = m.tid; g < ms_blocks(a.count) * 32; g += 32 * m.simdgroups) {
      if (groups[g] > reach) continue;
      ms_places places;
      ms_read_group(places, a.words, a.count, g);
      MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++)
        if (uint(places.at[j] >> 32) <= reach && ms_is_left(a, places.at[j]))
          last = max(last, uint(places.at[j] >> 32));
    }
  }
  a.drop = ms_largest(last, m);
  if (a.drop == 0) return;
  uint largest = a.drop;
  for (uint i = 0; i < a.specials; i++) {
    const uint token = uint(a.special[i].token);
    if (token >= a.vocab_size) continue;
    const uint key = ms_key(a.words[token]);
    if (key < largest && (ulong(key) << 32 | token) <= a.end) largest = key;
  }
  a.most = ms_logit(largest);
}

// A draw among all tokens that are left of a row: the part by the parts' masses, then the token in it.
MS_APART inline uint ms_draw_any(thread const ms_tokens& row, device const MSSampling& s, device const ulong* masses,
                        uint part_tokens, ms_group_memory m) {
  const uint threads = 32 * m.simdgroups, parts = (row.count - 1) / part_tokens + 1;
  const uint runs = (parts - 1) / threads + 1, first_part = min(m.tid * runs, parts),
             end_part = min(first_part + runs, parts);
  ulong own = 0, total, place;
  for (uint i = first_part; i < end_part; i++) own += masses[i];
  ulong at = ms_prefix(own, m, total);
  const ulong target = ms_multiply_high(total, ms_philox(s, 0) << 11);
  if (at <= target && target < at + own) {
    uint i = first_part;
    for (; at + masses[i] <= target; i++) at += masses[i];
    m.found[0] = i;
    m.found[1] = target - at;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint part = uint(m.found[0]);
  const ulong rest = m.found[1];
  const uint run = part_tokens / threads, first = min(part * part_tokens + m.tid * run, row.count);
  const uint end = min(first + run, row.count);
  uint last = 0;  // 1 + the last token with a mass: a part's sum is a little off the sum of its masses
  own = 0;
  for (uint i = first; i < end; i++) {
    const ulong mass = ms_token(row, m.list, i, place) ? ms_mass(row, place) : 0;
    own += mass;
    if (mass) last = i + 1;
  }
  last = ms_largest(last, m);
  at = ms_prefix(own, m, total);
  if (rest >= total) return max(last, 1u) - 1;
  if (at <= rest && rest < at + own) {
    for (uint i = first; i < end; i++) {
      at += ms_token(row, m.list, i, place) ? ms_mass(row, place) : 0;
      if (at > rest) {
        m.found[2] = i;
        break;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return uint(m.found[2]);
}

// The parts' masses of the tokens that are left of a row.
MS_APART inline void ms_weigh_parts(thread const ms_tokens& row, device ulong* masses, uint part_tokens,
                           ms_group_memory m) {
  const uint part_groups = part_tokens / MS_GROUP_TOKENS, groups = ms_blocks(row.count) * 32;
  for (uint part = m.sg; part * part_groups < groups; part += m.simdgroups) {
    ulong mass = 0;
    for (uint g = part * part_groups + m.lane; g < min((part + 1) * part_groups, groups); g += 32) {
      ms_places places;
      ms_read_group(places, row.words, row.count, g);
      MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++)
        if (ms_is_left(row, places.at[j])) mass += ms_mass(row, places.at[j]);
    }
    for (ushort d = 16; d > 0; d /= 2) {
      const uint low = simd_shuffle_xor(uint(mass), d), high = simd_shuffle_xor(uint(mass >> 32), d);
      mass += ulong(high) << 32 | low;
    }
    if (m.lane == 0) masses[part] = mass;
  }
  threadgroup_barrier(mem_flags::mem_device);
}

// One token of a row's logits, by its temperature and filters. all: the row, all tokens, weighed by its largest and
// r.scale. groups: their least keys. sum: of the weights that filters see, or (without any) of those to draw by.
// depths: of a row that is weighed. rank: of the token, or 0 where that is not known.
MS_APART inline uint ms_draw(thread ms_tokens& all, thread const ms_sample_row& r, device const MSSampling& s,
                    device const uint* groups, float sum, device ulong* masses, uint part_tokens,
                    thread const ms_depths& depths, ms_group_memory m, thread uint& rank) {
  rank = 0;
  const bool tempered_first = (s.flags & MS_SAMPLE_TEMPERATURE_FIRST) != 0, min_p = s.min_p > 0.0f;
  const bool nucleus_first = s.top_p < 1.0f && (!tempered_first || !(min_p || r.top_k));
  const bool nucleus_last = s.top_p < 1.0f && !nucleus_first;
  const float least_p = min_p ? precise::log(s.min_p) : 0.0f;
  const uint keep = max(s.min_keep, 1u);
  const uint least = ms_key(as_type<uint>(all.most));
  bool xtc = r.xtc;
  ulong mass = ulong(sum * all.unit), dropped = 0;
  // 1. xtc where nothing comes before it.
  if (r.xtc_first) {
    ms_exclude(all, groups, s.xtc_threshold, sum, m);
    xtc = false;
    dropped = all.drop ? ms_count_before(all, groups, ulong(all.drop) << 32, m) : 0;
    if (nucleus_first) mass = ms_total(all, groups, true, m);
  }
  if (!(s.top_p < 1.0f || min_p || r.top_k || xtc)) {
    all.scale = r.inverse;
    if (r.xtc_first) ms_weigh_parts(all, masses, part_tokens, m);
    return ms_draw_any(all, s, masses, part_tokens, m);
  }
  // 2. Bounds of what passes. The tokens within them are listed; if they do not fit, filters read the row.
  ulong reach = all.end;
  if (min_p) {
    reach = ms_through(ms_reach(all, least_p, false));
    const ulong kept = keep > 1 ? ms_bound(groups, all.count, least, keep + dropped, m) : 0;
    all.end = ms_earlier(all.end, ms_later(reach, kept));
  }
  if (r.top_k && !xtc) all.end = ms_earlier(all.end, ms_bound(groups, all.count, least, r.top_k + dropped, m));
  ms_tokens a = all;
  if (!nucleus_first) ms_list(a, groups, 0, a.end, m);
  // 3. A nucleus of all tokens.
  if (nucleus_first) {
    const ulong wanted = ms_later(ms_share(mass, s.top_p), 1);
    uint bin, earlier, token;
    ulong before;
    const bool found = r.weighed && ms_nucleus(all, a, groups, depths, wanted, !tempered_first, m, bin, before, earlier);
    const ulong end = a.end;
    if (found && !(min_p || r.top_k || xtc) &&
        ms_draw_listed(all, a, groups, depths, r.inverse, ms_philox(s, 0) << 11, bin, before, earlier, m, token, rank))
      return token;
    a = all;
    a.end = ms_earlier(
        a.end, found ? end : ms_select(a, groups, least, wanted, true, tempered_first ? MS_TO_TOKEN : MS_TO_KEY, m));
    ms_list(a, groups, 0, a.end, m);
  }
  // 4. min_p, and top_k unless xtc comes first.
  if (min_p) {
    const ulong kept = keep > 1 ? ms_select(a, groups, least, keep, false, MS_TO_TOKEN, m) : 0;
    a.end = ms_earlier(a.end, ms_later(reach, kept));
  }
  if (r.top_k && !xtc) a.end = ms_earlier(a.end, ms_select(a, groups, least, r.top_k, false, MS_TO_TOKEN, m));
  // 5. xtc, and what comes after it.
  if (xtc) {
    ms_exclude(a, groups, s.xtc_threshold, float(ms_total(a, groups, true, m)) / a.unit, m);
    if (r.top_k) a.end = ms_earlier(a.end, ms_select(a, groups, least, r.top_k, false, MS_TO_TOKEN, m));
  }
  if (nucleus_last) {
    const ulong wanted = ms_later(ms_share(ms_total(a, groups, true, m), s.top_p), 1);
    a.end = ms_earlier(a.end, ms_select(a, groups, least, wanted, true, MS_TO_TOKEN, m));
  }
  // 6. The draw.
  a.scale = r.inverse;
  const ulong target = ms_multiply_high(ms_total(a, groups, true, m), ms_philox(s, 0) << 11);
  return uint(ms_select(a, groups, least, target + 1, true, MS_TO_TOKEN, m));
}

#endif
