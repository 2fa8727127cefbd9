// Rows of bf16 against weights in int8, by the processor's dot products of bytes (VNNI).
//
// A row of x becomes fixed-point numbers of 23 bits, X = round(x / max|x| * 2^22), each in three signed digits of eight
// bits. Codes are raised to unsigned ones; what that adds is the same for every weight row and lies ready, negated, behind
// the digits. All the products that meet in a lane fit its 32 bits (4 * 128 * 2^22 = 2^31), so sums there are exact,
// modulo 2^32 on their way: nothing is rounded before the sum of a step becomes a float. Rounding x loses at most 2^-23 of
// the largest |x|, as a sum in fp32 would. A row with so wide a range that bf16 would keep more is left to other readers.
#pragma once

#include "quantized.h"

namespace {

#if defined(__AVX512VNNI__)
constexpr float largest_fixed = 0x1p22f - 2;  // rounding must not reach 2^22

constexpr int64_t fixed_vectors = 4;  // of x for a step of 64 codes: three digits, and what raising adds

// What packing leaves of x, and room for the scales and results of the weight rows at work. Readers without fixed
// point have what lies behind the first 64 bytes, which say whose it is.
struct FixedX {
  int64_t ldx;     // vectors of a row of x
  bool* fits;      // whether every row is one for fixed point
  float* factors;  // [m] of x
  float* totals;   // [m, outputs_at_once]
  float* scales;   // [outputs_at_once, groups] of the weight
  __m512i* x;

  FixedX(void* data, int64_t m, int64_t k) : ldx(vectors(k)) {
    fits = static_cast<bool*>(data);
    factors = static_cast<float*>(data) + lanes;
    totals = factors + round_up(m, lanes);
    scales = totals + m * outputs_at_once;
    x = reinterpret_cast<__m512i*>(scales + scales_room(k));
  }
  static int64_t vectors(int64_t k) { return round_up(k, 128) / 64 * fixed_vectors; }  // to whole groups
  static int64_t scales_room(int64_t k) { return round_up(outputs_at_once * ((k + run - 1) / run), lanes) + lanes; }
  static size_t bytes(int64_t m, int64_t k) {
    return (lanes + round_up(m, lanes) + m * outputs_at_once + scales_room(k)) * sizeof(float) + m * vectors(k) * 64;
  }
  // Scales of all groups of `count` rows of weight from n on, as floats; those of as many rows behind them are asked for.
  void read_scales(const QuantizedTask& task, int64_t n, int64_t count) const {
    const uint16_t* from = static_cast<const uint16_t*>(task.scales) + n * task.groups;
    for (int64_t i = 0, all = count * task.groups; i < all; i += lanes)
      __builtin_prefetch(from + all + i), store(scales + i, halves(from + i, all - i));
  }
};

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
  uint8_t* out = reinterpret_cast<uint8_t*>(x + number / 2 * fixed_vectors) + number % 2 * 32;
  put_digits(first, out, 64), put_digits(second, out + 16, 64);
  __m128i* raised = reinterpret_cast<__m128i*>(out + 3 * 64);
  _mm_storeu_si128(raised, times(fourths(first), -128)), _mm_storeu_si128(raised + 1, times(fourths(second), -128));
}

// The codes of a step, raised by 128.
INLINE __m512i raised_codes(const uint8_t* p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }

INLINE F products(__m512i codes, const __m512i* x) {
  __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x[0]);
  for (int i = 1; i < 3; ++i) sums = _mm512_dpbusd_epi32(_mm512_slli_epi32(sums, 8), codes, x[i]);
  return F(_mm512_cvtepi32_ps(_mm512_add_epi32(sums, x[3])));
}

// Adds step number s under its scales. group: of columns under one scale; 0 if one serves the row.
template <int group>
INLINE F add_products(F sum, __m512i codes, const __m512i* x, const float* scales, int64_t s) {
  if constexpr (group == 0)
    return sum + products(codes, x);
  else if constexpr (group == 32)
    return sum + products(codes, x) * F(_mm512_insertf32x8(_mm512_set1_ps(scales[2 * s]), _mm256_set1_ps(scales[2 * s + 1]), 1));
  else
    return sum + products(codes, x) * splat(scales[s * 64 / group]);
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

// Packs rows of bf16. False, with nothing packed, if one of them is not for fixed point.
INLINE bool place_fixed(const uint16_t* x, int64_t ldx, PackedRows rows) {
  const FixedX packed(rows.data, rows.m, rows.k);
  for (int64_t m = 0; m < rows.m; ++m) {
    const uint16_t* row = x + m * ldx;
    const float factor = fixed_factor(row, rows.k, packed.factors[m]);
    if (factor != factor) return *packed.fits = false;
    for (int64_t number = 0; number < round_up(rows.k, 128) / run; ++number) {
      __m512i halves[2];
      for (int i = 0; i < 2; ++i) halves[i] = _mm512_cvtps_epi32(__m512(elements_at(row, number * run + i * lanes, rows.k) * splat(factor)));
      place_digits(halves[0], halves[1], packed.x + m * packed.ldx, number);
    }
  }
  return *packed.fits = true;
}

// Products of four weight rows, the first being number `place` of those from n on, with `columns` rows of x from m on.
// Behind the last weight row it is taken again.
template <int group, int columns>
INLINE void fixed_block(const QuantizedTask& task, const FixedX& packed, int64_t n, int64_t place, int64_t m) {
  F acc[rows_at_once][columns] = {};
  const uint8_t* w[rows_at_once];
  const float* scales[rows_at_once];
  for (int r = 0; r < rows_at_once; ++r) {
    const int64_t row = smaller(place + r, task.n - 1 - n);
    w[r] = static_cast<const uint8_t*>(task.codes) + (n + row) * task.row_bytes, scales[r] = packed.scales + row * task.groups;
  }
  auto step = [&](int r, const uint8_t* at, const float* scale, int64_t of, int64_t s) INLINE_LAMBDA {
    const __m512i codes = raised_codes(at), *x = packed.x + m * packed.ldx + s * fixed_vectors;
    for (int c = 0; c < columns; ++c) acc[r][c] = add_products<group>(acc[r][c], codes, x + c * packed.ldx, scale, of);
  };
  // The four rows lie behind each other: what is asked for ahead of time is asked for in the order of memory, and for the
  // second-level cache, since more lines can be under way to that than to the first.
  const uint8_t* soon = w[0] + prefetch_bytes;
  const int64_t whole = task.row_bytes / 64, left = task.row_bytes % 64;
  for (int64_t s = 0; s < whole; ++s)
#pragma GCC unroll 4
    for (int r = 0; r < rows_at_once; ++r, soon += 64) __builtin_prefetch(soon, 0, 2), step(r, w[r] + s * 64, scales[r], s, s);
  if (left)
    for (int r = 0; r < rows_at_once; ++r) {
      uint8_t codes[64];
      const float last[2] = {task.group ? scales[r][task.groups - 1] : 0, 0};  // of a half step: another one has one group
      step(r, padded(w[r] + whole * 64, left, codes), last, 0, whole);
    }
  for (int c = 0; c < columns; ++c)
    *reinterpret_cast<F4m*>(packed.totals + (m + c) * outputs_at_once + place) = sum4(acc[0][c], acc[1][c], acc[2][c], acc[3][c]);
}

template <int group>
void fixed_range(const QuantizedTask& task, PackedRows rows, int64_t begin, int64_t end) {
  const FixedX packed(rows.data, rows.m, rows.k);
  for (int64_t first = begin; first < end; first += outputs_at_once) {
    const int64_t count = smaller(outputs_at_once, end - first);
    packed.read_scales(task, first, smaller(round_up(count, rows_at_once), task.n - first));
    for (int64_t i = 0; i < count; i += rows_at_once) {
      for (int64_t m = 0; m + 2 <= rows.m; m += 2) fixed_block<group, 2>(task, packed, first, i, m);
      if (rows.m % 2) fixed_block<group, 1>(task, packed, first, i, rows.m - 1);
    }
    for (int64_t m = 0; m < rows.m; ++m) store_outputs<Fp32, Bf16>(task, packed.totals + m * outputs_at_once, packed.factors[m], m, first, count);
  }
}
INLINE bool takes_fixed(Dtype x, const QuantizedTask& task, int64_t m) {
  return x == Dtype::bf16 && task.kind == Codes::int8 && !task.dynamic && m < dense_from;
}

INLINE PackedRows behind_flag(PackedRows rows) { return {static_cast<char*>(rows.data) + 64, rows.m, rows.k}; }

// Bytes of packed x, where readers without fixed point want `others`: they have what lies behind the flag.
INLINE size_t bytes_with_fixed(Dtype x, const QuantizedTask& task, int64_t m, size_t others) {
  return takes_fixed(x, task, m) ? larger(64 + others, FixedX::bytes(m, task.k)) : others;
}

// This and the next do the work where it is one for fixed point; else they return false, and other readers have `rows`.
INLINE bool pack_fixed(Dtype dtype, const QuantizedTask& task, const void* x, int64_t ldx, PackedRows& rows) {
  if (!takes_fixed(dtype, task, rows.m)) return false;
  if (place_fixed(static_cast<const uint16_t*>(x), ldx, rows)) return true;
  rows = behind_flag(rows);
  return false;
}

INLINE bool run_fixed(Dtype out, const QuantizedTask& task, PackedRows& rows, int64_t begin, int64_t end) {
  if (!takes_fixed(out, task, rows.m)) return false;
  if (!*FixedX(rows.data, rows.m, rows.k).fits) {
    rows = behind_flag(rows);
    return false;
  }
  (task.group == 0 ? fixed_range<0> : task.group == 32 ? fixed_range<32> : task.group == 64 ? fixed_range<64> : fixed_range<128>)(task, rows, begin, end);
  return true;
}

#else
INLINE size_t bytes_with_fixed(Dtype, const QuantizedTask&, int64_t, size_t others) { return others; }
INLINE bool pack_fixed(Dtype, const QuantizedTask&, const void*, int64_t, PackedRows&) { return false; }
INLINE bool run_fixed(Dtype, const QuantizedTask&, PackedRows&, int64_t, int64_t) { return false; }
#endif

}  // namespace
