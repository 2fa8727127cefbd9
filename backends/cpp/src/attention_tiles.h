// Attention of many query rows: tiles of queries against blocks of keys (FlashAttention-2, Dao 2023), bound by computing.
//
// Keys and values of a head are packed once, so that a vector holds the same element of neighbouring keys (or neighbouring
// columns of a value) and meets an element of a query (or a weight) in all its lanes: no sums across a vector. Blocks of
// keys that no query of a tile sees are not computed.
#pragma once

#include "attention_rows.h"
#include "tiles.h"

namespace {

constexpr int64_t tile_queries = 48;
// Rows and vectors of sums at a time: what fits in the registers.
constexpr int tile_rows_at_once = 6, tile_vectors = lanes == 16 ? 4 : 2;

template <class S>
struct AttentionTiles {
  using T = typename S::T;
  using M = TileFactors<S>;
  using X = typename M::X;
  const AttentionTask& task;
  const int64_t dim, dim_v;  // of queries and keys in whole steps of the sum; of values in whole vectors

  explicit AttentionTiles(const AttentionTask& t) : task(t), dim(round_up(t.dim, M::together)), dim_v(round_up(t.dim_v, lanes)) {}

  // Elements of X that a block of keys and its values take.
  int64_t block_elements() const { return key_block * (dim + dim_v); }

  int64_t scratch_floats() const {
    return tile_queries * (round_up(dim * int64_t(sizeof(X)), 64) / 4 + 2 * key_block + dim_v + 2);
  }

  // Keys [begin, begin + key_block) and their values; what lies behind the last is zero.
  void pack(int64_t batch, int64_t kv_head, int64_t begin, X* out) const {
    const int64_t count = smaller(key_block, task.keys - begin);
    const auto* k = static_cast<const T*>(task.k) + batch * task.k_stride[0] + kv_head * task.k_stride[1] + begin * task.k_stride[2];
    const auto* v = static_cast<const T*>(task.v) + batch * task.v_stride[0] + kv_head * task.v_stride[1] + begin * task.v_stride[2];
    constexpr int n = M::together;
    __builtin_memset(out, 0, block_elements() * sizeof(X));
    for (int64_t key = 0; key < count; ++key)
      for (int64_t i = 0; i < task.dim; ++i) out[(i / n * key_block + key) * n + i % n] = M::packed(k[key * task.k_stride[2] + i]);
    out += key_block * dim;
    for (int64_t key = 0; key < count; ++key)
      for (int64_t i = 0; i < task.dim_v; ++i) out[(key / n * dim_v + i) * n + key % n] = M::packed(v[key * task.v_stride[2] + i]);
  }

  struct Tile {
    X* q;
    float *scores, *mask, *acc, *maximum, *total;
    int64_t rows, padded;  // rows of queries, and in whole groups of tile_rows_at_once
  };

  Tile tile_of(float* scratch, int64_t first) const {
    Tile tile{reinterpret_cast<X*>(scratch)};
    tile.rows = smaller(tile_queries, task.queries - first), tile.padded = round_up(tile.rows, tile_rows_at_once);
    tile.scores = scratch + tile_queries * (round_up(dim * int64_t(sizeof(X)), 64) / 4);
    tile.mask = tile.scores + tile_queries * key_block, tile.acc = tile.mask + tile_queries * key_block;
    tile.maximum = tile.acc + tile_queries * dim_v, tile.total = tile.maximum + tile_queries;
    return tile;
  }

  void start(const Tile& tile, int64_t batch, int64_t head, int64_t first) const {
    const auto* q = static_cast<const T*>(task.q) + batch * task.q_stride[0] + head * task.q_stride[1] + first * task.q_stride[2];
    for (int64_t row = 0; row < tile.padded; ++row)
      for (int64_t i = 0; i < dim; ++i)
        tile.q[row * dim + i] = row < tile.rows && i < task.dim ? M::packed(q[row * task.q_stride[2] + i]) : X{};
    for (int64_t i = 0; i < tile.padded * dim_v; ++i) tile.acc[i] = 0.0f;
    for (int64_t row = 0; row < tile.padded; ++row) tile.maximum[row] = minus_infinity, tile.total[row] = 0.0f;
  }

  void score(const Tile& tile, const X* keys) const {
    for (int64_t row = 0; row < tile.padded; row += tile_rows_at_once)
      for (int64_t at = 0; at < key_block; at += tile_vectors * lanes) {
        F sums[tile_rows_at_once][tile_vectors] = {};
        tile_product<M>(tile.q + row * dim, dim, keys + at * M::together, key_block * M::together, dim / M::together, sums);
        for (int r = 0; r < tile_rows_at_once; ++r)
          for (int c = 0; c < tile_vectors; ++c) store(tile.scores + (row + r) * key_block + at + c * lanes, sums[r][c] * task.scale);
      }
  }

  template <int vectors>
  INLINE void add_columns(const Tile& tile, const X* values, int64_t row, int64_t at) const {
    F sums[tile_rows_at_once][vectors];
    for (int r = 0; r < tile_rows_at_once; ++r)
      for (int c = 0; c < vectors; ++c) sums[r][c] = load(tile.acc + (row + r) * dim_v + at + c * lanes);
    // The weights of a row take the place of its scores.
    const auto* weights = reinterpret_cast<const X*>(tile.scores + row * key_block);
    tile_product<M>(weights, key_block * int64_t(sizeof(float) / sizeof(X)), values + at * M::together, dim_v * M::together,
                     key_block / M::together, sums);
    for (int r = 0; r < tile_rows_at_once; ++r)
      for (int c = 0; c < vectors; ++c) store(tile.acc + (row + r) * dim_v + at + c * lanes, sums[r][c]);
  }

  void add_values(const Tile& tile, const X* values) const {
    for (int64_t row = 0; row < tile.padded; row += tile_rows_at_once) {
      int64_t at = 0;
      for (; at + tile_vectors * lanes <= dim_v; at += tile_vectors * lanes) add_columns<tile_vectors>(tile, values, row, at);
      for (; at < dim_v; at += lanes) add_columns<1>(tile, values, row, at);
    }
  }

  // Loads the mask at keys [begin, begin + count); whether it hides them all.
  bool hides_all(const Tile& tile, int64_t batch, int64_t head, int64_t first, int64_t begin, int64_t count) const {
    const int64_t distinct = task.mask_stride[2] == 0 ? 1 : tile.rows;
    float best = minus_infinity;
    for (int64_t row = 0; row < distinct; ++row) {
      float* out = tile.mask + row * key_block;
      load_mask_row<S>(task, batch, head, first + row, begin, count, out);
      for (int64_t i = 0; i < count; ++i) best = larger_or_nan(out[i], best);
    }
    return best == minus_infinity;
  }

  // Queries [first, first + tile_queries) of a head; packed: the blocks of its kv head.
  void run(int64_t batch, int64_t head, int64_t first, const X* packed, float* scratch) const {
    const Tile tile = tile_of(scratch, first);
    start(tile, batch, head, first);
    const int64_t end = task.causal ? smaller(task.keys, first + tile.rows) : task.keys;
    int64_t begin = task.window ? larger(0, first - task.window + 1) / key_block * key_block : 0;
    for (; begin < end; begin += key_block) {
      const int64_t count = smaller(key_block, task.keys - begin);
      const bool masked = task.mask_kind != AttentionTask::none;
      if (masked && hides_all(tile, batch, head, first, begin, count)) continue;
      const X* block = packed + begin / key_block * block_elements();
      score(tile, block);
      for (int64_t row = 0; row < tile.rows; ++row) {
        float* s = tile.scores + row * key_block;
        const float* add = masked ? tile.mask + (task.mask_stride[2] == 0 ? 0 : row) * key_block : nullptr;
        weigh_row<S>(task, first + row, begin, count, add, s, reinterpret_cast<X*>(s), dim_v,
                     tile.acc + row * dim_v, tile.maximum[row], tile.total[row]);
      }
      add_values(tile, block + key_block * dim);
    }
    for (int64_t row = 0; row < tile.rows; ++row) write(tile, batch, head, first, row);
  }

  void write(const Tile& tile, int64_t batch, int64_t head, int64_t first, int64_t row) const {
    T* out = static_cast<T*>(task.out) + batch * task.out_stride[0] + head * task.out_stride[1] + (first + row) * task.out_stride[2];
    const float* sums = tile.acc + row * dim_v;
    const float factor = tile.total[row] == 0.0f ? task.of_nothing : 1.0f / tile.total[row];
    for (int64_t i = 0; i < task.dim_v; i += lanes) {
      if (i + lanes <= task.dim_v) {
        S::put_in_order(out + i, load(sums + i) * factor);
      } else {
        T tail[lanes];
        S::put_in_order(tail, load(sums + i) * factor);
        __builtin_memcpy(out + i, tail, (task.dim_v - i) * sizeof(T));
      }
    }
  }
};

}  // namespace
