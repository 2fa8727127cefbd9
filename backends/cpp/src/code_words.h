// Codes of a quantised KV cache as 16-bit words, and the factors they meet: what attention_codes.h is made of.
#pragma once

#include "attention.h"

#if defined(__AVX512VNNI__)
namespace {

using graphopt::CacheKind;
using graphopt::QuantizedRows;

constexpr int64_t code_columns = 32;  // bytes of a row that are worked on together
constexpr int64_t octets = key_block / 8;
constexpr int64_t longest_code_row = 512;  // products of int8 codes and 16-bit factors that a sum of 32 bits has room for

// How far ahead rows are asked for: the next block. Further ahead (24 KiB, as for plain rows) it took a quarter longer.
constexpr int64_t codes_ahead_bytes = 6 << 10;

// What is left of `count` bytes from `at` on, as a mask of a vector of 32.
INLINE __mmask32 columns_left(int64_t at, int64_t count) {
  return at + code_columns <= count ? ~__mmask32(0) : (__mmask32(1) << (count - at)) - 1;
}

// The same 32 bytes of two rows.
INLINE __m512i two_rows(const uint8_t* one, const uint8_t* other, __mmask32 columns) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi8(columns, one)), _mm256_maskz_loadu_epi8(columns, other), 1);
}

// Some of 16 numbers, zeros for the others.
INLINE F some(Fp32, const float* p, __mmask16 there) { return F(_mm512_maskz_loadu_ps(there, p)); }
INLINE F some(Fp16, const uint16_t* p, __mmask16 there) { return F(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, p))); }
INLINE F some(Bf16, const uint16_t* p, __mmask16 there) {
  return F(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, p)), 16)));
}

// Factors in fixed point: the first of `parts` in units of a power of two that gives the largest 15 bits, the second in
// units of a 65536th of it. Sums are exact.
template <int parts_>
struct IntegerFactors {
  using Sum = __m512i;
  static constexpr int parts = parts_, sums = parts_;
  static INLINE Sum zero() { return _mm512_setzero_si512(); }
  static INLINE Sum mad(Sum sum, __m512i codes, __m512i factors) { return _mm512_dpwssd_epi32(sum, codes, factors); }
  static INLINE F total(const Sum* sum) {
    F wide = F(_mm512_cvtepi32_ps(sum[0]));
    if constexpr (parts == 2) wide += F(_mm512_cvtepi32_ps(sum[1])) * 0x1p-16f;
    return wide;
  }
  // What factors are multiplied with to be whole numbers. The unit is NaN if one is not finite, so that it does not matter
  // what numbers they become, and 0 if all are as good as zero.
  static INLINE F inverse(const float* factors, int64_t count, F& unit) {
    __m512i top = _mm512_setzero_si512();  // magnitudes, NaN the largest of all
    for (int64_t i = 0; i < count; i += lanes)
      top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_loadu_si512(factors + i), _mm512_set1_epi32(0x7fffffff)));
    top = _mm512_max_epu32(top, _mm512_shuffle_i32x4(top, top, 0x4e)), top = _mm512_max_epu32(top, _mm512_shuffle_i32x4(top, top, 0xb1));
    top = _mm512_max_epu32(top, _mm512_shuffle_epi32(top, _MM_PERM_ENUM(0x4e))), top = _mm512_max_epu32(top, _mm512_shuffle_epi32(top, _MM_PERM_ENUM(0xb1)));
    const I power = I(top) & 0x7f800000;
    const I small = power < (20 << 23), lost = power == 0x7f800000;
    unit = reinterpret_cast<F>((power - (14 << 23)) & ~small | lost);
    return reinterpret_cast<F>((268 << 23) - power);
  }
  static INLINE void split(F factor, F inverse, __m256i (&words)[parts]) {
    const F units = factor * inverse;
    const __m512i whole = _mm512_cvtps_epi32(__m512(units));
    words[0] = _mm512_cvtsepi32_epi16(whole);
    if constexpr (parts == 2) words[1] = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(__m512((units - F(_mm512_cvtepi32_ps(whole))) * 0x1p16f)));
  }
};

#if defined(__AVX512BF16__)
// Factors as sums of bf16 numbers. Flushes subnormals.
template <int parts_>
struct FloatFactors {
  using Sum = F;
  static constexpr int parts = parts_, sums = 1;
  static INLINE Sum zero() { return F{}; }
  static INLINE Sum mad(Sum sum, __m512i codes, __m512i factors) {
    return F(_mm512_dpbf16_ps(__m512(sum), (__m512bh)codes, (__m512bh)factors));
  }
  static INLINE F total(const Sum* sum) { return sum[0]; }
  static INLINE F inverse(const float*, int64_t, F& unit) { return unit = splat(1.0f); }
  static INLINE void split(F factor, F, __m256i (&words)[parts]) {
    for (int part = 0; part < parts; ++part) {
      if (part) factor -= reinterpret_cast<F>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words[part - 1]), 16));
      words[part] = (__m256i)_mm512_cvtneps_pbh(__m512(factor));
    }
  }
};
#endif

// Of each kind of codes: what its factors are, and how the four bytes of each lane become two words of the first and third
// byte and two of the second and fourth; of nibbles the low ones first.
template <CacheKind kind>
struct CodeWords;
template <>
struct CodeWords<CacheKind::int8> {
  using Tokens = uint16_t;
  static constexpr int halves = 1;
  template <bool wide>
  struct Of { using Keys = IntegerFactors<wide ? 2 : 1>; using Values = Keys; };
  static INLINE void words(__m512i quads, __m512i (&out)[2]) {
    out[0] = _mm512_srai_epi16(_mm512_slli_epi16(quads, 8), 8), out[1] = _mm512_srai_epi16(quads, 8);
  }
};
template <>
struct CodeWords<CacheKind::int4> {
  using Tokens = uint32_t;  // the parameters of a token
  static constexpr int halves = 2;
  template <bool wide>
  struct Of { using Keys = IntegerFactors<wide ? 2 : 1>; using Values = Keys; };
  static INLINE void words(__m512i quads, __m512i (&out)[4]) {
    const __m512i nibble = _mm512_set1_epi16(15);
    out[0] = _mm512_and_si512(quads, nibble), out[1] = _mm512_and_si512(_mm512_srli_epi16(quads, 8), nibble);
    out[2] = _mm512_and_si512(_mm512_srli_epi16(quads, 4), nibble), out[3] = _mm512_srli_epi16(quads, 12);
  }
};
#if defined(__AVX512BF16__)
struct E4m3Table {
  uint16_t number[128] = {};
  // The code of NaN comes out as 480: it occurs only under a scale that is not finite, which makes NaN of it.
  constexpr E4m3Table() {
    for (int code = 0; code < 128; ++code) {
      const int exponent = code >> 3, mantissa = code & 7;
      const float value = exponent ? float(8 + mantissa) * float(1 << exponent) : float(2 * mantissa);
      number[code] = __builtin_bit_cast(uint32_t, value * 0x1p-10f) >> 16;
    }
  }
};
alignas(64) constexpr E4m3Table e4m3_table;

template <>
struct CodeWords<CacheKind::fp8> {
  using Tokens = uint16_t;
  static constexpr int halves = 1;
  // Of a bf16 model scaled queries get two parts: one would double the error of scores that a bf16 query has by itself.
  template <bool wide>
  struct Of { using Keys = FloatFactors<wide ? 3 : 2>; using Values = FloatFactors<wide ? 3 : 1>; };
  static INLINE __m512i number(__m512i code) {
    const auto table = [](int i) INLINE_LAMBDA { return _mm512_load_si512(e4m3_table.number + 32 * i); };
    const __m512i small = _mm512_permutex2var_epi16(table(0), code, table(1)), large = _mm512_permutex2var_epi16(table(2), code, table(3));
    const __m512i magnitude = _mm512_mask_mov_epi16(small, _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40)), large);
    // magnitude | (shifted & sign)
    return _mm512_ternarylogic_epi64(magnitude, _mm512_slli_epi16(code, 8), _mm512_set1_epi16(int16_t(0x8000)), 0xf8);
  }
  static INLINE void words(__m512i quads, __m512i (&out)[2]) {
    out[0] = number(_mm512_and_si512(quads, _mm512_set1_epi16(255))), out[1] = number(_mm512_srli_epi16(quads, 8));
  }
};
#endif

// Parts of factors: `count` words of each. Gives what sums are to be multiplied with.
template <class Factors>
INLINE F pack_factors(const float* factors, int64_t count, uint16_t* out) {
  F unit;
  const F inverse = Factors::inverse(factors, count, unit);
  for (int64_t i = 0; i < count; i += lanes) {
    __m256i words[Factors::parts];
    Factors::split(load(factors + i), inverse, words);
    for (int part = 0; part < Factors::parts; ++part)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + part * count + i), words[part]);
  }
  return unit;
}

INLINE __m512i factor_pair(const uint16_t* at) {
  int32_t pair;
  __builtin_memcpy(&pair, at, sizeof pair);
  return _mm512_set1_epi32(pair);
}

// Quads of 16 keys' 32 bytes: 8 vectors, a lane for each key, `stride` bytes of `out` apart.
INLINE void key_quads(const uint8_t* codes, int64_t row_bytes, __mmask32 columns, uint8_t* out, int64_t stride) {
  __m512i rows[8], pairs[8], fours[8];
  for (int i = 0; i < 8; ++i) rows[i] = two_rows(codes + i * row_bytes, codes + (i + 8) * row_bytes, columns);
  for (int i = 0; i < 8; i += 2) pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + 2 + j]);
      fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + 2 + j]);
    }
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + i * stride, _mm512_permutex2var_epi64(fours[i], low, fours[4 + i]));
    _mm512_storeu_si512(out + (4 + i) * stride, _mm512_permutex2var_epi64(fours[i], high, fours[4 + i]));
  }
}

// Quads of 8 values' 32 bytes, in the order 0, 2, 1, 3, so that words are of neighbours: the second half of a vector has
// the fourth keys behind those of the first, each quarter of vector i the bytes from 4 * i on.
INLINE void value_quads(const uint8_t* codes, int64_t row_bytes, __mmask32 columns, __m512i (&quads)[4]) {
  __m512i rows[4];
  for (int i = 0; i < 4; ++i) rows[i] = two_rows(codes + i * row_bytes, codes + (i + 4) * row_bytes, columns);
  const __m512i low[2] = {_mm512_unpacklo_epi8(rows[0], rows[2]), _mm512_unpacklo_epi8(rows[1], rows[3])};
  const __m512i high[2] = {_mm512_unpackhi_epi8(rows[0], rows[2]), _mm512_unpackhi_epi8(rows[1], rows[3])};
  quads[0] = _mm512_unpacklo_epi16(low[0], low[1]), quads[1] = _mm512_unpackhi_epi16(low[0], low[1]);
  quads[2] = _mm512_unpacklo_epi16(high[0], high[1]), quads[3] = _mm512_unpackhi_epi16(high[0], high[1]);
}

// The sums that belong to such quads, in the order of the bytes: quarters of the same bytes added up.
INLINE void in_order(const F (&sums)[4], F (&out)[2]) {
  const __m512 a(sums[0]), b(sums[1]), c(sums[2]), d(sums[3]);
  const __m512 first[2] = {_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(c, d, 0x88)};
  const __m512 second[2] = {_mm512_shuffle_f32x4(a, b, 0xdd), _mm512_shuffle_f32x4(c, d, 0xdd)};
  out[0] = F(_mm512_shuffle_f32x4(first[0], first[1], 0x88)) + F(_mm512_shuffle_f32x4(first[0], first[1], 0xdd));
  out[1] = F(_mm512_shuffle_f32x4(second[0], second[1], 0x88)) + F(_mm512_shuffle_f32x4(second[0], second[1], 0xdd));
}

}  // namespace
#endif
