// Small-batch linear of more rows of x than one pass of dot products takes: a vector holds one element of all rows of x,
// and each element of the weight meets it in all lanes. No sums across vectors, and one instruction for each element of
// the weight whatever the number of rows.
#pragma once

#include "linear.h"
#include "tiles.h"

namespace {

template <class S>
struct ColumnLinear {
  using T = typename S::T;
  using M = TileFactors<S>;
  using X = typename M::X;
  static constexpr int rows = 8;                // of weight at a time
  static constexpr int64_t chunk = 64 / sizeof(T);  // a cache line of each, and the same of the next rows is asked for
  // Weights must be what the instruction multiplies.
  static constexpr bool takes = sizeof(X) == sizeof(T);

  static int64_t vectors(int64_t m) { return (m + lanes - 1) / lanes; }
  static size_t packed_bytes(int64_t m, int64_t k) { return round_up(k, M::together) * vectors(m) * lanes * sizeof(X); }

  static void pack(const T* x, int64_t ldx, PackedRows packed) {
    const int64_t ld = vectors(packed.m) * lanes;
    auto* out = static_cast<X*>(packed.data);
    __builtin_memset(out, 0, packed_bytes(packed.m, packed.k));
    for (int64_t m = 0; m < packed.m; ++m)
      for (int64_t i = 0; i < packed.k; ++i)
        out[(i / M::together * ld + m) * M::together + i % M::together] = M::packed(x[m * ldx + i]);
  }

  template <int count, int columns>
  static INLINE void group(const LinearTask& task, PackedRows packed, int64_t n) {
    const T* weight = static_cast<const T*>(task.weight) + n * task.ldw;
    const auto* x = static_cast<const X*>(packed.data);
    constexpr int64_t stride = columns * lanes * M::together;
    const int64_t whole = task.k / M::together * M::together;
    F sums[count][columns] = {};
    for (int64_t i = 0; i < whole; i += chunk) {
      for (int r = 0; r < count; ++r) __builtin_prefetch(weight + (r + count) * task.ldw + i, 0, 2);
      tile_product<M>(weight + i, task.ldw, x + i / M::together * stride, stride, smaller(chunk, whole - i) / M::together, sums);
    }
    if (whole < task.k)
      for (int r = 0; r < count; ++r)
        for (int c = 0; c < columns; ++c)
          sums[r][c] = M::mad(sums[r][c], M::last(weight + r * task.ldw + whole), M::vector(x + whole / M::together * stride + c * lanes * M::together));
    T results[count][columns * lanes];
    for (int r = 0; r < count; ++r) {
      const float bias = task.bias ? S::to_float(static_cast<const T*>(task.bias)[n + r]) : 0.0f;
      for (int c = 0; c < columns; ++c) S::put_in_order(results[r] + c * lanes, task.bias ? sums[r][c] + bias : sums[r][c]);
    }
    for (int64_t m = 0; m < packed.m; ++m) {
      T* out = static_cast<T*>(task.out) + m * task.ldo + n;
      for (int r = 0; r < count; ++r) out[r] = results[r][m];
    }
  }

  template <int columns>
  static void range_of(const LinearTask& task, PackedRows packed, int64_t begin, int64_t end) {
    int64_t n = begin;
    for (; n + rows <= end; n += rows) group<rows, columns>(task, packed, n);
    for (; n < end; ++n) group<1, columns>(task, packed, n);
  }

  static void range(const LinearTask& task, PackedRows packed, int64_t begin, int64_t end) {
    if (vectors(packed.m) == 1) return range_of<1>(task, packed, begin, end);
    range_of<2>(task, packed, begin, end);
  }
};

// Calls f with the storage whose linears of so many rows go this way, or does not and returns false.
template <class Call>
INLINE bool by_columns(Dtype dtype, int64_t m, Call&& f) {
  bool taken = false;
  if (m > 4 && m <= 2 * lanes)
    with_storage(dtype, [&]<class S>(S) {
      if constexpr (ColumnLinear<S>::takes) taken = true, f(S{});
    });
  return taken;
}

}  // namespace
