// How simdgroups attend by products of 8x8 tiles in half precision: 16 positions at a time, and up to 8 query heads beside each other.
#ifndef METALSTEP_ATTENTION_TILES_H
#define METALSTEP_ATTENTION_TILES_H

// Scores^T [position, head] = keys queries^T and sums^T [element, head] = values^T weights^T: what lanes read of the cache, in turn and
// 16 bytes where there are as many, is the left factor as it is. Four lanes have a position's key, eight lanes a position's value.
template <typename T, int D, int DV>
struct ms_tiled {
  using KeyCodec = typename ms_cache<T>::key;
  using ValueCodec = typename ms_cache<T>::value;
  using Key = ms_layout<KeyCodec, D>;
  using Value = ms_layout<ValueCodec, DV>;
  using KeyOwned = ms_owned<KeyCodec, D, 4>;
  using ValueOwned = ms_owned<ValueCodec, DV, 8>;
  static constant constexpr int steps = D / 16;   // of elements of keys
  static constant constexpr int tiles = DV / 16;  // of elements of values
  // Words of threadgroup memory for the tables; one where both codecs have the same.
  static constant constexpr int key_table = ms_pairs<KeyCodec, D>::words;
  static constant constexpr bool same = Key::turbo && Value::turbo && Key::bits == Value::bits;
  static constant constexpr int tables = key_table + (same ? 0 : ms_pairs<ValueCodec, DV>::words);
  static constant constexpr int value_table = same ? 0 : key_table;  // where it begins
  static_assert(D % 64 == 0 && DV % 64 == 0, "tiles of whole runs");
};

// A tile of positions, of which those in [lo, hi) are seen.
struct ms_positions {
  int first;
  int lo;
  int hi;
};

// Tile `i` of what the row sees.
inline ms_positions ms_tile_at(ms_view v, int i) {
  const int kept = ms_kept_tiles(v);
  ms_positions t;
  t.first = (i < kept ? (v.keep_lo >> MS_TILE_SHIFT) + i : (v.lo >> MS_TILE_SHIFT) + i - kept) << MS_TILE_SHIFT;
  t.lo = i < kept ? v.keep_lo : v.lo;
  t.hi = i < kept ? v.keep_hi : v.hi;
  return t;
}

// The lane's place in tiles: a row, and a pair of columns.
struct ms_lane {
  int row;
  int pair;
};
inline ms_lane ms_lane_of(uint lane) {
  const ushort2 at = ms_frag_coord(ushort(lane));
  ms_lane l;
  l.row = at.x;
  l.pair = at.y / 2;
  return l;
}

// A sequence's part of the planes, of one kv head, as the lane reads it. Positions from `newest` on are not in the cache yet.
template <typename T, int D, int DV>
struct ms_cached {
  using Key = typename ms_cache<T>::key;
  using Value = typename ms_cache<T>::value;
  ms_pages pages;
  ms_reader<Key, D, 4> keys;            // the lane's row
  ms_reader<Value, DV, 8> values;       // the first of its columns
  ms_reader<Value, DV, 8> value_rows;   // scales of turbo codecs: its row
  int newest;
};

template <typename T, int D, int DV>
inline ms_cached<T, D, DV> ms_cached_of(device const int* table, device const typename ms_codec<typename ms_cache<T>::key>::stored* k_plane,
                                        device const typename ms_codec<typename ms_cache<T>::value>::stored* v_plane, uint kv_head,
                                        int newest, constant MSGpuAttentionParams& p, ms_lane lane) {
  using Key = typename ms_cache<T>::key;
  using Value = typename ms_cache<T>::value;
  const ms_plane<Key> keys = ms_plane_of<Key, D>(k_plane, p.k_scales, kv_head, p.block_shift);
  const ms_plane<Value> values = ms_plane_of<Value, DV>(v_plane, p.v_scales, kv_head, p.block_shift);
  ms_cached<T, D, DV> from;
  from.pages = ms_pages_of(table, p);
  from.keys = ms_reader_of<Key, D, 4>(keys, lane.row, lane.pair, p);
  from.values = ms_reader_of<Value, DV, 8>(values, lane.pair * 2, lane.row, p);
  from.value_rows = ms_reader_of<Value, DV, 8>(values, lane.row, 0, p);
  from.newest = newest;
  return from;
}

inline uint ms_block_of(ms_pages pages, ms_positions t) { return uint(pages.table[t.first >> pages.shift]); }

// What a lane has of a tile: keys of its row of both tiles of scores, values of its columns of both tiles of weights.
template <typename T, int D, int DV>
struct ms_read_keys {
  ms_codes<typename ms_cache<T>::key, D, 4> codes[2];
  typename ms_codec<typename ms_cache<T>::key>::scale scale[2];  // of turbo codecs
};
template <typename T, int D, int DV>
struct ms_read_values {
  ms_codes<typename ms_cache<T>::value, DV, 8> codes[4];
  typename ms_codec<typename ms_cache<T>::value>::scale scale[2];  // of turbo codecs, for positions of its rows
};

// A tile is read as a whole, but for one that the cache has nothing of: what is not seen has to be taken out of values behind.
template <typename T, int D, int DV>
inline void ms_fetch_keys(thread ms_read_keys<T, D, DV>& to, ms_cached<T, D, DV> from, ms_positions t, uint block) {
  if (max(t.first, t.lo) >= from.newest) return;
  const uint first = uint(t.first) & ((1u << from.pages.shift) - 1);
  MS_UNROLL for (int i = 0; i < 2; i++) {
    ms_fetch(to.codes[i], from.keys, block, first, i * 8);
    if (ms_tiled<T, D, DV>::Key::turbo) to.scale[i] = ms_fetch_scale(from.keys, block, first, i * 8);
  }
}
template <typename T, int D, int DV>
inline void ms_fetch_values(thread ms_read_values<T, D, DV>& to, ms_cached<T, D, DV> from, ms_positions t, uint block) {
  if (max(t.first, t.lo) >= from.newest) return;
  const uint first = uint(t.first) & ((1u << from.pages.shift) - 1);
  MS_UNROLL for (int i = 0; i < 4; i++) ms_fetch(to.codes[i], from.values, block, first, i / 2 * 8 + i % 2);
  if (!ms_tiled<T, D, DV>::Value::turbo) return;
  MS_UNROLL for (int i = 0; i < 2; i++) to.scale[i] = ms_fetch_scale(from.value_rows, block, first, i * 8);
}

// Of a tile that is not seen or not in the cache as a whole: values without what is not seen, and the newest position's key and value.
template <typename T, int D, int DV, bool NEW>
inline void ms_mend(thread ms_read_keys<T, D, DV>& keys, thread ms_read_values<T, D, DV>& values, const threadgroup uint* key,
                    const threadgroup uint* value, ms_positions t, int newest, ms_lane lane) {
  using Tiled = ms_tiled<T, D, DV>;
  MS_UNROLL for (int i = 0; i < 4; i++) {
    const int position = t.first + i / 2 * 8 + lane.pair * 2 + i % 2;
    if (position < t.lo || position >= min(t.hi, newest)) ms_no_codes(values.codes[i]);
    if (NEW && position == newest && position < t.hi) ms_fetch_held(values.codes[i], value, lane.row);
  }
  MS_UNROLL for (int i = 0; NEW && i < 2; i++) {
    if (t.first + i * 8 + lane.row != newest || newest >= t.hi) continue;
    ms_fetch_held(keys.codes[i], key, lane.pair);
    if (Tiled::Key::turbo) ms_scale_of(keys.scale[i], key[Tiled::KeyOwned::words]);
    if (Tiled::Value::turbo) ms_scale_of(values.scale[i], value[Tiled::ValueOwned::words]);
  }
}

// Over the lanes that hold a column of a tile: their numbers differ in bits that leave ms_frag_coord's columns as they are.
inline float ms_column_max(float x) {
  MS_UNROLL for (ushort bit = 1; bit < 32; bit *= 2)
    if (ms_frag_coord(bit).y == 0) x = max(x, simd_shuffle_xor(x, bit));
  return x;
}
inline float ms_column_sum(float x) {
  MS_UNROLL for (ushort bit = 1; bit < 32; bit *= 2)
    if (ms_frag_coord(bit).y == 0) x += simd_shuffle_xor(x, bit);
  return x;
}

// A simdgroup's part of 8 heads: those of a lane are 2 pair and the next.
template <int D, int DV>
struct ms_tiled_heads {
  ms_half_right<2, 1> q[D / 16];
  float unit[2];  // what products with q are to be multiplied by
  ms_sums<2, 1> o[DV / 16];
  float m[2];
  float s[2];     // of this lane's positions
};

// Queries from threadgroup memory, half [8, D].
template <typename T, int D, int DV>
inline void ms_take_queries(thread ms_tiled_heads<D, DV>& t, const threadgroup half* queries, const threadgroup float* units, uint lane) {
  using Tiled = ms_tiled<T, D, DV>;
  using Owned = typename Tiled::KeyOwned;
  MS_UNROLL for (int i = 0; i < D / 8; i++) {
    half2 pair;
    MS_UNROLL for (int e = 0; e < 2; e++) {
      const ushort2 at = ms_right_coord(ushort(lane), e);
      const half x = queries[int(at.y) * D + Owned::at(at.x / 2, 2 * i + at.x % 2)];
      if (e == 0) pair.x = x;
      if (e == 1) pair.y = x;
    }
    ms_set(t.q[i / 2], i % 2, pair);
  }
  const int pair = ms_frag_coord(ushort(lane)).y;
  MS_UNROLL for (int e = 0; e < 2; e++) {
    t.unit[e] = Tiled::Key::turbo ? units[pair + e] * (1.0f / precise::sqrt(float(D))) : units[pair + e];
    t.m[e] = MS_NEG;
    t.s[e] = 0.0f;
  }
  MS_UNROLL for (int i = 0; i < DV / 16; i++) ms_clear(t.o[i]);
}

// Scores of a tile: [2 i + e] of row i * 8 + lane.row and the lane's head e.
template <typename T, int D, int DV>
inline void ms_score(thread float* score, thread ms_tiled_heads<D, DV>& t, thread ms_read_keys<T, D, DV>& keys, ms_positions at,
                     const threadgroup uint* table, float softcap, ms_lane lane) {
  using Tiled = ms_tiled<T, D, DV>;
  ms_sums<2, 1> sums[2];  // in turn, so that a product does not wait for the one before
  ms_clear(sums[0]);
  ms_clear(sums[1]);
  MS_UNROLL for (int step = 0; step < Tiled::steps; step++) {
    ms_half_left<2, 2> k;
    MS_UNROLL for (int i = 0; i < 4; i++)
      ms_set(k, i, as_type<half2>(ms_elements(keys.codes[i / 2], 2 * step + i % 2, table)));
    ms_multiply(sums[step % 2], k, t.q[step]);
  }
  MS_UNROLL for (int i = 0; i < 2; i++) {
    const int position = at.first + i * 8 + lane.row;
    const bool seen = position >= at.lo && position < at.hi;
    const float scale = Tiled::Key::turbo ? float(keys.scale[i]) : 1.0f;
    MS_UNROLL for (int e = 0; e < 2; e++) {
      const float sum = sums[0].tile[i].thread_elements()[e] + sums[1].tile[i].thread_elements()[e];
      score[2 * i + e] = seen ? sum * (t.unit[e] * scale) : MS_NEG;
    }
  }
  if (softcap == 0.0f) return;
  MS_UNROLL for (int i = 0; i < 4; i++) score[i] = score[i] <= MS_NEG ? MS_NEG : ms_capped(score[i], softcap);
}

// One tile of positions. Values of turbo codecs have their scales in the weights, which are therefore compared after: what is summed is
// at most 1 in any case.
template <typename T, int D, int DV>
inline void ms_add_tile(thread ms_tiled_heads<D, DV>& t, thread float* score, thread ms_read_values<T, D, DV>& values,
                        const threadgroup uint* table) {
  using Tiled = ms_tiled<T, D, DV>;
  float raised[4];
  MS_UNROLL for (int i = 0; i < 2; i++) {
    // A scale of zero counts as one that is next to nothing; one that is not a number stays so.
    const float log_scale = Tiled::Value::turbo ? fast::log2(float(values.scale[i]) + 1e-30f) : 0.0f;
    MS_UNROLL for (int e = 0; e < 2; e++) raised[2 * i + e] = score[2 * i + e] <= MS_NEG ? MS_NEG : score[2 * i + e] + log_scale;
  }
  float most[2];
  MS_UNROLL for (int e = 0; e < 2; e++) most[e] = max(t.m[e], ms_column_max(max(raised[e], raised[2 + e])));
  if (simd_any(most[0] > t.m[0] || most[1] > t.m[1])) {
    MS_UNROLL for (int e = 0; e < 2; e++) {
      const float left = ms_weight(t.m[e], most[e]);
      t.m[e] = most[e];
      t.s[e] *= left;
      MS_UNROLL for (int i = 0; i < Tiled::tiles * 2; i++) t.o[i / 2].tile[i % 2].thread_elements()[e] *= left;
    }
  }
  ms_half_right<2, 1> weights;
  MS_UNROLL for (int i = 0; i < 2; i++) {
    float weight[2];
    MS_UNROLL for (int e = 0; e < 2; e++) {
      weight[e] = ms_weight(raised[2 * i + e], most[e]);
      t.s[e] += Tiled::Value::turbo ? ms_weight(score[2 * i + e], most[e]) : weight[e];
    }
    ms_set(weights, i, ms_right_pair(half2(half(weight[0]), half(weight[1]))));
  }
  MS_UNROLL for (int tile = 0; tile < Tiled::tiles; tile++) {
    ms_half_left<2, 2> v;
    MS_UNROLL for (int i = 0; i < 2; i++) {
      uint pairs[2];
      ms_across(values.codes[2 * i], values.codes[2 * i + 1], 2 * tile, table, pairs);
      ms_set(v, i, as_type<half2>(pairs[0]));
      ms_set(v, 2 + i, as_type<half2>(pairs[1]));
    }
    ms_multiply(t.o[tile], v, weights);
  }
}

// What a simdgroup holds of heads [first, first + HM), for the threadgroup to merge.
template <typename T, int D, int DV, int HM, int NSG>
inline void ms_leave_heads(thread ms_tiled_heads<D, DV>& t, int first, ms_shared<DV, HM, NSG> all, int sg, ms_lane lane) {
  using Tiled = ms_tiled<T, D, DV>;
  const float factor = Tiled::Value::turbo ? 1.0f / precise::sqrt(float(DV)) : 1.0f;
  MS_UNROLL for (int e = 0; e < 2; e++) {
    const int g = lane.pair * 2 + e - first;
    const float sum = ms_column_sum(t.s[e]);
    if (g < 0 || g >= HM) continue;
    MS_UNROLL for (int i = 0; i < Tiled::tiles * 2; i++)
      all.o[(sg * HM + g) * DV + Tiled::ValueOwned::at(lane.row, i)] = t.o[i / 2].tile[i % 2].thread_elements()[e] * factor;
    if (lane.row == 0) {
      all.m[sg * HM + g] = t.m[e];
      all.s[sg * HM + g] = sum;
    }
  }
}

#endif
