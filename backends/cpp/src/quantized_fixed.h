// Rows of bf16 against weights in int8, as fixed-point numbers and sums of integers.
//
// A `Fixed` says how a row of x is packed and meets 64 codes (fixed_bytes.h, fixed_words.h). A row with so wide a range
// that bf16 would keep more is left to other readers.
#pragma once

#include "quantized.h"

#if defined(__AVX512VNNI__)
#include "fixed_bytes.h"
#elif defined(__AVX2__) && !defined(__AVX512F__)
#include "fixed_words.h"
#endif

namespace {

#if defined(GRAPHOPT_FIXED)
// What packing leaves of x, and room for the scales and results of the weight rows at work. Readers without fixed
// point have what lies behind the first 64 bytes, which say whose it is.
struct FixedX {
  static constexpr int64_t flag_floats = 16;

  int64_t ldx;     // vectors of a row of x
  bool* fits;      // whether every row is one for fixed point
  float* factors;  // [m] of x
  float* totals;   // [m, outputs_at_once]
  int64_t runs;    // floats of a row of sums; 0 if there are no readers of offsets
  float* scales;   // [parameter_rows(k), groups] of the weight
  float* offsets;  // the same
  float* sums;     // [m, runs] of x: of each group
  Fixed::Vector* x;

  FixedX(void* data, int64_t m, int64_t k) : ldx(vectors(k)), runs(sums_room(k)) {
    fits = static_cast<bool*>(data);
    factors = static_cast<float*>(data) + flag_floats;
    totals = factors + round_up(m, lanes);
    scales = totals + m * outputs_at_once;
    offsets = scales + parameters_room(k);
    sums = offsets + (runs ? parameters_room(k) : 0);
    x = reinterpret_cast<Fixed::Vector*>(sums + m * runs);
  }
  static int64_t vectors(int64_t k) { return round_up(k, 128) / 64 * Fixed::vectors; }  // to whole groups
  // For how many rows of weight parameters are read at once: they stay in the first cache.
  static int64_t parameter_rows(int64_t k) {
    const int64_t fit = 2048 / ((k + run - 1) / run) / rows_at_once * rows_at_once;
    return smaller(larger(fit, int64_t(rows_at_once)), outputs_at_once);
  }
  static int64_t parameters_room(int64_t k) { return round_up(parameter_rows(k) * ((k + run - 1) / run), lanes) + lanes; }
  static int64_t sums_room(int64_t k) { return Fixed::takes(Codes::int4) ? runs_padded(k) : 0; }
  static size_t bytes(int64_t m, int64_t k) {
    const int64_t of_weight = parameters_room(k) * (sums_room(k) ? 2 : 1);
    return (flag_floats + round_up(m, lanes) + m * outputs_at_once + of_weight + m * sums_room(k)) * sizeof(float) + m * vectors(k) * sizeof(Fixed::Vector);
  }
};

// Packs rows of bf16. False, with nothing packed, if one of them is not for fixed point.
INLINE bool place_fixed(const QuantizedTask& task, const uint16_t* x, int64_t ldx, PackedRows rows) {
  const FixedX packed(rows.data, rows.m, rows.k);
  for (int64_t m = 0; m < rows.m; ++m) {
    float* sums = packed.sums + m * packed.runs;
    __builtin_memset(sums, 0, packed.runs * sizeof *sums);
    if (!Fixed::place(task, x + m * ldx, packed.x + m * packed.ldx, packed.factors[m], sums)) return *packed.fits = false;
  }
  return *packed.fits = true;
}

// Products of four weight rows, the first being number `place` of those from n on, with `columns` rows of x from m on.
// Behind the last weight row it is taken again. parameters: which of those rows is the first that they were read of.
template <class Read, int group, int columns>
INLINE void fixed_block(const QuantizedTask& task, const FixedX& packed, const Read& codes_at, int64_t n, int64_t place, int64_t parameters, int64_t m) {
  F acc[rows_at_once][columns] = {};
  const uint8_t* w[rows_at_once];
  const float* scales[rows_at_once];
  for (int r = 0; r < rows_at_once; ++r) {
    const int64_t row = smaller(place + r, task.n - 1 - n), at = (row - parameters) * task.groups;
    w[r] = static_cast<const uint8_t*>(task.codes) + (n + row) * task.row_bytes;
    scales[r] = packed.scales + at;
    if constexpr (Read::has_offsets)
      for (int64_t i = 0; i < task.groups; i += lanes) {
        const F offsets = load(packed.offsets + at + i), own = select(lane_number() < int32_t(smaller(task.groups - i, lanes)), offsets, F{});
        for (int c = 0; c < columns; ++c) acc[r][c] += own * load(packed.sums + (m + c) * packed.runs + i);
      }
  }
  auto step = [&](int r, const uint8_t* at, const float* scale, int64_t of, int64_t s) INLINE_LAMBDA {
    const auto codes = codes_at(at);
    const auto* x = packed.x + m * packed.ldx + s * Fixed::vectors;
    for (int c = 0; c < columns; ++c) acc[r][c] = Fixed::add<group>(acc[r][c], codes, x + c * packed.ldx, scale, of);
  };
  // The four rows lie behind each other: what is asked for ahead of time is asked for in the order of memory.
  const uint8_t* soon = w[0];
  const int64_t whole = task.row_bytes / Read::step_bytes, left = task.row_bytes % Read::step_bytes;
  for (int64_t s = 0; s < whole; ++s)
#pragma GCC unroll 4
    for (int r = 0; r < rows_at_once; ++r, soon += Read::step_bytes)
      read_once(soon), step(r, w[r] + s * Read::step_bytes, scales[r], s, s);
  if (left)
    for (int r = 0; r < rows_at_once; ++r) {
      uint8_t codes[64];
      const float last[2] = {task.group ? scales[r][task.groups - 1] : 0, 0};  // of a half step: another one has one group
      step(r, padded(w[r] + whole * Read::step_bytes, left, codes), last, 0, whole);
    }
  for (int c = 0; c < columns; ++c)
    *reinterpret_cast<F4m*>(packed.totals + (m + c) * outputs_at_once + place) = sum4(acc[0][c], acc[1][c], acc[2][c], acc[3][c]);
}

template <class Read, int group>
void fixed_range(const QuantizedTask& task, PackedRows rows, int64_t begin, int64_t end) {
  const FixedX packed(rows.data, rows.m, rows.k);
  const Read codes_at(task.kind);
  const GroupParameters parameters(task);
  const int64_t parameter_rows = FixedX::parameter_rows(rows.k);
  for (int64_t first = begin; first < end; first += outputs_at_once) {
    const int64_t count = smaller(outputs_at_once, end - first);
    int64_t read = 0;  // up to here, and from `from` on
    for (int64_t i = 0, from = 0; i < count; i += rows_at_once) {
      if (group && i == read) {
        from = i, read = smaller(i + parameter_rows, round_up(count, rows_at_once));
        parameters.of_rows(task, first + i, smaller(read - i, task.n - first - i), packed.scales, packed.offsets);
      }
      for (int64_t m = 0; m + 2 <= rows.m; m += 2) fixed_block<Read, group, 2>(task, packed, codes_at, first, i, from, m);
      if (rows.m % 2) fixed_block<Read, group, 1>(task, packed, codes_at, first, i, from, rows.m - 1);
    }
    for (int64_t m = 0; m < rows.m; ++m) store_outputs<Fp32, Bf16>(task, packed.totals + m * outputs_at_once, packed.factors[m], m, first, count);
  }
}

INLINE bool takes_fixed(Dtype x, const QuantizedTask& task, [[maybe_unused]] int64_t m) {
#if defined(__AVX512BF16__)
  if (m >= dense_from) return false;
#endif
  return x == Dtype::bf16 && Fixed::takes(task.kind) && !task.dynamic;
}

INLINE PackedRows behind_flag(PackedRows rows) { return {static_cast<char*>(rows.data) + 64, rows.m, rows.k}; }

// Bytes of packed x, where readers without fixed point want `others`: they have what lies behind the flag.
INLINE size_t bytes_with_fixed(Dtype x, const QuantizedTask& task, int64_t m, size_t others) {
  return takes_fixed(x, task, m) ? larger(64 + others, FixedX::bytes(m, task.k)) : others;
}

// This and the next do the work where it is one for fixed point; else they return false, and other readers have `rows`.
INLINE bool pack_fixed(Dtype dtype, const QuantizedTask& task, const void* x, int64_t ldx, PackedRows& rows) {
  if (!takes_fixed(dtype, task, rows.m)) return false;
  if (place_fixed(task, static_cast<const uint16_t*>(x), ldx, rows)) return true;
  rows = behind_flag(rows);
  return false;
}

INLINE bool run_fixed(Dtype out, const QuantizedTask& task, PackedRows& rows, int64_t begin, int64_t end) {
  if (!takes_fixed(out, task, rows.m)) return false;
  if (!*FixedX(rows.data, rows.m, rows.k).fits) {
    rows = behind_flag(rows);
    return false;
  }
  Fixed::with_reader(task, [&]<class Read, int group>() { fixed_range<Read, group>(task, rows, begin, end); });
  return true;
}

#else
INLINE size_t bytes_with_fixed(Dtype, const QuantizedTask&, int64_t, size_t others) { return others; }
INLINE bool pack_fixed(Dtype, const QuantizedTask&, const void*, int64_t, PackedRows&) { return false; }
INLINE bool run_fixed(Dtype, const QuantizedTask&, PackedRows&, int64_t, int64_t) { return false; }
#endif

}  // namespace
