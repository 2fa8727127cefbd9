// graphopt_cpp::quantized_linear, parallel_quantized_linear and quantized_embedding as torch operators.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/_int_mm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/new_empty.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <string_view>

#include "decode.h"
#include "experts.h"
#include "kernels.h"
#include "operators.h"
#include "wide_product.h"

namespace graphopt {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Tasks = c10::SmallVector<QuantizedTask, 4>;

// Numbers written out at a time: they stay in the cache until they are read.
constexpr int64_t buffer_bytes = 4 << 20;

// What a scheme's canonical name says of a packed weight.
struct Scheme {
  Codes kind;
  int64_t group = 0;
  bool offsets = false, dynamic = false, units = false;
  size_t parts() const { return 2 + offsets + 2 * units; }
};

Scheme scheme_of(std::string_view name) {
  auto take = [&](std::string_view word) {
    const bool found = name.substr(0, word.size()) == word;
    if (found) name.remove_prefix(word.size());
    return found;
  };
  const std::string whole(name);
  Scheme scheme{};
  if (take("mxfp4")) scheme = {Codes::mxfp4, 32};
  else if (take("q4_k")) scheme = {Codes::int4, 32, true, false, true};
  else if (take("int8")) scheme = {Codes::int8};
  else if (take("int4")) scheme = {Codes::int4, 0, true};
  else if (take("fp8")) scheme = {Codes::fp8};
  else if (take("nf4")) scheme = {Codes::nf4};
  else TORCH_CHECK(false, "no quantisation scheme '", whole, "'");
  if (!scheme.group) {
    if (take("-g32")) scheme.group = 32;
    else if (take("-g64")) scheme.group = 64;
    else if (take("-g128")) scheme.group = 128;
    if (take("-sym")) scheme.offsets = false;
    if (take("-dynamic")) scheme.dynamic = true;
  }
  const bool in_rows = scheme.kind == Codes::int8 || scheme.kind == Codes::fp8;
  TORCH_CHECK(name.empty() && (scheme.group || in_rows) && !(scheme.group && (scheme.dynamic || scheme.kind == Codes::fp8)),
              "no quantisation scheme '", whole, "'");
  return scheme;
}

// The weight as a task without an output; refuses tensors that are not laid out as the scheme says.
QuantizedTask task_of(const Scheme& scheme, at::TensorList parts, int64_t k) {
  const Tensor& codes = parts[0];
  TORCH_CHECK(codes.dim() == 2, "packed codes must have two dimensions, got ", codes.dim());
  QuantizedTask task{};
  task.kind = scheme.kind, task.dynamic = scheme.dynamic, task.group = scheme.group;
  task.n = codes.size(0), task.k = k;
  task.groups = scheme.group ? (k + scheme.group - 1) / scheme.group : 0;
  const int64_t columns = scheme.group ? task.groups * scheme.group : k;
  task.row_bytes = scheme.kind == Codes::int8 || scheme.kind == Codes::fp8 ? columns : columns / 2;
  TORCH_CHECK(codes.size(1) == task.row_bytes && codes.element_size() == 1, "packed codes of ", k, " columns must have ",
              task.row_bytes, " bytes in each row, got ", codes.sizes(), " of ", codes.dtype());
  const auto wanted = !scheme.group ? at::kFloat : scheme.kind == Codes::mxfp4 || scheme.units ? at::kByte : at::kHalf;
  for (size_t i = 1; i < parts.size(); ++i) {
    const bool unit = i > 2;
    const auto dtype = unit ? at::kHalf : wanted;
    const int64_t in_row = unit ? unit_count(task.groups) : scheme.group ? task.groups : 1;
    TORCH_CHECK(parts[i].scalar_type() == dtype && parts[i].numel() == task.n * in_row, unit ? "units" : "scales and offsets", " must be ", dtype,
                " with ", in_row, " numbers for each row, got ", parts[i].sizes(), " of ", parts[i].dtype());
  }
  for (const Tensor& part : parts) TORCH_CHECK(part.is_contiguous() && part.device().is_cpu(), "packed tensors must be contiguous and on the CPU");
  task.codes = codes.const_data_ptr(), task.scales = parts[1].const_data_ptr();
  task.offsets = scheme.offsets ? parts[2].const_data_ptr() : nullptr;
  if (scheme.units) task.scale_units = parts[3].const_data_ptr(), task.offset_units = parts[4].const_data_ptr();
  return task;
}

QuantizedTask task_of(const Scheme& scheme, at::TensorList parts, int64_t k, at::ScalarType dtype, const MaybeTensor& bias) {
  QuantizedTask task = task_of(scheme, parts, k);
  if (bias && bias->defined()) {
    const bool fits = bias->dim() == 1 && bias->size(0) == task.n && bias->scalar_type() == dtype;
    TORCH_CHECK(fits && bias->is_contiguous(), "the bias must be ", task.n, " contiguous values of ", dtype);
    task.bias = bias->const_data_ptr();
  }
  task.ldo = task.n;
  return task;
}

Element element_of(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 ? Element::bf16 : x.scalar_type() == at::kFloat ? Element::fp32 : Element::integer;
}

// x as torch multiplies it: rounded by dynamic schemes, with `factors` [m], else as it is. Sums of codes exceed float16:
// those are made in float32, and so are products that are slow here.
Tensor operand_of(const Tensor& rows, const QuantizedTask& task, Tensor& factors) {
  const bool wide = rows.scalar_type() == at::kHalf || !multiplies_fast(rows.scalar_type());
  const auto numbers = wide ? at::kFloat : rows.scalar_type();
  if (!task.dynamic) return rows.to(numbers);
  const auto dtype = task.kind == Codes::int8 ? at::kChar : numbers;
  const Tensor x = at::empty({rows.size(0), task.k}, at::dtype(dtype));
  factors = at::empty({rows.size(0)}, at::kFloat);
  at::parallel_for(0, rows.size(0), 16, [&](int64_t begin, int64_t end) {
    kernels().rounded_rows(*dtype_of(rows.scalar_type()), task.kind, rows.const_data_ptr(), rows.stride(0), task.k, element_of(x),
                           x.mutable_data_ptr(), factors.mutable_data_ptr<float>(), begin, end);
  });
  return x;
}

// The rows [first, last) of the weight as torch multiplies them, unscaled if one scale serves a whole row: codes are
// exact in any dtype.
Tensor weight_rows(const QuantizedTask& task, const Tensor& x, void* buffer, int64_t first, int64_t last) {
  if (x.scalar_type() == at::kChar)
    return at::from_blob(const_cast<char*>(static_cast<const char*>(task.codes)) + first * task.row_bytes, {last - first, task.k}, x.options());
  const int64_t row_size = task.k * int64_t(x.element_size());
  at::parallel_for(first, last, row_unit, [&](int64_t begin, int64_t end) {
    void* to = static_cast<char*>(buffer) + (begin - first) * row_size;
    kernels().dequantized_rows(*dtype_of(x.scalar_type()), task, false, to, begin, end);
  });
  return at::from_blob(buffer, {last - first, task.k}, x.options().requires_grad(false));
}

// The columns of the output from `first` on, out of the sums y that torch made.
void finish(const QuantizedTask& task, Dtype dtype, const Tensor& y, const Tensor& factors, int64_t first) {
  at::parallel_for(0, y.size(0), 16, [&](int64_t begin, int64_t end) {
    kernels().finished_rows(dtype, task, element_of(y), y.const_data_ptr(), task.dynamic ? factors.const_data_ptr<float>() : nullptr,
                            first, y.size(1), begin, end);
  });
}

// Many rows: a part of the weight's rows at a time is made numbers and multiplied by torch. With one part torch's
// result becomes the output; what is left to do to it is done in place.
Tensor run_prefill(const Tensor& rows, QuantizedTask task, const MaybeTensor& bias) {
  Tensor factors;
  const Tensor x = operand_of(rows, task, factors);
  const Dtype dtype = *dtype_of(rows.scalar_type());
  const int64_t row_size = task.k * int64_t(x.element_size());
  const int64_t part = std::min(task.n, std::max<int64_t>(row_unit, buffer_bytes / row_size / row_unit * row_unit));
  void* buffer = scratch(Scratch::per_call, part * row_size);
  if (part == task.n && x.scalar_type() == rows.scalar_type()) {
    const Tensor weight = weight_rows(task, x, buffer, 0, part);
    if (task.group) return at::linear(x, weight, bias).contiguous();
    const Tensor y = at::linear(x, weight).contiguous();
    task.out = y.mutable_data_ptr();
    finish(task, dtype, y, factors, 0);
    return y;
  }
  const Tensor out = at::empty({rows.size(0), task.n}, rows.options().requires_grad(false));
  task.out = out.mutable_data_ptr();
  for (int64_t first = 0; first < task.n; first += part) {
    const Tensor weight = weight_rows(task, x, buffer, first, std::min(first + part, task.n));
    finish(task, dtype, x.scalar_type() == at::kChar ? at::_int_mm(x, weight.t()) : at::linear(x, weight).contiguous(), factors, first);
  }
  return out;
}

std::vector<Tensor> parallel_quantized_linear(const Tensor& x, at::TensorList packed, at::ArrayRef<MaybeTensor> biases, c10::string_view name) {
  const Scheme scheme = scheme_of({name.data(), name.size()});
  TORCH_CHECK(packed.size() == biases.size() * scheme.parts(), "scheme '", name, "' has ", scheme.parts(), " packed tensors to a weight, got ",
              packed.size(), " for ", biases.size(), " weights");
  const auto dtype = dtype_of(x.scalar_type());
  TORCH_CHECK(dtype && x.dim() >= 1 && x.layout() == at::kStrided, "x must be a dense floating-point tensor [..., K], got ", x.dtype(), " ", x.sizes());
  Tasks tasks;
  for (size_t i = 0; i < biases.size(); ++i)
    tasks.push_back(task_of(scheme, packed.slice(i * scheme.parts(), scheme.parts()), x.size(-1), x.scalar_type(), biases[i]));
  const int64_t k = x.size(-1), m = k ? x.numel() / k : 0;
  const WithoutAutocast guard;
  std::vector<Tensor> outs;
  if (m > max_decode_rows) {
    const Tensor rows = rows_of(x, m);
    for (size_t i = 0; i < tasks.size(); ++i) outs.push_back(run_prefill(rows, tasks[i], biases[i]).view(out_sizes(x, tasks[i].n)));
    return outs;
  }
  for (QuantizedTask& task : tasks) {
    outs.push_back(at::empty(out_sizes(x, task.n), x.options().requires_grad(false)));
    task.out = outs.back().mutable_data_ptr();
  }
  if (m && !tasks.empty()) run_decode<QuantizedTask>(rows_of(x, m), tasks);
  return outs;
}

Tensor quantized_linear_cpu(const Tensor& x, at::TensorList packed, const MaybeTensor& bias, c10::string_view scheme) {
  return parallel_quantized_linear(x, packed, bias, scheme)[0];
}

std::vector<Tensor> parallel_quantized_linear_cpu(const Tensor& x, at::TensorList packed, const c10::List<MaybeTensor>& biases, c10::string_view scheme) {
  return parallel_quantized_linear(x, packed, biases.vec(), scheme);
}

Tensor quantized_grouped_linear_cpu(const Tensor& x, at::TensorList packed, const Tensor& ends, c10::string_view scheme) {
  TORCH_CHECK(ends.dim() == 1 && ends.numel() > 0 && !packed.empty() && packed[0].dim() == 2 && packed[0].size(0) % ends.numel() == 0,
              "quantized_grouped_linear: packed must be [E * N, ...] and ends [E], got ", packed.empty() ? at::IntArrayRef() : packed[0].sizes(), " and ",
              ends.sizes());
  const int64_t rows = packed[0].size(0) / ends.numel();
  return by_expert(x, ends, rows, [&](int64_t expert, const Tensor& own_x) {
    std::vector<Tensor> own;
    for (const Tensor& part : packed) own.push_back(part.narrow(0, expert * rows, rows));
    return quantized_linear_cpu(own_x, own, std::nullopt, scheme);
  });
}

template <class Index>
void look_up(const Tensor& indices, const QuantizedTask& table, Dtype dtype, const Tensor& out) {
  const Index* index = indices.const_data_ptr<Index>();
  const int64_t row_size = table.k * int64_t(out.element_size());
  at::parallel_for(0, indices.numel(), std::max<int64_t>(1, bytes_worth_threads / row_size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = index[i];
      TORCH_CHECK_INDEX(row >= 0 && row < table.n, "quantized_embedding: index ", row, " is out of range of a table of ", table.n, " rows");
      kernels().dequantized_rows(dtype, table, true, static_cast<char*>(out.mutable_data_ptr()) + i * row_size, row, row + 1);
    }
  });
}

Tensor quantized_embedding_cpu(const Tensor& indices, at::TensorList packed, int64_t columns, at::ScalarType dtype, c10::string_view name) {
  const Scheme scheme = scheme_of({name.data(), name.size()});
  TORCH_CHECK(packed.size() == scheme.parts(), "scheme '", name, "' has ", scheme.parts(), " packed tensors, got ", packed.size());
  TORCH_CHECK(dtype_of(dtype), "quantized_embedding gives float32, bfloat16 or float16, not ", dtype);
  const QuantizedTask table = task_of(scheme, packed, columns);
  std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(columns);
  const Tensor out = at::empty(sizes, at::dtype(dtype));
  const Tensor dense = indices.contiguous();
  if (indices.scalar_type() == at::kInt)
    look_up<int32_t>(dense, table, *dtype_of(dtype), out);
  else
    look_up<int64_t>(dense, table, *dtype_of(dtype), out);
  return out;
}

std::vector<Tensor> parallel_quantized_linear_meta(const Tensor& x, at::TensorList packed, const c10::List<MaybeTensor>& biases, c10::string_view name) {
  const size_t parts = scheme_of({name.data(), name.size()}).parts();
  std::vector<Tensor> outs;
  for (size_t i = 0; i < biases.size(); ++i) {
    auto sizes = x.sym_sizes().vec();
    sizes.back() = packed[i * parts].sym_size(0);
    outs.push_back(x.new_empty_symint(sizes));
  }
  return outs;
}

Tensor quantized_linear_meta(const Tensor& x, at::TensorList packed, const MaybeTensor& bias, c10::string_view scheme) {
  return parallel_quantized_linear_meta(x, packed, c10::List<MaybeTensor>({bias}), scheme)[0];
}

Tensor quantized_grouped_linear_meta(const Tensor& x, at::TensorList packed, const Tensor& ends, c10::string_view) {
  return x.new_empty_symint({x.sym_size(0), packed[0].sym_size(0) / ends.sym_size(0)});
}

Tensor quantized_embedding_meta(const Tensor& indices, at::TensorList, int64_t columns, at::ScalarType dtype, c10::string_view) {
  auto sizes = indices.sym_sizes().vec();
  sizes.push_back(columns);
  return indices.new_empty_symint(sizes, dtype);
}

TORCH_LIBRARY_FRAGMENT(graphopt_cpp, m) {
  m.def("quantized_linear(Tensor x, Tensor[] packed, Tensor? bias, str scheme) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("parallel_quantized_linear(Tensor x, Tensor[] packed, Tensor?[] biases, str scheme) -> Tensor[]", {at::Tag::pt2_compliant_tag});
  m.def("quantized_grouped_linear(Tensor x, Tensor[] packed, Tensor ends, str scheme) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("quantized_embedding(Tensor indices, Tensor[] packed, int columns, ScalarType dtype, str scheme) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(graphopt_cpp, CPU, m) {
  m.impl("quantized_linear", quantized_linear_cpu);
  m.impl("parallel_quantized_linear", parallel_quantized_linear_cpu);
  m.impl("quantized_grouped_linear", quantized_grouped_linear_cpu);
  m.impl("quantized_embedding", quantized_embedding_cpu);
}

TORCH_LIBRARY_IMPL(graphopt_cpp, Meta, m) {
  m.impl("quantized_linear", quantized_linear_meta);
  m.impl("parallel_quantized_linear", parallel_quantized_linear_meta);
  m.impl("quantized_grouped_linear", quantized_grouped_linear_meta);
  m.impl("quantized_embedding", quantized_embedding_meta);
}

}  // namespace
}  // namespace graphopt
