// bf16 linear on Intel's tile registers, for two rows of x and up.
//
// A tile product needs one operand with pairs of k interleaved. Instead of repacking the weight (a second copy of it,
// or the same work at each call), the product is taken transposed: out^T = weight * x^T. Then 16 rows x 32 columns
// of the row-major weight are a left operand as they lie in memory, and only x, which is small, is interleaved.
#pragma once

#include "linear.h"

#if defined(__AMX_BF16__)

namespace {

constexpr int tile_rows = 16, tile_k = 32;            // a bf16 tile: 16 rows of 64 bytes
constexpr int64_t tile_elements = tile_rows * tile_k;

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles are enabled on the calling thread as long as one of these lives; idle ones would slow every context switch.
struct TilesInUse {
  TilesInUse() {
    const TileConfig config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TilesInUse() { asm volatile("tilerelease"); }
};

// The compiler's own intrinsics take tile numbers as literals only, which templates cannot give.
template <int tile>
INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(tile)); }
template <int tile>
INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int sum, int left, int right>
INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
}

INLINE void transpose(F (&r)[16]) {
  constexpr Count<16>::type all{};
  F block[4][4];  // [rows 4i..4i+3][column c of each group of four]: 128-bit lanes hold four rows of one column
  for (int i = 0; i < 4; ++i) {
    F* four = r + 4 * i;
    F a = interleave_low(four[0], four[1], all), b = interleave_high(four[0], four[1], all);
    F c = interleave_low(four[2], four[3], all), d = interleave_high(four[2], four[3], all);
    block[i][0] = pairs_low(a, c, all), block[i][1] = pairs_high(a, c, all);
    block[i][2] = pairs_low(b, d, all), block[i][3] = pairs_high(b, d, all);
  }
  for (int c = 0; c < 4; ++c) {
    __m512 lo01 = _mm512_shuffle_f32x4(__m512(block[0][c]), __m512(block[1][c]), 0x88);
    __m512 hi01 = _mm512_shuffle_f32x4(__m512(block[0][c]), __m512(block[1][c]), 0xdd);
    __m512 lo23 = _mm512_shuffle_f32x4(__m512(block[2][c]), __m512(block[3][c]), 0x88);
    __m512 hi23 = _mm512_shuffle_f32x4(__m512(block[2][c]), __m512(block[3][c]), 0xdd);
    r[c] = F(_mm512_shuffle_f32x4(lo01, lo23, 0x88)), r[8 + c] = F(_mm512_shuffle_f32x4(lo01, lo23, 0xdd));
    r[4 + c] = F(_mm512_shuffle_f32x4(hi01, hi23, 0x88)), r[12 + c] = F(_mm512_shuffle_f32x4(hi01, hi23, 0xdd));
  }
}

constexpr int64_t tiles_along(int64_t k) { return (k + tile_k - 1) / tile_k; }

size_t panel_bytes(int64_t m, int64_t k) { return round_up(m, tile_rows) * tiles_along(k) * tile_k * sizeof(uint16_t); }

// Layout: [m / 16][k / 32] tiles, each [16 pairs of k][16 rows of x][2]. Missing rows and columns are zeros.
void pack_panel(const void* x, int64_t ldx, PackedRows packed, int64_t m_begin, int64_t m_end) {
  const auto* rows = static_cast<const uint16_t*>(x);
  for (int64_t m = m_begin; m < m_end; m += tile_rows)
    for (int64_t t = 0; t < tiles_along(packed.k); ++t) {
      F block[16];
      const __mmask32 mask = __mmask32((uint64_t(1) << smaller(packed.k - t * tile_k, tile_k)) - 1);
      for (int r = 0; r < tile_rows; ++r)
        block[r] = m + r < packed.m
            ? F(_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, rows + (m + r) * ldx + t * tile_k))) : F{};
      transpose(block);
      auto* out = static_cast<uint16_t*>(packed.data) + (m / tile_rows * tiles_along(packed.k) + t) * tile_elements;
      for (int r = 0; r < tile_rows; ++r) store(reinterpret_cast<float*>(out + r * tile_k), block[r]);
    }
}

// A tile of weight; what lies outside the matrix comes from a buffer of zeros, not from the next row, which could
// hold a NaN.
template <int tile>
INLINE void load_weight(const uint16_t* w, int64_t ldw, int64_t rows, int64_t columns, uint16_t* buffer) {
  if (rows >= tile_rows && columns >= tile_k) return tile_load<tile>(w, ldw * sizeof *w);
  __builtin_memset(buffer, 0, tile_elements * sizeof *w);
  for (int64_t r = 0; r < smaller(rows, tile_rows); ++r)
    __builtin_memcpy(buffer + r * tile_k, w + r * ldw, smaller(columns, tile_k) * sizeof *w);
  tile_load<tile>(buffer, 64);
}

// One or two tiles of out^T below each other, turned, biased, rounded and stored.
//
// Rounding first, two rows of out^T to one vector of 32-bit pairs, halves the shuffles that turning costs.
template <int tile, int count>
INLINE void finish(const LinearTask& task, int64_t n, int64_t m, int64_t m_end) {
  alignas(64) float sums[32][16];
  tile_store<tile>(sums, 64);
  if (count > 1) tile_store<tile + 1>(sums + 16, 64);
  alignas(64) float bias[32] = {};
  if (task.bias)
    for (int64_t i = 0; i < smaller(task.n - n, 32); ++i) bias[i] = Bf16::to_float(static_cast<const uint16_t*>(task.bias)[n + i]);
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                       4, 19, 3, 18, 2, 17, 1, 16, 0);
  F rows[16] = {};
#pragma GCC unroll 16
  for (int i = 0; i < 8 * count; ++i) {
    F even = load(sums[2 * i]) + splat(bias[2 * i]), odd = load(sums[2 * i + 1]) + splat(bias[2 * i + 1]);
    __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(__m512(odd), __m512(even));
    rows[i] = F(_mm512_castsi512_ps(_mm512_permutexvar_epi16(zip, pair)));
  }
  transpose(rows);
  const __mmask32 mask = __mmask32((uint64_t(1) << smaller(task.n - n, 16 * count)) - 1);
  auto* out = static_cast<uint16_t*>(task.out) + n + m * task.ldo;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (m + i < m_end) _mm512_mask_storeu_epi16(out + i * task.ldo, mask, _mm512_castps_si512(__m512(rows[i])));
}

// A block of `left` x `right` tiles of out^T: sums in tiles 0-1 and 2-3, weight in 4-5, x in 6-7.
template <int left, int right>
INLINE void tile_block(const LinearTask& task, PackedRows packed, int64_t n, int64_t m, Ahead ahead) {
  alignas(64) uint16_t edge[tile_elements];
  const int64_t tiles = tiles_along(task.k), rows = task.n - n;
  const auto* w = static_cast<const uint16_t*>(task.weight) + n * task.ldw;
  const auto* x = static_cast<const uint16_t*>(packed.data) + m / tile_rows * tiles * tile_elements;
  tile_zero<0>();
  if (left > 1) tile_zero<1>();
  if (right > 1) tile_zero<2>();
  if (left > 1 && right > 1) tile_zero<3>();
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t k = t * tile_k, columns = task.k - k;
    if (right == 1) {  // a single pass over the weight is bound by memory
      const uint16_t* at = w + k + (k < ahead.split ? ahead.before : ahead.after);
      for (int r = 0; r < left * tile_rows; ++r) __builtin_prefetch(at + r * task.ldw, 0, 3);
    }
    tile_load<6>(x + t * tile_elements, 64);
    if (right > 1) tile_load<7>(x + (tiles + t) * tile_elements, 64);
    load_weight<4>(w + k, task.ldw, rows, columns, edge);
    tile_multiply_add<0, 4, 6>();
    if (right > 1) tile_multiply_add<2, 4, 7>();
    if (left > 1) {
      load_weight<5>(w + k + tile_rows * task.ldw, task.ldw, rows - tile_rows, columns, edge);
      tile_multiply_add<1, 5, 6>();
      if (right > 1) tile_multiply_add<3, 5, 7>();
    }
  }
  finish<0, left>(task, n, m, packed.m);
  if (right > 1) finish<2, left>(task, n, m + tile_rows, packed.m);
}

template <int left>
INLINE void tile_columns(const LinearTask& task, PackedRows packed, int64_t n, Ahead ahead) {
  int64_t m = 0;
  for (; m + tile_rows < packed.m; m += 2 * tile_rows) tile_block<left, 2>(task, packed, n, m, ahead);
  if (m < packed.m) tile_block<left, 1>(task, packed, n, m, ahead);
}

void linear_panel(const LinearTask& task, PackedRows packed, int64_t begin, int64_t end) {
  const TilesInUse tiles;
  const Ahead ahead = Ahead::of(task.k, task.ldw, sizeof(uint16_t), 2 * tile_rows);
  int64_t n = begin;
  for (; n + tile_rows < end; n += 2 * tile_rows) tile_columns<2>(task, packed, n, ahead);
  if (n < end) tile_columns<1>(task, packed, n, ahead);
}

}  // namespace

#endif
