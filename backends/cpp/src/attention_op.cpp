// graphopt_cpp::attention as a torch operator.
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/where.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <limits>

#include "kernels.h"
#include "operators.h"

namespace graphopt {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Keys are shared out among threads in blocks of this many.
constexpr int64_t key_unit = 64;
// Below this many multiply-adds a second thread costs more than it brings.
constexpr int64_t work_worth_thread = 1 << 16;

bool dense_rows(const Tensor& t) { return t.layout() == at::kStrided && (t.stride(3) == 1 || t.size(3) == 1); }

bool kernel_takes(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask, double softcap, int64_t window) {
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4 || !dtype_of(q.scalar_type())) return false;
  if (k.scalar_type() != q.scalar_type() || v.scalar_type() != q.scalar_type()) return false;
  if (!dense_rows(q) || !dense_rows(k) || !dense_rows(v)) return false;
  if (q.numel() == 0 || k.numel() == 0 || v.numel() == 0 || q.size(2) > max_decode_rows) return false;
  const int64_t batch = q.size(0), kv_heads = k.size(1), keys = k.size(2);
  if (k.size(0) != batch || v.size(0) != batch || v.size(1) != kv_heads || v.size(2) != keys) return false;
  if (q.size(1) % kv_heads != 0 || k.size(3) != q.size(3) || softcap < 0 || window < 0) return false;
  if (!mask || !mask->defined()) return true;
  const auto type = mask->scalar_type();
  if (mask->layout() != at::kStrided || (type != at::kBool && type != q.scalar_type() && type != at::kFloat)) return false;
  const int64_t full[] = {batch, q.size(1), q.size(2), keys};
  if (mask->dim() > 4) return false;
  for (int64_t i = 0; i < mask->dim(); ++i) {
    const int64_t size = mask->size(mask->dim() - 1 - i);
    if (size != 1 && size != full[3 - i]) return false;
  }
  return true;
}

AttentionTask task_of(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask, const Tensor& out, bool causal,
                      double scale, double softcap, int64_t window, bool nan_rows) {
  AttentionTask task{};
  task.of_nothing = nan_rows ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
  task.q = q.const_data_ptr(), task.k = k.const_data_ptr(), task.v = v.const_data_ptr(), task.out = out.mutable_data_ptr();
  task.batch = q.size(0), task.heads = q.size(1), task.kv_heads = k.size(1), task.queries = q.size(2), task.keys = k.size(2);
  task.dim = q.size(3), task.dim_v = v.size(3);
  for (int i = 0; i < 3; ++i) {
    task.q_stride[i] = q.stride(i), task.k_stride[i] = k.stride(i), task.v_stride[i] = v.stride(i);
    task.out_stride[i] = out.stride(i);
  }
  task.causal = causal, task.scale = float(scale), task.softcap = float(softcap), task.window = window;
  if (mask && mask->defined()) {
    task.mask = mask->const_data_ptr();
    const auto type = mask->scalar_type();
    task.mask_kind = type == at::kBool ? AttentionTask::boolean
        : type == q.scalar_type()      ? AttentionTask::additive
                                       : AttentionTask::additive_fp32;
    for (int64_t i = 0; i < mask->dim(); ++i) {
      const int64_t d = mask->dim() - 1 - i;
      task.mask_stride[3 - i] = mask->size(d) == 1 ? 0 : mask->stride(d);
    }
  }
  return task;
}

// Whether the mask hides a key from every query. In a mask of numbers only minus infinity does: all other numbers
// leave a weight, however small.
bool is_hidden(const AttentionTask& task, Dtype dtype, int64_t key) {
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

void run(Dtype dtype, const AttentionTask& task) {
  const Kernels& table = kernels();
  int64_t scratch_floats, part_floats;
  table.attention_floats(dtype, task, &scratch_floats, &part_floats);
  // Keys that no query may see are not read.
  int64_t end = task.causal ? std::min(task.keys, task.queries) : task.keys;
  int64_t begin = task.window ? std::min(std::max<int64_t>(0, 1 - task.window), end) : 0;
  // Of a cache of fixed size only the used part is read: the rest, and padding on the left, the mask hides.
  if (task.mask_kind != AttentionTask::none) {
    while (end > begin + 1 && is_hidden(task, dtype, end - 1)) --end;
    while (begin < end - 1 && is_hidden(task, dtype, begin)) ++begin;
  }
  const int64_t blocks = (end - begin + key_unit - 1) / key_unit, heads = task.batch * task.kv_heads;
  const int64_t work = heads * (end - begin) * (task.heads / task.kv_heads) * task.queries * (task.dim + task.dim_v);
  const int64_t threads = std::clamp<int64_t>(std::min<int64_t>(work / work_worth_thread, heads * blocks), 1, at::get_num_threads());

  // Each thread takes an equal run of blocks, which may begin and end within a head; such a head is merged afterwards.
  c10::SmallVector<AttentionPiece, 16> pieces;
  c10::SmallVector<int64_t, 16> first{0};
  int64_t parts = 0;
  for (int64_t thread = 0; thread < threads; ++thread) {
    const int64_t last = (thread + 1) * heads * blocks / threads;
    for (int64_t at = thread * heads * blocks / threads; at < last;) {
      const int64_t head = at / blocks, from = at % blocks, to = std::min(blocks, from + last - at);
      const bool whole = from == 0 && to == blocks;
      parts += !whole;
      // The addresses of the parts are known once they are counted; a mark stands in until then.
      static float mark;
      pieces.push_back({head / task.kv_heads, head % task.kv_heads, begin + from * key_unit, std::min(end, begin + to * key_unit),
                        whole ? nullptr : &mark});
      at += to - from;
    }
    first.push_back(int64_t(pieces.size()));
  }
  auto* part = static_cast<float*>(scratch(Scratch::per_call, (parts * part_floats + 1) * sizeof(float)));
  for (AttentionPiece& piece : pieces)
    if (piece.part) piece.part = part, part += part_floats;

  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    auto* memory = static_cast<float*>(scratch(Scratch::per_thread, scratch_floats * sizeof(float)));
    for (int64_t i = first[from]; i < first[to]; ++i) table.attention_piece(dtype, task, pieces[i], memory);
  });
  for (size_t i = 0; i < pieces.size();) {
    size_t next = i + 1;
    while (next < pieces.size() && pieces[next].batch == pieces[i].batch && pieces[next].kv_head == pieces[i].kv_head) ++next;
    if (pieces[i].part) table.attention_merge(dtype, task, &pieces[i], int64_t(next - i));
    i = next;
  }
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

Tensor empty_out(const Tensor& q, const Tensor& v) {
  const auto b = q.sym_size(0), h = q.sym_size(1), s = q.sym_size(2), d = v.sym_size(3);
  return at::empty_strided_symint({b, h, s, d}, {s * h * d, d, h * d, c10::SymInt(1)}, q.options());
}

Tensor attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask, bool causal, double scale,
                     double softcap, int64_t window, bool nan_rows) {
  if (kernel_takes(q, k, v, mask, softcap, window)) {
    Tensor out = empty_out(q, v);
    run(*dtype_of(q.scalar_type()), task_of(q, k, v, mask, out, causal, scale, softcap, window, nan_rows));
    return out;
  }
  const WithoutAutocast guard;
  Tensor result = plain(q, k, v, mask, causal, scale, softcap, window, nan_rows);
  if (result.dim() != 4) return result.contiguous();
  // The strides that the fake implementation promises.
  Tensor out = empty_out(q, v);
  return out.copy_(result);
}

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
