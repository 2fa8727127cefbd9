// Products without sums across a vector: one operand is packed, so that a vector holds the same element of neighbouring
// rows, and the other one's element meets it in all lanes.
#pragma once

#include "vec.h"

namespace {

// How packed factors lie and meet; `together` of them along the sum are neighbours, the last may be alone.
template <class S>
struct TileFloats {
  using X = float;
  using V = F;
  static constexpr int together = 1;
  static INLINE X packed(typename S::T x) { return S::to_float(x); }
  static INLINE V vector(const X* p) { return load(p); }
  static INLINE V everywhere(const X* p) { return splat(*p); }
  static INLINE V last(const X* p) { return splat(*p); }
  static INLINE F mad(F sum, V a, V b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct TilePairs {
  using X = uint16_t;
  using V = __m512bh;
  static constexpr int together = 2;
  static INLINE X packed(uint16_t x) { return x; }
  static INLINE V vector(const X* p) { return (V)_mm512_loadu_si512(p); }
  static INLINE V everywhere(const X* p) {
    int two;
    __builtin_memcpy(&two, p, sizeof two);
    return (V)_mm512_set1_epi32(two);
  }
  static INLINE V last(const X* p) { return (V)_mm512_set1_epi32(*p); }
  static INLINE F mad(F sum, V a, V b) { return F(_mm512_dpbf16_ps(__m512(sum), a, b)); }
};
#endif

template <class S>
struct TileFactors : TileFloats<S> {};
#if defined(__AVX512BF16__)
template <>
struct TileFactors<Bf16> : TilePairs {};
#endif

// sums[r][c] += left[r] . packed columns from c * lanes: `steps` steps, `stride` elements of `packed` apart.
template <class M, int rows, int vectors>
INLINE void tile_product(const typename M::X* left, int64_t ld, const typename M::X* packed, int64_t stride, int64_t steps, F (&sums)[rows][vectors]) {
  for (int64_t step = 0; step < steps; ++step, left += M::together, packed += stride) {
    typename M::V columns[vectors];
#pragma GCC unroll 4
    for (int c = 0; c < vectors; ++c) columns[c] = M::vector(packed + c * lanes * M::together);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const auto element = M::everywhere(left + r * ld);
#pragma GCC unroll 4
      for (int c = 0; c < vectors; ++c) sums[r][c] = M::mad(sums[r][c], element, columns[c]);
    }
  }
}

}  // namespace
