// Vectors of floats as wide as the instruction set, and how the storage types become such vectors.
//
// GCC's vector extension covers arithmetic, shifts and shuffles for every target; intrinsics appear only where a
// conversion has an instruction of its own. Everything lives in an unnamed namespace: see kernels.h for why.
#pragma once

#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

typedef float F __attribute__((vector_size(lanes * 4)));
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(lanes * 4)));
typedef uint32_t U __attribute__((vector_size(lanes * 4)));
typedef uint16_t H __attribute__((vector_size(lanes * 2)));
// The same at any address.
typedef float Fm __attribute__((vector_size(lanes * 4), aligned(4), may_alias));
typedef float F4m __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t Um __attribute__((vector_size(lanes * 4), aligned(2), may_alias));
typedef uint16_t Hm __attribute__((vector_size(lanes * 2), aligned(2), may_alias));

INLINE F load(const float* p) { return *reinterpret_cast<const Fm*>(p); }
INLINE void store(float* p, F v) { *reinterpret_cast<Fm*>(p) = v; }
INLINE F splat(float x) { return x - F{}; }  // not x + F{}: that turns -0 into +0
INLINE F select(I mask, F a, F b) { return reinterpret_cast<F>((mask & reinterpret_cast<I>(a)) | (~mask & reinterpret_cast<I>(b))); }

template <int... i>
struct Indices {};
template <int n, int... i>
struct Count : Count<n - 1, n - 1, i...> {};
template <int... i>
struct Count<0, i...> {
  using type = Indices<i...>;
};

// Sums of four vectors side by side; about a third of the shuffles of four separate sums.
template <int... i>
INLINE F interleave_low(F a, F b, Indices<i...>) { return __builtin_shufflevector(a, b, (i / 4 * 4 + i % 4 / 2 + i % 2 * lanes)...); }
template <int... i>
INLINE F interleave_high(F a, F b, Indices<i...>) { return __builtin_shufflevector(a, b, (i / 4 * 4 + 2 + i % 4 / 2 + i % 2 * lanes)...); }
template <int... i>
INLINE F pairs_low(F a, F b, Indices<i...>) { return __builtin_shufflevector(a, b, (i / 4 * 4 + i % 2 + i % 4 / 2 * lanes)...); }
template <int... i>
INLINE F pairs_high(F a, F b, Indices<i...>) { return __builtin_shufflevector(a, b, (i / 4 * 4 + 2 + i % 2 + i % 4 / 2 * lanes)...); }

INLINE F4 sum4(F a, F b, F c, F d) {
  constexpr typename Count<lanes>::type all{};
  F ab = interleave_low(a, b, all) + interleave_high(a, b, all);
  F cd = interleave_low(c, d, all) + interleave_high(c, d, all);
  F abcd = pairs_low(ab, cd, all) + pairs_high(ab, cd, all);
  F4 part[lanes / 4];
  __builtin_memcpy(part, &abcd, sizeof part);
  for (int width = lanes / 8; width; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}
INLINE float sum(F a) { return sum4(a, a, a, a)[0]; }

INLINE float bits_to_float(uint32_t u) { return __builtin_bit_cast(float, u); }
INLINE uint32_t float_to_bits(float f) { return __builtin_bit_cast(uint32_t, f); }

// Storage types. `step` elements make two vectors, `pair`, in the order that costs least: what is multiplied with
// them (`spread`) and what is stored from them (`put`) uses the same order.
struct Fp32 {
  using T = float;
  static constexpr int step = 2 * lanes;
  struct Pair { F v[2]; };
  static INLINE Pair pair(const T* p) { return {load(p), load(p + lanes)}; }
  static INLINE void put(T* p, Pair a) { store(p, a.v[0]), store(p + lanes, a.v[1]); }
  static INLINE void put_in_order(T* p, F a) { store(p, a); }
  static INLINE int place(int i) { return i; }
  static INLINE float to_float(T x) { return x; }
  static INLINE T from_float(float x) { return x; }
};

struct Bf16 {
  using T = uint16_t;
  static constexpr int step = 2 * lanes;
  struct Pair { F v[2]; };
  // Even elements are the low halves of 32-bit words, odd ones the high halves: one shift and one mask, no shuffle.
  static INLINE Pair pair(const T* p) {
    U u = *reinterpret_cast<const Um*>(p);
    return {reinterpret_cast<F>(u << 16), reinterpret_cast<F>(u & 0xffff0000u)};
  }
  static INLINE U round(F x) {  // to nearest even; NaN stays NaN
    U u = reinterpret_cast<U>(x);
    U rounded = (u + (0x7fffu + ((u >> 16) & 1))) >> 16;
    U nan = (u >> 16) | 0x40;
    I is_nan = x != x;
    return (reinterpret_cast<U>(is_nan) & nan) | (~reinterpret_cast<U>(is_nan) & rounded);
  }
  static INLINE void put(T* p, Pair a) { *reinterpret_cast<Um*>(p) = round(a.v[0]) | (round(a.v[1]) << 16); }
  static INLINE void put_in_order(T* p, F a) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(__m512(a)));  // flushes subnormals
#else
    *reinterpret_cast<Hm*>(p) = __builtin_convertvector(round(a), H);
#endif
  }
  static INLINE int place(int i) { return i % 2 * lanes + i / 2; }
  static INLINE float to_float(T x) { return bits_to_float(uint32_t(x) << 16); }
  static INLINE T from_float(float x) {
    uint32_t u = float_to_bits(x);
    return x != x ? T(u >> 16 | 0x40) : T((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
};

struct Fp16 {
  using T = uint16_t;
  static constexpr int step = 2 * lanes;
  struct Pair { F v[2]; };
  static INLINE F widen(const T* p) {
#if defined(__AVX512F__)
    return F(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
    return F(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    // Shift the exponent and mantissa into place and let a multiplication rebias (it also normalises subnormals).
    U u = __builtin_convertvector(*reinterpret_cast<const Hm*>(p), U);
    U magnitude = (u & 0x7fff) << 13;
    U scaled = reinterpret_cast<U>(reinterpret_cast<F>(magnitude) * splat(0x1p112f));
    U not_finite = reinterpret_cast<U>(magnitude >= 0x0f800000u) & 0x7f800000u;
    return reinterpret_cast<F>(scaled | not_finite | ((u & 0x8000) << 16));
#endif
  }
  static INLINE Pair pair(const T* p) { return {widen(p), widen(p + lanes)}; }
  static INLINE void put(T* p, Pair a) {
    for (int i = 0; i < step; ++i) p[i] = from_float(a.v[i / lanes][i % lanes]);
  }
  static INLINE void put_in_order(T* p, F a) {
    for (int i = 0; i < lanes; ++i) p[i] = from_float(a[i]);
  }
  static INLINE int place(int i) { return i; }
  static INLINE float to_float(T h) {
    uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
    uint32_t scaled = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
    if (magnitude >= 0x0f800000u) scaled |= 0x7f800000u;
    return bits_to_float(scaled | uint32_t(h & 0x8000) << 16);
  }
  static INLINE T from_float(float x) {
    uint32_t u = float_to_bits(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000u) return T(sign | 0x7e00 | (magnitude >> 13 & 0x1ff));
    if (magnitude >= 0x477ff000u) return T(sign | 0x7c00);  // 65520 and above round to infinity
    if (magnitude < 0x38800000u)  // subnormal result: adding one half aligns and rounds the mantissa
      return T(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
    return T(sign | (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13);
  }
};

// Calls f with the storage type of this dtype.
template <class Call>
INLINE void with_storage(graphopt::Dtype dtype, Call&& f) {
  if (dtype == graphopt::Dtype::fp32) return f(Fp32{});
  if (dtype == graphopt::Dtype::fp16) return f(Fp16{});
  return f(Bf16{});
}

// `pair` of the last elements of a row, zeros behind them; never reads past the row.
template <class S>
INLINE typename S::Pair pair_tail(const typename S::T* p, int64_t count) {
#if defined(__AVX512F__)
  alignas(64) typename S::T buffer[S::step];
  const int64_t bytes = count * sizeof *p;
  for (int64_t at = 0; at < int64_t(sizeof buffer); at += 64) {
    const int64_t left = bytes - at;
    const __mmask64 mask = left >= 64 ? ~__mmask64(0) : left <= 0 ? 0 : (__mmask64(1) << left) - 1;
    _mm512_store_si512(reinterpret_cast<char*>(buffer) + at, _mm512_maskz_loadu_epi8(mask, reinterpret_cast<const char*>(p) + at));
  }
#else
  typename S::T buffer[S::step] = {};
  __builtin_memcpy(buffer, p, count * sizeof *p);
#endif
  return S::pair(buffer);
}

// A row as floats in the order of `pair`, padded with zeros to a whole number of steps.
template <class S>
INLINE void spread(const typename S::T* row, int64_t count, float* out, float factor = 1.0f) {
  for (int64_t i = 0; i < count; i += S::step, out += S::step) {
    auto pair = count - i >= S::step ? S::pair(row + i) : pair_tail<S>(row + i, count - i);
    store(out, pair.v[0] * factor), store(out + lanes, pair.v[1] * factor);
  }
}

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
