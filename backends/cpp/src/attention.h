// Decode attention: few query rows against many keys, bound by reading keys and values once.
//
// All query rows that share a key/value head (the heads of its group, times the queries) are served by one pass over
// that head. Softmax is taken block by block with a running maximum and sum (Milakov and Gimelshein 2018, as in
// FlashAttention), so that a range of keys can be worked on by itself and merged later (flash-decoding).
#pragma once

#include "linear.h"

namespace {

constexpr int64_t key_block = 64;
constexpr float minus_infinity = -__builtin_inff();

// exp(x) for x <= 0, about 1 ulp; NaN stays, minus infinity gives 0, subnormal results are flushed to 0.
INLINE F exp_negative(F x) {
  F clamped = select(x < splat(-87.0f), splat(-87.0f), x);
  constexpr float rounding = 0x1.8p23f;  // adding it leaves the integer nearest to the argument in the low bits
  F shifted = clamped * 0x1.715476p0f + rounding;
  F n = shifted - rounding;
  F r = clamped - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts
  F p = r * 0x1.6850e4p-10f + 0x1.123bccp-7f;
  p = p * r + 0x1.555b98p-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0x1.fffff8p-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  F power = reinterpret_cast<F>((reinterpret_cast<I>(shifted) << 23) + 0x3f800000);
  return select(x < splat(-87.0f), F{}, p * power);
}

INLINE float exp_negative(float x) { return exp_negative(splat(x))[0]; }

// The largest element. NaN counts as larger than anything: a row whose scores are all NaN must not look like one that
// is masked.
template <class V>
INLINE V larger_or_nan(V a, V b) { return a <= b ? b : a; }

INLINE float largest(F a) {
  F4 part[lanes / 4];
  __builtin_memcpy(part, &a, sizeof part);
  for (int width = lanes / 8; width; width /= 2)
    for (int i = 0; i < width; ++i) part[i] = larger_or_nan(part[i], part[i + width]);
  F4 two = larger_or_nan(part[0], __builtin_shufflevector(part[0], part[0], 2, 3, 0, 1));
  return larger_or_nan(two[0], two[1]);
}

INLINE F softcapped(F s, float cap) {
  F y = s / cap;
  F magnitude = reinterpret_cast<F>(reinterpret_cast<U>(y) & 0x7fffffff);
  F e = exp_negative(-2.0f * magnitude);
  F tanh = (1.0f - e) / (1.0f + e);
  return cap * reinterpret_cast<F>(reinterpret_cast<U>(tanh) | (reinterpret_cast<U>(y) & 0x80000000u));
}

// One (batch, kv head): its sizes and where its parts lie in scratch memory.
template <class S>
struct Attention {
  using T = typename S::T;
  const AttentionTask& task;
  const int64_t group, rows, dim, dim_v;  // dims rounded up to whole steps
  float *q, *scores, *mask, *acc, *maximum, *total;
  int64_t column = 0;  // of the block of scores: where the keys of score_block and value_block begin

  static int64_t part_floats(const AttentionTask& t) {
    return t.heads / t.kv_heads * t.queries * (round_up(t.dim_v, S::step) + 2);
  }
  static int64_t scratch_floats(const AttentionTask& t) {
    return t.heads / t.kv_heads * t.queries * (round_up(t.dim, S::step) + 2 * key_block) + part_floats(t);
  }

  Attention(const AttentionTask& t, float* scratch, float* part)
      : task(t), group(t.heads / t.kv_heads), rows(group * t.queries), dim(round_up(t.dim, S::step)),
        dim_v(round_up(t.dim_v, S::step)) {
    q = scratch, scores = q + rows * dim, mask = scores + rows * key_block;
    acc = part ? part : mask + rows * key_block;
    maximum = acc + rows * dim_v, total = maximum + rows;
  }

  INLINE int64_t query(int64_t row) const { return row % task.queries; }

  void load_queries(const AttentionPiece& piece) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t head = piece.kv_head * group + row / task.queries;
      const auto* at = static_cast<const T*>(task.q) + piece.batch * task.q_stride[0] + head * task.q_stride[1] +
                       query(row) * task.q_stride[2];
      spread<S>(at, task.dim, q + row * dim, task.scale);
    }
  }

  // scores[row][i] = q[row] . k[begin + i]
  template <int keys>
  INLINE void score_keys(const T* k, int64_t i, Ahead ahead) {
    int64_t row = 0;
    auto pass = [&]<int columns>() INLINE_LAMBDA {
      F sums[keys][columns];
      const float* at = q + row * dim;
      if (row == 0)
        dot_block<Exact<S>, keys, columns, true>(k, task.k_stride[2], at, dim, task.dim, ahead, sums);
      else
        dot_block<Exact<S>, keys, columns, false>(k, task.k_stride[2], at, dim, task.dim, ahead, sums);
      for (int c = 0; c < columns; ++c, ++row) {
        F4 four = sum4(sums[0][c], sums[1 % keys][c], sums[2 % keys][c], sums[3 % keys][c]);
        for (int r = 0; r < keys; ++r) scores[row * key_block + column + i + r] = four[r];
      }
    };
    while (rows - row >= columns_at_once) pass.template operator()<columns_at_once>();
    if (columns_at_once > 2 && rows - row == 3) pass.template operator()<3>();
    if (columns_at_once > 2 && rows - row == 2) pass.template operator()<2>();
    if (rows - row == 1) pass.template operator()<1>();
  }

  void score_block(const AttentionPiece& piece, int64_t begin, int64_t count) {
    const auto* k = static_cast<const T*>(task.k) + piece.batch * task.k_stride[0] + piece.kv_head * task.k_stride[1] +
                    begin * task.k_stride[2];
    const Ahead ahead = Ahead::of(task.dim, task.k_stride[2], sizeof(T));
    int64_t i = 0;
    for (; i + rows_at_once <= count; i += rows_at_once) score_keys<rows_at_once>(k + i * task.k_stride[2], i, ahead);
    for (; i < count; ++i) score_keys<1>(k + i * task.k_stride[2], i, ahead);
  }

  // The mask as floats to add, one row for each query, or for each head and query where heads differ.
  void load_mask(const AttentionPiece& piece, int64_t begin, int64_t count) {
    const int64_t distinct = task.mask_stride[1] == 0 ? task.queries : rows, step = task.mask_stride[3];
    for (int64_t row = 0; row < distinct; ++row) {
      const int64_t head = piece.kv_head * group + row / task.queries;
      const int64_t at = piece.batch * task.mask_stride[0] + head * task.mask_stride[1] + query(row) * task.mask_stride[2] +
                         begin * step;
      float* out = mask + row * key_block;
      if (task.mask_kind == AttentionTask::boolean)
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<const uint8_t*>(task.mask)[at + i * step] ? 0.0f : minus_infinity;
      else if (task.mask_kind == AttentionTask::additive)
        for (int64_t i = 0; i < count; ++i) out[i] = S::to_float(static_cast<const T*>(task.mask)[at + i * step]);
      else
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<const float*>(task.mask)[at + i * step];
    }
  }

  // Scores to weights relative to the running maximum; rescales what was summed under an older maximum.
  void softmax_block(int64_t begin, int64_t count) {
    for (int64_t row = 0; row < rows; ++row) {
      float* s = scores + row * key_block;
      for (int64_t i = count; i < key_block; ++i) s[i] = minus_infinity;
      if (task.softcap != 0.0f)
        for (int64_t i = 0; i < count; i += lanes) store(s + i, softcapped(load(s + i), task.softcap));
      for (int64_t i = count; i < round_up(count, lanes); ++i) s[i] = minus_infinity;
      if (task.mask_kind != AttentionTask::none) {
        const float* add = mask + (task.mask_stride[1] == 0 ? query(row) : row) * key_block;
        for (int64_t i = 0; i < count; ++i) s[i] += add[i];
      }
      const int64_t from = task.window ? query(row) - task.window + 1 - begin : 0;  // keys outside [from, to) are hidden
      const int64_t to = task.causal ? query(row) + 1 - begin : count;
      for (int64_t i = 0; i < smaller(from, count); ++i) s[i] = minus_infinity;
      for (int64_t i = larger(to, 0); i < count; ++i) s[i] = minus_infinity;

      F best = load(s);
      for (int64_t i = lanes; i < key_block; i += lanes) best = larger_or_nan(load(s + i), best);
      const float now = larger_or_nan(largest(best), maximum[row]);
      F sums{};
      if (now == minus_infinity) {  // nothing visible yet
        for (int64_t i = 0; i < key_block; i += lanes) store(s + i, F{});
        continue;
      }
      for (int64_t i = 0; i < key_block; i += lanes) {
        F weight = exp_negative(load(s + i) - now);
        store(s + i, weight);
        sums += weight;
      }
      const float before = maximum[row] == minus_infinity ? 0.0f : exp_negative(maximum[row] - now);
      if (before != 1.0f)
        for (int64_t i = 0; i < dim_v; i += lanes) store(acc + row * dim_v + i, load(acc + row * dim_v + i) * before);
      total[row] = total[row] * before + sum(sums);
      maximum[row] = now;
    }
  }

  // acc[row .. row + many][at ..] += weights . v, for as many steps of v as registers allow.
  template <int many, int steps>
  INLINE void add_values(const T* v, int64_t row, int64_t at, int64_t count, int64_t ahead) {
    F sums[many][2 * steps];
    for (int r = 0; r < many; ++r)
      for (int c = 0; c < 2 * steps; ++c) sums[r][c] = load(acc + (row + r) * dim_v + at + c * lanes);
    const bool whole = at + steps * S::step <= task.dim_v;
    for (int64_t i = 0; i < count; ++i) {
      const T* from = v + i * task.v_stride[2] + at;
      typename S::Pair values[steps];
#pragma GCC unroll 2
      for (int c = 0; c < steps; ++c) {
        values[c] = whole || c + 1 < steps ? S::pair(from + c * S::step) : pair_tail<S>(from + c * S::step, task.dim_v - at - c * S::step);
        if (row == 0) __builtin_prefetch(from + c * S::step + ahead, 0, 3);
      }
#pragma GCC unroll 4
      for (int r = 0; r < many; ++r) {
        const F weight = splat(scores[(row + r) * key_block + column + i]);
#pragma GCC unroll 4
        for (int c = 0; c < 2 * steps; ++c) sums[r][c] += weight * values[c / 2].v[c % 2];
      }
    }
    for (int r = 0; r < many; ++r)
      for (int c = 0; c < 2 * steps; ++c) store(acc + (row + r) * dim_v + at + c * lanes, sums[r][c]);
  }

  template <int many>
  INLINE void add_rows(const T* v, int64_t row, int64_t count, int64_t ahead) {
    int64_t at = 0;
    for (; at + 2 * S::step <= dim_v; at += 2 * S::step) add_values<many, 2>(v, row, at, count, ahead);
    if (at < dim_v) add_values<many, 1>(v, row, at, count, ahead);
  }

  void value_block(const AttentionPiece& piece, int64_t begin, int64_t count) {
    const auto* v = static_cast<const T*>(task.v) + piece.batch * task.v_stride[0] + piece.kv_head * task.v_stride[1] +
                    begin * task.v_stride[2];
    const int64_t ahead = key_block * task.v_stride[2];
    int64_t row = 0;
    for (; row + columns_at_once <= rows; row += columns_at_once) add_rows<columns_at_once>(v, row, count, ahead);
    if (columns_at_once > 2 && rows - row == 3) return add_rows<3>(v, row, count, ahead);
    if (columns_at_once > 2 && rows - row == 2) return add_rows<2>(v, row, count, ahead);
    if (rows - row == 1) add_rows<1>(v, row, count, ahead);
  }

  T* out_row(const AttentionPiece& piece, int64_t row) const {
    const int64_t head = piece.kv_head * group + row / task.queries;
    return static_cast<T*>(task.out) + piece.batch * task.out_stride[0] + head * task.out_stride[1] + query(row) * task.out_stride[2];
  }

  // out = sums * factor; a row that saw no key has a sum of zero and gives zeros, as in torch, or NaN.
  void write(T* out, const float* sums, float factor) const {
    for (int64_t i = 0; i < task.dim_v; i += S::step) {
      const typename S::Pair pair{load(sums + i) * factor, load(sums + i + lanes) * factor};
      if (i + S::step <= task.dim_v) {
        S::put(out + i, pair);
      } else {
        T tail[S::step];
        S::put(tail, pair);
        __builtin_memcpy(out + i, tail, (task.dim_v - i) * sizeof(T));
      }
    }
  }

  void start(const AttentionPiece& piece) {
    load_queries(piece);
    for (int64_t i = 0; i < rows * dim_v; ++i) acc[i] = 0.0f;
    for (int64_t row = 0; row < rows; ++row) maximum[row] = minus_infinity, total[row] = 0.0f;
  }

  // Scores of keys [begin, begin + count) to weights.
  void weigh_block(const AttentionPiece& piece, int64_t begin, int64_t count) {
    if (task.mask_kind != AttentionTask::none) load_mask(piece, begin, count);
    softmax_block(begin, count);
  }

  void run(const AttentionPiece& piece) {
    start(piece);
    for (int64_t begin = piece.begin; begin < piece.end; begin += key_block) {
      const int64_t count = smaller(key_block, piece.end - begin);
      score_block(piece, begin, count);
      weigh_block(piece, begin, count);
      value_block(piece, begin, count);
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
