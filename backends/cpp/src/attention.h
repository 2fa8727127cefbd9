// Decode attention: few query rows against many keys, bound by reading keys and values once.
//
// All query rows that share a key/value head (the heads of its group, times the queries) are served by one pass over
// that head. Where the heads of a row lie side by side in memory, several are served together, so that memory is read in
// its order. Softmax is taken block by block with a running maximum and sum (Milakov and Gimelshein 2018, as in
// FlashAttention), so that a range of keys can be worked on by itself and merged later (flash-decoding).
#pragma once

#include "attention_rows.h"

namespace {

constexpr int64_t rows_ahead_bytes = 24 << 10;

// Asks for rows that will be read soon. In the order in which they lie in memory and into the second-level cache: so the
// hardware's own prefetcher goes along, and more lines are under way than the first-level cache can wait for.
template <class T>
INLINE void prefetch_rows(const T* rows, int64_t count, int64_t stride, int64_t span) {
  for (int64_t row = 0; row < count; ++row)
    for (int64_t byte = 0; byte < span * int64_t(sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(rows + row * stride) + byte, 0, 2);
}

// Some kv heads of one batch element: their sizes and where their parts lie in scratch memory.
template <class S>
struct Attention {
  using T = typename S::T;
  using Dot = typename Values<S>::Dot;
  using X = typename Dot::X;
  using Weight = typename Values<S>::X;
  const AttentionTask& task;
  const int64_t group, of_head, rows, dim, dim_v;  // query heads and rows of a kv head, all rows; dims in whole steps
  X* q;
  float *scores, *mask, *acc, *maximum, *total;
  bool reads_ahead = true;  // whether rows go on behind the block in the same strides
  int64_t column = 0;       // of the block of scores: where the keys of score_block and value_block begin

  static int64_t rows_of(const AttentionTask& t) { return t.heads / t.kv_heads * t.queries * t.together; }
  static int64_t part_floats(const AttentionTask& t) { return rows_of(t) * (round_up(t.dim_v, S::step) + 2); }
  static int64_t scratch_floats(const AttentionTask& t) {
    return rows_of(t) * (round_up(t.dim, S::step) + 2 * key_block) + part_floats(t);
  }

  Attention(const AttentionTask& t, float* scratch, float* part)
      : task(t), group(t.heads / t.kv_heads), of_head(group * t.queries), rows(rows_of(t)), dim(round_up(t.dim, S::step)),
        dim_v(round_up(t.dim_v, S::step)), q(reinterpret_cast<X*>(scratch)) {
    scores = scratch + rows * dim, mask = scores + rows * key_block;
    acc = part ? part : mask + rows * key_block;
    maximum = acc + rows * dim_v, total = maximum + rows;
  }

  INLINE int64_t query(int64_t row) const { return row % task.queries; }
  INLINE int64_t head(const AttentionPiece& piece, int64_t row) const { return piece.kv_head * group + row / task.queries; }
  // The weights of a row take the place of its scores.
  INLINE Weight* weights(int64_t row) const { return reinterpret_cast<Weight*>(scores + row * key_block); }

  void load_queries(const AttentionPiece& piece) {
    for (int64_t row = 0; row < rows; ++row) {
      const auto* at = static_cast<const T*>(task.q) + piece.batch * task.q_stride[0] + head(piece, row) * task.q_stride[1] +
                       query(row) * task.q_stride[2];
      Dot::pack(at, task.dim, q + row * dim);
    }
  }

  // What lies together of a row of keys (or values): that of one kv head, or of all that are served together.
  INLINE int64_t span(const int64_t (&stride)[3], int64_t size) const { return (task.together - 1) * stride[1] + size; }

  INLINE void read_ahead(const T* rows, int64_t count, const int64_t (&stride)[3], int64_t size) const {
    const int64_t bytes = span(stride, size) * int64_t(sizeof(T));
    if (reads_ahead) prefetch_rows(rows + larger(1, rows_ahead_bytes / bytes) * stride[2], count, stride[2], span(stride, size));
  }

  // Calls pass<many>(row) for rows [row, last), at most `most` (1 to 4) at a time.
  template <int most, class Pass>
  static INLINE void in_passes(int64_t row, int64_t last, const Pass& pass) {
    for (; last - row >= most; row += most) pass.template operator()<most>(row);
    if (most > 3 && last - row == 3) return pass.template operator()<3>(row);
    if (most > 2 && last - row == 2) return pass.template operator()<2>(row);
    if (most > 1 && last - row == 1) return pass.template operator()<1>(row);
  }

  // scores[row][i] = q[row] . k[begin + i], for the rows of one kv head, the first of which is `first`.
  template <int keys>
  INLINE void score_keys(const T* k, int64_t first, int64_t i) {
    in_passes<columns_at_once>(first, first + of_head, [&]<int columns>(int64_t row) INLINE_LAMBDA {
      F sums[keys][columns];
      dot_block<Dot, keys, columns, false>(k, task.k_stride[2], q + row * dim, dim, task.dim, Ahead{}, sums);
      for (int c = 0; c < columns; ++c, ++row) {
        F4 four = sum4(sums[0][c], sums[1 % keys][c], sums[2 % keys][c], sums[3 % keys][c]) * task.scale;
        for (int r = 0; r < keys; ++r) scores[row * key_block + column + i + r] = four[r];
      }
    });
  }

  // The keys of kv heads [from, to) of the piece, in the order in which they lie.
  void score_block(const AttentionPiece& piece, int64_t from, int64_t to, int64_t begin, int64_t count) {
    const auto* k = static_cast<const T*>(task.k) + piece.batch * task.k_stride[0] + piece.kv_head * task.k_stride[1] +
                    begin * task.k_stride[2];
    for (int64_t i = 0; i < count;) {
      const int64_t keys = i + rows_at_once <= count ? rows_at_once : 1;
      read_ahead(k + i * task.k_stride[2], keys, task.k_stride, task.dim);
      for (int64_t h = from; h < to; ++h) {
        const T* at = k + h * task.k_stride[1] + i * task.k_stride[2];
        if (keys == rows_at_once)
          score_keys<rows_at_once>(at, h * of_head, i);
        else
          score_keys<1>(at, h * of_head, i);
      }
      i += keys;
    }
  }

  // One row for each query, or for each head and query where heads differ.
  void load_mask(const AttentionPiece& piece, int64_t begin, int64_t count) {
    const int64_t distinct = task.mask_stride[1] == 0 ? task.queries : rows;
    for (int64_t row = 0; row < distinct; ++row)
      load_mask_row<S>(task, piece.batch, head(piece, row), query(row), begin, count, mask + row * key_block);
  }

  template <class W>
  void softmax_block(int64_t begin, int64_t count, float* sums) {
    for (int64_t row = 0; row < rows; ++row) {
      const float* add = mask + (task.mask_stride[1] == 0 ? query(row) : row) * key_block;
      float* own = scores + row * key_block;
      weigh_row<W>(task, query(row), begin, count, task.mask_kind == AttentionTask::none ? nullptr : add, own,
                   reinterpret_cast<typename Values<W>::X*>(own), dim_v, sums + row * dim_v, maximum[row], total[row]);
    }
  }

  // acc[row .. row + many][at ..] += weights . v, for as many steps of v as registers allow.
  // ahead: whether to ask for all of the rows to come.
  template <int many, int steps>
  INLINE void add_values(const T* v, int64_t row, int64_t at, int64_t count, bool ahead) {
    constexpr int keys = Values<S>::together;
    F sums[many][2 * steps];
    for (int r = 0; r < many; ++r)
      for (int c = 0; c < 2 * steps; ++c) sums[r][c] = load(acc + (row + r) * dim_v + at + c * lanes);
    for (int64_t i = 0; i < count; i += keys) {
      if (ahead) read_ahead(v + i * task.v_stride[2], keys, task.v_stride, task.dim_v);
      const T* from = v + i * task.v_stride[2] + at;
      typename Values<S>::Pair values[steps];
#pragma GCC unroll 2
      for (int c = 0; c < steps; ++c)
        values[c] = Values<S>::values(from + c * S::step, task.v_stride[2], i + keys <= count, task.dim_v - at - c * S::step);
#pragma GCC unroll 4
      for (int r = 0; r < many; ++r) {
        const auto weight = Values<S>::everywhere(weights(row + r) + column + i);
#pragma GCC unroll 4
        for (int c = 0; c < 2 * steps; ++c) sums[r][c] = Values<S>::mad(sums[r][c], weight, values[c / 2].v[c % 2]);
      }
    }
    for (int r = 0; r < many; ++r)
      for (int c = 0; c < 2 * steps; ++c) store(acc + (row + r) * dim_v + at + c * lanes, sums[r][c]);
  }

  template <int many>
  INLINE void add_rows(const T* v, int64_t row, int64_t count, bool ahead) {
    int64_t at = 0;
    for (; at + 2 * S::step <= dim_v; at += 2 * S::step) add_values<many, 2>(v, row, at, count, ahead && at == 0);
    if (at < dim_v) add_values<many, 1>(v, row, at, count, ahead && at == 0);
  }

  // The values of kv heads [from, to) of the piece.
  void value_block(const AttentionPiece& piece, int64_t from, int64_t to, int64_t begin, int64_t count) {
    const auto* v = static_cast<const T*>(task.v) + piece.batch * task.v_stride[0] + piece.kv_head * task.v_stride[1] +
                    begin * task.v_stride[2];
    for (int64_t h = from; h < to; ++h) {
      const T* at = v + h * task.v_stride[1];
      const int64_t first = h * of_head;
      in_passes<columns_at_once>(first, first + of_head, [&]<int many>(int64_t row) INLINE_LAMBDA {
        add_rows<many>(at, row, count, h == 0 && row == first);
      });
    }
  }

  T* out_row(const AttentionPiece& piece, int64_t row) const {
    return static_cast<T*>(task.out) + piece.batch * task.out_stride[0] + head(piece, row) * task.out_stride[1] +
           query(row) * task.out_stride[2];
  }

  // out = sums * factor; a row that saw no key has a sum of zero and gives zeros, as in torch, or NaN.
  void write(T* out, const float* sums, float factor) const {
    for (int64_t i = 0; i < task.dim_v; i += S::step) {
      const F one = load(sums + i) * factor, other = load(sums + i + lanes) * factor;
      if (i + S::step <= task.dim_v) {
        Values<S>::put(out + i, one, other);
      } else {
        T tail[S::step];
        Values<S>::put(tail, one, other);
        __builtin_memcpy(out + i, tail, (task.dim_v - i) * sizeof(T));
      }
    }
  }

  void start(const AttentionPiece& piece) {
    load_queries(piece);
    for (int64_t i = 0; i < rows * dim_v; ++i) acc[i] = 0.0f;
    for (int64_t row = 0; row < rows; ++row) maximum[row] = minus_infinity, total[row] = 0.0f;
  }

  // Scores of keys [begin, begin + count) to weights as values of type W meet; `sums` is what they will be added to.
  template <class W>
  void weigh_block(const AttentionPiece& piece, int64_t begin, int64_t count, float* sums) {
    if (task.mask_kind != AttentionTask::none) load_mask(piece, begin, count);
    softmax_block<W>(begin, count, sums);
  }
  void weigh_block(const AttentionPiece& piece, int64_t begin, int64_t count) { weigh_block<S>(piece, begin, count, acc); }

  // Takes over sums that were made elsewhere, in the order of the values.
  void take(const float* sums) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < dim_v; ++i) acc[row * dim_v + i / S::step * S::step + Values<S>::place(i % S::step)] = sums[row * dim_v + i];
  }

  void run(const AttentionPiece& piece) {
    start(piece);
    for (int64_t begin = piece.begin; begin < piece.end; begin += key_block) {
      const int64_t count = smaller(key_block, piece.end - begin);
      score_block(piece, 0, task.together, begin, count);
      weigh_block(piece, begin, count);
      value_block(piece, 0, task.together, begin, count);
    }
    finish(piece);
  }

  void finish(const AttentionPiece& piece) {
    if (!piece.part)
      for (int64_t row = 0; row < rows; ++row)
        write(out_row(piece, row), acc + row * dim_v, total[row] == 0.0f ? task.of_nothing : 1.0f / total[row]);
  }

  // Adds the later parts into the first and writes the result.
  static void merge(const AttentionTask& task, const AttentionPiece* pieces, int64_t count) {
    Attention first(task, pieces[0].part, pieces[0].part);
    for (int64_t row = 0; row < first.rows; ++row) {
      float best = minus_infinity, sum = 0.0f;
      for (int64_t p = 0; p < count; ++p) {
        const float other = Attention(task, pieces[p].part, pieces[p].part).maximum[row];
        best = other <= best ? best : other;
      }
      float* acc = first.acc + row * first.dim_v;
      for (int64_t p = 0; p < count; ++p) {
        Attention part(task, pieces[p].part, pieces[p].part);
        const float factor = part.maximum[row] == minus_infinity ? 0.0f : exp_negative(part.maximum[row] - best);
        sum += part.total[row] * factor;
        const float* from = part.acc + row * part.dim_v;
        for (int64_t i = 0; i < part.dim_v; i += lanes)
          store(acc + i, p == 0 ? load(from + i) * factor : load(acc + i) + load(from + i) * factor);
      }
      first.write(first.out_row(pieces[0], row), acc, sum == 0.0f ? task.of_nothing : 1.0f / sum);
    }
  }
};

}  // namespace
