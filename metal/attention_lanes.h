// How lanes attend: each has a part of a position's elements, and all of the query heads beside each other.
#ifndef METALSTEP_ATTENTION_LANES_H
#define METALSTEP_ATTENTION_LANES_H

// Lanes have chunks of four elements in turn, so that lanes beside each other read what lies side by side. RUN: of packed elements each
// has one run of them, which are few words.
template <int D, int LPT, bool RUN>
struct ms_chunks {
  static constant constexpr int all = D / 4;
  static constant constexpr int lane = (all + LPT - 1) / LPT;
  static constant constexpr int elements = lane * 4;
  static constant constexpr bool even = all % LPT == 0;
  static inline int at(int c, int l) { return RUN ? l * lane + c : c * LPT + l; }
};

// A lane's part of H heads.
template <int H, int EK, int EV>
struct ms_heads {
  float q[H * EK];
  float o[H * EV];
  float m[H];
  float s[H];
};

// The row's own key and value where they are not read from the cache; position -1: nowhere. As ms_read_lane would have them.
template <typename T>
struct ms_newest {
  int position;
  const threadgroup typename ms_codec<typename ms_cache<T>::key>::unpacked* key;
  const threadgroup typename ms_codec<typename ms_cache<T>::value>::unpacked* value;
  const threadgroup float* scales;  // of the key and of the value
};

template <typename T, int D, int LPT, bool RUN>
inline void ms_read_floats(device const T* from, int l, thread float* to) {
  using Chunks = ms_chunks<D, LPT, RUN>;
  MS_UNROLL for (int c = 0; c < Chunks::lane; c++) {
    const int chunk = Chunks::at(c, l);
    if (Chunks::even || chunk < Chunks::all) {
      ms_read4(from + chunk * 4, to + c * 4);
    } else {
      MS_UNROLL for (int e = 0; e < 4; e++) to[c * 4 + e] = 0.0f;
    }
  }
}

template <typename T, int D, int LPT, bool RUN>
inline void ms_copy_floats(const threadgroup T* from, int l, thread float* to) {
  using Chunks = ms_chunks<D, LPT, RUN>;
  MS_UNROLL for (int c = 0; c < Chunks::lane; c++) {
    const int chunk = Chunks::at(c, l);
    MS_UNROLL for (int e = 0; e < 4; e++) {
      to[c * 4 + e] = Chunks::even || chunk < Chunks::all ? float(from[chunk * 4 + e]) : 0.0f;
    }
  }
}

// A lane's elements of the vector at `place`; what they are still to be multiplied by.
template <int D, int LPT, typename C>
inline float ms_read_lane(ms_plane<C> plane, ulong place, uint block_shift, int l, const threadgroup float* table,
                          thread float* to) {
  ms_read_floats<C, D, LPT, false>(plane.codes + place * D, l, to);
  return 1.0f;
}
template <int D, int LPT, int CODEC>
inline float ms_read_lane(ms_plane<ms_packed<CODEC>> plane, ulong place, uint block_shift, int l, const threadgroup float* table,
                          thread float* to) {
  using Chunks = ms_chunks<D, LPT, true>;
  return ms_unpack<D, Chunks::elements, !Chunks::even>(plane, place, block_shift, l * Chunks::elements, table, to);
}

// What all lanes read from: the planes, and what the codes of turbo codecs stand for.
template <typename T>
struct ms_source {
  ms_pages pages;
  ms_plane<typename ms_cache<T>::key> keys;
  ms_plane<typename ms_cache<T>::value> values;
  const threadgroup float* key_table;
  const threadgroup float* value_table;
};

// Which codecs a cache has, for vectors of D and DV elements, and how lanes divide them.
template <typename T, int D, int DV, int LPT>
struct ms_parts {
  using key = ms_layout<typename ms_cache<T>::key, D>;
  using value = ms_layout<typename ms_cache<T>::value, DV>;
  using key_chunks = ms_chunks<D, LPT, key::packed>;
  using value_chunks = ms_chunks<DV, LPT, value::packed>;
};

// Visible positions [begin, end) of the row, counted from the first that it sees.
template <typename T, int D, int DV, int H, int LPT, int U, int NSG, bool NEW, int EK, int EV>
inline void ms_attend(thread ms_heads<H, EK, EV>& t, ms_view view, int begin, int end, ms_source<T> from,
                      ms_newest<T> newest, float softcap, int sg, int lane) {
  using Parts = ms_parts<T, D, DV, LPT>;
  using Key = typename ms_codec<typename ms_cache<T>::key>::unpacked;
  using Value = typename ms_codec<typename ms_cache<T>::value>::unpacked;
  constexpr int TPS = 32 / LPT;
  const int sub = lane / LPT, l = lane % LPT, kept = view.keep_hi - view.keep_lo;
  const uint shift = from.pages.shift;
  MS_UNROLL for (int g = 0; g < H; g++) {
    t.m[g] = MS_NEG;
    t.s[g] = 0.0f;
    MS_UNROLL for (int i = 0; i < EV; i++) t.o[g * EV + i] = 0.0f;
  }
  for (int first = begin + sg * TPS * U; first < end; first += NSG * TPS * U) {
    float score[U * H];
    ulong place[U];
    bool own[U];
    MS_UNROLL for (int u = 0; u < U; u++) {
      const int j = min(first + u * TPS + sub, end - 1);  // behind the end the last one again, without a weight
      const int position = j < kept ? view.keep_lo + j : view.lo + (j - kept);
      own[u] = NEW && position == newest.position;
      place[u] = ms_place(from.pages, position);
      float key[EK], scale = 1.0f;
      if (own[u]) {
        ms_copy_floats<Key, D, LPT, Parts::key::packed>(newest.key, l, key);
        if (Parts::key::turbo) scale = newest.scales[0];
      } else {
        scale = ms_read_lane<D, LPT>(from.keys, place[u], shift, l, from.key_table, key);
      }
      MS_UNROLL for (int g = 0; g < H; g++) {
        float sum = 0.0f;
        MS_UNROLL for (int i = 0; i < EK; i++) sum = fma(key[i], t.q[g * EK + i], sum);
        score[u * H + g] = Parts::key::turbo ? sum * scale : sum;
      }
    }
    MS_UNROLL for (int u = 0; u < U; u++) {
      const bool there = first + u * TPS + sub < end;
      MS_UNROLL for (int g = 0; g < H; g++) {
        float sum = score[u * H + g];
        MS_UNROLL for (int d = LPT / 2; d > 0; d /= 2) sum += simd_shuffle_xor(sum, ushort(d));
        score[u * H + g] = there ? ms_capped(sum, softcap) : MS_NEG;
      }
    }
    MS_UNROLL for (int g = 0; g < H; g++) {
      float most = t.m[g];
      MS_UNROLL for (int u = 0; u < U; u++) most = max(most, score[u * H + g]);
      const float left = ms_weight(t.m[g], most);
      t.m[g] = most;
      float sum = 0.0f;
      MS_UNROLL for (int u = 0; u < U; u++) {
        score[u * H + g] = ms_weight(score[u * H + g], most);
        sum += score[u * H + g];
      }
      t.s[g] = fma(t.s[g], left, sum);
      MS_UNROLL for (int i = 0; i < EV; i++) t.o[g * EV + i] *= left;
    }
    MS_UNROLL for (int u = 0; u < U; u++) {
      float value[EV], scale = 1.0f;
      if (own[u]) {
        ms_copy_floats<Value, DV, LPT, Parts::value::packed>(newest.value, l, value);
        if (Parts::value::turbo) scale = newest.scales[1];
      } else {
        scale = ms_read_lane<DV, LPT>(from.values, place[u], shift, l, from.value_table, value);
      }
      MS_UNROLL for (int g = 0; g < H; g++) {
        const float weight = Parts::value::turbo ? score[u * H + g] * scale : score[u * H + g];
        MS_UNROLL for (int i = 0; i < EV; i++) t.o[g * EV + i] = fma(weight, value[i], t.o[g * EV + i]);
      }
    }
  }
}

// One result of what the lanes of a simdgroup that have different positions hold, of heads [first, first + HM).
template <typename Chunks, int DV, int H, int HM, int LPT, int NSG, int EK, int EV>
inline void ms_merge_lanes(thread ms_heads<H, EK, EV>& t, int first, ms_shared<DV, HM, NSG> all, int sg, int lane) {
  const int sub = lane / LPT, l = lane % LPT;
  MS_UNROLL for (int i = 0; i < HM; i++) {
    const int g = first + i;
    if (g >= H) break;
    float most = t.m[g];
    MS_UNROLL for (int d = LPT; d < 32; d *= 2) most = max(most, simd_shuffle_xor(most, ushort(d)));
    const float left = ms_weight(t.m[g], most);
    float sum = t.s[g] * left;
    MS_UNROLL for (int d = LPT; d < 32; d *= 2) sum += simd_shuffle_xor(sum, ushort(d));
    MS_UNROLL for (int e = 0; e < EV; e++) {
      t.o[g * EV + e] *= left;
      MS_UNROLL for (int d = LPT; d < 32; d *= 2) t.o[g * EV + e] += simd_shuffle_xor(t.o[g * EV + e], ushort(d));
    }
    if (sub == 0) {
      MS_UNROLL for (int c = 0; c < Chunks::lane; c++) {
        const int chunk = Chunks::at(c, l);
        if (Chunks::even || chunk < Chunks::all) {
          MS_UNROLL for (int e = 0; e < 4; e++) all.o[(sg * HM + i) * DV + chunk * 4 + e] = t.o[g * EV + c * 4 + e];
        }
      }
      if (l == 0) {
        all.m[sg * HM + i] = most;
        all.s[sg * HM + i] = sum;
      }
    }
  }
}

// All that a threadgroup's simdgroups hold, written out; every thread comes here.
template <typename Parts, int DV, int H, int HM, int LPT, int NSG, int EK, int EV, typename Out>
inline void ms_merge(thread ms_heads<H, EK, EV>& t, ms_shared<DV, HM, NSG> all, ms_target to, uint rows,
                     device Out* out, device const float* sinks, device float* workspace,
                     constant MSGpuAttentionParams& p, int tid, int sg, int lane) {
  MS_UNROLL for (int first = 0; first < H; first += HM) {
    if (first > 0) threadgroup_barrier(mem_flags::mem_threadgroup);
    ms_merge_lanes<typename Parts::value_chunks, DV, H, HM, LPT, NSG, EK, EV>(t, first, all, sg, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    ms_merge_simdgroups<DV, HM, NSG, Parts::value::turbo>(all, first, to, rows, out, sinks, workspace, p, tid);
  }
}

#endif
