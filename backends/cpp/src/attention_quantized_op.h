// graphopt_cpp::attention_quantized as a torch operator: its arguments are those of graphopt::attention_quantized.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <torch/library.h>

#include "attention_run.h"

namespace graphopt {
namespace quantized_cache {

constexpr int64_t group = 32;  // keys that share parameters (cache_operations.py)

CacheKind kind_of(c10::string_view name) {
  if (name == "int8") return CacheKind::int8;
  if (name == "fp8") return CacheKind::fp8;
  TORCH_CHECK(name == "int4", "attention_quantized: kind must be int8, fp8 or int4, got ", name);
  return CacheKind::int4;
}

struct Part {
  const Tensor &codes, &params, &tail;
  int64_t packed() const { return codes.size(2); }
  Tensor recent(int64_t length) const { return tail.narrow(2, tail.size(2) - (length - packed()), length - packed()); }
};

QuantizedRows rows_of(const Part& part, CacheKind kind) {
  QuantizedRows rows{kind, part.codes.const_data_ptr<uint8_t>(), static_cast<const uint16_t*>(part.params.const_data_ptr()),
                     part.packed(), group};
  for (int i = 0; i < 3; ++i) rows.code_stride[i] = part.codes.stride(i), rows.param_stride[i] = part.params.stride(i);
  return rows;
}

void check(const Tensor& q, const Part& part, int64_t length, CacheKind kind, bool keys) {
  const auto& [codes, params, tail] = part;
  TORCH_CHECK(codes.dim() == 4 && params.dim() == 4 && tail.dim() == 4 && codes.scalar_type() == at::kByte &&
                  params.scalar_type() == at::kHalf && tail.scalar_type() == q.scalar_type(),
              "attention_quantized: codes [B, H, P, C] uint8, params float16 and a tail of the dtype of q are needed");
  const int64_t size = tail.size(3), numbers = kind == CacheKind::int4 ? 2 : 1, packed = codes.size(2), recent = length - packed;
  TORCH_CHECK(codes.size(3) == (kind == CacheKind::int4 ? size / 2 : size) && packed % group == 0 && recent >= 0 &&
                  recent <= tail.size(2) && params.size(2) == (keys ? packed / group : packed) &&
                  params.size(3) == numbers * (keys ? size : 1),
              "attention_quantized: codes ", codes.sizes(), ", params ", params.sizes(), " and tail ", tail.sizes(),
              " are not a part of ", length, " rows");
  for (const Tensor* tensor : {&codes, &params})
    TORCH_CHECK(tensor->size(0) == tail.size(0) && tensor->size(1) == tail.size(1), "attention_quantized: parts of several batches");
}

Tensor whole(const Part& part, int64_t length, CacheKind kind, bool keys) {
  Tensor steps, wide = part.params.to(at::kFloat), offset;
  if (kind == CacheKind::int4)
    steps = at::cat({part.codes.bitwise_and(15), part.codes.bitwise_right_shift(4)}, -1).to(at::kFloat);
  else
    steps = part.codes.contiguous().view(kind == CacheKind::int8 ? at::kChar : at::kFloat8_e4m3fn).to(at::kFloat);
  if (keys) wide = wide.repeat_interleave(group, 2);
  if (kind == CacheKind::int4) {
    const int64_t half = wide.size(3) / 2;
    offset = wide.narrow(3, half, half), wide = wide.narrow(3, 0, half);
  }
  Tensor rows = steps * wide;
  if (offset.defined()) rows = rows + offset;
  return at::cat({rows.to(part.tail.scalar_type()), part.recent(length)}, 2);
}

bool dense(const Part& part) { return part.codes.stride(3) == 1 && part.params.stride(3) == 1 && dense_rows(part.tail); }

Tensor attention_quantized_cpu(const Tensor& q, const Tensor& k_codes, const Tensor& k_params, const Tensor& k_tail,
                               const Tensor& v_codes, const Tensor& v_params, const Tensor& v_tail, const MaybeTensor& mask,
                               int64_t length, c10::string_view name, bool causal, double scale, double softcap, int64_t window,
                               bool nan_rows) {
  const CacheKind kind = kind_of(name);
  const Part k{k_codes, k_params, k_tail}, v{v_codes, v_params, v_tail};
  TORCH_CHECK(q.dim() == 4, "attention_quantized: q must be [B, H, S, D]");
  check(q, k, length, kind, true), check(q, v, length, kind, false);
  TORCH_CHECK(k.packed() == v.packed() && k_tail.size(0) == q.size(0) && k_tail.size(3) == q.size(3) &&
                  q.size(1) % std::max<int64_t>(1, k_tail.size(1)) == 0 && v_tail.size(1) == k_tail.size(1),
              "attention_quantized: q ", q.sizes(), " does not fit keys ", k_tail.sizes(), " and values ", v_tail.sizes());
  const bool fits = dtype_of(q.scalar_type()) && dense(k) && dense(v) && dense_rows(q) && softcap >= 0 && window >= 0 && length > 0 &&
      q.numel() > 0 && v_tail.size(3) > 0 && q.size(2) <= max_decode_rows &&
      mask_fits(mask, q.scalar_type(), {q.size(0), q.size(1), q.size(2), length});
  if (!fits)
    return attention_cpu(q, whole(k, length, kind, true), whole(v, length, kind, false), mask, causal, scale, softcap, window, nan_rows);

  // A few rows: what is not read for each key is of the dtype that codes are made into, see kernels.h.
  const Dtype tail = *dtype_of(q.scalar_type()), rows = tail == Dtype::bf16 ? tail : Dtype::fp32;
  const at::ScalarType scalar = tail == Dtype::bf16 ? at::kBFloat16 : at::kFloat;
  const Tensor own = q.to(scalar), recent_k = k.recent(length), recent_v = v.recent(length);
  MaybeTensor added = mask;
  if (added && added->defined() && added->scalar_type() == at::kHalf) added = added->to(at::kFloat);
  Tensor out = empty_out(own, v_tail);
  AttentionTask task = task_of(own, recent_k, recent_v, added, out, causal, scale, softcap, window, nan_rows);
  task.keys = length;
  const QuantizedRows k_rows = rows_of(k, kind), v_rows = rows_of(v, kind);
  task.together = heads_together(task, k_codes.stride(1) < k_codes.stride(2) && v_codes.stride(1) < v_codes.stride(2));
  run_attention(rows, task, k_rows.group, kernels().quantized_floats(task), [&](const AttentionPiece& piece, float* memory, float* block) {
    kernels().attention_quantized(tail, task, k_rows, v_rows, piece, memory, block);
  });
  return out.to(q.scalar_type());
}

Tensor attention_quantized_meta(const Tensor& q, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                const Tensor& v_tail, const MaybeTensor&, c10::SymInt, c10::string_view, bool, double, double, int64_t,
                                bool) {
  return empty_out(q, v_tail);
}

TORCH_LIBRARY_FRAGMENT(graphopt_cpp, m) {
  m.def("attention_quantized(Tensor q, Tensor k_codes, Tensor k_params, Tensor k_tail, Tensor v_codes, Tensor v_params, "
        "Tensor v_tail, Tensor? mask, SymInt length, str kind, bool is_causal, float scale, float softcap, int window, "
        "bool nan_rows=False) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(graphopt_cpp, CPU, m) { m.impl("attention_quantized", attention_quantized_cpu); }

TORCH_LIBRARY_IMPL(graphopt_cpp, Meta, m) { m.impl("attention_quantized", attention_quantized_meta); }

}  // namespace quantized_cache
}  // namespace graphopt
