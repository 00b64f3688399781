// How a prompt's attention brings keys and values into threadgroup memory: as half precision, 8 elements of a vector at a time.
// What is stored as half is copied while products go on; all else is read into registers first (ms_fetch) and stored behind them.
#ifndef METALSTEP_ATTENTION_PROMPT_H
#define METALSTEP_ATTENTION_PROMPT_H

// Tile positions of W elements in shares of 8, of which each of so many threads has `count`.
template <int W, int BK, int THREADS>
struct ms_shares {
  static constant constexpr int parts = W / 8;
  static constant constexpr bool even = THREADS % parts == 0;  // a thread's are `step` positions apart
  static constant constexpr int step = THREADS / parts;
  static constant constexpr int count = even ? (BK + step - 1) / step : (BK * parts + THREADS - 1) / THREADS;
  static constant constexpr bool all = even ? BK % step == 0 : BK * parts % THREADS == 0;
  // Of share i of a thread: its position in the tile, and its first element.
  static int position(int i, int tid) { return even ? tid / parts + i * step : (tid + i * THREADS) / parts; }
  static int element(int i, int tid) { return even ? tid % parts * 8 : (tid + i * THREADS) % parts * 8; }
  static int piece(int i, int tid) {
    if (even && 16 % step == 0) return i * step / 16;
    return even && step == 16 ? i : position(i, tid) / 16;
  }
  static bool there(int i, int tid) { return all || position(i, tid) < BK; }
};

// The tile behind the one at `first`: of the kept positions, or of recent ones.
template <int BK>
inline int ms_tile_after(ms_span span, int first) {
  const int next = first + BK, recent = span.lo / BK * BK;
  return next < recent && next >= span.keep_hi ? recent : next;
}

// Where a tile's positions are, of every 16 of them, which are in one block: the block, and where in it.
template <int BK>
struct ms_places {
  uint block[BK / 16];
  uint in_block[BK / 16];
};

// A piece of which nothing is seen may have no block: another one is read for it, and its scores are not used.
template <int BK>
inline void ms_find(thread ms_places<BK>& to, ms_pages pages, ms_span span, int first) {
  const int low = span.lo / 16 * 16, high = (span.hi - 1) / 16 * 16;
  MS_UNROLL for (int i = 0; i < BK / 16; i++) {
    const int begin = first + i * 16;
    const bool kept = begin < span.keep_hi && begin + 16 > span.keep_lo;
    const uint position = uint(kept ? begin : min(max(begin, low), high));
    to.block[i] = uint(pages.table[position >> pages.shift]);
    to.in_block[i] = position & ((1u << pages.shift) - 1);
  }
}

// A piece's first vector in a plane. In 32 bits: a plane has fewer, packed ones by KVCodec.scales_at, and floats are 32 bytes or more.
template <int BK>
inline uint ms_place_of(thread ms_places<BK>& places, ms_pages pages, int piece) {
  uint block = places.block[0], in_block = places.in_block[0];
  MS_UNROLL for (int i = 1; i < BK / 16; i++) {
    if (i != piece) continue;
    block = places.block[i];
    in_block = places.in_block[i];
  }
  return block * (uint(pages.heads) << pages.shift) + in_block;
}

// ---- eight elements as they are stored, and as halves ------------------------------------------------------------------------
template <typename C, int W>
struct ms_raw {};
template <int W>
struct ms_raw<bfloat, W> {
  vec<uint, 4> bits;
};
template <int CODEC, int W>
struct ms_raw<ms_packed<CODEC>, W> {
  uint word[2];
  typename ms_codec<ms_packed<CODEC>>::scale scale;  // affine: its step
  typename ms_codec<ms_packed<CODEC>>::scale least;  // affine only
};

// Elements from `at` on of the k-th vector behind the one at `place`.
template <int W>
inline void ms_fetch8(thread ms_raw<half, W>&, ms_plane<half> plane, uint place, uint k, uint, int at, threadgroup half* to) {
  ms_copy8(to, (plane.codes + (k * W + uint(at))) + ulong(place) * W);
}
template <int W>
inline void ms_fetch8(thread ms_raw<bfloat, W>& raw, ms_plane<bfloat> plane, uint place, uint k, uint, int at, threadgroup half*) {
  raw.bits = *(device const vec<uint, 4>*)((plane.codes + (k * W + uint(at))) + ulong(place) * W);
}
template <int W, int CODEC>
inline void ms_fetch8(thread ms_raw<ms_packed<CODEC>, W>& raw, ms_plane<ms_packed<CODEC>> plane, uint place, uint k, uint block_shift,
                      int at, threadgroup half*) {
  using Layout = ms_layout<ms_packed<CODEC>, W>;
  device const uint* vector = (plane.codes + k * Layout::words) + ulong(place) * Layout::words;
  // As they are: a shift would wait for the memory.
  if (Layout::bits == 2) {
    raw.word[0] = ((device const ushort*)vector)[at / 8];
  } else {
    const int word = at * Layout::bits / 32;
    raw.word[0] = vector[word];
    if (Layout::bits != 4) raw.word[1] = vector[min(word + 1, Layout::words - 1)];
  }
  if (Layout::turbo) {
    raw.scale = plane.scales[place + k];
  } else {  // scales [block, kv_head, group, 2, block_size]
    const uint in_block = place & ((1u << block_shift) - 1), group = uint(at / Layout::group) * 2;
    device const typename ms_codec<ms_packed<CODEC>>::scale* scales =
        plane.scales + (ulong(place - in_block) * Layout::scales + in_block + k);
    raw.scale = scales[group << block_shift];
    raw.least = scales[(group + 1) << block_shift];
  }
}

inline void ms_store8(threadgroup half* to, half2 a, half2 b, half2 c, half2 d) {
  *(threadgroup vec<uint, 4>*)to = vec<uint, 4>(as_type<uint>(a), as_type<uint>(b), as_type<uint>(c), as_type<uint>(d));
}

// Eight codes of B bits, four bits apart.
template <int B>
inline uint ms_spread(uint codes) {
  if (B == 2) {
    codes = (codes & 0xffu) | ((codes & 0xff00u) << 8);
    codes = (codes & 0x000f000fu) | ((codes & 0x00f000f0u) << 4);
    return (codes & 0x03030303u) | ((codes & 0x0c0c0c0cu) << 2);
  }
  if (B == 3) {
    codes = (codes & 0xfffu) | ((codes & 0xfff000u) << 4);
    codes = (codes & 0x003f003fu) | ((codes & 0x0fc00fc0u) << 2);
    return (codes & 0x07070707u) | ((codes & 0x38383838u) << 1);
  }
  return codes;
}

// The first bytes and the second bytes of the halves that codes 0 to 7 stand for, times sqrt(D); of four bits those of codes 8 to 15,
// which the others are the negatives of.
template <int B>
struct ms_half_book {};
template <>
struct ms_half_book<2> {
  static constant constexpr uint first[2] = {0x0b3f3f0bu, 0u}, second[2] = {0x3e37b7beu, 0u};
};
template <>
struct ms_half_book<3> {
  static constant constexpr uint first[2] = {0xd80c604eu, 0x4e600cd8u}, second[2] = {0xb3babdc0u, 0x403d3a33u};
};
template <>
struct ms_half_book<4> {
  static constant constexpr uint first[2] = {0x8a41351cu, 0x77237906u}, second[2] = {0x3b393630u, 0x41403e3du};
};

// What eight codes stand for, times sqrt(D).
template <int B>
inline void ms_pairs_of(uint codes, thread half2* pair) {
  using Book = ms_half_book<B>;
  uint which = ms_spread<B>(codes), negative = 0;
  if (B == 4) {
    negative = ~which & 0x88888888u;
    which = (which ^ (negative - (negative >> 3))) & 0x77777777u;
  }
  MS_UNROLL for (int i = 0; i < 2; i++) {  // four of them
    const uint first = ms_choose_bytes(Book::first[0], Book::first[1], which);
    uint second = ms_choose_bytes(Book::second[0], Book::second[1], which);
    if (B == 4) {
      const uint signs = ms_choose_bytes(negative, 0, i == 0 ? 0x1100u : 0x3322u);
      second |= ((signs << 4) & 0x00800080u) | (signs & 0x80008000u);
    }
    pair[i * 2] = as_type<half2>(ms_choose_bytes(first, second, 0x5140u));
    pair[i * 2 + 1] = as_type<half2>(ms_choose_bytes(first, second, 0x7362u));
    which >>= 16;
  }
}

// Whether an element is beyond what a half holds; CAREFUL: it becomes the greatest half, else it is infinite.
template <bool CAREFUL, int W>
inline bool ms_leave8(thread ms_raw<half, W>&, int, threadgroup half*) {
  return false;
}
template <bool CAREFUL, int W>
inline bool ms_leave8(thread ms_raw<bfloat, W>& raw, int, threadgroup half* to) {
  half2 pair[4];
  uint word[4] = {raw.bits.x, raw.bits.y, raw.bits.z, raw.bits.w}, large = 0;
  MS_UNROLL for (int i = 0; i < 4; i++) {
    const float low = as_type<float>(word[i] << 16), high = as_type<float>(word[i] & 0xffff0000u);
    large |= (word[i] & 0x7fff7fffu) + 0x38803880u;  // 2^16 and more reach the highest bits
    pair[i] = CAREFUL ? half2(ms_half_of(low), ms_half_of(high)) : half2(half(low), half(high));
  }
  ms_store8(to, pair[0], pair[1], pair[2], pair[3]);
  return (large & 0x80008000u) != 0;
}
template <bool CAREFUL, int W, int CODEC>
inline bool ms_leave8(thread ms_raw<ms_packed<CODEC>, W>& raw, int at, threadgroup half* to) {
  using Layout = ms_layout<ms_packed<CODEC>, W>;
  half2 pair[4];
  bool beyond = false;
  if (Layout::turbo) {
    float scale = float(raw.scale) * (1.0f / precise::sqrt(float(W)));
    // The outermost centroid is 2.74; scales of half, of 16 elements or more, never come to this.
    if (Layout::facts::wide && ms_is_finite(scale)) scale = min(scale, MS_HALF_MOST / 2.75f);
    const half2 both = half2(half(scale), half(scale));
    uint codes = raw.word[0];
    if (Layout::bits == 3) codes = ms_choose_bytes(codes, raw.word[1], 0x3210u + uint(at * 3 % 32 / 8) * 0x1111u);
    ms_pairs_of<Layout::turbo ? Layout::bits : 2>(codes, pair);
    MS_UNROLL for (int i = 0; i < 4; i++) pair[i] = pair[i] * both;
  } else {
    const float step = float(raw.scale), least = float(raw.least);
    const half2 steps = half2(half(step), half(step)), leasts = half2(half(least), half(least));
    MS_UNROLL for (int i = 0; i < 4; i++) {  // bytes are the last bits of 1024 and more
      const uint bytes = ms_choose_bytes(raw.word[i / 2], 0x64646464u, i % 2 == 0 ? 0x4140u : 0x4342u);
      const half2 code = as_type<half2>(bytes) - half2(half(1024.0f), half(1024.0f));
      pair[i] = CAREFUL ? half2(ms_half_of(fma(float(code.x), step, least)), ms_half_of(fma(float(code.y), step, least)))
                        : fma(code, steps, leasts);
    }
    beyond = fma(255.0f, step, least) > MS_HALF_MOST;
  }
  ms_store8(to, pair[0], pair[1], pair[2], pair[3]);
  return beyond;
}

// ---- a thread's shares of a tile, rows LD halves apart --------------------------------------------------------------------------
template <typename C, int W, int COUNT>
struct ms_fetched {
  ms_raw<C, W> share[COUNT];
};

template <typename Shares, int LD, int BK, typename C, int W, int COUNT>
inline void ms_fetch(thread ms_fetched<C, W, COUNT>& to, threadgroup half* tile, ms_plane<C> plane, thread ms_places<BK>& places,
                     ms_pages pages, int tid) {
  MS_UNROLL for (int i = 0; i < COUNT; i++) {
    const int k = Shares::position(i, tid), at = Shares::element(i, tid);
    if (!Shares::there(i, tid)) continue;
    const uint place = ms_place_of(places, pages, Shares::piece(i, tid));
    ms_fetch8(to.share[i], plane, place, uint(k % 16), pages.shift, at, tile + k * LD + at);
  }
}

template <typename Shares, int LD, typename C, int W, int COUNT>
inline void ms_leave(thread ms_fetched<C, W, COUNT>& from, threadgroup half* tile, int tid) {
  bool beyond = false;
  MS_UNROLL for (int i = 0; i < COUNT; i++) {
    const int at = Shares::element(i, tid);
    if (Shares::there(i, tid)) beyond |= ms_leave8<false>(from.share[i], at, tile + Shares::position(i, tid) * LD + at);
  }
  if (!beyond) return;
  MS_UNROLL for (int i = 0; i < COUNT; i++) {
    const int at = Shares::element(i, tid);
    if (Shares::there(i, tid)) ms_leave8<true>(from.share[i], at, tile + Shares::position(i, tid) * LD + at);
  }
}

// An element that is not finite would reach rows that do not see it, as 0 times it: it becomes zero, and its position is marked as
// broken for those that do.
template <int W, int LD, int BK, int THREADS>
inline void ms_mark_broken(threadgroup half* tile, threadgroup uint* broken, int tid) {
  constexpr int L = THREADS / BK >= 8 ? 8 : (THREADS / BK >= 4 ? 4 : (THREADS / BK >= 2 ? 2 : 1));  // lanes of a position
  static_assert(THREADS >= BK && BK * L % 32 == 0, "whole simdgroups");
  if (tid >= BK * L) return;
  threadgroup uint* row = (threadgroup uint*)(tile + tid / L * LD);
  uint found = 0;
  for (int i = tid % L; i < W / 2; i += L) {
    const uint pair = row[i];
    const uint low = (pair & 0x7c00u) == 0x7c00u ? 0u : 0xffffu, high = (pair & 0x7c000000u) == 0x7c000000u ? 0u : 0xffff0000u;
    if ((low | high) == 0xffffffffu) continue;
    row[i] = pair & (low | high);
    found = 1;
  }
  MS_UNROLL for (int d = L / 2; d > 0; d /= 2) found |= simd_shuffle_xor(found, ushort(d));
  if (tid % L == 0) broken[tid / L] = found;
}

#endif
