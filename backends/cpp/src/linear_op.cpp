// graphopt_cpp::linear and graphopt_cpp::parallel_linear as torch operators.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "kernels.h"
#include "operators.h"

namespace graphopt {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Rows of one weight given to a thread are a multiple of this, so that groups of rows and cache lines stay whole.
constexpr int64_t row_unit = 16;
// Below this many bytes of weight a second thread costs more than it brings.
constexpr int64_t bytes_worth_threads = 48 << 10;

bool kernel_takes(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  if (x.dim() < 1 || weight.dim() != 2 || !dtype_of(x.scalar_type())) return false;
  if (weight.scalar_type() != x.scalar_type() || x.layout() != at::kStrided || weight.layout() != at::kStrided) return false;
  const int64_t n = weight.size(0), k = weight.size(1);
  if (n == 0 || k == 0 || x.size(-1) != k || x.numel() == 0) return false;
  if (weight.stride(1) != 1 && k != 1) return false;
  if (weight.stride(0) < k && n != 1) return false;  // expanded or overlapping rows
  if (!bias || !bias->defined()) return true;
  return bias->dim() == 1 && bias->size(0) == n && bias->scalar_type() == x.scalar_type() && bias->layout() == at::kStrided &&
         (bias->stride(0) == 1 || n == 1);
}

std::vector<int64_t> out_sizes(const Tensor& x, int64_t n) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  return sizes;
}

// The rows of x as one [m, k] matrix with dense rows; copies only if the strides do not allow it.
Tensor rows_of(const Tensor& x, int64_t m) {
  const int64_t k = x.size(-1);
  if (x.dim() == 2 && (x.stride(1) == 1 || k == 1)) return x;
  Tensor rows = x.reshape({m, k});
  return rows.stride(1) == 1 || k == 1 ? rows : rows.contiguous();
}

LinearTask task_of(const Tensor& weight, const MaybeTensor& bias, const Tensor& out) {
  const bool has_bias = bias && bias->defined();
  const int64_t n = weight.size(0);
  return {weight.const_data_ptr(), has_bias ? bias->const_data_ptr() : nullptr, out.mutable_data_ptr(), n, weight.size(1),
          weight.stride(0), n};
}

// All rows of all weights in one parallel region, each thread an equal share of the bytes.
void run_decode(const Tensor& x, int64_t m, at::ArrayRef<LinearTask> tasks) {
  const Kernels& table = kernels();
  const Dtype dtype = *dtype_of(x.scalar_type());
  const Tensor rows = rows_of(x, m);
  const int64_t k = rows.size(1), ldx = m == 1 ? k : rows.stride(0);
  const void* data = rows.const_data_ptr();
  int64_t units = 0;
  for (const LinearTask& task : tasks) units += (task.n + row_unit - 1) / row_unit;
  const int64_t unit_bytes = row_unit * k * int64_t(rows.element_size());
  const int64_t grain = std::max<int64_t>(1, bytes_worth_threads / unit_bytes);
  at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    // Packed by each thread for itself: cheaper than fetching it from another core's cache.
    PackedRows packed{scratch(Scratch::per_thread, table.packed_bytes(dtype, m, k)), m, k};
    table.pack_rows(dtype, data, ldx, packed);
    int64_t first = 0;  // unit at which the task begins
    for (const LinearTask& task : tasks) {
      const int64_t last = first + (task.n + row_unit - 1) / row_unit;
      const int64_t from = (std::max(begin, first) - first) * row_unit;
      const int64_t to = std::min((std::min(end, last) - first) * row_unit, task.n);
      if (from < to) table.linear_rows(dtype, task, packed, from, to);
      first = last;
    }
  });
}

// Rows of x packed at a time: as many as stay in a core's cache while a thread's share of the weight passes by.
constexpr int64_t panel_bytes = 1 << 20;

// Many rows: x is packed once per call for all threads and weights, chunk by chunk.
void run_prefill(const Tensor& x, int64_t m, at::ArrayRef<LinearTask> tasks) {
  const Kernels& table = kernels();
  const Tensor rows = rows_of(x, m);
  const int64_t k = rows.size(1), ldx = rows.stride(0);
  const int64_t chunk = std::min(m, std::max<int64_t>(2 * row_unit, panel_bytes / (2 * k) / (2 * row_unit) * (2 * row_unit)));
  PackedRows packed{scratch(Scratch::per_call, table.packed_bytes(Dtype::bf16, chunk, k)), chunk, k};
  int64_t units = 0;
  for (const LinearTask& task : tasks) units += (task.n + 2 * row_unit - 1) / (2 * row_unit);
  for (int64_t done = 0; done < m; done += chunk) {
    packed.m = std::min(chunk, m - done);
    const auto* data = static_cast<const uint16_t*>(rows.const_data_ptr()) + done * ldx;
    at::parallel_for(0, (packed.m + row_unit - 1) / row_unit, std::max<int64_t>(1, bytes_worth_threads / (row_unit * k)),
                     [&](int64_t begin, int64_t end) { table.pack_panel(data, ldx, packed, begin * row_unit, end * row_unit); });
    at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      int64_t first = 0;
      for (LinearTask task : tasks) {
        const int64_t last = first + (task.n + 2 * row_unit - 1) / (2 * row_unit);
        const int64_t from = (std::max(begin, first) - first) * 2 * row_unit;
        const int64_t to = std::min((std::min(end, last) - first) * 2 * row_unit, task.n);
        task.out = static_cast<uint16_t*>(task.out) + done * task.ldo;
        if (from < to) table.linear_panel(task, packed, from, to);
        first = last;
      }
    });
  }
}

Tensor linear_cpu(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  if (kernel_takes(x, weight, bias)) {
    const int64_t m = x.numel() / x.size(-1);
    const bool decode = m <= max_decode_rows;
    if (decode || (x.scalar_type() == at::kBFloat16 && kernels().linear_panel)) {
      Tensor out = at::empty(out_sizes(x, weight.size(0)), x.options());
      const LinearTask task = task_of(weight, bias, out);
      if (decode) run_decode(x, m, task); else run_prefill(x, m, task);
      return out;
    }
  }
  return at::linear(x, weight, bias).contiguous();
}

std::vector<Tensor> parallel_linear_cpu(const Tensor& x, at::TensorList weights, const c10::List<MaybeTensor>& biases) {
  TORCH_CHECK(weights.size() == biases.size(), "parallel_linear: ", weights.size(), " weights but ", biases.size(), " biases");
  std::vector<Tensor> outs;
  std::vector<LinearTask> tasks;
  outs.reserve(weights.size());
  bool together = x.dim() >= 1 && x.size(-1) > 0 && x.numel() / x.size(-1) <= max_decode_rows;
  for (size_t i = 0; i < weights.size() && together; ++i) together = kernel_takes(x, weights[i], biases.get(i));
  for (size_t i = 0; i < weights.size(); ++i) {
    const MaybeTensor bias = biases.get(i);
    if (!together) {
      outs.push_back(linear_cpu(x, weights[i], bias));
      continue;
    }
    outs.push_back(at::empty(out_sizes(x, weights[i].size(0)), x.options()));
    tasks.push_back(task_of(weights[i], bias, outs.back()));
  }
  if (!tasks.empty()) run_decode(x, x.numel() / x.size(-1), tasks);
  return outs;
}

Tensor linear_meta(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  return at::linear(x, weight, bias).contiguous();
}

std::vector<Tensor> parallel_linear_meta(const Tensor& x, at::TensorList weights, const c10::List<MaybeTensor>& biases) {
  TORCH_CHECK(weights.size() == biases.size(), "parallel_linear: ", weights.size(), " weights but ", biases.size(), " biases");
  std::vector<Tensor> outs;
  for (size_t i = 0; i < weights.size(); ++i) outs.push_back(linear_meta(x, weights[i], biases.get(i)));
  return outs;
}

TORCH_LIBRARY_FRAGMENT(graphopt_cpp, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("parallel_linear(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(graphopt_cpp, CPU, m) {
  m.impl("linear", linear_cpu);
  m.impl("parallel_linear", parallel_linear_cpu);
}

TORCH_LIBRARY_IMPL(graphopt_cpp, Meta, m) {
  m.impl("linear", linear_meta);
  m.impl("parallel_linear", parallel_linear_meta);
}

}  // namespace
}  // namespace graphopt
