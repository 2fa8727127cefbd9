// The kernels of one instruction set: compiled once per set, with GRAPHOPT_ISA naming it and the flags to match.
#include "kernels.h"

#define GRAPHOPT_JOIN(a, b) a##b
#define GRAPHOPT_TABLE(isa) GRAPHOPT_JOIN(isa, _kernels)
#define GRAPHOPT_TEXT(a) #a
#define GRAPHOPT_NAME(isa) GRAPHOPT_TEXT(isa)

#if defined(GRAPHOPT_ABSENT)  // the compiler does not know this set

const graphopt::Kernels* graphopt::GRAPHOPT_TABLE(GRAPHOPT_ISA)() { return nullptr; }

#else

using namespace graphopt;

#include "amx.h"
#include "attention.h"
#include "linear.h"

namespace {

// Whether these rows go to the tile registers.
[[maybe_unused]] bool on_tiles(Dtype dtype, int64_t m) { return dtype == Dtype::bf16 && m > 1; }

size_t packed_bytes(Dtype dtype, int64_t m, int64_t k) {
#if defined(__AMX_BF16__)
  if (on_tiles(dtype, m)) return panel_bytes(m, k);
#endif
  size_t bytes = 0;
  with_multiplier(dtype, m, [&]<class M>(M) { bytes = m * round_up(k, M::step) * sizeof(typename M::X); });
  return bytes;
}

void pack_rows(Dtype dtype, const void* x, int64_t ldx, PackedRows packed) {
#if defined(__AMX_BF16__)
  if (on_tiles(dtype, packed.m)) return pack_panel(x, ldx, packed, 0, packed.m);
#endif
  with_multiplier(dtype, packed.m, [&]<class M>(M) { pack_range<M>(x, ldx, packed); });
}

void linear_rows(Dtype dtype, const LinearTask& task, PackedRows packed, int64_t begin, int64_t end) {
#if defined(__AMX_BF16__)
  if (on_tiles(dtype, packed.m)) return linear_panel(task, packed, begin, end);
#endif
  with_multiplier(dtype, packed.m, [&]<class M>(M) { linear_range<M>(task, packed, begin, end); });
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

#if !defined(__AMX_BF16__)
constexpr decltype(Kernels::pack_panel) pack_panel = nullptr;
constexpr decltype(Kernels::linear_panel) linear_panel = nullptr;
#endif

constexpr Kernels table = {
    .isa = GRAPHOPT_NAME(GRAPHOPT_ISA),
    .packed_bytes = packed_bytes,
    .pack_rows = pack_rows,
    .linear_rows = linear_rows,
    .pack_panel = pack_panel,
    .linear_panel = linear_panel,
    .attention_floats = attention_floats,
    .attention_piece = attention_piece,
    .attention_merge = attention_merge,
};

}  // namespace

const Kernels* graphopt::GRAPHOPT_TABLE(GRAPHOPT_ISA)() { return &table; }

#endif
