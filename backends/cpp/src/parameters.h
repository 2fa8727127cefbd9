// Scales and offsets of packed weights: brought to float once for each row, one of each for every run of columns, or once
// for several rows, one of each for every group.
//
// They lie in one of a few forms. Which one is found once for many, not for each number.
#pragma once

#include "codes.h"

namespace {

// Halves [count > 0] as floats, zeros behind them; of `readable` more than those may be read.
INLINE F halves(const uint16_t* p, int64_t count, [[maybe_unused]] int64_t readable = 0) {
  if (count >= lanes) return Fp16::widen(p);
#if defined(__AVX512F__)
  return F(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p)));
#else
  if (readable >= lanes) return select(lane_number() < int32_t(count), Fp16::widen(p), F{});
  uint16_t buffer[lanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
  return Fp16::widen(buffer);
#endif
}

// Bytes [count > 0] as integers, zeros behind them; of `readable` more than those may be read.
INLINE U small_numbers(const uint8_t* p, int64_t count, [[maybe_unused]] int64_t readable = 0) {
  const int32_t inside = int32_t(smaller(count, lanes));
#if defined(__AVX512F__)
  return U(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(__mmask16((1u << inside) - 1), p)));
#else
  if (readable >= lanes) return reinterpret_cast<U>((lane_number() < inside) & widened(p) & 255);
  uint8_t buffer[lanes] = {};
  for (int i = 0; i < inside; ++i) buffer[i] = p[i];
  return reinterpret_cast<U>(widened(buffer) & 255);
#endif
}

// Powers of two from their biased exponents [count > 0] (E8M0), where 255 means NaN; zeros behind them.
INLINE F powers(const uint8_t* p, int64_t count, int64_t readable) {
  const U exponent = small_numbers(p, count, readable);
  const U bits = exponent << 23 | (reinterpret_cast<U>((exponent == 0) | (exponent == 255)) & 0x00400000u);
  return reinterpret_cast<F>(bits & reinterpret_cast<U>(lane_number() < int32_t(smaller(count, lanes))));
}

// float16 numbers; exponents; bytes times the unit of several groups.
enum class Form { halves, powers, counts };

// Parameters of this form, one for 1 << shift runs; with offsets or without.
template <Form form, int shift, bool has_offsets>
struct Parameters {
  // Of the runs [from, from + lanes) of weight row n; zeros behind the last. Rows without units may be read on over
  // `rows` of them, as if they were one.
  static INLINE F of_runs(const QuantizedTask& task, const void* all, const void* units, int64_t n, int64_t from, int64_t rows = 1) {
    const int64_t first = from >> shift, count = rows * task.groups - first;
    if (count <= 0) return F{};
    const int64_t at = n * task.groups + first, readable = task.n * task.groups - at;
    F groups;
    if constexpr (form == Form::halves) groups = halves(static_cast<const uint16_t*>(all) + at, count, readable);
    if constexpr (form == Form::powers) groups = powers(static_cast<const uint8_t*>(all) + at, count, readable);
    if constexpr (form == Form::counts) {
      const U bytes = small_numbers(static_cast<const uint8_t*>(all) + at, count, readable);
      groups = __builtin_convertvector(reinterpret_cast<I>(bytes), F) * units_of(task, static_cast<const uint16_t*>(units), n, first);
    }
    if constexpr (shift == 0) return groups;
    return __builtin_shuffle(groups, lane_number() >> shift);
  }

  static INLINE F scales(const QuantizedTask& task, int64_t n, int64_t from) { return of_runs(task, task.scales, task.scale_units, n, from); }

  // What belongs to the code that is read as 0: codes are -8..7 here, but count from the offset in the pack.
  static INLINE F offsets(const QuantizedTask& task, int64_t n, int64_t from, F scales) {
    const F middle = splat(8.0f) * scales, offsets = of_runs(task, task.offsets, task.offset_units, n, from);
    return form == Form::counts ? middle - offsets : middle + offsets;
  }

  // The scales of weight row n to `scales`; what its offsets add to each of `columns` rows of x, the sums of whose runs are
  // in `sums`, is added to acc, in any lane.
  template <int columns>
  static void of_row(const QuantizedTask& task, int64_t n, int64_t runs, float* scales_out, const float* sums, F* acc) {
    F all[columns];
    for (int c = 0; c < columns; ++c) all[c] = acc[c];
    for (int64_t j = 0; j < (task.k + run - 1) / run; j += lanes) {
      const F scale = scales(task, n, j);
      store(scales_out + j, scale);
      if constexpr (!has_offsets) continue;
      const F offset = offsets(task, n, j, scale);
      for (int c = 0; c < columns; ++c) all[c] += offset * load(sums + c * runs + j);
    }
    for (int c = 0; c < columns; ++c) acc[c] = all[c];
  }

  // Scales and offsets of all groups of `count` weight rows from n on. Those of as many rows behind them are asked for.
  static void of_rows(const QuantizedTask& task, int64_t n, int64_t count, float* scales, float* offsets) {
    read_rows(task, task.scales, task.scale_units, n, count, 1.0f, scales);
    if constexpr (has_offsets) read_rows(task, task.offsets, task.offset_units, n, count, form == Form::counts ? -1.0f : 1.0f, offsets);
  }

 private:
  static INLINE void read_rows(const QuantizedTask& task, const void* all, const void* units, int64_t n, int64_t count, float sign, float* out) {
    static_assert(shift == 0);
    const int64_t together = form == Form::counts ? 1 : count, groups = together * task.groups, item = form == Form::halves ? 2 : 1;
    const char* ahead = static_cast<const char*>(all) + (n + count) * task.groups * item;
    for (int64_t row = 0; row < count; row += together, out += groups)
      for (int64_t i = 0; i < groups; i += lanes) {
        __builtin_prefetch(ahead + (row * task.groups + i) * item);
        if (form == Form::halves && groups - i >= lanes)
          store(out + i, Fp16::widen(static_cast<const uint16_t*>(all) + n * task.groups + i));
        else
          store(out + i, splat(sign) * of_runs(task, all, units, n + row, i, together));
      }
  }

  // The units of the groups [first, first + lanes): of two times 8 groups, or of 8.
  static INLINE F units_of(const QuantizedTask& task, const uint16_t* units, int64_t n, int64_t first) {
    const int64_t all = unit_count(task.groups), number = first >> unit_shift;
    const uint16_t* unit = units + n * all + number;
#if defined(__AVX512F__)
    uint32_t pair = *unit;
    if (number + 1 < all) __builtin_memcpy(&pair, unit, sizeof pair);
    const __m128 two = _mm_cvtph_ps(_mm_cvtsi32_si128(int32_t(pair)));
    return F(_mm512_permutexvar_ps(__m512i(lane_number() >> unit_shift), _mm512_castps128_ps512(two)));
#elif defined(__AVX2__)
    return F(_mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(*unit))));
#else
    return splat(Fp16::to_float(*unit));
#endif
  }
};

// Calls f.operator()<P>() with the Parameters of a weight that has groups: of its runs, or of its groups themselves.
template <bool of_groups, class Call>
INLINE void with_parameters(const QuantizedTask& task, const Call& f) {
  if (task.scale_units) return f.template operator()<Parameters<Form::counts, 0, true>>();
  if (task.kind == Codes::mxfp4) return f.template operator()<Parameters<Form::powers, 0, false>>();
  auto with_shift = [&]<int shift>() INLINE_LAMBDA {
    if (task.offsets) return f.template operator()<Parameters<Form::halves, shift, true>>();
    f.template operator()<Parameters<Form::halves, shift, false>>();
  };
  if constexpr (of_groups) return with_shift.template operator()<0>();
  else switch (task.group) {
    case 32: return with_shift.template operator()<0>();
    case 64: return with_shift.template operator()<1>();
    default: return with_shift.template operator()<2>();
  }
}

// Parameters::of_row of a weight, for each number of columns that is asked for.
struct RowParameters {
  using Call = void(const QuantizedTask&, int64_t n, int64_t runs, float* scales, const float* sums, F* acc);
  Call *one, *two, *four;

  explicit RowParameters(const QuantizedTask& task) {
    with_parameters<false>(task, [&]<class P>() INLINE_LAMBDA { one = P::template of_row<1>, two = P::template of_row<2>, four = P::template of_row<4>; });
  }
  template <int columns>
  INLINE Call* of() const { return columns == 1 ? one : columns == 2 ? two : four; }
};

// Parameters::of_rows of a weight.
struct GroupParameters {
  void (*of_rows)(const QuantizedTask&, int64_t n, int64_t count, float* scales, float* offsets);

  explicit GroupParameters(const QuantizedTask& task) {
    with_parameters<true>(task, [&]<class P>() INLINE_LAMBDA { of_rows = P::of_rows; });
  }
};

}  // namespace
