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

template <class M>
struct FixedX;
template <class M>
bool place_fixed(const uint16_t* x, int64_t ldx, PackedRows rows);
template <class M>
void fixed_range(const QuantizedTask& task, PackedRows rows, int64_t begin, int64_t end);

#if defined(__AVX512VNNI__)
constexpr float largest_fixed = 0x1p22f - 2;  // rounding must not reach 2^22

// What packing leaves of x, and room for the scales and results of the weight rows at work. Readers without fixed
// point have what lies behind the first 64 bytes, which say whose it is.
template <class M>
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
  static int64_t vectors(int64_t k) { return round_up(k, 128) / M::elements * M::vectors; }  // to whole groups
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

// A step of 64 codes, raised by 128, against `vectors` of x: three digits, and what raising adds. group: of columns under
// one scale; 0 if one serves the row.
template <int group>
struct FixedBytes {
  static constexpr int elements = 64, vectors = 4;
  static INLINE __m512i step(const uint8_t* p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }
  static INLINE F products(__m512i codes, const __m512i* x) {
    __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x[0]);
    for (int i = 1; i < 3; ++i) sums = _mm512_dpbusd_epi32(_mm512_slli_epi32(sums, 8), codes, x[i]);
    return F(_mm512_cvtepi32_ps(_mm512_add_epi32(sums, x[3])));
  }
  static INLINE F scale(const float* scales, int64_t s) {
    if constexpr (group == 32)
      return F(_mm512_insertf32x8(_mm512_set1_ps(scales[2 * s]), _mm256_set1_ps(scales[2 * s + 1]), 1));
    else
      return splat(scales[s * elements / group]);
  }
  static INLINE F add(F sum, __m512i codes, const __m512i* x, const float* scales, int64_t s) {
    if constexpr (group == 0)
      return sum + products(codes, x);
    else
      return sum + products(codes, x) * scale(scales, s);
  }
  static INLINE void place(__m512i first, __m512i second, __m512i* x, int64_t number) {
    uint8_t* out = reinterpret_cast<uint8_t*>(x + number / 2 * vectors) + number % 2 * 32;
    put_digits(first, out, 64), put_digits(second, out + 16, 64);
    __m128i* raised = reinterpret_cast<__m128i*>(out + 3 * 64);
    _mm_storeu_si128(raised, times(fourths(first), -128)), _mm_storeu_si128(raised + 1, times(fourths(second), -128));
  }
};

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

// Packs rows of bf16 for the reader M. False, with nothing packed, if one of them is not for fixed point.
template <class M>
bool place_fixed(const uint16_t* x, int64_t ldx, PackedRows rows) {
  const FixedX<M> packed(rows.data, rows.m, rows.k);
  for (int64_t m = 0; m < rows.m; ++m) {
    const uint16_t* row = x + m * ldx;
    const float factor = fixed_factor(row, rows.k, packed.factors[m]);
    if (factor != factor) return *packed.fits = false;
    for (int64_t number = 0; number < round_up(rows.k, 128) / run; ++number) {
      __m512i halves[2];
      for (int i = 0; i < 2; ++i) halves[i] = _mm512_cvtps_epi32(__m512(elements_at(row, number * run + i * lanes, rows.k) * splat(factor)));
      M::place(halves[0], halves[1], packed.x + m * packed.ldx, number);
    }
  }
  return *packed.fits = true;
}

// Products of four weight rows, the first being number `place` of those from n on, with `columns` rows of x from m on.
// Behind the last weight row it is taken again.
template <class M, int columns>
INLINE void fixed_block(const QuantizedTask& task, const FixedX<M>& packed, int64_t n, int64_t place, int64_t m) {
  F acc[rows_at_once][columns] = {};
  const uint8_t* w[rows_at_once];
  const float* scales[rows_at_once];
  for (int r = 0; r < rows_at_once; ++r) {
    const int64_t row = smaller(place + r, task.n - 1 - n);
    w[r] = static_cast<const uint8_t*>(task.codes) + (n + row) * task.row_bytes, scales[r] = packed.scales + row * task.groups;
  }
  auto step = [&](int r, const uint8_t* at, const float* scale, int64_t of, int64_t s) INLINE_LAMBDA {
    const __m512i codes = M::step(at), *x = packed.x + m * packed.ldx + s * M::vectors;
    for (int c = 0; c < columns; ++c) acc[r][c] = M::add(acc[r][c], codes, x + c * packed.ldx, scale, of);
  };
  // The four rows lie behind each other: what is asked for ahead of time is asked for in the order of memory.
  const uint8_t* soon = w[0] + prefetch_bytes;
  const int64_t whole = task.row_bytes / 64, left = task.row_bytes % 64;
  for (int64_t s = 0; s < whole; ++s)
#pragma GCC unroll 4
    for (int r = 0; r < rows_at_once; ++r, soon += 64) __builtin_prefetch(soon), step(r, w[r] + s * 64, scales[r], s, s);
  if (left)
    for (int r = 0; r < rows_at_once; ++r) {
      uint8_t codes[64];
      const float last[2] = {task.group ? scales[r][task.groups - 1] : 0, 0};  // of a half step: another one has one group
      step(r, padded(w[r] + whole * 64, left, codes), last, 0, whole);
    }
  for (int c = 0; c < columns; ++c)
    *reinterpret_cast<F4m*>(packed.totals + (m + c) * outputs_at_once + place) = sum4(acc[0][c], acc[1][c], acc[2][c], acc[3][c]);
}

template <class M>
void fixed_range(const QuantizedTask& task, PackedRows rows, int64_t begin, int64_t end) {
  const FixedX<M> packed(rows.data, rows.m, rows.k);
  for (int64_t first = begin; first < end; first += outputs_at_once) {
    const int64_t count = smaller(outputs_at_once, end - first);
    packed.read_scales(task, first, smaller(round_up(count, rows_at_once), task.n - first));
    for (int64_t i = 0; i < count; i += rows_at_once) {
      for (int64_t m = 0; m + 2 <= rows.m; m += 2) fixed_block<M, 2>(task, packed, first, i, m);
      if (rows.m % 2) fixed_block<M, 1>(task, packed, first, i, rows.m - 1);
    }
    for (int64_t m = 0; m < rows.m; ++m) store_outputs<Fp32, Bf16>(task, packed.totals + m * outputs_at_once, packed.factors[m], m, first, count);
  }
}
#endif

// Calls f.operator()<M>() with the reader of fixed point for this task, if there is one.
template <class Call>
INLINE void with_fixed_reader([[maybe_unused]] Dtype x, [[maybe_unused]] const QuantizedTask& task, [[maybe_unused]] int64_t m, [[maybe_unused]] Call&& f) {
#if defined(__AVX512VNNI__)
  if (x != Dtype::bf16 || task.kind != Codes::int8 || task.dynamic || m >= dense_from) return;
  if (task.group == 0) return f.template operator()<FixedBytes<0>>();
  if (task.group == 32) return f.template operator()<FixedBytes<32>>();
  if (task.group == 64) return f.template operator()<FixedBytes<64>>();
  return f.template operator()<FixedBytes<128>>();
#endif
}

// Bytes of packed x, where readers without fixed point want `others`: they have what lies behind the flag.
INLINE size_t bytes_with_fixed(Dtype x, const QuantizedTask& task, int64_t m, size_t others) {
  size_t fixed = 0;
  with_fixed_reader(x, task, m, [&]<class M>() { fixed = FixedX<M>::bytes(m, task.k); });
  return fixed ? larger(64 + others, fixed) : others;
}

INLINE PackedRows behind_flag(PackedRows rows) { return {static_cast<char*>(rows.data) + 64, rows.m, rows.k}; }

// Both do the work where it is one for fixed point; else they return false and leave what other readers take in `rows`.
INLINE bool pack_fixed(Dtype dtype, const QuantizedTask& task, const void* x, int64_t ldx, PackedRows& rows) {
  bool fits = false;
  with_fixed_reader(dtype, task, rows.m, [&]<class M>() {
    fits = place_fixed<M>(static_cast<const uint16_t*>(x), ldx, rows);
    if (!fits) rows = behind_flag(rows);
  });
  return fits;
}

INLINE bool run_fixed(Dtype out, const QuantizedTask& task, PackedRows& rows, int64_t begin, int64_t end) {
  bool fits = false;
  with_fixed_reader(out, task, rows.m, [&]<class M>() {
    fits = *FixedX<M>(rows.data, rows.m, rows.k).fits;
    if (fits)
      fixed_range<M>(task, rows, begin, end);
    else
      rows = behind_flag(rows);
  });
  return fits;
}

}  // namespace
