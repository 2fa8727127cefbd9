// Products of bfloat16 or float16 by way of float32, for processors without instructions for them: torch makes those at a
// tenth to a hundredth of float32's rate. A part of the weight at a time is widened, and each sum is rounded once, as torch does.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <optional>

#include "operators.h"

namespace graphopt {
namespace {

// Whether oneDNN multiplies numbers of this dtype here; torch's own loops do where it does not.
inline bool multiplies_fast(at::ScalarType dtype) {
  auto asked = [](const char* name) {
    const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    return op && op->typed<bool()>().call();
  };
  static const bool bf16 = asked("mkldnn::_is_mkldnn_bf16_supported"), fp16 = asked("mkldnn::_is_mkldnn_fp16_supported");
  return dtype == at::kBFloat16 ? bf16 : dtype == at::kHalf ? fp16 : true;
}

// rows [m, k] on weight [n, k], bias [n]: [m, n]. Widened parts and their sums stay in the cache until they are used.
inline at::Tensor wide_linear(const at::Tensor& rows, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  constexpr int64_t part_floats = 1 << 20;
  const int64_t m = rows.size(0), k = rows.size(1), n = weight.size(0);
  const at::Tensor out = at::empty({m, n}, rows.options().requires_grad(false)), x = rows.to(at::kFloat);
  const int64_t part = std::clamp<int64_t>(part_floats / std::max<int64_t>({m, k, 1}) / row_unit * row_unit, 4 * row_unit, std::max(n, 4 * row_unit));
  auto* memory = static_cast<float*>(scratch(Scratch::per_call, part * (m + k) * sizeof(float)));
  for (int64_t first = 0; first < n; first += part) {
    const int64_t count = std::min(part, n - first);
    const at::Tensor wide = at::from_blob(memory, {count, k}, x.options());
    at::Tensor sums = at::from_blob(memory + part * k, {m, count}, x.options());
    wide.copy_(weight.narrow(0, first, count));
    at::mm_out(sums, x, wide.t());
    if (bias && bias->defined()) sums.add_(bias->narrow(0, first, count));
    out.narrow(1, first, count).copy_(sums);
  }
  return out;
}

}  // namespace
}  // namespace graphopt
