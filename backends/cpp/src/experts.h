// Products of a mixture of experts: rows sorted by expert, each with the weight of its own.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

namespace graphopt {
namespace {

// linear(expert, its rows of x) [.., n] for all rows of x [S, K]: [S, n]. ends [E]: the row behind each expert's last. Experts
// without rows are not called; rows behind all of them give zeros.
template <class Linear>
at::Tensor by_expert(const at::Tensor& x, const at::Tensor& ends, int64_t n, const Linear& linear) {
  TORCH_CHECK(x.dim() == 2 && ends.dim() == 1, "a grouped product takes x [S, K] and ends [E], got ", x.sizes(), " and ", ends.sizes());
  const at::Tensor last = ends.to(at::kLong).contiguous(), out = at::zeros({x.size(0), n}, x.options().requires_grad(false));
  int64_t begin = 0;
  for (int64_t expert = 0; expert < last.numel(); ++expert) {
    const int64_t end = last.const_data_ptr<int64_t>()[expert], count = end - begin;
    TORCH_CHECK_INDEX(count >= 0 && end <= x.size(0), "a grouped product's ends must rise and stay within ", x.size(0), " rows, got ", end, " behind ", begin);
    if (count) out.narrow(0, begin, count).copy_(linear(expert, x.narrow(0, begin, count)));
    begin = end;
  }
  return out;
}

}  // namespace
}  // namespace graphopt
