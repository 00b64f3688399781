// Tiles of 8x8 elements that a simdgroup holds together, two in each lane. The mapping is that of metal/ms_dialect.h.
namespace metal {

inline uint sim_tile_row(uint lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
inline uint sim_tile_column(uint lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }

template <typename T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "simdgroup_matrix is 8x8");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  // The value on the diagonal; make_filled_simdgroup_matrix has it everywhere.
  explicit simdgroup_matrix(T value) : elements(T(0)) {
    const uint lane = sim_lane();
    for (uint i = 0; i < 2; i++)
      if (sim_tile_row(lane) == sim_tile_column(lane) + i) elements.v[i] = value;
  }
  vec<T, 2>& thread_elements() { return elements; }
  const vec<T, 2>& thread_elements() const { return elements; }
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <typename T, int Rows, int Columns = Rows>
inline simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Rows, Columns> tile;
  tile.elements = vec<T, 2>(value);
  return tile;
}

template <typename T, typename P>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& tile, const P* from, ulong row = 8, ulong2 origin = ulong2(0, 0),
                           bool transposed = false) {
  static_assert(is_same_v<remove_cv_t<P>, T>, "simdgroup_load of another type");
  sim->simdgroup_wait("simdgroup_load", false);
  const uint lane = sim_lane(), r = sim_tile_row(lane), c = sim_tile_column(lane);
  const P* at = from + origin.y * row + origin.x;
  for (uint i = 0; i < 2; i++) tile.elements.v[i] = transposed ? at[(c + i) * row + r] : at[r * row + c + i];
}
template <typename T>
inline void simdgroup_store(simdgroup_matrix<T, 8, 8> tile, T* to, ulong row = 8, ulong2 origin = ulong2(0, 0),
                            bool transposed = false) {
  sim->simdgroup_wait("simdgroup_store", false);
  const uint lane = sim_lane(), r = sim_tile_row(lane), c = sim_tile_column(lane);
  T* at = to + origin.y * row + origin.x;
  for (uint i = 0; i < 2; i++) (transposed ? at[(c + i) * row + r] : at[r * row + c + i]) = tile.elements.v[i];
}

template <typename A, typename B, typename C>
struct sim_tiles {  // a lane's part
  vec<C, 2> c;
  vec<A, 2> a;
  vec<B, 2> b;
};
// c + a * b into c, elements in order of k. One lane does it for all; float32 as on the GPU.
template <typename A, typename B, typename C>
SIM_UNSEEN inline void sim_multiply(void* values, uint lanes) {
  sim_tiles<A, B, C>* part = (sim_tiles<A, B, C>*)values;
  alignas(32) float a[8][8] = {}, b[8][8] = {}, c[8][8] = {};
  for (uint lane = 0; lane < lanes; lane++) {
    const uint row = sim_tile_row(lane), column = sim_tile_column(lane);
    for (uint i = 0; i < 2; i++) {
      a[row][column + i] = float(part[lane].a.v[i]);
      b[row][column + i] = float(part[lane].b.v[i]);
      c[row][column + i] = float(part[lane].c.v[i]);
    }
  }
  for (uint row = 0; row < 8; row++)
    for (uint k = 0; k < 8; k++)
      for (uint column = 0; column < 8; column++)
        c[row][column] = __builtin_fmaf(a[row][k], b[k][column], c[row][column]);
  for (uint lane = 0; lane < lanes; lane++)
    for (uint i = 0; i < 2; i++) part[lane].c.v[i] = C(c[sim_tile_row(lane)][sim_tile_column(lane) + i]);
}
template <typename D, typename A, typename B, typename C>
SIM_UNSEEN inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                                     simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c) {
  using Tiles = sim_tiles<A, B, C>;
  const sim_lanes<Tiles> all(Tiles{c.elements, a.elements, b.elements}, "simdgroup_multiply_accumulate",
                             sim_multiply<A, B, C>);
  d.elements = vec<D, 2>(all.value[all.lane].c);
}
template <typename D, typename A, typename B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8>(D(0)));
}
template <typename T>
inline simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8> a, simdgroup_matrix<T, 8, 8> b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b);
  return d;
}
}  // namespace metal
