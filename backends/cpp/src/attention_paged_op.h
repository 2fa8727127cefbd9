// graphopt_cpp::attention_paged as a torch operator: its arguments are those of graphopt::attention_paged.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <torch/library.h>

#include "attention_run.h"

namespace graphopt {
namespace paged_cache {

struct Pages {
  const Tensor &first, &table, &tail;
  int64_t block_rows() const { return first.size(1); }
  int64_t sealed() const { return table.size(1) * block_rows(); }
  Tensor recent(int64_t length) const { return tail.narrow(2, tail.size(2) - (length - sealed()), length - sealed()); }
};

// The blocks that the memory behind the first one holds.
int64_t capacity(const Pages& pages) {
  const int64_t elements = int64_t(pages.first.storage().nbytes() / pages.first.element_size()) - pages.first.storage_offset();
  return elements / std::max<int64_t>(1, pages.first.numel());
}

void check(const Tensor& q, const Pages& pages, int64_t length) {
  const auto& [first, table, tail] = pages;
  TORCH_CHECK(first.dim() == 3 && table.dim() == 2 && tail.dim() == 4 && table.scalar_type() == at::kLong &&
                  first.scalar_type() == q.scalar_type() && tail.scalar_type() == q.scalar_type() && first.is_contiguous(),
              "attention_paged: a block [H, rows, D], a table [B, P] int64 and a tail [B, H, T, D] of the dtype of q are needed");
  const int64_t recent = length - pages.sealed();
  TORCH_CHECK(first.size(1) > 0 && recent >= 0 && recent <= tail.size(2) && table.size(0) == tail.size(0) &&
                  first.size(0) == tail.size(1) && first.size(2) == tail.size(3),
              "attention_paged: a block ", first.sizes(), ", a table ", table.sizes(), " and a tail ", tail.sizes(),
              " are not a cache of ", length, " rows");
  const int64_t blocks = capacity(pages), *numbers = table.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < table.size(0); ++b)
    for (int64_t i = 0; i < table.size(1); ++i) {
      const int64_t number = numbers[b * table.stride(0) + i * table.stride(1)];
      TORCH_CHECK(number >= 0 && number < blocks, "attention_paged: block ", number, " of a pool of ", blocks);
    }
}

PagedRows rows_of(const Pages& pages) {
  return {pages.first.const_data_ptr(), pages.table.const_data_ptr<int64_t>(), pages.table.stride(0), pages.sealed(), pages.block_rows(),
          pages.first.numel()};
}

Tensor whole(const Pages& pages, int64_t length) {
  const Tensor& first = pages.first;
  const int64_t heads = first.size(0), rows = first.size(1), size = first.size(2), batch = pages.table.size(0);
  const Tensor pool = first.as_strided({capacity(pages), heads, rows, size}, {first.numel(), rows * size, size, 1});
  const Tensor gathered = pool.index_select(0, pages.table.flatten()).view({batch, pages.table.size(1), heads, rows, size});
  return at::cat({gathered.transpose(1, 2).flatten(2, 3), pages.recent(length)}, 2);
}

Tensor attention_paged_cpu(const Tensor& q, const Tensor& k_first, const Tensor& k_table, const Tensor& k_tail, const Tensor& v_first,
                           const Tensor& v_table, const Tensor& v_tail, const MaybeTensor& mask, int64_t length, bool causal,
                           double scale, double softcap, int64_t window, bool nan_rows) {
  const Pages k{k_first, k_table, k_tail}, v{v_first, v_table, v_tail};
  TORCH_CHECK(q.dim() == 4, "attention_paged: q must be [B, H, S, D]");
  check(q, k, length), check(q, v, length);
  TORCH_CHECK(k.sealed() == v.sealed() && k.block_rows() == v.block_rows() && k_tail.size(0) == q.size(0) &&
                  k_tail.size(3) == q.size(3) && q.size(1) % std::max<int64_t>(1, k_tail.size(1)) == 0 &&
                  v_tail.size(1) == k_tail.size(1),
              "attention_paged: q ", q.sizes(), " does not fit keys ", k_tail.sizes(), " and values ", v_tail.sizes());
  const bool fits = dtype_of(q.scalar_type()) && (k_table.stride(1) == 1 || k_table.size(1) == 1) &&
      (v_table.stride(1) == 1 || v_table.size(1) == 1) && dense_rows(k_tail) && dense_rows(v_tail) && dense_rows(q) && softcap >= 0 &&
      window >= 0 && length > 0 && q.numel() > 0 && v_tail.size(3) > 0 && q.size(2) <= max_decode_rows &&
      mask_fits(mask, q.scalar_type(), {q.size(0), q.size(1), q.size(2), length});
  if (!fits) return attention_cpu(q, whole(k, length), whole(v, length), mask, causal, scale, softcap, window, nan_rows);

  const Tensor recent_k = k.recent(length), recent_v = v.recent(length);
  Tensor out = empty_out(q, v_tail);
  const Dtype dtype = *dtype_of(q.scalar_type());
  AttentionTask task = task_of(q, recent_k, recent_v, mask, out, causal, scale, softcap, window, nan_rows);
  task.keys = length;
  task.together = heads_together(task, true);
  const PagedRows k_rows = rows_of(k), v_rows = rows_of(v);
  run_attention(dtype, task, 1, 0, [&](const AttentionPiece& piece, float* memory, float*) {
    kernels().attention_paged(dtype, task, k_rows, v_rows, piece, memory);
  });
  return out;
}

Tensor attention_paged_meta(const Tensor& q, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            const Tensor& v_tail, const MaybeTensor&, c10::SymInt, bool, double, double, int64_t, bool) {
  return empty_out(q, v_tail);
}

TORCH_LIBRARY_FRAGMENT(graphopt_cpp, m) {
  m.def("attention_paged(Tensor q, Tensor k_first, Tensor k_table, Tensor k_tail, Tensor v_first, Tensor v_table, Tensor v_tail, "
        "Tensor? mask, SymInt length, bool is_causal, float scale, float softcap, int window, bool nan_rows=False) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(graphopt_cpp, CPU, m) { m.impl("attention_paged", attention_paged_cpu); }

TORCH_LIBRARY_IMPL(graphopt_cpp, Meta, m) { m.impl("attention_paged", attention_paged_meta); }

}  // namespace paged_cache
}  // namespace graphopt
