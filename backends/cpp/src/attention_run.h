// What the operators of decode attention share: the task of their tensors, and how it is shared out among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <array>
#include <limits>

#include "kernels.h"
#include "operators.h"

namespace graphopt {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Keys are shared out among threads in blocks of this many, or of a group.
inline constexpr int64_t key_unit = 16;
// Query rows of kv heads that are served together.
inline constexpr int64_t most_rows_together = 64;
// Below this many multiply-adds a second thread costs more than it brings.
inline constexpr int64_t work_worth_thread = 1 << 16;

inline bool dense_rows(const Tensor& t) { return t.layout() == at::kStrided && (t.stride(3) == 1 || t.size(3) == 1); }

// Whether the kernels take the mask, which broadcasts to `full`: batch, heads, queries, keys.
inline bool mask_fits(const MaybeTensor& mask, at::ScalarType dtype, std::array<int64_t, 4> full) {
  if (!mask || !mask->defined()) return true;
  const auto type = mask->scalar_type();
  if (mask->layout() != at::kStrided || (type != at::kBool && type != dtype && type != at::kFloat)) return false;
  if (mask->dim() > 4) return false;
  for (int64_t i = 0; i < mask->dim(); ++i) {
    const int64_t size = mask->size(mask->dim() - 1 - i);
    if (size != 1 && size != full[3 - i]) return false;
  }
  return true;
}

inline float of_nothing(bool nan_rows) { return nan_rows ? std::numeric_limits<float>::quiet_NaN() : 0.0f; }

inline void set_keys(AttentionTask& task, const Tensor& k, const Tensor& v) {
  task.k = k.const_data_ptr(), task.v = v.const_data_ptr();
  for (int i = 0; i < 3; ++i) task.k_stride[i] = k.stride(i), task.v_stride[i] = v.stride(i);
}

inline void set_mask(AttentionTask& task, const MaybeTensor& mask, at::ScalarType rows) {
  if (!mask || !mask->defined()) return;
  task.mask = mask->const_data_ptr();
  const auto type = mask->scalar_type();
  task.mask_kind = type == at::kBool ? AttentionTask::boolean : type == rows ? AttentionTask::additive : AttentionTask::additive_fp32;
  for (int64_t i = 0; i < mask->dim(); ++i) {
    const int64_t d = mask->dim() - 1 - i;
    task.mask_stride[3 - i] = mask->size(d) == 1 ? 0 : mask->stride(d);
  }
}

inline AttentionTask task_of(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask, const Tensor& out, bool causal,
                      double scale, double softcap, int64_t window, bool nan_rows) {
  AttentionTask task{};
  task.of_nothing = of_nothing(nan_rows);
  task.q = q.const_data_ptr(), task.out = out.mutable_data_ptr();
  set_keys(task, k, v);
  task.batch = q.size(0), task.heads = q.size(1), task.kv_heads = k.size(1), task.queries = q.size(2), task.keys = k.size(2);
  task.dim = q.size(3), task.dim_v = v.size(3);
  for (int i = 0; i < 3; ++i) task.q_stride[i] = q.stride(i), task.out_stride[i] = out.stride(i);
  task.causal = causal, task.scale = float(scale), task.softcap = float(softcap), task.window = window;
  set_mask(task, mask, q.scalar_type());
  return task;
}

// How many kv heads are served together: one, or as many as rows of keys and values hold side by side and as keep what
// belongs to their query rows in the caches of a core.
inline int64_t heads_together(const AttentionTask& task, bool side_by_side) {
  if (!side_by_side) return 1;
  const int64_t rows = task.heads / task.kv_heads * task.queries;
  int64_t together = task.kv_heads;
  while (together > 1 && (together * rows > most_rows_together || task.kv_heads % together)) --together;
  return together;
}

// Whether the mask hides a key from every query. In a mask of numbers only minus infinity does: all other numbers
// leave a weight, however small.
inline bool is_hidden(const AttentionTask& task, Dtype dtype, int64_t key) {
  for (int64_t b = 0; b < (task.mask_stride[0] ? task.batch : 1); ++b)
    for (int64_t h = 0; h < (task.mask_stride[1] ? task.heads : 1); ++h)
      for (int64_t q = 0; q < (task.mask_stride[2] ? task.queries : 1); ++q) {
        const int64_t at = b * task.mask_stride[0] + h * task.mask_stride[1] + q * task.mask_stride[2] + key * task.mask_stride[3];
        if (task.mask_kind == AttentionTask::boolean) {
          if (static_cast<const uint8_t*>(task.mask)[at]) return false;
        } else if (task.mask_kind == AttentionTask::additive_fp32 || dtype == Dtype::fp32) {
          if (static_cast<const float*>(task.mask)[at] != -std::numeric_limits<float>::infinity()) return false;
        } else if (static_cast<const uint16_t*>(task.mask)[at] != (dtype == Dtype::fp16 ? 0xfc00 : 0xff80)) {
          return false;
        }
      }
  return true;
}

// A task (its `together` filled in) shared out among threads: each takes an equal run of blocks of keys, which may begin and
// end within a head; such heads are merged when all threads are done. Pieces begin at a multiple of
// `group` keys.
class AttentionShares {
 public:
  AttentionShares(Dtype dtype, const AttentionTask& task, int64_t group) : dtype_(dtype) {
    kernels().attention_floats(dtype, task, &scratch_floats_, &part_floats_);
    // Keys that no query may see are not read.
    int64_t end = task.causal ? std::min(task.keys, task.queries) : task.keys;
    int64_t begin = task.window ? std::min(std::max<int64_t>(0, 1 - task.window), end) : 0;
    // Of a cache of fixed size only the used part is read: the rest, and padding on the left, the mask hides.
    if (task.mask_kind != AttentionTask::none) {
      while (end > begin + 1 && is_hidden(task, dtype, end - 1)) --end;
      while (begin < end - 1 && is_hidden(task, dtype, begin)) ++begin;
    }
    begin -= begin % group;
    begin_ = begin, end_ = end;
    const int64_t unit = std::max(key_unit, group), blocks = (end - begin + unit - 1) / unit, groups = task.kv_heads / task.together;
    const int64_t heads = task.batch * groups;  // or several at once
    const int64_t work = task.batch * task.kv_heads * (end - begin) * (task.heads / task.kv_heads) * task.queries * (task.dim + task.dim_v);
    const int64_t threads = std::clamp<int64_t>(std::min<int64_t>(work / work_worth_thread, heads * blocks), 1, at::get_num_threads());
    for (int64_t thread = 0; thread < threads; ++thread) {
      const int64_t last = (thread + 1) * heads * blocks / threads;
      for (int64_t at = thread * heads * blocks / threads; at < last;) {
        const int64_t head = at / blocks, from = at % blocks, to = std::min(blocks, from + last - at);
        part_.push_back(from == 0 && to == blocks ? -1 : parts_++);
        pieces_.push_back({head / groups, head % groups * task.together, begin + from * unit, std::min(end, begin + to * unit), nullptr});
        at += to - from;
      }
      first_.push_back(int64_t(pieces_.size()));
    }
  }

  int64_t threads() const { return int64_t(first_.size()) - 1; }
  // Keys before `begin` and from `end` on are in no piece.
  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }
  // Of each thread.
  int64_t scratch_floats() const { return scratch_floats_; }

  // What heads that are merged need: nothing, if there are none.
  int64_t part_bytes() const { return parts_ * part_floats_ * int64_t(sizeof(float)); }
  void set_parts(void* memory) {
    for (size_t i = 0; i < pieces_.size(); ++i)
      if (part_[i] >= 0) pieces_[i].part = static_cast<float*>(memory) + part_[i] * part_floats_;
  }

  at::ArrayRef<AttentionPiece> of(int64_t thread) const {
    if (thread >= threads()) return {};
    return at::ArrayRef<AttentionPiece>(pieces_).slice(first_[thread], first_[thread + 1] - first_[thread]);
  }

  // Those of the merges that fall to a thread of so many.
  void merge(const AttentionTask& task, int64_t thread, int64_t threads) const {
    int64_t turn = 0;
    for (size_t i = 0; i < pieces_.size();) {
      size_t next = i + 1;
      while (next < pieces_.size() && pieces_[next].batch == pieces_[i].batch && pieces_[next].kv_head == pieces_[i].kv_head) ++next;
      if (pieces_[i].part && turn++ % threads == thread) kernels().attention_merge(dtype_, task, &pieces_[i], int64_t(next - i));
      i = next;
    }
  }

 private:
  Dtype dtype_;
  c10::SmallVector<AttentionPiece, 16> pieces_;
  c10::SmallVector<int64_t, 16> part_;  // of each piece: its number, or -1 for a whole head
  c10::SmallVector<int64_t, 16> first_{0};
  int64_t parts_ = 0, begin_ = 0, end_ = 0, scratch_floats_ = 0, part_floats_ = 0;
};

// Run a task by `work(piece, scratch, extra)`: scratch memory as the kernels of `dtype` ask for, and `extra_floats` more.
template <class Work>
void run_attention(Dtype dtype, const AttentionTask& task, int64_t group, int64_t extra_floats, Work&& work_on) {
  AttentionShares shares(dtype, task, group);
  shares.set_parts(scratch(Scratch::per_call, shares.part_bytes() + 1));
  at::parallel_for(0, shares.threads(), 1, [&](int64_t from, int64_t to) {
    const int64_t floats = shares.scratch_floats();
    auto* memory = static_cast<float*>(scratch(Scratch::per_thread, (floats + extra_floats) * sizeof(float)));
    for (int64_t thread = from; thread < to; ++thread)
      for (const AttentionPiece& piece : shares.of(thread)) work_on(piece, memory, memory + floats);
  });
  shares.merge(task, 0, 1);
}

// Attention of many queries: for as many kv heads at a time as packed_bytes hold (but one at least), first all blocks of
// keys are packed and then all tiles of queries computed.
inline void run_tiles(Dtype dtype, const AttentionTask& task, const AttentionTiling& tiling) {
  constexpr int64_t packed_bytes = 16 << 20;
  const Kernels& table = kernels();
  const int64_t blocks = (task.keys + tiling.keys - 1) / tiling.keys, tiles = (task.queries + tiling.queries - 1) / tiling.queries;
  const int64_t heads = task.batch * task.kv_heads, group = task.heads / task.kv_heads, head_bytes = blocks * tiling.block_bytes;
  const int64_t chunk = std::clamp<int64_t>(packed_bytes / head_bytes, 1, heads);
  char* packed = static_cast<char*>(scratch(Scratch::per_call, chunk * head_bytes));
  for (int64_t done = 0; done < heads; done += chunk) {
    const int64_t count = std::min(chunk, heads - done);
    at::parallel_for(0, count * blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = done + i / blocks;
        table.attention_pack(dtype, task, head / task.kv_heads, head % task.kv_heads, i % blocks * tiling.keys, packed + i * tiling.block_bytes);
      }
    });
    const int64_t units = count * group * tiles;
    Shares shares(units, std::min<int64_t>(units, at::get_num_threads()), 1);
    at::parallel_for(0, shares.threads(), 1, [&](int64_t thread, int64_t) {
      auto* memory = static_cast<float*>(scratch(Scratch::per_thread, tiling.scratch_bytes));
      for (Shares::Piece piece = shares.take(thread); piece.from < piece.to; piece = shares.take(thread)) {
        const int64_t member = piece.from / tiles, local = member / group, head = done + local;
        table.attention_tile(dtype, task, head / task.kv_heads, head % task.kv_heads * group + member % group,
                             piece.from % tiles * tiling.queries, packed + local * head_bytes, memory);
      }
    });
  }
}

inline Tensor empty_out(const Tensor& q, const Tensor& v) {
  // As torch lays out empty tensors: a dimension of size 0 counts as one of size 1.
  auto extent = [](const c10::SymInt& size) { return size.is_symbolic() ? size : c10::SymInt(std::max<int64_t>(1, size.expect_int())); };
  const auto b = q.sym_size(0), h = q.sym_size(1), s = q.sym_size(2), d = v.sym_size(3);
  return at::empty_strided_symint({b, h, s, d}, {extent(s) * extent(h) * extent(d), extent(d), extent(h) * extent(d), c10::SymInt(1)}, q.options());
}

// graphopt_cpp::attention itself, for operators that fall back to it.
Tensor attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask, bool causal, double scale,
                     double softcap, int64_t window, bool nan_rows);

}  // namespace graphopt
