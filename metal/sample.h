// What both launches of the sampler share: keys of logits, what a row's record asks for, random numbers, the workspace.
// All that is compared is compared as integers, so that NaN and infinities keep their meaning in any maths mode.
#ifndef METALSTEP_SAMPLE_H
#define METALSTEP_SAMPLE_H

// Of what a row that filters may need in several places. NVIDIA's compiler takes a minute to put all of them in line.
#ifdef MS_CUDA
#define MS_APART __attribute__((noinline))
#else
#define MS_APART
#endif

enum {
  MS_GROUP_TOKENS = 16,  // of one lane; a simdgroup's block is 32 groups, interleaved: tokens 32 j + lane of the block
  MS_BLOCK_TOKENS = 512,
  MS_GROUPS_AT_ONCE = 8,  // whose least keys a thread reads together
  MS_LIST_TOKENS = 2048,  // that fit in the list of a row that filters; with more of them, filters read the row
  MS_DEPTH_BINS = 1024,  // of a row's tokens by how far they are below the largest: a multiple of a threadgroup's threads
  MS_DIGIT_BITS = 11,    // of a selection
  MS_BINS = 1 << MS_DIGIT_BITS,
  MS_BOUND_BITS = 15,  // of keys: 256 bins of 2^15 are an octave
};

// Logits by their bits: keys ascend as logits descend, and +0 and -0 are one.
enum ms_bits : uint {
  MS_BITS_NEG_INFINITY = 0xff800000u,
  MS_BITS_NAN = 0x7fc00000u,
  MS_KEY_NONE = 0xff800000u,  // of -infinity: no token
};

inline uint ms_key(uint bits) {
  if (bits == 0x80000000u) bits = 0u;
  return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}
inline float ms_logit(uint key) { return as_type<float>(key >> 31 ? key : ~key & 0x7fffffffu); }
// NaN or +infinity.
inline bool ms_is_bad(uint bits) { return (bits & 0x7fffffffu) >= 0x7f800000u && bits != MS_BITS_NEG_INFINITY; }
inline ulong ms_earlier(ulong a, ulong b) { return a < b ? a : b; }
inline ulong ms_later(ulong a, ulong b) { return a < b ? b : a; }
// Every token with this key or a smaller one comes up to here in the order of (key, index).
inline ulong ms_through(uint key) { return ulong(key) << 32 | 0xffffffffu; }

// e^(depth * scale) for depth <= 0. A scale is finite, so that a depth of 0 weighs 1. Powers of two cost half of powers of e.
inline float ms_weight(float depth, float scale) { return precise::exp2(depth * scale * 1.44269504f); }

// ---- what a row's record asks for -----------------------------------------------------------------------------------
struct ms_sample_row {
  uint length;     // positions of the history that the row sees
  uint top_k;      // 0: off
  float inverse;   // 1 / temperature; 1 where nothing is drawn
  float scale;     // of the distribution that filters see: inverse or 1
  bool draws;      // else it is the most likely token, or the target
  bool xtc;        // its coin fell
  bool xtc_first;  // no filter comes before it: it sees all tokens
  bool in_place;   // the processed logits replace the row
  bool penalised;
  bool stopped;
  bool masked;
  bool changes;  // the processed logits are not the model's own
  bool own_sum;  // sums to make: of the model's own logits (if they differ), and of the processed ones
  bool sum;
  bool tempered;
  bool weighed;  // its tokens, in bins: a nucleus of all of them is the first filter
};

// Philox 4x32-10 of key (seed) and counter: Salmon et al., SC 2011. 53 bits of its first two words, a fraction of 2^53.
// use: the counter's second word: 0 the token, 1 xtc's coin.
inline ulong ms_philox(device const MSSampling& s, uint use) {
  uint c0 = s.counter, c1 = use, c2 = 0, c3 = 0, k0 = s.seed_lo, k1 = s.seed_hi;
  for (int round = 0; round < 10; round++) {
    const uint n0 = mulhi(0xCD9E8D57u, c2) ^ c1 ^ k0, n2 = mulhi(0xD2511F53u, c0) ^ c3 ^ k1;
    c1 = 0xCD9E8D57u * c2;
    c3 = 0xD2511F53u * c0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return ulong(c0 >> 5) << 26 | ulong(c1 >> 6);
}

// The high 64 bits of a product of two numbers of 64.
inline ulong ms_multiply_high(ulong a, ulong b) {
  const ulong a0 = a & 0xffffffffu, a1 = a >> 32, b0 = b & 0xffffffffu, b1 = b >> 32;
  const ulong middle = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + (middle & 0xffffffffu);
  return a1 * b1 + (middle >> 32) + (other >> 32);
}

// Whether the draw is below a probability, exactly.
inline bool ms_coin(device const MSSampling& s) {
  const float limit = s.xtc_probability * 9007199254740992.0f;  // 2^53: no rounding
  const ulong whole = ulong(limit), drawn = ms_philox(s, 1);
  return drawn < whole || (drawn == whole && float(whole) < limit);
}

inline ms_sample_row ms_read_row(device const MSSampling& s, device const MSStep& step, constant MSSampleParams& p,
                                 device const int* positions, device const uint* sampled_rows, uint row) {
  ms_sample_row r;
  r.length = 0;
  r.in_place = (s.flags & MS_SAMPLE_PROCESSED_LOGPROBS) != 0;
  r.draws = s.target < 0 && as_type<int>(s.temperature) > 0;
  r.penalised = false;
  r.stopped = false;
  r.masked = false;
  if (s.state >= 0) {
    const uint token_row = sampled_rows[row];
    const int position = token_row < step.num_tokens ? positions[token_row] : -1;
    r.length = min(uint(max(position, -1) + 1), p.history_stride);
  }
  if (r.in_place || s.target < 0) {
    const bool repetition = s.repetition_penalty != 1.0f && s.repetition_penalty != 0.0f;
    r.penalised = s.state >= 0 && (repetition || s.presence_penalty != 0.0f || s.frequency_penalty != 0.0f);
    r.stopped = s.counter < s.min_tokens && s.stop_count > 0;
    r.masked = (s.mask | s.grammar) != 0;
  }
  r.changes = r.penalised || r.stopped || r.masked || (s.bias_count > 0 && (r.in_place || s.target < 0));
  r.own_sum = r.changes && !r.in_place;
  r.sum = !r.own_sum;
  r.tempered = false;
  r.inverse = 1.0f;
  r.scale = 1.0f;
  r.top_k = 0;
  r.xtc = false;
  r.xtc_first = false;
  r.weighed = false;
  if (!r.draws) return r;
  const bool tempered_first = (s.flags & MS_SAMPLE_TEMPERATURE_FIRST) != 0;
  const bool min_p = s.min_p > 0.0f, top_p = s.top_p < 1.0f;
  r.top_k = s.top_k < p.vocab_size ? s.top_k : 0;
  // Finite, and after a product with another constant too, which fast maths may take first. Below it all weigh alike.
  r.inverse = s.temperature < 1e-37f ? 1e37f : 1.0f / s.temperature;
  r.scale = tempered_first ? r.inverse : 1.0f;
  r.xtc = s.xtc_probability > 0.0f && ms_coin(s);
  r.xtc_first = r.xtc && !min_p && (tempered_first || !top_p);
  r.weighed = top_p && !r.xtc_first && (!tempered_first || !(min_p || r.top_k));
  const bool filter_sum = r.xtc_first || (top_p && (!tempered_first || !(min_p || r.top_k)));
  const bool draw_sum = !(r.xtc || top_p || min_p || r.top_k);
  r.sum = r.sum || (filter_sum && r.scale == 1.0f) || (draw_sum && r.inverse == 1.0f);
  r.tempered = (filter_sum && r.scale != 1.0f) || (draw_sum && r.inverse != 1.0f);
  return r;
}

// ---- the workspace: per row, its bins, what is known of its parts, then of its groups, then its processed logits -----
// A part's logits: maxima by key, and sums relative to them. The first launch writes it.
struct ms_part {
  uint own_key;   // of the model's own logits
  uint key;       // of the processed ones
  uint first;     // the first token with it
  uint bad;       // 1: a NaN or +infinity in either
  float own_sum;  // of e^(x - max), where asked for
  float sum;
  float tempered;  // of e^((x - max) / temperature), where asked for
  uint pad;
};

struct ms_workspace {
  device uint* bins;  // [MS_DEPTH_BINS] of four words: see ms_depths
  device ms_part* parts;
  device ulong* masses;  // of the parts, to draw from
  device uint* own;      // least key of each group of the model's own logits
  device uint* given;    // likewise of the processed ones
  device uint* logits;   // the processed logits' bits, where they do not replace the row
};

inline uint ms_parts(uint vocab_size, uint part_tokens) { return (vocab_size - 1) / part_tokens + 1; }
inline uint ms_blocks(uint vocab_size) { return (vocab_size - 1) / MS_BLOCK_TOKENS + 1; }

// What the parts say of their row: its largest logits, and sums relative to them. Each simdgroup reads all: no barriers.
struct ms_summary {
  uint own;    // least key of the model's own logits
  uint least;  // and of the processed ones
  uint first;  // the first token with it
  uint bad;
  float reported_sum;
  float drawn_sum;  // of the weights that filters see, or (without any) of those to draw by
};
inline bool ms_is_sampled(thread const ms_summary& s) { return !s.bad && s.own < MS_KEY_NONE && s.least < MS_KEY_NONE; }

// unit: of the masses that are written, by this simdgroup; 0: none are.
inline ms_summary ms_read_parts(thread const ms_workspace& w, uint parts, thread const ms_sample_row& r, float unit,
                                uint lane) {
  ms_summary s;
  uint own = 0xffffffffu, key = 0xffffffffu, first = 0xffffffffu, bad = 0;
  for (uint i = lane; i < parts; i += 32) {
    own = min(own, w.parts[i].own_key);
    bad |= w.parts[i].bad;
    if (w.parts[i].key < key) {
      key = w.parts[i].key;
      first = w.parts[i].first;
    }
  }
  s.least = simd_min(key);
  s.first = simd_min(key == s.least ? first : 0xffffffffu);
  s.own = simd_min(own);
  s.bad = simd_max(bad);
  s.reported_sum = 0.0f;
  s.drawn_sum = 0.0f;
  if (!ms_is_sampled(s)) return s;
  const float most = ms_logit(s.least), reported_most = r.own_sum ? ms_logit(s.own) : most;
  for (uint i = lane; i < parts; i += 32) {
    device const ms_part& part = w.parts[i];
    const uint reported_key = r.own_sum ? part.own_key : part.key;
    if (reported_key < MS_KEY_NONE)
      s.reported_sum += (r.own_sum ? part.own_sum : part.sum) * precise::exp(ms_logit(reported_key) - reported_most);
    if (!r.draws) continue;
    const float scale = r.tempered ? (r.scale != 1.0f ? r.scale : r.inverse) : 1.0f;
    float share = 0.0f;
    if (part.key < MS_KEY_NONE)
      share = (r.tempered ? part.tempered : part.sum) * ms_weight(ms_logit(part.key) - most, scale);
    s.drawn_sum += share;
    if (unit > 0.0f) w.masses[i] = ulong(share * unit);
  }
  s.reported_sum = simd_sum(s.reported_sum);
  s.drawn_sum = simd_sum(s.drawn_sum);
  return s;
}

// How many units of mass are 1: all tokens together are less than 2^63. 2^(30 + clz(vocab_size))
inline float ms_mass_unit(uint vocab_size) { return as_type<float>((157u + clz(vocab_size)) << 23); }

// part_tokens: what one threadgroup of the first launch processes. kernels/gpu/sample.py: workspace_bytes.
inline ms_workspace ms_row_workspace(device uint* workspace, uint vocab_size, uint part_tokens, uint row) {
  const ulong parts = (vocab_size - 1) / part_tokens + 1, groups = ulong(ms_blocks(vocab_size)) * 32;
  const ulong bins = 4 * MS_DEPTH_BINS;
  const ulong words = bins + parts * 10 + groups * 2 + vocab_size + (vocab_size & 1);
  device uint* at = workspace + words * row;
  ms_workspace w;
  w.bins = at;
  at += bins;
  w.parts = (device ms_part*)at;
  w.masses = (device ulong*)(at + parts * 8);
  w.own = at + parts * 10;
  w.given = w.own + groups;
  w.logits = w.given + groups;
  return w;
}

#endif
