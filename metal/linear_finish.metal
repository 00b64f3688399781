// A linear's epilogue over products that another launch has made. kernels/gpu/linear_library.py writes the kernels, one per epilogue,
// from what is here. Reference: kernels/program.py.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"
#include "expressions.h"

// Four columns of a row; with ALIGN 4 they lie at a multiple of four elements.
struct ms_columns {
  float at[4];
};

template <int ALIGN, typename T>
inline ms_columns ms_read_columns(device const T* from) {
  ms_columns c;
  if (ALIGN == 4) {
    const vec<T, 4> v = *(device const vec<T, 4>*)from;
    c.at[0] = float(v.x);
    c.at[1] = float(v.y);
    c.at[2] = float(v.z);
    c.at[3] = float(v.w);
  } else {
    MS_UNROLL for (int i = 0; i < 4; i++) c.at[i] = float(from[i]);
  }
  return c;
}

// As an element of a buffer. What float16 does not hold becomes its largest number; infinities and NaN stay.
template <typename T>
inline T ms_stored(float x) {
  return T(x);
}
template <>
inline half ms_stored<half>(float x) {
  return half(fabs(x) <= 3.4028234e38f ? clamp(x, -65504.0f, 65504.0f) : x);
}

template <int ALIGN, typename T>
inline void ms_write_columns(device T* to, thread const ms_columns& c) {
  if (ALIGN == 4) {
    *(device vec<T, 4>*)to = vec<T, 4>(ms_stored<T>(c.at[0]), ms_stored<T>(c.at[1]), ms_stored<T>(c.at[2]), ms_stored<T>(c.at[3]));
  } else {
    MS_UNROLL for (int i = 0; i < 4; i++) to[i] = ms_stored<T>(c.at[i]);
  }
}
