// Fixed-point rows by the processor's dot products of bytes (VNNI).
//
// A row of x becomes fixed-point numbers of 23 bits, X = round(x / max|x| * 2^22), each in three signed digits of eight
// bits. Codes are raised to unsigned ones; what that adds is the same for every weight row and lies ready, negated, behind
// the digits. All the products that meet in a lane fit its 32 bits (4 * 128 * 2^22 = 2^31), so sums there are exact,
// modulo 2^32 on their way: nothing is rounded before the sum of a step becomes a float. Rounding x loses at most 2^-23 of
// the largest |x|, as a sum in fp32 would.
#pragma once

#include "quantized.h"

namespace {

constexpr float largest_fixed = 0x1p22f - 2;  // rounding must not reach 2^22

// Digits of sixteen numbers, the highest first, each `digit_bytes` behind the one before.
INLINE void put_digits(__m512i numbers, uint8_t* out, int64_t digit_bytes) {
  const __m512i half = _mm512_set1_epi32(128), tens = _mm512_srai_epi32(_mm512_add_epi32(numbers, half), 8);
  const __m512i digits[3] = {_mm512_srai_epi32(_mm512_add_epi32(tens, half), 8), tens, numbers};
  for (int i = 0; i < 3; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * digit_bytes), _mm512_cvtepi32_epi8(digits[i]));
}

// Sums of four neighbours each.
INLINE __m128i fourths(__m512i numbers) {
  __m512i sums = _mm512_add_epi32(numbers, _mm512_shuffle_epi32(numbers, _MM_PERM_CDAB));
  sums = _mm512_add_epi32(sums, _mm512_shuffle_epi32(sums, _MM_PERM_BADC));
  return _mm512_castsi512_si128(_mm512_maskz_compress_epi32(0x1111, sums));
}
INLINE __m128i times(__m128i numbers, int factor) { return _mm_mullo_epi32(numbers, _mm_set1_epi32(factor)); }

// A half step of x.
INLINE void place_digits(__m512i first, __m512i second, __m512i* x, int64_t number) {
  uint8_t* out = reinterpret_cast<uint8_t*>(x + number / 2 * 4) + number % 2 * 32;
  put_digits(first, out, 64), put_digits(second, out + 16, 64);
  __m128i* raised = reinterpret_cast<__m128i*>(out + 3 * 64);
  _mm_storeu_si128(raised, times(fourths(first), -128)), _mm_storeu_si128(raised + 1, times(fourths(second), -128));
}

// Sixteen elements of a row of bf16 from `at` on, zeros behind its end.
INLINE F elements_at(const uint16_t* row, int64_t at, int64_t k) {
  const int64_t left = k - at;
  const __mmask16 inside = left >= lanes ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
  return F(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, row + at)), 16));
}

// 2^22 over the largest |x|, or NaN if the row is not one for fixed point.
INLINE float fixed_factor(const uint16_t* row, int64_t k, float& unit) {
  F most = {}, total = {};
  for (int64_t i = 0; i < k; i += lanes) {
    const F size = reinterpret_cast<F>(reinterpret_cast<U>(elements_at(row, i, k)) & 0x7fffffffu);
    most = select(size > most, size, most), total += size;
  }
  const float largest = _mm512_reduce_max_ps(__m512(most)), all = sum(total);
  unit = largest / largest_fixed;
  // What rounding takes from the other elements, against what they lost as numbers of bf16. False for NaN.
  const bool fits = largest == 0 || (largest > 0x1p-90f && all < 0x1p120f && float(k) * largest * 0x1p-24f <= (all - largest) * 0x1p-9f);
  return !fits ? __builtin_nanf("") : largest == 0 ? 0 : largest_fixed / largest;
}

// Codes of int8, raised by 128.
struct RaisedBytes {
  static constexpr int64_t step_bytes = 64;
  static constexpr bool has_offsets = false;
  explicit RaisedBytes(Codes) {}
  INLINE __m512i operator()(const uint8_t* p) const { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }
};

struct FixedBytes {
  using Vector = __m512i;
  static constexpr int64_t vectors = 4;  // of x for a step of 64 codes: three digits, and what raising adds

  static constexpr bool takes(Codes codes) { return codes == Codes::int8; }  // of nibbles other readers are as fast
  template <class Call>
  static INLINE void with_reader(const QuantizedTask& task, const Call& f) { by_group<RaisedBytes>(task, f); }

  // Packs a row, and its factor. False if it is not one for fixed point.
  static INLINE bool place(const QuantizedTask& task, const uint16_t* row, Vector* x, float& unit, float*) {
    const int64_t k = task.k;
    const float factor = fixed_factor(row, k, unit);
    if (factor != factor) return false;
    for (int64_t number = 0; number < round_up(k, 128) / run; ++number) {
      __m512i halves[2];
      for (int i = 0; i < 2; ++i) halves[i] = _mm512_cvtps_epi32(__m512(elements_at(row, number * run + i * lanes, k) * splat(factor)));
      place_digits(halves[0], halves[1], x, number);
    }
    return true;
  }

  static INLINE F products(__m512i codes, const Vector* x) {
    __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x[0]);
    for (int i = 1; i < 3; ++i) sums = _mm512_dpbusd_epi32(_mm512_slli_epi32(sums, 8), codes, x[i]);
    return F(_mm512_cvtepi32_ps(_mm512_add_epi32(sums, x[3])));
  }

  // Adds step number s under its scales. group: of columns under one scale; 0 if one serves the row.
  template <int group>
  static INLINE F add(F sum, __m512i codes, const Vector* x, const float* scales, int64_t s) {
    if constexpr (group == 0)
      return sum + products(codes, x);
    else if constexpr (group == 32)
      return sum + products(codes, x) * F(_mm512_insertf32x8(_mm512_set1_ps(scales[2 * s]), _mm256_set1_ps(scales[2 * s + 1]), 1));
    else
      return sum + products(codes, x) * splat(scales[s * 64 / group]);
  }
};

using Fixed = FixedBytes;
#define GRAPHOPT_FIXED

}  // namespace
