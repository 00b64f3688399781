// How lanes hold vectors of the cache for products of 8x8 tiles: as they are stored, until pairs of elements are asked for as halves.
#ifndef METALSTEP_ATTENTION_CODES_H
#define METALSTEP_ATTENTION_CODES_H

// The W elements of a vector among OWNERS lanes. An owner has `runs` runs of them, 16 bytes each where it has more, in turn with the
// others: lanes beside each other read what lies side by side.
template <typename C, int W, int OWNERS>
struct ms_owned {
  using Layout = ms_layout<C, W>;
  static constant constexpr int bits = Layout::packed ? Layout::bits : 16;
  static constant constexpr int words = W * bits / 32;  // of a vector
  static constant constexpr int elements = W / OWNERS;
  static constant constexpr int run = elements * bits > 128 && 128 % bits == 0 ? 128 / bits : elements;
  static constant constexpr int runs = elements / run;
  static constant constexpr bool whole = run * bits % 32 == 0;  // runs are of whole words
  static constant constexpr int scales = Layout::packed && !Layout::turbo ? 2 * runs : 1;  // a step and a least element for each run
  static_assert(W % (OWNERS * 2) == 0 && elements % run == 0 && Layout::group % run == 0, "an owner's elements");
  static_assert(scales == 1 || OWNERS * run % Layout::group == 0, "runs in turn are of groups in turn");
  static inline int at(int owner, int x) { return x / run * (OWNERS * run) + owner * run + x % run; }
};

// What an owner has of a vector. Of turbo codecs the scale is held by others.
template <typename C, int W, int OWNERS>
struct ms_codes {
  using Owned = ms_owned<C, W, OWNERS>;
  ms_code_run<Owned::bits, Owned::run> run[Owned::runs];
  typename ms_codec<C>::scale scale[Owned::scales];
};

template <typename C, int W, int OWNERS>
inline void ms_no_codes(thread ms_codes<C, W, OWNERS>& to) {
  using Owned = ms_owned<C, W, OWNERS>;
  MS_UNROLL for (int i = 0; i < Owned::runs; i++)
    MS_UNROLL for (int j = 0; j < ms_code_run<Owned::bits, Owned::run>::words; j++) to.run[i].word[j] = 0;
  MS_UNROLL for (int i = 0; i < Owned::scales; i++) to.scale[i] = typename ms_codec<C>::scale(0.0f);
}

// Where a lane reads a plane: its own part of the vector at a place in block 0, and what lies between blocks.
template <typename C, int W, int OWNERS>
struct ms_reader {
  device const uint* codes;
  device const typename ms_codec<C>::scale* scales;
  uint block_vectors;  // of all kv heads
  uint block_shift;
  int owner;
};

// place: of the vector in its block.
template <typename C, int W, int OWNERS>
inline ms_reader<C, W, OWNERS> ms_reader_of(ms_plane<C> plane, int place, int owner, constant MSGpuAttentionParams& p) {
  using Owned = ms_owned<C, W, OWNERS>;
  ms_reader<C, W, OWNERS> r;
  r.codes = (device const uint*)plane.codes + place * Owned::words + (Owned::whole ? owner * Owned::run * Owned::bits / 32 : 0);
  r.scales = plane.scales + place + (Owned::scales > 1 ? (owner * Owned::run / Owned::Layout::group * 2) << p.block_shift : 0);
  r.block_vectors = p.num_kv_heads << p.block_shift;
  r.block_shift = p.block_shift;
  r.owner = owner;
  return r;
}

// The vector `next` places behind the reader's own and `first` places into `block`; `next` is known to the compiler.
template <typename C, int W, int OWNERS>
inline void ms_fetch(thread ms_codes<C, W, OWNERS>& to, ms_reader<C, W, OWNERS> from, uint block, uint first, int next) {
  using Owned = ms_owned<C, W, OWNERS>;
  device const uint* vector =
      from.codes + (ulong(block) * (from.block_vectors * Owned::words) + first * Owned::words) + next * Owned::words;
  const int other = Owned::whole ? 0 : from.owner * Owned::run;
  MS_UNROLL for (int i = 0; i < Owned::runs; i++)
    ms_read_codes<Owned::bits, Owned::run, Owned::words, false>(vector, i * OWNERS * Owned::run + other, to.run[i]);
  if (Owned::scales == 1) return;
  constexpr int GROUPS = OWNERS * Owned::run / Owned::Layout::group;  // between runs
  device const typename ms_codec<C>::scale* scales =
      from.scales + (ulong(block) * (from.block_vectors * Owned::Layout::scales) + first) + next;
  MS_UNROLL for (int i = 0; i < Owned::scales; i++) to.scale[i] = scales[(i / 2 * GROUPS * 2 + i % 2) << from.block_shift];
}

// The scale of a turbo codec's vector.
template <typename C, int W, int OWNERS>
inline typename ms_codec<C>::scale ms_fetch_scale(ms_reader<C, W, OWNERS> from, uint block, uint first, int next) {
  return (from.scales + (ulong(block) * from.block_vectors + first))[next];
}

// A vector in threadgroup memory: its words, and the bits of its scales, a word each.
template <typename C, int W>
struct ms_held {
  static constant constexpr int words = ms_owned<C, W, 4>::words;
  static constant constexpr int scales = ms_layout<C, W>::scales;
  static constant constexpr int all = words + scales;
};
inline void ms_scale_of(thread half& to, uint bits) { to = as_type<half>(ushort(bits)); }
inline void ms_scale_of(thread float& to, uint bits) { to = as_type<float>(bits); }

template <typename C, int W, int OWNERS>
inline void ms_fetch_held(thread ms_codes<C, W, OWNERS>& to, const threadgroup uint* held, int owner) {
  using Owned = ms_owned<C, W, OWNERS>;
  MS_UNROLL for (int i = 0; i < Owned::runs; i++) {
    const int bit = (i * OWNERS + owner) * Owned::run * Owned::bits, word = bit / 32, shift = bit % 32;
    MS_UNROLL for (int j = 0; j < ms_code_run<Owned::bits, Owned::run>::words; j++) {
      const uint low = held[min(word + j, Owned::words - 1)], high = held[min(word + j + 1, Owned::words - 1)];
      to.run[i].word[j] = shift == 0 ? low : (low >> shift) | (high << (32 - shift));
    }
  }
  if (Owned::scales == 1) return;
  MS_UNROLL for (int i = 0; i < Owned::scales; i++) {
    const int group = (i / 2 * OWNERS + owner) * Owned::run / Owned::Layout::group;
    ms_scale_of(to.scale[i], held[Owned::words + group * 2 + i % 2]);
  }
}

// ---- pairs of codes of a codebook by tables in threadgroup memory: entry code + (next code << bits) is both as halves, in units of
// the codebook. A table has COPIES of each entry, one for lanes of that number, so that they seldom meet in a bank.
template <typename C, int D>
struct ms_pairs {
  static constant constexpr int bits = ms_layout<C, D>::turbo ? 2 * ms_layout<C, D>::bits : 0;
  static constant constexpr int copies = bits == 4 ? 32 : 16;
  static constant constexpr int words = bits == 0 ? 0 : copies << bits;
};

template <typename C, int D>
inline void ms_fill_pairs(threadgroup uint* table, int tid, int threads) {
  using Pairs = ms_pairs<C, D>;
  constexpr int BITS = Pairs::bits == 0 ? 2 : Pairs::bits / 2;
  if (Pairs::bits == 0) return;
  for (int i = tid; i < 1 << Pairs::bits; i += threads) {
    const half low = half(ms_turbo_centroid<BITS>(uint(i))), high = half(ms_turbo_centroid<BITS>(uint(i) >> BITS));
    const uint pair = as_type<uint>(half2(low, high));
    MS_UNROLL for (int j = 0; j < Pairs::copies; j++) table[i * Pairs::copies + j] = pair;
  }
}

// The pair whose codes are in `word` from `bit` on, which the compiler knows. table: from the lane's own copy on.
template <typename C, int D>
inline uint ms_pair(const threadgroup uint* table, uint word, int bit) {
  using Pairs = ms_pairs<C, D>;
  uint entry = (word >> bit) & ((1u << Pairs::bits) - 1);
  if (Pairs::bits == 8) entry = ms_choose_bytes(word, 0, 0x4440u + uint(bit / 8));
  if (Pairs::bits == 4) entry = ms_choose_bytes((word >> (bit & 4)) & 0x0f0f0f0fu, 0, 0x4440u + uint(bit / 8));
  return *(const threadgroup uint*)((const threadgroup uchar*)table + entry * (Pairs::copies * 4));
}

// ---- affine8: bytes are halves' last bits, those of 1024.
inline uint ms_affine(uint bytes, half2 step, half2 least) {
  const half2 code = as_type<half2>(bytes) - half2(half(1024.0f), half(1024.0f));
  return as_type<uint>(fma(code, step, least));
}

inline uint ms_both(float a, float b) { return as_type<uint>(half2(half(a), half(b))); }

// Elements 2 p and 2 p + 1 of what an owner has of one vector, as halves. p: known to the compiler.
template <typename C, int W, int OWNERS>
inline uint ms_elements(thread ms_codes<C, W, OWNERS>& from, int p, const threadgroup uint* table) {
  using Owned = ms_owned<C, W, OWNERS>;
  using Run = ms_code_run<Owned::bits, Owned::run>;
  const int run = 2 * p / Owned::run, first = 2 * p % Owned::run;
  if (!Owned::Layout::packed) return from.run[run].word[first / 2 % Run::words];
  if (!Owned::Layout::turbo) {
    const half step = half(from.scale[run * 2 % Owned::scales]), least = half(from.scale[(run * 2 + 1) % Owned::scales]);
    const uint word = from.run[run].word[first / 4 % Run::words];
    return ms_affine(ms_choose_bytes(word, 0x64646464u, first % 4 == 0 ? 0x4140u : 0x4342u), half2(step, step), half2(least, least));
  }
  const int bit = first * Owned::bits, at = bit % 32;
  const uint word = from.run[run].word[bit / 32 % Run::words];
  if (at + 2 * Owned::bits <= 32) return ms_pair<C, W>(table, word, at);
  const uint next = from.run[run].word[(bit / 32 + 1) % Run::words];
  return ms_pair<C, W>(table, (word >> at) | (next << ((32 - at) & 31)), 0);
}

// Element x of two vectors, a's and b's, and element x + 1: [0] and [1] of `to`. x is even and known to the compiler.
template <typename C, int W, int OWNERS>
inline void ms_across(thread ms_codes<C, W, OWNERS>& a, thread ms_codes<C, W, OWNERS>& b, int x, const threadgroup uint* table,
                      thread uint* to) {
  using Owned = ms_owned<C, W, OWNERS>;
  using Run = ms_code_run<Owned::bits, Owned::run>;
  constexpr int B = Owned::bits;
  const int run = x / Owned::run, first = x % Owned::run, bit = first * B, at = bit % 32, w = bit / 32 % Run::words;
  const uint u = a.run[run].word[w], v = b.run[run].word[w];
  if (!Owned::Layout::packed) {
    to[0] = ms_choose_bytes(u, v, 0x5410u);
    to[1] = ms_choose_bytes(u, v, 0x7632u);
  } else if (!Owned::Layout::turbo) {
    const int s = run * 2 % Owned::scales, l = (run * 2 + 1) % Owned::scales;
    const half2 step = half2(half(a.scale[s]), half(b.scale[s])), least = half2(half(a.scale[l]), half(b.scale[l]));
    const uint bytes = ms_choose_bytes(u, v, first % 4 == 0 ? 0x5140u : 0x7362u);  // of a, b, a, b
    to[0] = ms_affine(ms_choose_bytes(bytes, 0x64646464u, 0x4140u), step, least);
    to[1] = ms_affine(ms_choose_bytes(bytes, 0x64646464u, 0x4342u), step, least);
  } else if (32 % (2 * B) == 0) {
    // Codes of even elements of both, and of odd ones: the compiler finds the words again for the other fields.
    constexpr uint EVEN = B == 2 ? 0x33333333u : 0x0f0f0f0fu;
    to[0] = ms_pair<C, W>(table, (u & EVEN) | ((v << B) & ~EVEN), at);
    to[1] = ms_pair<C, W>(table, ((u >> B) & EVEN) | (v & ~EVEN), at);
  } else {
    MS_UNROLL for (int e = 0; e < 2; e++)
      to[e] = ms_pair<C, W>(table, ms_code_at(a.run[run], first + e) | (ms_code_at(b.run[run], first + e) << B), 0);
  }
}

#endif
