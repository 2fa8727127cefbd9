// Linears of a few rows, plain and quantised: what both kinds share when threads go through their weights' rows.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels.h"
#include "operators.h"

namespace graphopt {
namespace {

// The kernels of a kind of task; `like` stands for all weights that share x.
inline size_t packed_bytes(Dtype dtype, const LinearTask& like, int64_t m) { return kernels().packed_bytes(dtype, m, like.k); }
inline size_t packed_bytes(Dtype dtype, const QuantizedTask& like, int64_t m) { return kernels().quantized_bytes(dtype, like, m); }

inline void pack(Dtype dtype, const LinearTask&, const void* x, int64_t ldx, const PackedRows& packed) {
  kernels().pack_rows(dtype, x, ldx, packed);
}
inline void pack(Dtype dtype, const QuantizedTask& like, const void* x, int64_t ldx, const PackedRows& packed) {
  kernels().quantized_pack(dtype, like, x, ldx, packed);
}

inline void multiply(Dtype dtype, const LinearTask& task, const PackedRows& packed, int64_t from, int64_t to) {
  kernels().linear_rows(dtype, task, packed, from, to);
}
inline void multiply(Dtype dtype, const QuantizedTask& task, const PackedRows& packed, int64_t from, int64_t to) {
  kernels().quantized_rows(dtype, task, packed, from, to);
}

inline int64_t row_bytes(Dtype dtype, const LinearTask& task) { return task.k * (dtype == Dtype::fp32 ? 4 : 2); }
inline int64_t row_bytes(Dtype, const QuantizedTask& task) { return task.row_bytes; }

inline const void* weight_of(const LinearTask& task) { return task.weight; }
inline const void* weight_of(const QuantizedTask& task) { return task.codes; }

// Up to max_decode_rows rows of x [m, k] on weights of one kind and shape.
template <class Task>
class Decode {
 public:
  Decode(Dtype dtype, int64_t m, at::ArrayRef<Task> tasks, int64_t threads)
      : dtype_(dtype), m_(m), like_(tasks.front()), rows_(tasks, row_unit, unit_bytes(dtype, tasks), threads) {}

  static int64_t threads(Dtype dtype, at::ArrayRef<Task> tasks) {
    return RowsOfAll<Task>::threads(tasks, row_unit, unit_bytes(dtype, tasks));
  }

  size_t scratch_bytes() const { return packed_bytes(dtype_, like_, m_); }

  // The part of a thread. x is packed by each thread for itself: cheaper than fetching it from another core's cache.
  template <class Memory>
  void run(int64_t thread, const void* x, int64_t ldx, const Memory& scratch_memory) {
    auto packed_x = [&] {
      const PackedRows packed{scratch_memory(), m_, like_.k};
      pack(dtype_, like_, x, ldx, packed);
      return packed;
    };
    rows_.run(thread, packed_x, [&](const PackedRows& packed, const Task& task, int64_t from, int64_t to) {
      multiply(dtype_, task, packed, from, to);
    });
  }

 private:
  static int64_t unit_bytes(Dtype dtype, at::ArrayRef<Task> tasks) {
    return std::max<int64_t>(1, row_unit * row_bytes(dtype, tasks.front()));
  }

  Dtype dtype_;
  int64_t m_;
  const Task& like_;
  RowsOfAll<Task> rows_;
};

// One parallel region over all weights.
template <class Task>
void run_decode(const at::Tensor& rows, at::ArrayRef<Task> tasks) {
  const Dtype dtype = *dtype_of(rows.scalar_type());
  const int64_t threads = Decode<Task>::threads(dtype, tasks), ldx = rows.stride(0);
  Decode<Task> decode(dtype, rows.size(0), tasks, threads);
  const void* x = rows.const_data_ptr();
  const size_t bytes = decode.scratch_bytes();
  at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    decode.run(thread, x, ldx, [&] { return scratch(Scratch::per_thread, bytes); });
  });
}

}  // namespace
}  // namespace graphopt
