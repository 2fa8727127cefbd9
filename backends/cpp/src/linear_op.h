// graphopt_cpp::linear and graphopt_cpp::parallel_linear as torch operators.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/new_empty.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include "decode.h"
#include "experts.h"
#include "kernels.h"
#include "operators.h"
#include "wide_product.h"

namespace graphopt {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t panel_unit = 32;  // rows of a weight that the tile kernel takes together

bool kernel_takes(at::ScalarType dtype, const Tensor& weight, const MaybeTensor& bias) {
  if (weight.dim() != 2 || weight.scalar_type() != dtype || weight.layout() != at::kStrided) return false;
  const int64_t n = weight.size(0), k = weight.size(1);
  if (n == 0 || k == 0) return false;
  if (weight.stride(1) != 1 && k != 1) return false;
  if (weight.stride(0) < k && n != 1) return false;  // expanded or overlapping rows
  if (!bias || !bias->defined()) return true;
  return bias->dim() == 1 && bias->size(0) == n && bias->scalar_type() == dtype && bias->layout() == at::kStrided && (bias->stride(0) == 1 || n == 1);
}

bool kernel_takes(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  if (x.dim() < 1 || weight.dim() != 2 || !dtype_of(x.scalar_type()) || x.layout() != at::kStrided) return false;
  return x.size(-1) == weight.size(1) && x.numel() != 0 && kernel_takes(x.scalar_type(), weight, bias);
}

LinearTask task_of(const Tensor& weight, const MaybeTensor& bias, void* out) {
  const bool has_bias = bias && bias->defined();
  const int64_t n = weight.size(0);
  return {weight.const_data_ptr(), has_bias ? bias->const_data_ptr() : nullptr, out, n, weight.size(1),
          weight.stride(0), n};
}

// Rows of x packed at a time: as many as stay in a core's cache while a thread's share of the weight passes by.
int64_t panel_rows(int64_t m, int64_t k) {
  constexpr int64_t bytes = 1 << 20;
  return std::min(m, std::max(panel_unit, bytes / (2 * k) / panel_unit * panel_unit));
}

// Whether the tile kernel is worth it: each chunk of rows reads the weight anew, which long rows make too often.
bool panel_takes(const Tensor& x, int64_t m, int64_t k) {
  return x.scalar_type() == at::kBFloat16 && kernels().linear_panel && m <= 4 * panel_rows(m, k);
}

// Many rows: x is packed once per call for all threads and weights, chunk by chunk.
void run_prefill(const Tensor& x, int64_t m, at::ArrayRef<LinearTask> tasks) {
  const Kernels& table = kernels();
  const Tensor rows = rows_of(x, m);
  const int64_t k = rows.size(1), ldx = rows.stride(0), chunk = panel_rows(m, k);
  PackedRows packed{scratch(Scratch::per_call, table.packed_bytes(Dtype::bf16, chunk, k)), chunk, k};
  for (int64_t done = 0; done < m; done += chunk) {
    packed.m = std::min(chunk, m - done);
    const auto* data = static_cast<const uint16_t*>(rows.const_data_ptr()) + done * ldx;
    at::parallel_for(0, (packed.m + row_unit - 1) / row_unit, std::max<int64_t>(1, bytes_worth_threads / (2 * row_unit * k)),
                     [&](int64_t begin, int64_t end) { table.pack_panel(data, ldx, packed, begin * row_unit, end * row_unit); });
    auto ready = [&] { return packed; };
    for_rows_of_all(tasks, panel_unit, bytes_worth_threads, ready, [&](const PackedRows& packed, LinearTask task, int64_t from, int64_t to) {
      task.out = static_cast<uint16_t*>(task.out) + done * task.ldo;
      table.linear_panel(task, packed, from, to);
    });
  }
}

// Runs weights [i] on the kernels, all in one go, if they can take them; false if not.
bool run(const Tensor& x, at::TensorList weights, at::ArrayRef<MaybeTensor> biases, std::vector<Tensor>& outs) {
  for (size_t i = 0; i < weights.size(); ++i)
    if (!kernel_takes(x, weights[i], biases[i])) return false;
  const int64_t k = x.size(-1), m = x.numel() / k;
  const bool decode = m <= max_decode_rows;
  if (!decode && !panel_takes(x, m, k)) return false;
  c10::SmallVector<LinearTask, 4> tasks;
  for (size_t i = 0; i < weights.size(); ++i) {
    outs.push_back(at::empty(out_sizes(x, weights[i].size(0)), x.options().requires_grad(false)));
    tasks.push_back(task_of(weights[i], biases[i], outs.back().mutable_data_ptr()));
  }
  decode ? run_decode<LinearTask>(rows_of(x, m), tasks) : run_prefill(x, m, tasks);
  return true;
}

Tensor by_torch(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  const WithoutAutocast guard;
  if (const int64_t k = x.size(-1); kernel_takes(x, weight, bias) && !multiplies_fast(x.scalar_type()))
    return wide_linear(rows_of(x, x.numel() / k), weight, bias).view(out_sizes(x, weight.size(0)));
  return at::linear(x, weight, bias).contiguous();
}

Tensor linear_cpu(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  std::vector<Tensor> outs;
  return run(x, weight, bias, outs) ? std::move(outs[0]) : by_torch(x, weight, bias);
}

std::vector<Tensor> parallel_linear(const Tensor& x, at::TensorList weights, at::ArrayRef<MaybeTensor> biases) {
  TORCH_CHECK(weights.size() == biases.size(), "parallel_linear: ", weights.size(), " weights but ", biases.size(), " biases");
  std::vector<Tensor> outs;
  if (weights.empty() || run(x, weights, biases, outs)) return outs;
  for (size_t i = 0; i < weights.size(); ++i) outs.push_back(linear_cpu(x, weights[i], biases[i]));
  return outs;
}

std::vector<Tensor> parallel_linear_cpu(const Tensor& x, at::TensorList weights, const c10::List<MaybeTensor>& biases) {
  return parallel_linear(x, weights, biases.vec());
}

Tensor grouped_linear_cpu(const Tensor& x, const Tensor& experts, const Tensor& ends) {
  TORCH_CHECK(experts.dim() == 3 && experts.size(0) == ends.numel(), "grouped_linear: experts must be [E, N, K] for ends [E], got ", experts.sizes(),
              " and ", ends.sizes());
  return by_expert(x, ends, experts.size(1), [&](int64_t expert, const Tensor& own_x) { return linear_cpu(own_x, experts.select(0, expert), std::nullopt); });
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

Tensor grouped_linear_meta(const Tensor& x, const Tensor& experts, const Tensor&) {
  return x.new_empty_symint({x.sym_size(0), experts.sym_size(1)});
}

TORCH_LIBRARY_FRAGMENT(graphopt_cpp, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("wide_linear(Tensor rows, Tensor weight, Tensor? bias) -> Tensor");
  m.def("grouped_linear(Tensor x, Tensor experts, Tensor ends) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("parallel_linear(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(graphopt_cpp, CPU, m) {
  m.impl("wide_linear", wide_linear);
  m.impl("grouped_linear", grouped_linear_cpu);
  m.impl("linear", linear_cpu);
  m.impl("parallel_linear", parallel_linear_cpu);
}

TORCH_LIBRARY_IMPL(graphopt_cpp, Meta, m) {
  m.impl("grouped_linear", grouped_linear_meta);
  m.impl("linear", linear_meta);
  m.impl("parallel_linear", parallel_linear_meta);
}

}  // namespace
}  // namespace graphopt
