// Sampling in three launches: threadgroups process the parts of all rows, then they weigh those rows that draw from a
// nucleus, then one threadgroup per row ends it. Results do not depend on the order of threads, nor a row's on its batch.
// Each reads what the step asks for before it waits for the launch in front of it. Reference: kernels/sample.py.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"
#include "sample.h"
#include "sample_draw.h"
#include "sample_process.h"

// A threadgroup per part of SIMDGROUPS * 512 tokens and per row.
template <int SIMDGROUPS>
[[kernel, max_total_threads_per_threadgroup(SIMDGROUPS * 32)]] void sample_process(
    device const MSStep* step [[buffer(0)]],
    device uint* logits [[buffer(1)]],                // float32 [num_sampled, vocab_size]
    device const MSSampling* sampling [[buffer(2)]],  // [num_sampled]
    device const int* positions [[buffer(3)]],
    device const uint* sampled_rows [[buffer(4)]],
    device const MSTokenBias* biases [[buffer(5)]],
    device const uint* masks [[buffer(6)]],
    device const int* history [[buffer(7)]],
    device const uint* counts [[buffer(8)]],
    device uint* workspace [[buffer(9)]],
    constant MSSampleParams& p [[buffer(10)]],
    uint3 group [[threadgroup_position_in_grid]],  // part, row
    uint tid [[thread_index_in_threadgroup]],
    uint sg [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr int PART = SIMDGROUPS * MS_BLOCK_TOKENS;
  threadgroup uint cells[PART];
  threadgroup uint keys[SIMDGROUPS];
  threadgroup uint own_keys[SIMDGROUPS];
  threadgroup uint firsts[SIMDGROUPS];
  threadgroup uint bads[SIMDGROUPS];
  threadgroup float own_sums[SIMDGROUPS];
  threadgroup float sums[SIMDGROUPS];
  threadgroup float tempered[SIMDGROUPS];
  const uint row = group.y, n = p.vocab_size;
  if (row >= step->num_sampled) {
    MS_WAIT_PREVIOUS(logits);
    return;
  }
  device const MSSampling& s = sampling[row];
  const ms_sample_row r = ms_read_row(s, *step, p, positions, sampled_rows, row);
  MS_WAIT_PREVIOUS(logits);
  workspace = ms_waited(workspace);
  MS_LAUNCH_NEXT;
  const ms_workspace w = ms_row_workspace(workspace, n, PART, row);
  if (r.weighed)
    for (uint i = group.x * SIMDGROUPS * 32 + tid; i < 4 * MS_DEPTH_BINS; i += ms_parts(n, PART) * SIMDGROUPS * 32) w.bins[i] = 0;
  const uint part_first = group.x * PART, first = part_first + sg * MS_BLOCK_TOKENS + lane;
  const uint own_group = (group.x * SIMDGROUPS + sg) * 32 + lane;
  const bool has_group = own_group < ms_blocks(n) * 32;
  device uint* from = logits + ulong(row) * n;
  // 1. The model's own logits; none behind the last.
  ms_group x;
  MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++)
    x.bits[j] = first + 32 * j < n ? from[first + 32 * j] : MS_BITS_NEG_INFINITY;
  uint key = ms_least_key(x), bad = ms_any_bad(x), first_token = 0xffffffffu;
  if (has_group) w.own[own_group] = key;
  uint own = simd_min(key);
  if (lane == 0) own_keys[sg] = own;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = 0; i < SIMDGROUPS; i++) own = min(own, own_keys[i]);
  // 2. The processed ones.
  if (r.changes) {
    const float own_sum = simd_sum(r.own_sum && own < MS_KEY_NONE ? ms_sum_weights(x, ms_logit(own), 1.0f) : 0.0f);
    if (lane == 0) own_sums[sg] = own_sum;
    const int state = max(s.state, 0);
    ms_process(x, first, part_first, PART, n, r, s, biases, masks, history + ulong(state) * p.history_stride,
               counts + ulong(state) * n, (threadgroup atomic_uint*)cells, tid, SIMDGROUPS * 32);
    device uint* to = r.in_place ? from : w.logits;
    MS_UNROLL for (int j = 0; j < MS_GROUP_TOKENS; j++)
      if (first + 32 * j < n) to[first + 32 * j] = x.bits[j];
    key = ms_least_key(x);
    bad |= ms_any_bad(x);
    if (has_group) w.given[own_group] = key;
  }
  // 3. Their maximum, the first token that has it, and sums.
  uint least = simd_min(key);
  if (lane == 0) keys[sg] = least;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = 0; i < SIMDGROUPS; i++) least = min(least, keys[i]);
  if (key == least)
    MS_UNROLL for (int j = MS_GROUP_TOKENS - 1; j >= 0; j--)
      if (ms_key(x.bits[j]) == least) first_token = first + 32 * j;
  const float most = ms_logit(least);
  const bool some = least < MS_KEY_NONE;
  const float sum = simd_sum(some && r.sum ? ms_sum_weights(x, most, 1.0f) : 0.0f);
  const float cool = simd_sum(some && r.tempered ? ms_sum_weights(x, most, r.inverse) : 0.0f);
  first_token = simd_min(first_token);
  bad = simd_max(bad);
  if (lane == 0) {
    firsts[sg] = first_token;
    bads[sg] = bad;
    sums[sg] = sum;
    tempered[sg] = cool;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (tid > 0) return;
  device ms_part& part = w.parts[group.x];
  part.own_key = own;
  part.key = least;
  for (int i = 0; i < SIMDGROUPS; i++) {
    first_token = min(first_token, firsts[i]);
    bad |= bads[i];
  }
  part.first = first_token;
  part.bad = bad;
  part.own_sum = r.own_sum ? ms_sum_simdgroups(own_sums, SIMDGROUPS) : 0.0f;
  part.sum = ms_sum_simdgroups(sums, SIMDGROUPS);
  part.tempered = ms_sum_simdgroups(tempered, SIMDGROUPS);
}

// Adds the weights of the tokens of a row that is weighed to its bins. A threadgroup per SIMDGROUPS * 512 tokens and per
// row. PART: tokens of a part in the first launch.
template <int SIMDGROUPS, int PART>
[[kernel, max_total_threads_per_threadgroup(SIMDGROUPS * 32)]] void sample_weigh(
    device const MSStep* step [[buffer(0)]],
    device const uint* logits [[buffer(1)]],
    device const MSSampling* sampling [[buffer(2)]],
    device const int* positions [[buffer(3)]],
    device const uint* sampled_rows [[buffer(4)]],
    device uint* workspace [[buffer(5)]],
    constant MSSampleParams& p [[buffer(6)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint tid [[thread_index_in_threadgroup]],
    uint sg [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint bins[6 * MS_DEPTH_BINS];
  const uint row = group.y, n = p.vocab_size;
  if (row >= step->num_sampled) {
    MS_WAIT_PREVIOUS(workspace);
    return;
  }
  device const MSSampling& s = sampling[row];
  const ms_sample_row r = ms_read_row(s, *step, p, positions, sampled_rows, row);
  MS_WAIT_PREVIOUS(workspace);
  logits = ms_waited(logits);
  MS_LAUNCH_NEXT;
  if (!r.weighed) return;
  for (uint i = tid; i < 6 * MS_DEPTH_BINS; i += SIMDGROUPS * 32) bins[i] = 0;
  const ms_workspace w = ms_row_workspace(workspace, n, PART, row);
  const ms_summary parts = ms_read_parts(w, ms_parts(n, PART), r, 0.0f, lane);
  if (!ms_is_sampled(parts)) return;
  const uint first = (group.x * SIMDGROUPS + sg) * MS_BLOCK_TOKENS + lane;
  device const uint* from = r.changes && !r.in_place ? w.logits : logits + ulong(row) * n;
  const float most = ms_logit(parts.least), unit = ms_mass_unit(n);
  const float bins_per_depth = ms_bins_per_depth(parts.drawn_sum, n, r.scale);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint start = first; start < first + MS_BLOCK_TOKENS; start += 4 * 32) {  // long code costs more than it saves
    uint bits[4];
    MS_UNROLL for (int j = 0; j < 4; j++) bits[j] = start + 32 * j < n ? from[start + 32 * j] : uint(MS_BITS_NEG_INFINITY);
    MS_UNROLL for (int j = 0; j < 4; j++) {
      if (bits[j] == MS_BITS_NEG_INFINITY) continue;
      const float x = as_type<float>(bits[j]);
      threadgroup atomic_uint* bin = (threadgroup atomic_uint*)bins + 6 * ms_depth_bin(x, most, bins_per_depth);
      ms_add_weight(bin, ulong(ms_weight(x - most, r.scale) * unit));
      if (r.scale != r.inverse) ms_add_weight(bin + 3, ulong(ms_weight(x - most, r.inverse) * unit));
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = tid; i < 2 * MS_DEPTH_BINS; i += SIMDGROUPS * 32) {
    const ulong mass = ms_weight_of(bins + 3 * i);
    if (mass) ms_add_mass(w.bins + 2 * i, mass);
  }
}

// The most likely tokens, and none (-1, NaN) where the finite ones end.
MS_APART inline void ms_report_top(device MSTopLogprob* out, uint count, thread const ms_tokens& row, device const uint* groups,
                          float log_sum, ms_group_memory m) {
  const uint least = ms_key(as_type<uint>(row.most));
  ms_tokens some = row;
  if (!ms_list(some, groups, 0, ms_bound(groups, row.count, least, count, m), m))
    ms_list(some, groups, 0, ms_select(row, groups, least, count, false, MS_TO_TOKEN, m), m);
  const uint found = some.count;
  for (uint i = m.tid; i < min(found, count); i += 32 * m.simdgroups) {
    out[i].token = int(uint(m.list[i]));
    out[i].logprob = ms_logit(uint(m.list[i] >> 32)) - row.most - log_sum;
  }
  for (uint i = found + m.tid; i < count; i += 32 * m.simdgroups) {
    out[i].token = -1;
    out[i].logprob = as_type<float>(uint(MS_BITS_NAN));
  }
}

// A threadgroup per row. PART: tokens of a part in the first launch.
template <int SIMDGROUPS, int PART>
[[kernel, max_total_threads_per_threadgroup(SIMDGROUPS * 32)]] void sample_finish(
    device const MSStep* step [[buffer(0)]],
    device const uint* logits [[buffer(1)]],
    device const MSSampling* sampling [[buffer(2)]],
    device MSSampled* out [[buffer(3)]],    // [steps of a run, max_rows]
    device MSTopLogprob* top [[buffer(4)]],  // [steps of a run, max_rows, max_top]
    device const int* positions [[buffer(5)]],
    device const uint* sampled_rows [[buffer(6)]],
    device const MSTokenBias* biases [[buffer(7)]],
    device int* history [[buffer(8)]],
    device uint* counts [[buffer(9)]],
    device uint* workspace [[buffer(10)]],
    constant MSSampleParams& p [[buffer(11)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint tid [[thread_index_in_threadgroup]],
    uint sg [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint THREADS = SIMDGROUPS * 32;
  threadgroup ulong list[MS_LIST_TOKENS];
  threadgroup ulong sums[SIMDGROUPS];
  threadgroup ulong found[4];
  threadgroup uint counter[1];
  static_assert(MS_LIST_TOKENS == MS_BINS, "both words of the bins fill the list's place");
  const uint row = group.x, n = p.vocab_size;
  if (row >= step->num_sampled) {
    MS_WAIT_PREVIOUS(workspace);
    return;
  }
  device const MSSampling& s = sampling[row];
  const ms_sample_row r = ms_read_row(s, *step, p, positions, sampled_rows, row);
  const ulong result = ulong(step->index) * p.max_rows + row;
  const uint count = min(s.top, p.max_top);
  MS_WAIT_PREVIOUS(workspace);
  logits = ms_waited(logits);
  MS_LAUNCH_NEXT;
  ms_group_memory m;
  m.list = list;
  m.low = (threadgroup atomic_uint*)list;
  m.high = m.low + MS_BINS;
  m.sums = sums;
  m.found = found;
  m.counter = (threadgroup atomic_uint*)counter;
  m.tid = tid;
  m.lane = lane;
  m.sg = sg;
  m.simdgroups = SIMDGROUPS;
  const ms_workspace w = ms_row_workspace(workspace, n, PART, row);
  // 1. What the parts say.
  const float unit = ms_mass_unit(n);
  const ms_summary parts = ms_read_parts(w, ms_parts(n, PART), r, r.draws && sg == 0 ? unit : 0.0f, lane);
  if (!ms_is_sampled(parts)) {
    if (tid == 0) {
      out[result].token = 0;
      out[result].logprob = as_type<float>(uint(MS_BITS_NAN));
      out[result].rank = 0;
      out[result].status = parts.bad || parts.own >= MS_KEY_NONE ? MS_SAMPLE_NOT_FINITE : MS_SAMPLE_NOTHING_ALLOWED;
    }
    for (uint i = tid; i < count; i += THREADS) {
      top[result * p.max_top + i].token = -1;
      top[result * p.max_top + i].logprob = as_type<float>(uint(MS_BITS_NAN));
    }
    return;
  }
  const float most = ms_logit(parts.least), reported_most = r.own_sum ? ms_logit(parts.own) : most;
  threadgroup_barrier(mem_flags::mem_device);
  // 2. The token.
  ms_tokens all;
  all.words = r.changes && !r.in_place ? w.logits : logits + ulong(row) * n;
  all.count = n;
  all.source = MS_SOURCE_ROW;
  all.vocab_size = n;
  all.end = (ulong(MS_KEY_NONE) << 32) - 1;
  all.drop = 0;
  all.special = biases + s.xtc_first;
  all.specials = s.xtc_count;
  all.most = most;
  all.scale = r.scale;
  all.unit = unit;
  ms_tokens reported = all;
  reported.words = logits + ulong(row) * n;
  reported.most = reported_most;
  device const uint* groups = r.changes ? w.given : w.own;
  device const uint* reported_groups = r.own_sum ? w.own : groups;
  uint token = s.target >= 0 ? uint(s.target) : parts.first, rank = r.own_sum ? 0 : 1;
  if (r.draws) {
    ms_depths depths;
    depths.masses = w.bins;
    depths.bins_per_depth = ms_bins_per_depth(parts.drawn_sum, n, r.scale);
    depths.same = r.scale == r.inverse;
    token = ms_draw(all, r, s, groups, parts.drawn_sum, w.masses, PART, depths, m, rank);
  }
  // 3. What is reported of it.
  const uint token_key = ms_key(reported.words[token]);
  const float log_sum = precise::log(parts.reported_sum);
  if (s.target >= 0 || r.own_sum || rank == 0)
    rank = 1 + ms_count_before(reported, reported_groups, ulong(token_key) << 32 | token, m);
  if (count) ms_report_top(top + result * p.max_top, count, reported, reported_groups, log_sum, m);
  if (tid > 0) return;
  out[result].token = int(token);
  out[result].logprob = ms_logit(token_key) - reported_most - log_sum;
  out[result].rank = rank;
  out[result].status = MS_SAMPLE_OK;
  if ((s.flags & MS_SAMPLE_COMMIT) && s.state >= 0 && s.target < 0) {
    if (r.length < p.history_stride) history[ulong(s.state) * p.history_stride + r.length] = int(token);
    counts[ulong(s.state) * n + token]++;
  }
}
