// The kernels of one instruction set: compiled once per set, with GRAPHOPT_ISA naming it and the flags to match.
#include "kernels.h"

#define GRAPHOPT_TEXT(a) #a
#define GRAPHOPT_NAME(isa) GRAPHOPT_TEXT(isa)

using namespace graphopt;

#include "amx.h"
#include "attention.h"
#include "attention_paged.h"
#include "attention_quantized.h"
#include "attention_tiles.h"
#include "dequantize.h"
#include "linear.h"
#include "linear_columns.h"
#include "quantized.h"
#include "quantized_dynamic.h"
#include "quantized_fixed.h"
#include "row_steps.h"

namespace {

// Whether these rows go to the tile registers.
[[maybe_unused]] bool on_tiles(Dtype dtype, int64_t m) { return dtype == Dtype::bf16 && m > 1; }

size_t packed_bytes(Dtype dtype, int64_t m, int64_t k) {
#if defined(__AMX_BF16__)
  if (on_tiles(dtype, m)) return panel_bytes(m, k);
#endif
  size_t bytes = 0;
  if (by_columns(dtype, m, [&]<class S>(S) { bytes = ColumnLinear<S>::packed_bytes(m, k); })) return bytes;
  with_multiplier(dtype, m, [&]<class M>(M) { bytes = m * round_up(k, M::step) * sizeof(typename M::X); });
  return bytes;
}

void pack_rows(Dtype dtype, const void* x, int64_t ldx, PackedRows packed) {
#if defined(__AMX_BF16__)
  if (on_tiles(dtype, packed.m)) return pack_panel(x, ldx, packed, 0, packed.m);
#endif
  if (by_columns(dtype, packed.m, [&]<class S>(S) { ColumnLinear<S>::pack(static_cast<const typename S::T*>(x), ldx, packed); })) return;
  with_multiplier(dtype, packed.m, [&]<class M>(M) { pack_range<M>(x, ldx, packed); });
}

void linear_rows(Dtype dtype, const LinearTask& task, PackedRows packed, int64_t begin, int64_t end) {
#if defined(__AMX_BF16__)
  if (on_tiles(dtype, packed.m)) return linear_panel(task, packed, begin, end);
#endif
  if (by_columns(dtype, packed.m, [&]<class S>(S) { ColumnLinear<S>::range(task, packed, begin, end); })) return;
  with_multiplier(dtype, packed.m, [&]<class M>(M) { linear_range<M>(task, packed, begin, end); });
}

void row_step(Dtype dtype, const RowTask& task) {
  with_storage(dtype, [&]<class S>(S) { row_step_as<S>(task); });
}

void attention_floats(Dtype dtype, const AttentionTask& task, int64_t* scratch, int64_t* part) {
  with_storage(dtype, [&]<class S>(S) {
    *scratch = Attention<S>::scratch_floats(task);
    *part = Attention<S>::part_floats(task);
  });
}

void attention_piece(Dtype dtype, const AttentionTask& task, const AttentionPiece& piece, float* scratch) {
  with_storage(dtype, [&]<class S>(S) { Attention<S>(task, scratch, piece.part).run(piece); });
}

void attention_merge(Dtype dtype, const AttentionTask& task, const AttentionPiece* pieces, int64_t count) {
  with_storage(dtype, [&]<class S>(S) { Attention<S>::merge(task, pieces, count); });
}

AttentionTiling attention_tiling(Dtype dtype, const AttentionTask& task) {
  AttentionTiling tiling{};
#if defined(__AMX_BF16__)
  if (dtype == Dtype::bf16) return tiling;  // torch's own runs on tile registers
#endif
  with_storage(dtype, [&]<class S>(S) {
    const AttentionTiles<S> tiles(task);
    tiling = {tile_queries, key_block, tiles.block_elements() * int64_t(sizeof(typename AttentionTiles<S>::X)), tiles.scratch_floats() * 4};
  });
  return tiling;
}

void attention_pack(Dtype dtype, const AttentionTask& task, int64_t batch, int64_t kv_head, int64_t first_key, void* out) {
  with_storage(dtype, [&]<class S>(S) {
    using Tiles = AttentionTiles<S>;
    Tiles(task).pack(batch, kv_head, first_key, static_cast<typename Tiles::X*>(out));
  });
}

void attention_tile(Dtype dtype, const AttentionTask& task, int64_t batch, int64_t head, int64_t first_query, const void* packed, float* scratch) {
  with_storage(dtype, [&]<class S>(S) {
    using Tiles = AttentionTiles<S>;
    Tiles(task).run(batch, head, first_query, static_cast<const typename Tiles::X*>(packed), scratch);
  });
}

int64_t quantized_floats(const AttentionTask& task) { return QuantizedAttention<Fp32>::block_floats(task); }

void attention_quantized(Dtype tail, const AttentionTask& task, const QuantizedRows& k, const QuantizedRows& v,
                         const AttentionPiece& piece, float* scratch, float* block) {
  with_storage(tail, [&]<class S>(S) { QuantizedAttention<S>(task, k, v, block).run(piece, scratch); });
}

void attention_paged(Dtype dtype, const AttentionTask& task, const PagedRows& k, const PagedRows& v, const AttentionPiece& piece,
                     float* scratch) {
  with_storage(dtype, [&]<class S>(S) { PagedAttention<S>(task, k, v).run(piece, scratch); });
}

// Whether weight rows are made bf16 before they meet these rows of x.
[[maybe_unused]] bool on_dense(Dtype x, const QuantizedTask& task, int64_t m) { return !task.dynamic && x == Dtype::bf16 && m >= dense_from; }

size_t quantized_bytes(Dtype x, const QuantizedTask& task, int64_t m) {
  size_t bytes = 0;
  with_reader(x, task.dynamic, task.kind, m, [&]<class M>() { bytes = PackedX<M>::bytes(m, task.k); });
#if defined(__AVX512BF16__)
  if (on_dense(x, task, m)) bytes += outputs_at_once * dense_ld(task.k) * sizeof(uint16_t);
#endif
  return bytes_with_fixed(x, task, m, bytes);
}

void quantized_pack(Dtype dtype, const QuantizedTask& task, const void* x, int64_t ldx, PackedRows rows) {
  if (pack_fixed(dtype, task, x, ldx, rows)) return;
  with_reader(dtype, task.dynamic, task.kind, rows.m, [&]<class M>() {
    if (task.dynamic) return place_codes<M>(dtype, task.kind, x, ldx, rows);
    if constexpr (sizeof(typename M::X) > 1) place_rows<M>(dtype, task.offsets != nullptr, x, ldx, rows);
  });
}

void quantized_rows(Dtype out, const QuantizedTask& task, PackedRows rows, int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
  if (on_dense(out, task, rows.m)) return dense_range(out, task, rows, begin, end);
#endif
  if (run_fixed(out, task, rows, begin, end)) return;
  with_reader(out, task.dynamic, task.kind, rows.m, [&]<class M>() {
    if constexpr (M::has_groups)
      if (task.group) return quantized_range<M, true>(out, task, rows, begin, end);
    if constexpr (M::has_rows)
      if (!task.group) return quantized_range<M, false>(out, task, rows, begin, end);
  });
}

void rounded_rows(Dtype dtype, Codes kind, const void* x, int64_t ldx, int64_t k, Element as, void* out, float* factors, int64_t begin, int64_t end) {
  switch (as) {
    case Element::integer: return rounded_rows_as(dtype, kind, x, ldx, k, static_cast<int8_t*>(out), factors, begin, end);
    case Element::bf16: return rounded_rows_as(dtype, kind, x, ldx, k, static_cast<uint16_t*>(out), factors, begin, end);
    case Element::fp32: return rounded_rows_as(dtype, kind, x, ldx, k, static_cast<float*>(out), factors, begin, end);
  }
}

void finished_rows(Dtype out, const QuantizedTask& task, Element of, const void* y, const float* factors, int64_t n, int64_t count, int64_t begin, int64_t end) {
  with_storage(out, [&]<class S>(S) {
    for (int64_t m = begin; m < end; ++m) {
      const float factor = factors ? factors[m] : 1.0f;
      switch (of) {
        case Element::integer: store_outputs<Int32, S>(task, static_cast<const int32_t*>(y) + m * count, factor, m, n, count); break;
        case Element::bf16: store_outputs<Bf16, S>(task, static_cast<const uint16_t*>(y) + m * count, factor, m, n, count); break;
        case Element::fp32: store_outputs<Fp32, S>(task, static_cast<const float*>(y) + m * count, factor, m, n, count); break;
      }
    }
  });
}

#if !defined(__AMX_BF16__)
constexpr decltype(Kernels::pack_panel) pack_panel = nullptr;
constexpr decltype(Kernels::linear_panel) linear_panel = nullptr;
#endif

constexpr Kernels table = {
    .isa = GRAPHOPT_NAME(GRAPHOPT_ISA),
    .packed_bytes = packed_bytes,
    .pack_rows = pack_rows,
    .linear_rows = linear_rows,
    .row_step = row_step,
    .pack_panel = pack_panel,
    .linear_panel = linear_panel,
    .quantized_bytes = quantized_bytes,
    .quantized_pack = quantized_pack,
    .quantized_rows = quantized_rows,
    .dequantized_rows = dequantized_rows,
    .rounded_rows = rounded_rows,
    .finished_rows = finished_rows,
    .attention_floats = attention_floats,
    .attention_piece = attention_piece,
    .attention_merge = attention_merge,
    .attention_tiling = attention_tiling,
    .attention_pack = attention_pack,
    .attention_tile = attention_tile,
    .quantized_floats = quantized_floats,
    .attention_quantized = attention_quantized,
    .attention_paged = attention_paged,
};

}  // namespace

const Kernels* graphopt_table() { return &table; }
