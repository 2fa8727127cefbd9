// How weights meet values, by storage type: the weights of a row of scores, and the sums of weighted values.
//
// `together` keys go together, see tiles.h. Sums lie in the order that costs least; `put` and `place`
// know it.
#pragma once

#include "linear.h"
#include "tiles.h"

namespace {

// Products and sums in fp32.
template <class S>
struct InFloats : TileFloats<S> {
  using T = typename S::T;
  using Dot = Exact<S>;
  using Pair = typename S::Pair;
  // The next step of one key; `left` elements of it are there.
  static INLINE Pair values(const T* v, int64_t, bool, int64_t left) { return left >= S::step ? S::pair(v) : pair_tail<S>(v, left); }
  static INLINE void put_weights(float* out, F a, F b) { store(out, a), store(out + lanes, b); }
  static INLINE void put(T* out, F a, F b) { S::put(out, {a, b}); }
  static INLINE int place(int i) { return S::place(i); }
};

#if defined(__AVX512BF16__)
// Weights are rounded to bf16, as torch's own attention does; two keys at a time are summed in fp32 by one instruction,
// straight from storage. Scores are exact: their factors are bf16.
struct InPairs : TilePairs {
  using T = uint16_t;
  using Dot = Paired;
  struct Pair { V v[2]; };
  static INLINE __m512i row(const T* v, int64_t left) {
    return left >= 32 ? _mm512_loadu_si512(v) : _mm512_maskz_loadu_epi16((__mmask32(1) << left) - 1, v);
  }
  // The next step of two keys, or of one. Within each quarter, the first half's pairs and then the second's.
  static INLINE Pair values(const T* v, int64_t stride, bool both, int64_t left) {
    const __m512i one = row(v, left), other = both ? row(v + stride, left) : _mm512_setzero_si512();
    return {(__m512bh)_mm512_unpacklo_epi16(one, other), (__m512bh)_mm512_unpackhi_epi16(one, other)};
  }
  static INLINE void put_weights(X* out, F a, F b) { _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(__m512(b), __m512(a))); }
  static INLINE void put(T* out, F a, F b) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi64(order, (__m512i)_mm512_cvtne2ps_pbh(__m512(b), __m512(a))));
  }
  static INLINE int place(int i) { return i % 8 / 4 * lanes + i / 8 * 4 + i % 4; }
};
#endif

template <class S>
struct Values : InFloats<S> {};
#if defined(__AVX512BF16__)
template <>
struct Values<Bf16> : InPairs {};
#endif

}  // namespace
