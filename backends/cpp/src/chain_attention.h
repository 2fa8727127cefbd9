// Attention as a step of a chain: new rows of keys and values are stored at the end of their rooms by whoever reads them there.
#pragma once

#include "attention_run.h"

namespace graphopt {
namespace {

class Attend {
 public:
  // q, k, v: elements in a row of queries, and of new keys and values. keys, values: rooms [B, H, T, D], with the new rows last.
  Attend(Dtype dtype, int64_t m, int64_t q, int64_t k, int64_t v, const Tensor& keys, const Tensor& values, const MaybeTensor& mask, double scale,
         double softcap, double window, bool nan_rows)
      : dtype_(dtype), item_(int64_t(keys.element_size())), task_(task_of(m, q, k, v, keys, values, mask, scale, softcap, window, nan_rows)),
        shares_(dtype, task_, 1), first_new_(task_.keys - task_.queries), keys_(keys.mutable_data_ptr()), values_(values.mutable_data_ptr()) {}

  int64_t out_size() const { return task_.heads * task_.dim_v; }
  int64_t threads() const { return shares_.threads(); }
  size_t scratch_bytes() const { return shares_.scratch_floats() * sizeof(float); }
  size_t part_bytes() const { return shares_.part_bytes(); }
  bool merges() const { return shares_.part_bytes() != 0; }
  void set_memory(void* parts, void* out) { shares_.set_parts(parts), task_.out = out; }

  // The part of a thread, whose rows of queries, new keys and new values these are.
  void run(int64_t thread, const void* q, const void* k, const void* v, void* scratch) const {
    AttentionTask task = task_;
    task.q = q;
    for (const AttentionPiece& piece : shares_.of(thread)) {
      store(piece.batch, piece.kv_head, piece.kv_head + task.together, piece.begin, piece.end, k, v);
      kernels().attention_piece(dtype_, task, piece, static_cast<float*>(scratch));
    }
    if (thread != 0) return;
    for (int64_t batch = 0; batch < task.batch; ++batch) {  // rows that a mask or a window hides
      store(batch, 0, task.kv_heads, 0, shares_.begin(), k, v);
      store(batch, 0, task.kv_heads, shares_.end(), task.keys, k, v);
    }
  }
  void merge(int64_t thread, int64_t threads) const { shares_.merge(task_, thread, threads); }

 private:
  static AttentionTask task_of(int64_t m, int64_t q, int64_t k, int64_t v, const Tensor& keys, const Tensor& values, const MaybeTensor& mask,
                               double scale, double softcap, double window, bool nan_rows) {
    TORCH_CHECK(keys.dim() == 4 && values.dim() == 4 && dense_rows(keys) && dense_rows(values) && keys.numel() > 0 && values.numel() > 0,
                "chain: no rooms of keys and values: ", keys.sizes(), " and ", values.sizes());
    const int64_t batch = keys.size(0), kv_heads = keys.size(1), count = keys.size(2), dim = keys.size(3), dim_v = values.size(3);
    TORCH_CHECK(values.size(0) == batch && values.size(1) == kv_heads && values.size(2) == count && values.scalar_type() == keys.scalar_type(),
                "chain: rooms of ", keys.sizes(), " ", keys.dtype(), " and ", values.sizes(), " ", values.dtype(), " do not go together");
    const int64_t queries = m / batch, heads = q / dim;
    TORCH_CHECK(m % batch == 0 && queries <= count && q == heads * dim && heads % kv_heads == 0 && k == kv_heads * dim && v == kv_heads * dim_v,
                "chain: ", m, " rows of ", q, ", ", k, " and ", v, " elements do not fit rooms of ", keys.sizes(), " and ", values.sizes());
    TORCH_CHECK(mask_fits(mask, keys.scalar_type(), {batch, heads, queries, count}) && softcap >= 0 && window >= 0,
                "chain: attention with softcap ", softcap, ", window ", window, " and another mask than for ", batch, " x ", heads, " x ", queries, " x ", count);
    AttentionTask task{};
    set_keys(task, keys, values);
    set_mask(task, mask, keys.scalar_type());
    task.batch = batch, task.heads = heads, task.kv_heads = kv_heads, task.queries = queries, task.keys = count;
    task.dim = dim, task.dim_v = dim_v;
    task.q_stride[0] = queries * q, task.q_stride[1] = dim, task.q_stride[2] = q;
    task.out_stride[0] = queries * heads * dim_v, task.out_stride[1] = dim_v, task.out_stride[2] = heads * dim_v;
    task.scale = float(scale), task.softcap = float(softcap), task.window = int64_t(window);
    task.of_nothing = of_nothing(nan_rows);
    task.together = heads_together(task, keys.stride(1) < keys.stride(2) && values.stride(1) < values.stride(2));
    return task;
  }

  // The new rows of these heads that belong at [begin, end).
  void store(int64_t batch, int64_t from_head, int64_t to_head, int64_t begin, int64_t end, const void* k, const void* v) const {
    for (int64_t at = std::max(begin, first_new_); at < end; ++at)
      for (int64_t head = from_head; head < to_head; ++head) {
        const int64_t row = (batch * task_.queries + at - first_new_) * task_.kv_heads + head;
        auto put = [&](void* room, const int64_t(&stride)[3], const void* rows, int64_t size) {
          std::memcpy(static_cast<char*>(room) + item_ * (batch * stride[0] + head * stride[1] + at * stride[2]),
                      static_cast<const char*>(rows) + item_ * row * size, item_ * size);
        };
        put(keys_, task_.k_stride, k, task_.dim), put(values_, task_.v_stride, v, task_.dim_v);
      }
  }

  Dtype dtype_;
  int64_t item_;
  AttentionTask task_;
  AttentionShares shares_;
  int64_t first_new_;
  void *keys_, *values_;
};

}  // namespace
}  // namespace graphopt
