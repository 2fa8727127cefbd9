// Rows of x in codes as the weight's, each with a scale: what schemes do that round x too.
#pragma once

#include "quantized.h"

namespace {

// To the nearest whole number, ties to even; |x| below 2^22.
INLINE F rounded(F x) { return (x + splat(0x1.8p23f)) - splat(0x1.8p23f); }
// To the nearest number of e4m3, ties to even; |x| up to 448.
INLINE F rounded_to_e4m3(F x) {
  const U u = reinterpret_cast<U>(x);
  const F normal = reinterpret_cast<F>((u + (0x7ffffu + (u >> 20 & 1u))) & 0xfff00000u), small = (x + splat(0x1.8p14f)) - splat(0x1.8p14f);
  return select(reinterpret_cast<I>(u & 0x7fffffffu) < 0x3c800000, small, normal);
}
INLINE void convert_code(float code, float& to) { to = code; }
INLINE void convert_code(float code, uint16_t& to) { to = uint16_t(float_to_bits(code) >> 16); }  // exact
INLINE void convert_code(float code, int8_t& to) { to = int8_t(code); }

// What dynamic schemes make of one row of x: codes as the weight's, and their scale. `factor` is that scale, or NaN if
// the row is not finite; its codes are zeros then.
template <class S>
struct RoundedRow {
  const typename S::T* row;
  int64_t k;
  Codes kind;
  float factor, divisor;

  RoundedRow(const typename S::T* row, int64_t k, Codes kind) : row(row), k(k), kind(kind) {
    F most = {}, probe = {};
    int64_t i = 0;
    for (; i + lanes <= k; i += lanes) {
      F values;
      for (int j = 0; j < lanes; ++j) values[j] = S::to_float(row[i + j]);
      const F size = reinterpret_cast<F>(reinterpret_cast<U>(values) & 0x7fffffffu);
      most = select(size > most, size, most), probe += values * splat(0.0f);
    }
    float largest = 0, not_finite = sum(probe);
    for (int j = 0; j < lanes; ++j) largest = most[j] > largest ? most[j] : largest;
    for (; i < k; ++i) {
      const float value = S::to_float(row[i]), size = __builtin_fabsf(value);
      largest = size > largest ? size : largest, not_finite += value * 0.0f;
    }
    const float scale = largest / (kind == Codes::int8 ? 127.0f : 448.0f);
    factor = scale + not_finite, divisor = scale == 0 ? 1.0f : scale;
  }

  // Codes of a run and their sum.
  template <class X>
  INLINE float codes(int64_t number, X (&out)[run]) const {
    float values[run] = {}, all = 0;
    const int64_t count = smaller(k - number * run, run);
    if (factor != factor || count <= 0) {
      for (X& code : out) code = 0;
      return 0;
    }
    if (count == run)
      for (int i = 0; i < run; ++i) values[i] = S::to_float(row[number * run + i]);
    else
      for (int64_t i = 0; i < count; ++i) values[i] = S::to_float(row[number * run + i]);
    for (int i = 0; i < run; i += lanes) {
      F code = load(values + i) / splat(divisor);
      code = kind == Codes::int8 ? rounded(code) : rounded_to_e4m3(code);
      store(values + i, code), all += sum(code);
    }
    for (int i = 0; i < run; ++i) convert_code(values[i], out[i]);
    return all;
  }
};

template <class M>
void place_codes(Dtype dtype, Codes kind, const void* x, int64_t ldx, PackedRows rows) {
  const PackedX<M> packed(rows.data, rows.m, rows.k);
  with_storage(dtype, [&]<class S>(S) {
    for (int64_t m = 0; m < rows.m; ++m) {
      const RoundedRow<S> row(static_cast<const typename S::T*>(x) + m * ldx, rows.k, kind);
      packed.factors[m] = row.factor;
      float all = 0;
      for (int64_t number = 0; number < round_up(rows.k, 128) / run; ++number) {
        typename M::X codes[run];
        all += row.codes(number, codes);
        M::place(codes, packed.x + m * packed.ldx, number);
      }
      if constexpr (sizeof(typename M::X) == 1) reinterpret_cast<int32_t*>(packed.sums)[m] = 128 * int32_t(all);
    }
  });
}

// The same for products that torch makes: dense rows [m_begin, m_end) of X, and their factors.
template <class X>
void rounded_rows_as(Dtype dtype, Codes kind, const void* x, int64_t ldx, int64_t k, X* out, float* factors, int64_t begin, int64_t end) {
  with_storage(dtype, [&]<class S>(S) {
    for (int64_t m = begin; m < end; ++m) {
      const RoundedRow<S> row(static_cast<const typename S::T*>(x) + m * ldx, k, kind);
      factors[m] = row.factor;
      for (int64_t i = 0; i < k; i += run) {
        X codes[run];
        row.codes(i / run, codes);
        __builtin_memcpy(out + m * k + i, codes, smaller(k - i, run) * sizeof *out);
      }
    }
  });
}

}  // namespace
