// graphopt_cpp::attention as a torch operator.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <limits>

#include "attention_run.h"

namespace graphopt {
namespace {

bool kernel_takes(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask, double softcap, int64_t window) {
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4 || !dtype_of(q.scalar_type())) return false;
  if (k.scalar_type() != q.scalar_type() || v.scalar_type() != q.scalar_type()) return false;
  if (!dense_rows(q) || !dense_rows(k) || !dense_rows(v)) return false;
  if (q.numel() == 0 || k.numel() == 0 || v.numel() == 0) return false;
  const int64_t batch = q.size(0), kv_heads = k.size(1), keys = k.size(2);
  if (k.size(0) != batch || v.size(0) != batch || v.size(1) != kv_heads || v.size(2) != keys) return false;
  if (q.size(1) % kv_heads != 0 || k.size(3) != q.size(3) || softcap < 0 || window < 0) return false;
  return mask_fits(mask, q.scalar_type(), {batch, q.size(1), q.size(2), keys});
}

// The operator's meaning in plain torch, for what the kernel does not take.
Tensor plain(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask, bool causal, double scale, double softcap,
             int64_t window, bool nan_rows) {
  const Tensor row = at::arange(q.size(-2), q.options().dtype(at::kLong)).unsqueeze(1);
  const Tensor key = at::arange(k.size(-2), q.options().dtype(at::kLong)).unsqueeze(0);
  MaybeTensor visible;
  if (causal) visible = key.le(row);
  if (window) visible = visible ? *visible & key.gt(row - window) : key.gt(row - window);
  MaybeTensor combined = mask;
  if (visible && mask && mask->defined())
    combined = mask->scalar_type() == at::kBool ? *mask & *visible
                                                : at::where(*visible, *mask, at::scalar_tensor(-std::numeric_limits<double>::infinity(), mask->options()));
  else if (visible)
    combined = visible;
  if (combined && combined->defined() && combined->is_floating_point()) combined = combined->to(q.scalar_type());
  const bool grouped = q.dim() == 4 && k.dim() == 4 && q.size(1) != k.size(1);
  if (softcap == 0 && !nan_rows) return at::scaled_dot_product_attention(q, k, v, combined, 0.0, false, scale, grouped);
  const auto wide = at::toOpMathType(q.scalar_type());
  const int64_t repeats = grouped ? q.size(1) / k.size(1) : 1;
  const Tensor keys = grouped ? k.repeat_interleave(repeats, 1) : k, values = grouped ? v.repeat_interleave(repeats, 1) : v;
  Tensor scores = q.to(wide).matmul(keys.to(wide).transpose(-2, -1)) * scale;
  if (softcap != 0) scores = softcap * (scores / softcap).tanh();
  const Tensor hidden = at::scalar_tensor(-std::numeric_limits<double>::infinity(), scores.options());
  if (combined && combined->defined())
    scores = combined->scalar_type() == at::kBool ? at::where(*combined, scores, hidden) : scores + *combined;
  if (nan_rows) return scores.softmax(-1).to(q.scalar_type()).to(wide).matmul(values.to(wide)).to(q.scalar_type());
  const Tensor nothing = (scores == hidden).all(-1, true);
  return at::where(nothing, at::scalar_tensor(0.0, scores.options()), scores.softmax(-1)).matmul(values.to(wide)).to(q.scalar_type());
}

}  // namespace

Tensor attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask, bool causal, double scale,
                     double softcap, int64_t window, bool nan_rows) {
  if (kernel_takes(q, k, v, mask, softcap, window)) {
    Tensor out = empty_out(q, v);
    const Dtype dtype = *dtype_of(q.scalar_type());
    AttentionTask task = task_of(q, k, v, mask, out, causal, scale, softcap, window, nan_rows);
    if (task.queries <= max_decode_rows) {
      task.together = heads_together(task, k.stride(1) < k.stride(2) && v.stride(1) < v.stride(2));
      run_attention(dtype, task, 1, 0, [&](const AttentionPiece& piece, float* memory, float*) {
        kernels().attention_piece(dtype, task, piece, memory);
      });
      return out;
    }
    const AttentionTiling tiling = kernels().attention_tiling(dtype, task);
    if (tiling.queries) {
      run_tiles(dtype, task, tiling);
      return out;
    }
  }
  const WithoutAutocast guard;
  Tensor result = plain(q, k, v, mask, causal, scale, softcap, window, nan_rows);
  if (result.dim() != 4) return result.contiguous();
  // The strides that the fake implementation promises.
  Tensor out = empty_out(q, v);
  return out.copy_(result);
}

namespace {

Tensor attention_meta(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask, bool causal, double scale,
                      double softcap, int64_t window, bool nan_rows) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "attention: q, k and v must have four dimensions, got ", q.dim(), ", ",
              k.dim(), " and ", v.dim());
  return empty_out(q, v);
}

TORCH_LIBRARY_FRAGMENT(graphopt_cpp, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale, float softcap, int window, "
        "bool nan_rows=False) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(graphopt_cpp, CPU, m) { m.impl("attention", attention_cpu); }

TORCH_LIBRARY_IMPL(graphopt_cpp, Meta, m) { m.impl("attention", attention_meta); }

}  // namespace
}  // namespace graphopt
