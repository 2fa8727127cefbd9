// Shared by the files that bind kernels to torch.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <optional>

#include "kernels.h"
#include "shares.h"

namespace graphopt {

inline std::optional<Dtype> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Dtype::fp32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::fp16;
    default: return std::nullopt;
  }
}

// Held while an operator falls back to torch's own: autocast has had its say where the operator was called, and must
// not change the dtype of the result now.
struct WithoutAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// Memory of the calling thread, aligned to 64 bytes, valid until it asks again for the same use; kept between calls.
enum class Scratch { per_thread, per_call };
void* scratch(Scratch use, size_t bytes);

// Rows of one weight given to a thread are a multiple of this, so that groups of rows and cache lines stay whole.
inline constexpr int64_t row_unit = 16;
// Below this many bytes of weight a second thread costs more than it brings.
inline constexpr int64_t bytes_worth_threads = 48 << 10;
// Bytes of weight that a thread takes at a time: a few microseconds of reading.
inline constexpr int64_t bytes_at_a_time = 32 << 10;

inline std::vector<int64_t> out_sizes(const at::Tensor& x, int64_t n) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  return sizes;
}

// The rows of x as one [m, k] matrix with dense rows; copies only if the strides do not allow it.
inline at::Tensor rows_of(const at::Tensor& x, int64_t m) {
  const int64_t k = x.size(-1);
  if (x.dim() == 2 && (x.stride(1) == 1 || k == 1)) return x;
  at::Tensor rows = x.reshape({m, k});
  return rows.stride(1) == 1 || k == 1 ? rows : rows.contiguous();
}

// The rows (task.n) of all weights, in units of so many rows and bytes, shared among threads.
template <class Task>
class RowsOfAll {
 public:
  RowsOfAll(at::ArrayRef<Task> tasks, int64_t unit, int64_t unit_bytes, int64_t threads)
      : tasks_(tasks), unit_(unit), shares_(units(tasks, unit), threads, threads == 1 ? INT64_MAX : std::max<int64_t>(1, bytes_at_a_time / unit_bytes)) {}

  // How many threads are worth it.
  static int64_t threads(at::ArrayRef<Task> tasks, int64_t unit, int64_t unit_bytes) {
    return std::clamp<int64_t>(units(tasks, unit) * unit_bytes / bytes_worth_threads, 1, at::get_num_threads());
  }

  // The part of a thread, which calls begin() once and then f(begun, task, first row, row after the last) for one piece
  // after the other.
  template <class Begin, class Call>
  void run(int64_t thread, const Begin& begin, const Call& f) {
    Shares::Piece piece = shares_.take(thread);
    if (piece.from == piece.to) return;
    const auto begun = begin();
    for (; piece.from < piece.to; piece = shares_.take(thread)) {
      int64_t first = 0;  // the unit at which the task begins
      for (const Task& task : tasks_) {
        const int64_t last = first + units_of(task, unit_);
        const int64_t low = (std::max<int64_t>(piece.from, first) - first) * unit_;
        const int64_t high = std::min((std::min<int64_t>(piece.to, last) - first) * unit_, task.n);
        if (low < high) f(begun, task, low, high);
        first = last;
      }
    }
  }

 private:
  static int64_t units_of(const Task& task, int64_t unit) { return (task.n + unit - 1) / unit; }
  static int64_t units(at::ArrayRef<Task> tasks, int64_t unit) {
    int64_t all = 0;
    for (const Task& task : tasks) all += units_of(task, unit);
    TORCH_CHECK(all <= UINT32_MAX, "a weight of ", all * unit, " rows is more than these kernels count");
    return all;
  }

  at::ArrayRef<Task> tasks_;
  int64_t unit_;
  Shares shares_;
};

template <class Task, class Begin, class Call>
void for_rows_of_all(at::ArrayRef<Task> tasks, int64_t unit, int64_t unit_bytes, const Begin& begin, const Call& f) {
  const int64_t threads = RowsOfAll<Task>::threads(tasks, unit, unit_bytes);
  RowsOfAll<Task> rows(tasks, unit, unit_bytes, threads);
  at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) { rows.run(thread, begin, f); });
}

}  // namespace graphopt
