// Small-batch linear: weight rows are streamed once, in the order they lie in memory, against rows of x kept in cache.
//
// A row-major [n, k] weight needs no packing for this: a dot product along k reads it contiguously. For up to four rows
// of x the weight is read exactly as it lies, and asked for a little ahead (`read_once`). More go by linear_columns.h
// where the instruction set multiplies the weight as it is stored; else four weight rows go together, so that each load
// of x is used four times. The horizontal sums of four rows share their shuffles.
#pragma once

#include "vec.h"

namespace {

// A multiplier says how a step of weight meets a step of x. Exact: products and sums in fp32.
template <class S>
struct Exact {
  using Storage = S;
  using X = float;
  using Pair = typename S::Pair;
  static constexpr int step = S::step, halves = 2, rows_of_x = max_decode_rows;
  static INLINE Pair weight(const typename S::T* p) { return S::pair(p); }
  static INLINE Pair weight_tail(const typename S::T* p, int64_t count) { return pair_tail<S>(p, count); }
  static INLINE Pair row(const X* p) { return {load(p), load(p + lanes)}; }
  static INLINE F mad(F acc, F w, F x) { return acc + w * x; }
  static INLINE void pack(const typename S::T* row, int64_t k, X* out) { spread<S>(row, k, out); }
};

// The same for one row of x, which is used once for each weight row and widened as it is: a long row stays in the first
// cache beside the weight that passes by (rows of 4096 bf16: 53 GB/s for 42).
template <class S>
struct OneRow : Exact<S> {
  using X = typename S::T;
  static constexpr int rows_of_x = 1;
  static INLINE typename S::Pair row(const X* p) { return S::pair(p); }
  static INLINE void pack(const X* row, int64_t k, X* out) {
    __builtin_memcpy(out, row, k * sizeof *row);
    __builtin_memset(out + k, 0, (round_up(k, S::step) - k) * sizeof *row);
  }
};

#if defined(__AVX512BF16__)
// Pairs of bf16 products summed in fp32 by one instruction, straight from storage. Flushes subnormals.
struct Paired {
  using Storage = Bf16;
  using X = uint16_t;
  struct Pair { __m512bh v[1]; };
  static constexpr int step = Bf16::step, halves = 1, rows_of_x = max_decode_rows;
  static INLINE Pair weight(const X* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
  static INLINE Pair weight_tail(const X* p, int64_t count) {
    return {(__m512bh)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << count) - 1), p)};
  }
  static INLINE Pair row(const X* p) { return weight(p); }
  static INLINE F mad(F acc, __m512bh w, __m512bh x) { return F(_mm512_dpbf16_ps(__m512(acc), w, x)); }
  static INLINE void pack(const X* row, int64_t k, X* out) { OneRow<Bf16>::pack(row, k, out); }
};
#endif

constexpr int rows_at_once = 4;                    // of weight
constexpr int columns_at_once = lanes == 16 ? 4 : 2;  // rows of x: what fits in the registers
constexpr int64_t prefetch_bytes = 8192;           // how far ahead of the reads, over all rows at once
constexpr int64_t read_once_bytes = 4096;          // the same where the weight is read as it lies

// Asks for a line of what is read in the order it lies, once in a step and then not before all other weights: past the
// larger caches, which need not write back what nobody will ask them for. On Zen 3 (two threads, all linears of a model in
// a row) that made reading bf16 11 % and int8 8 % faster than the hardware's prefetcher and than going by the second level.
INLINE void read_once(const void* at) { __builtin_prefetch(static_cast<const char*>(at) + read_once_bytes, 0, 0); }

// Where the reads of a group of weight rows will be prefetch_bytes later: further along the rows, or where a row ends
// before that, in a later group. The hardware's prefetcher stops at each 4 KiB page; this one does not.
struct Ahead {
  int64_t split;          // from this k on the second distance holds
  int64_t before, after;  // in elements
  static Ahead of(int64_t k, int64_t ldw, int64_t size, int64_t rows = rows_at_once) {
    int64_t distance = prefetch_bytes / rows / size, group = rows * ldw;
    if (k > distance) return {k - distance, distance, group - k + distance};
    int64_t groups = (distance + k - 1) / k;
    return {k, group * groups, group * groups};
  }
};

template <class M, int rows, int columns, bool prefetch>
INLINE void dot_block(const typename M::Storage::T* w, int64_t ldw, const typename M::X* x, int64_t ldx, int64_t k,
                      Ahead ahead, F (&out)[rows][columns]) {
  F acc[rows][columns] = {};
  auto add = [&](const typename M::Pair (&weights)[rows], const typename M::X* at) INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) {
      typename M::Pair row = M::row(at + c * ldx);
#pragma GCC unroll 2
      for (int h = 0; h < M::halves; ++h)
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) acc[r][c] = M::mad(acc[r][c], weights[r].v[h], row.v[h]);
    }
  };
  auto run = [&](int64_t from, int64_t to, int64_t distance) INLINE_LAMBDA {
    for (int64_t i = from; i < to; i += M::step) {
      typename M::Pair weights[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const auto* at = w + r * ldw + i;
        weights[r] = M::weight(at);
        if (prefetch)
          for (int64_t byte = 0; byte < M::step * int64_t(sizeof *at); byte += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(at + distance) + byte, 0, 3);
      }
      add(weights, x + i);
    }
  };
  int64_t whole = k / M::step * M::step, split = smaller(ahead.split / M::step * M::step, whole);
  run(0, split, ahead.before);
  run(split, whole, ahead.after);
  if (whole < k) {
    typename M::Pair weights[rows];
    for (int r = 0; r < rows; ++r) weights[r] = M::weight_tail(w + r * ldw + whole, k - whole);
    add(weights, x + whole);
  }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) out[r][c] = acc[r][c];
}

// The same, a weight row after the other.
template <class M, int rows, int columns>
INLINE void dot_rows(const typename M::Storage::T* w, int64_t ldw, const typename M::X* x, int64_t ldx, int64_t k, F (&out)[rows][columns]) {
  // Enough independent sums to hide the latency of one.
  constexpr int chains = M::halves * columns, steps = chains >= 4 ? 1 : 4 / chains;
  const int64_t whole = k / M::step * M::step, most = k / (steps * M::step) * steps * M::step;
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r, w += ldw) {
    F acc[steps][M::halves][columns] = {};
    auto add = [&](int s, typename M::Pair weights, int64_t i) INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) {
        const typename M::Pair row = M::row(x + c * ldx + i);
        for (int h = 0; h < M::halves; ++h) acc[s][h][c] = M::mad(acc[s][h][c], weights.v[h], row.v[h]);
      }
    };
    int64_t i = 0;
    for (; i < most; i += steps * M::step)
#pragma GCC unroll 4
      for (int s = 0; s < steps; ++s) {
        if (s * M::step * int64_t(sizeof *w) % 64 == 0) read_once(w + i + s * M::step);
        add(s, M::weight(w + i + s * M::step), i + s * M::step);
      }
    for (; i < whole; i += M::step) add(0, M::weight(w + i), i);
    if (i < k) add(0, M::weight_tail(w + i, k - i), i);
    for (int c = 0; c < columns; ++c) {
      out[r][c] = F{};
      for (int s = 0; s < steps; ++s)
        for (int h = 0; h < M::halves; ++h) out[r][c] += acc[s][h][c];
    }
  }
}

// What of a group of weight rows is read from memory, and how: nothing, in the order it lies, or all rows side by side.
enum class Read { cached, in_order, side_by_side };

template <class M, int rows, int columns, Read read>
INLINE void linear_block(const LinearTask& task, const typename M::X* x, int64_t ldx, int64_t m, int64_t n, Ahead ahead) {
  using S = typename M::Storage;
  using T = typename S::T;
  F sums[rows][columns];
  const T* weight = static_cast<const T*>(task.weight) + n * task.ldw;
  if constexpr (read == Read::in_order)
    dot_rows<M, rows, columns>(weight, task.ldw, x + m * ldx, ldx, task.k, sums);
  else
    dot_block<M, rows, columns, read == Read::side_by_side>(weight, task.ldw, x + m * ldx, ldx, task.k, ahead, sums);
  const T* bias = task.bias ? static_cast<const T*>(task.bias) + n : nullptr;
  for (int c = 0; c < columns; ++c) {
    F4 four = sum4(sums[0][c], sums[1 % rows][c], sums[2 % rows][c], sums[3 % rows][c]);
    T* out = static_cast<T*>(task.out) + (m + c) * task.ldo + n;
    for (int r = 0; r < rows; ++r) out[r] = S::from_float(four[r] + (bias ? S::to_float(bias[r]) : 0.0f));
  }
}

template <class M, int rows>
INLINE void linear_group(const LinearTask& task, const typename M::X* x, int64_t ldx, int64_t m, int64_t n, Ahead ahead) {
  int64_t at = 0;
  auto pass = [&]<int columns>() INLINE_LAMBDA {
    if (m <= columns)
      linear_block<M, rows, columns, Read::in_order>(task, x, ldx, at, n, ahead);
    else if (at == 0)
      linear_block<M, rows, columns, Read::side_by_side>(task, x, ldx, at, n, ahead);
    else
      linear_block<M, rows, columns, Read::cached>(task, x, ldx, at, n, ahead);
    at += columns;
  };
  if constexpr (M::rows_of_x == 1) return pass.template operator()<1>();
  while (m - at >= columns_at_once) pass.template operator()<columns_at_once>();
  if (columns_at_once > 2 && m - at == 3) pass.template operator()<3>();
  if (columns_at_once > 2 && m - at == 2) pass.template operator()<2>();
  if (m - at == 1) pass.template operator()<1>();
}

template <class M>
void linear_range(const LinearTask& task, PackedRows packed, int64_t begin, int64_t end) {
  const auto* x = static_cast<const typename M::X*>(packed.data);
  int64_t ldx = round_up(packed.k, M::step), n = begin;
  Ahead ahead = Ahead::of(task.k, task.ldw, sizeof(typename M::Storage::T));
  for (; n + rows_at_once <= end; n += rows_at_once) linear_group<M, rows_at_once>(task, x, ldx, packed.m, n, ahead);
  for (; n < end; ++n) linear_group<M, 1>(task, x, ldx, packed.m, n, ahead);
}

template <class M>
void pack_range(const void* x, int64_t ldx, PackedRows packed) {
  auto* out = static_cast<typename M::X*>(packed.data);
  for (int64_t m = 0; m < packed.m; ++m)
    M::pack(static_cast<const typename M::Storage::T*>(x) + m * ldx, packed.k, out + m * round_up(packed.k, M::step));
}

// Calls f with the multiplier for this dtype and number of rows: a single row is bound by memory and stays exact.
template <class Call>
INLINE void with_multiplier(Dtype dtype, int64_t m, Call&& f) {
  if (dtype == Dtype::fp32) return f(Exact<Fp32>{});
  if (dtype == Dtype::fp16) return m == 1 ? f(OneRow<Fp16>{}) : f(Exact<Fp16>{});
  if (m == 1) return f(OneRow<Bf16>{});
#if defined(__AVX512BF16__)
  return f(Paired{});
#else
  return f(Exact<Bf16>{});
#endif
}

}  // namespace
