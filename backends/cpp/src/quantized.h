// Small-batch linear on packed weights: codes are streamed once, made numbers in registers, and multiplied at the
// precision of x. Scales of groups are brought to float once for each row and meet the sum of each group; offsets meet
// the sums of x over the groups. Schemes that round x too: see quantized_dynamic.h.
#pragma once

#include "codes.h"
#include "linear.h"

namespace {

constexpr int64_t outputs_at_once = 64;  // rows of weight whose results are rounded and stored together

// What packing leaves of x, and room for what belongs to the weight rows at work. All parts are aligned to 64 bytes.
template <class M>
struct PackedX {
  int64_t runs, ldx;  // floats of a row of scales or sums; elements of a row of x
  float* scales;      // [rows_at_once, runs] of the weight
  float* totals;      // [m, outputs_at_once] of the result
  float* factors;     // [m] of x
  float* sums;        // [m, runs] of x
  typename M::X* x;

  PackedX(void* data, int64_t m, int64_t k) : runs(runs_padded(k)), ldx(round_up(k, 128)) {
    scales = static_cast<float*>(data);
    totals = scales + rows_at_once * runs;
    factors = totals + m * outputs_at_once;
    sums = factors + round_up(m, 16);
    x = reinterpret_cast<typename M::X*>(sums + m * runs);
  }
  static size_t bytes(int64_t m, int64_t k) {
    const int64_t floats = rows_at_once * runs_padded(k) + m * outputs_at_once + round_up(m, 16) + m * runs_padded(k);
    return floats * sizeof(float) + m * round_up(k, 128) * sizeof(typename M::X);
  }
  typename M::X* end(int64_t m) const { return x + m * ldx; }
};

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
INLINE F powers(const uint8_t* p, int64_t count) {
  const U exponent = small_numbers(p, count);
  const U bits = exponent << 23 | (reinterpret_cast<U>((exponent == 0) | (exponent == 255)) & 0x00400000u);
  return reinterpret_cast<F>(bits & reinterpret_cast<U>(lane_number() < int32_t(smaller(count, lanes))));
}

// One parameter for the runs [from, from + lanes) of a weight row, where 1 << shift runs have one and the row `all`; zeros
// behind the last.
template <class Read>
INLINE F for_runs(int shift, int64_t all, int64_t from, const Read& read) {
  const int64_t first = from >> shift, count = all - first;
  if (count <= 0) return F{};
  F groups = read(first, count);
  return shift ? __builtin_shuffle(groups, lane_number() >> shift) : groups;
}

INLINE int group_shift(const QuantizedTask& task) { return task.group == 32 ? 0 : task.group == 64 ? 1 : 2; }

INLINE F halves_for_runs(const QuantizedTask& task, const void* groups, int64_t n, int64_t from) {
  return for_runs(group_shift(task), task.groups, from, [&](int64_t first, int64_t count) INLINE_LAMBDA {
    return halves(static_cast<const uint16_t*>(groups) + n * task.groups + first, count, (task.n - n) * task.groups - first);
  });
}

// Bytes of groups of 32 times their units: two of them for a vector, or one.
INLINE F counts_for_runs(const QuantizedTask& task, const void* counts, const void* units, int64_t n, int64_t from) {
  if (from >= task.groups) return F{};
  const U bytes = small_numbers(static_cast<const uint8_t*>(counts) + n * task.groups + from, task.groups - from, (task.n - n) * task.groups - from);
  const int64_t all = unit_count(task.groups), first = from >> unit_shift;
  const uint16_t* unit = static_cast<const uint16_t*>(units) + n * all + first;
#if defined(__AVX512F__)
  uint32_t pair = *unit;
  if (first + 1 < all) __builtin_memcpy(&pair, unit, sizeof pair);
  const __m128 two = _mm_cvtph_ps(_mm_cvtsi32_si128(int32_t(pair)));
  const F each = F(_mm512_permutexvar_ps(__m512i(lane_number() >> unit_shift), _mm512_castps128_ps512(two)));
#else
  const F each = splat(Fp16::to_float(*unit));
#endif
  return __builtin_convertvector(reinterpret_cast<I>(bytes), F) * each;
}

INLINE F scales_for_runs(const QuantizedTask& task, int64_t n, int64_t from) {
  if (task.scale_units) return counts_for_runs(task, task.scales, task.scale_units, n, from);
  if (task.kind != Codes::mxfp4) return halves_for_runs(task, task.scales, n, from);
  return for_runs(0, task.groups, from, [&](int64_t first, int64_t count) INLINE_LAMBDA {
    return powers(static_cast<const uint8_t*>(task.scales) + n * task.groups + first, count);
  });
}

// What belongs to the code that is read as 0: codes are -8..7 here, but count from the offset in the pack.
INLINE F offsets_for_runs(const QuantizedTask& task, int64_t n, int64_t from, F scales) {
  const F middle = splat(8.0f) * scales;
  if (task.offset_units) return middle - counts_for_runs(task, task.offsets, task.offset_units, n, from);
  return middle + halves_for_runs(task, task.offsets, n, from);
}

// Scales of weight row n to `scales`; what the offsets add to each column is added to acc, in any lane.
template <int columns>
INLINE void row_parameters(const QuantizedTask& task, int64_t n, int64_t runs, float* scales, const float* sums, F (&acc)[columns]) {
  for (int64_t j = 0; j < (task.k + run - 1) / run; j += lanes) {
    const F scale = scales_for_runs(task, n, j);
    store(scales + j, scale);
    if (!task.offsets) continue;
    const F offset = offsets_for_runs(task, n, j, scale);
    for (int c = 0; c < columns; ++c) acc[c] += offset * load(sums + c * runs + j);
  }
}

// Totals of sums[row][column], rows first.
template <int rows, int columns>
INLINE void store_totals(const F (&sums)[rows][columns], float* totals) {
  if constexpr (rows == 4)
    for (int c = 0; c < columns; ++c)
      *reinterpret_cast<F4m*>(totals + c * outputs_at_once) = sum4(sums[0][c], sums[1][c], sums[2][c], sums[3][c]);
  else
    for (int c = 0; c < columns; c += 2) {
      const F4 four = sum4(sums[0][c], sums[1][c], sums[0][c + 1], sums[1][c + 1]);
      for (int i = 0; i < 4; ++i) totals[(c + i / 2) * outputs_at_once + i % 2] = four[i];
    }
}

// Integer sums are exact; so is what a float then keeps of them, up to its rounding.
template <int rows, int columns>
INLINE void store_totals(const I (&sums)[rows][columns], float* totals, const int32_t* raised) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) {
      int32_t all = -raised[c];
      for (int i = 0; i < lanes; ++i) all += sums[r][c][i];
      totals[c * outputs_at_once + r] = float(all);
    }
}

// Products of `rows` weight rows from n with `columns` rows of x from m, to the totals at `place`. Behind the last
// weight row it is taken again.
template <class M, bool grouped, int rows, int columns>
INLINE void quantized_block(const QuantizedTask& task, const M& reader, const PackedX<M>& packed, int64_t n, int64_t m, int64_t place, Ahead ahead) {
  using Sum = typename M::Sum;
  Sum acc[rows][columns] = {};
  const uint8_t* w[rows];
  for (int r = 0; r < rows; ++r) {
    const int64_t row = smaller(n + r, task.n - 1);
    w[r] = static_cast<const uint8_t*>(task.codes) + row * task.row_bytes;
    if constexpr (grouped) row_parameters<columns>(task, row, packed.runs, packed.scales + r * packed.runs, packed.sums + m * packed.runs, acc[r]);
  }
  const auto* x = packed.x + m * packed.ldx;
  // One step of `count` rows from the first, whose codes are in raw.
  auto step = [&]<int count>(int first, const typename M::Raw (&raw)[count], int64_t s) INLINE_LAMBDA {
    Sum part[count][columns] = {};
    if constexpr (!grouped)
      for (int r = 0; r < count; ++r)
        for (int c = 0; c < columns; ++c) part[r][c] = acc[first + r][c];
#pragma GCC unroll 8
    for (int i = 0; i < M::vectors; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < count; ++r) {
        const auto weight = reader.vector(raw[r], i);
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) part[r][c] = M::mad(part[r][c], weight, M::row(x + c * packed.ldx + s * M::elements, i));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c)
        if constexpr (grouped)
          acc[first + r][c] += part[r][c] * M::spread(packed.scales + (first + r) * packed.runs + s * (M::elements / run));
        else
          acc[first + r][c] = part[r][c];
    }
  };
  const int64_t whole = task.row_bytes / M::bytes, split = smaller(ahead.split / M::bytes, whole);
  auto steps = [&]<int count>(int first) INLINE_LAMBDA {
    auto run = [&](int64_t from, int64_t to, [[maybe_unused]] int64_t distance) INLINE_LAMBDA {
      for (int64_t s = from; s < to; ++s) {
        typename M::Raw raw[count];
#pragma GCC unroll 4
        for (int r = 0; r < count; ++r) {
          const uint8_t* at = w[first + r] + s * M::bytes;
          raw[r] = M::raw(at);
          if constexpr (count > 1) __builtin_prefetch(at + distance, 0, 3);
        }
        step.template operator()<count>(first, raw, s);
      }
    };
    run(0, split, ahead.before);
    run(split, whole, ahead.after);
    if (const int64_t left = task.row_bytes - whole * M::bytes) {
      uint8_t buffer[count][64];
      typename M::Raw raw[count];
      for (int r = 0; r < count; ++r) raw[r] = M::raw(padded(w[first + r] + whole * M::bytes, left, buffer[r]));
      step.template operator()<count>(first, raw, whole);
    }
  };
  if constexpr (columns == 1) {  // the codes are read exactly as they lie, see linear.h
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) steps.template operator()<1>(r);
  } else {
    steps.template operator()<rows>(0);
  }
  float* totals = packed.totals + m * outputs_at_once + place;
  if constexpr (sizeof(typename M::X) == 1)
    store_totals(acc, totals, reinterpret_cast<const int32_t*>(packed.sums) + m);
  else
    store_totals(acc, totals);
}

INLINE float number(Fp32, float x) { return x; }
INLINE float number(Bf16, uint16_t x) { return Bf16::to_float(x); }
struct Int32 { using T = int32_t; };
INLINE float number(Int32, int32_t x) { return float(x); }

// Sums of one row of x [count] to the output at (m, n): times the scales of x and, where it has one for each row, the
// weight, plus the bias.
template <class From, class S>
INLINE void store_outputs(const QuantizedTask& task, const typename From::T* sums, float factor, int64_t m, int64_t n, int64_t count) {
  using T = typename S::T;
  const T* bias = task.bias ? static_cast<const T*>(task.bias) + n : nullptr;
  const float* scales = task.group ? nullptr : static_cast<const float*>(task.scales) + n;
  T* out = static_cast<T*>(task.out) + m * task.ldo + n;
  for (int64_t i = 0; i < count; ++i) {
    float value = number(From{}, sums[i]) * factor;
    if (scales) value = value * scales[i] + (scales[i] - scales[i]);  // NaN under a scale that is not finite
    out[i] = S::from_float(value + (bias ? S::to_float(bias[i]) : 0.0f));
  }
}

// The totals of `count` weight rows from n to the output.
template <class M>
INLINE void store_totals_of(Dtype out, const QuantizedTask& task, const PackedX<M>& packed, int64_t rows, int64_t n, int64_t count) {
  with_storage(out, [&]<class S>(S) {
    for (int64_t m = 0; m < rows; ++m) store_outputs<Fp32, S>(task, packed.totals + m * outputs_at_once, packed.factors[m], m, n, count);
  });
}

template <class M, bool grouped>
void quantized_range(Dtype out, const QuantizedTask& task, PackedRows rows, int64_t begin, int64_t end) {
  const PackedX<M> packed(rows.data, rows.m, rows.k);
  const M reader(task.kind);
  const Ahead ahead = Ahead::of(task.row_bytes, task.row_bytes, 1, rows.m == 1 ? 4 : 2);
  for (int64_t first = begin; first < end; first += outputs_at_once) {
    const int64_t count = smaller(outputs_at_once, end - first);
    if (rows.m == 1)
      for (int64_t i = 0; i < count; i += 4) quantized_block<M, grouped, 4, 1>(task, reader, packed, first + i, 0, i, ahead);
    else
      for (int64_t i = 0; i < count; i += 2)
        for (int64_t m = 0; m < rows.m;) {
          // The last of an odd number is taken again with its neighbour.
          if (lanes == 16 && rows.m - m >= 4)
            quantized_block<M, grouped, 2, 4>(task, reader, packed, first + i, m, i, ahead), m += 4;
          else
            quantized_block<M, grouped, 2, 2>(task, reader, packed, first + i, smaller(m, rows.m - 2), i, ahead), m += 2;
        }
    store_totals_of(out, task, packed, rows.m, first, count);
  }
}

// Calls f.operator()<Read, group>() for the task's columns under one scale.
template <class Read, class Call>
INLINE void by_group(const QuantizedTask& task, const Call& f) {
  switch (task.group) {
    case 0: return f.template operator()<Read, 0>();
    case 32: return f.template operator()<Read, 32>();
    case 64: return f.template operator()<Read, 64>();
    default: return f.template operator()<Read, 128>();
  }
}

// Elements of x as a reader of this X wants them.
template <class S>
INLINE void convert(typename S::T from, float& to) { to = S::to_float(from); }
template <class S>
INLINE void convert(typename S::T from, uint16_t& to) { to = from; }
INLINE float value_of(float x) { return x; }
INLINE float value_of(uint16_t x) { return Bf16::to_float(x); }

// Rows of x in the reader's order, and the sums of their runs where offsets will meet them.
template <class M>
void place_rows(Dtype dtype, bool with_sums, const void* x, int64_t ldx, PackedRows rows) {
  const PackedX<M> packed(rows.data, rows.m, rows.k);
  with_storage(dtype, [&]<class S>(S) {
    for (int64_t m = 0; m < rows.m; ++m) {
      const auto* row = static_cast<const typename S::T*>(x) + m * ldx;
      packed.factors[m] = 1.0f;
      for (int64_t number = 0; number < round_up(rows.k, 128) / run; ++number) {
        const int64_t count = smaller(rows.k - number * run, run);
        typename M::X values[run] = {};
        if (count == run)
          for (int i = 0; i < run; ++i) convert<S>(row[number * run + i], values[i]);
        else
          for (int64_t i = 0; i < count; ++i) convert<S>(row[number * run + i], values[i]);
        M::place(values, packed.x + m * packed.ldx, number);
        if (with_sums) {
          F all = {};
          for (int i = 0; i < run; i += lanes)
            for (int j = 0; j < lanes; ++j) all[j] += value_of(values[i + j]);
          packed.sums[m * packed.runs + number] = sum(all);
        }
      }
      if (with_sums)
        for (int64_t number = round_up(rows.k, 128) / run; number < packed.runs; ++number) packed.sums[m * packed.runs + number] = 0;
    }
  });
}

[[maybe_unused]] constexpr int64_t dense_from = 5;  // rows of x for which making the weight dense costs less

// Calls f.operator()<M>() with the reader for this dtype of x and number of its rows.
template <class Call>
INLINE void with_reader([[maybe_unused]] Dtype x, bool dynamic, Codes kind, [[maybe_unused]] int64_t m, Call&& f) {
#if defined(__AVX512VNNI__)
  if (dynamic && kind == Codes::int8) return f.template operator()<ByteDots>();
#endif
#if defined(__AVX512BF16__)
  if (!dynamic && x == Dtype::bf16 && m >= dense_from) return f.template operator()<Dense>();
  if ((dynamic || (x == Dtype::bf16 && m > 1)) && kind == Codes::fp8) return f.template operator()<Fp8Pairs>();
  if (x == Dtype::bf16 && (kind == Codes::int4 || kind == Codes::mxfp4)) return f.template operator()<NibblePairs>();
#endif
  if (kind == Codes::int8) return f.template operator()<ByteReader<Int8>>();
  if (kind == Codes::fp8) return f.template operator()<ByteReader<E4m3>>();
  if (kind == Codes::int4) return f.template operator()<NibbleReader<true>>();
  f.template operator()<NibbleReader<false>>();
}

}  // namespace
