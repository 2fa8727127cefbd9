// Small-batch linear on packed weights: codes are streamed once, made numbers in registers, and multiplied at the
// precision of x. Scales of groups meet the sum of each group, offsets the sums of x over the groups: parameters.h.
// Schemes that round x too: see quantized_dynamic.h.
#pragma once

#include "linear.h"
#include "parameters.h"

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
INLINE void quantized_block(const QuantizedTask& task, const M& reader, [[maybe_unused]] const RowParameters& parameters, const PackedX<M>& packed, int64_t n,
                            int64_t m, int64_t place, Ahead ahead) {
  using Sum = typename M::Sum;
  Sum acc[rows][columns] = {};
  const uint8_t* w[rows];
  for (int r = 0; r < rows; ++r) {
    const int64_t row = smaller(n + r, task.n - 1);
    w[r] = static_cast<const uint8_t*>(task.codes) + row * task.row_bytes;
    if constexpr (grouped) parameters.template of<columns>()(task, row, packed.runs, packed.scales + r * packed.runs, packed.sums + m * packed.runs, acc[r]);
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
  const RowParameters parameters(task);
  const Ahead ahead = Ahead::of(task.row_bytes, task.row_bytes, 1, rows.m == 1 ? 4 : 2);
  for (int64_t first = begin; first < end; first += outputs_at_once) {
    const int64_t count = smaller(outputs_at_once, end - first);
    if (rows.m == 1)
      for (int64_t i = 0; i < count; i += 4) quantized_block<M, grouped, 4, 1>(task, reader, parameters, packed, first + i, 0, i, ahead);
    else
      for (int64_t i = 0; i < count; i += 2)
        for (int64_t m = 0; m < rows.m;) {
          // The last of an odd number is taken again with its neighbour.
          if (lanes == 16 && rows.m - m >= 4)
            quantized_block<M, grouped, 2, 4>(task, reader, parameters, packed, first + i, m, i, ahead), m += 4;
          else
            quantized_block<M, grouped, 2, 2>(task, reader, parameters, packed, first + i, smaller(m, rows.m - 2), i, ahead), m += 2;
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
