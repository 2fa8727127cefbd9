// Decode attention over quantised keys and values: each block of keys is dequantised into memory of its own, which stays
// in the first-level cache, and attended to as plain rows: of bf16 where the model is of bf16, else of floats. The layout
// is that of graphopt/quantization/cache_operations.py: packed rows first, then a tail of rows in the model's dtype.
#pragma once

#include "attention_codes.h"
#include "codes.h"

namespace {

using graphopt::CacheKind;
using graphopt::QuantizedRows;

// The type of the rows that are attended to, by that of the tail.
template <class S>
struct RowsOf { using type = Fp32; };
template <>
struct RowsOf<Bf16> { using type = Bf16; };
template <class S>
using CacheRows = typename RowsOf<S>::type;

// How codes of one kind become numbers, before scale and offset: a vector of them from a row's bytes, element i on.
template <CacheKind kind>
struct CacheCode {
  static constexpr bool has_offset = false;
  static INLINE F vector(const uint8_t* codes, int64_t i, int64_t) {
    if constexpr (kind == CacheKind::int8) return Int8::decode(codes + i);
    return E4m3::decode(codes + i);
  }
  static INLINE float number(const uint8_t* codes, int64_t i, int64_t) {
    if constexpr (kind == CacheKind::int8) return float(int8_t(codes[i]));
    return bits_to_float((uint32_t(int32_t(int8_t(codes[i]))) << 20) & 0x87f00000u) * 0x1p120f;
  }
};
// The first half of a row in the low nibbles, the second in the high ones.
template <>
struct CacheCode<CacheKind::int4> {
  static constexpr bool has_offset = true;
  static INLINE F vector(const uint8_t* codes, int64_t i, int64_t half) {
    const I bytes = widened(codes + (i < half ? i : i - half));
    return __builtin_convertvector((i < half ? bytes : bytes >> 4) & 15, F);
  }
  static INLINE float number(const uint8_t* codes, int64_t i, int64_t half) { return float(i < half ? codes[i] & 15 : codes[i - half] >> 4); }
};

// One row of codes as numbers: code * scale + offset, with one scale for each channel (keys) or for all (values).
template <CacheKind kind, bool keys, class S>
INLINE void cache_row(const uint8_t* codes, const float* scale, const float* offset, int64_t dim, typename S::T* out) {
  using Code = CacheCode<kind>;
  const int64_t half = dim / 2;
  auto vector = [&](int64_t i) INLINE_LAMBDA {
    const F by = keys ? load(scale + i) : splat(scale[0]), number = Code::vector(codes, i, half) * by;
    if constexpr (kind == CacheKind::fp8) return number + (by - by);  // its NaN has become a number: see E4m3
    return Code::has_offset ? number + (keys ? load(offset + i) : splat(offset[0])) : number;
  };
  int64_t i = 0;
  // A vector must not lie across the halves of a row of nibbles.
  if (!Code::has_offset || half % lanes == 0)
    for (; i + lanes <= dim; i += lanes) S::put_in_order(out + i, vector(i));
  for (; i < dim; ++i) {
    const float by = scale[keys ? i : 0], nan_or_0 = kind == CacheKind::fp8 ? by - by : 0, number = Code::number(codes, i, half) * by + nan_or_0;
    out[i] = S::from_float(Code::has_offset ? number + offset[keys ? i : 0] : number);
  }
}

// Packed rows [begin, begin + count) of one (batch, head), `stride` numbers apart. span: how much of each row to ask for
// ahead of time, 0 for nothing.
template <CacheKind kind, bool keys, class S>
void cache_rows(const QuantizedRows& rows, int64_t batch, int64_t head, int64_t begin, int64_t count, int64_t dim, float* params,
                typename S::T* out, int64_t stride, int64_t span) {
  const int64_t numbers = (keys ? dim : 1) * (1 + CacheCode<kind>::has_offset);
  const uint8_t* codes = rows.codes + batch * rows.code_stride[0] + head * rows.code_stride[1];
  const uint16_t* stored = rows.params + batch * rows.param_stride[0] + head * rows.param_stride[1];
  int64_t loaded = -1;
  for (int64_t row = begin; row < begin + count; ++row) {
    const int64_t at = keys ? row / rows.group : row;
    if (at != loaded) {
      const uint16_t* from = stored + at * rows.param_stride[2];
      int64_t i = 0;
      for (; i + lanes <= numbers; i += lanes) store(params + i, Fp16::widen(from + i));
      for (; i < numbers; ++i) params[i] = Fp16::to_float(from[i]);
      loaded = at;
    }
    const uint8_t* from = codes + row * rows.code_stride[2];
    if (span) prefetch_rows(from + larger(1, rows_ahead_bytes / span) * rows.code_stride[2], 1, 0, span);
    cache_row<kind, keys, S>(from, params, params + (keys ? dim : 1), dim, out + (row - begin) * stride);
  }
}

template <bool keys, class S, class... Arguments>
void dequantize_cache(CacheKind kind, Arguments... arguments) {
  if (kind == CacheKind::int8) return cache_rows<CacheKind::int8, keys, S>(arguments...);
  if (kind == CacheKind::fp8) return cache_rows<CacheKind::fp8, keys, S>(arguments...);
  return cache_rows<CacheKind::int4, keys, S>(arguments...);
}

// Some kv heads of quantised keys and values. S is the tail's storage type; q, mask, result and the rows that are attended
// to are of type `Rows`.
template <class S>
struct QuantizedAttention {
  using T = typename S::T;
  using Rows = CacheRows<S>;
  using Number = typename Rows::T;
  const AttentionTask& task;
  const QuantizedRows &k, &v;
  AttentionTask block;  // the rows of one head that are being worked on, as a task of their own
  Number *keys, *values;
  float* params;

  static int64_t row_floats(const AttentionTask& t) {
    return key_block * (round_up(t.dim, Rows::step) + round_up(t.dim_v, Rows::step)) + 2 * larger(t.dim, t.dim_v);
  }

  QuantizedAttention(const AttentionTask& t, const QuantizedRows& k, const QuantizedRows& v, float* memory)
      : task(t), k(k), v(v), block(t), params(memory) {
    memory += 2 * larger(t.dim, t.dim_v);
    keys = reinterpret_cast<Number*>(memory), values = keys + key_block * round_up(t.dim, Rows::step);
    block.k = keys, block.v = values;
    // Whatever the head, its rows are in the same place.
    for (int i = 0; i < 2; ++i) block.k_stride[i] = block.v_stride[i] = 0;
    block.k_stride[2] = round_up(t.dim, Rows::step), block.v_stride[2] = round_up(t.dim_v, Rows::step);
  }

  template <bool is_key>
  void load_rows(const AttentionPiece& piece, int64_t head, int64_t begin, int64_t count) {
    const QuantizedRows& rows = is_key ? k : v;
    const int64_t dim = is_key ? task.dim : task.dim_v, out_stride = (is_key ? block.k_stride : block.v_stride)[2];
    Number* out = is_key ? keys : values;
    const int64_t span = (task.together - 1) * rows.code_stride[1] + (rows.kind == CacheKind::int4 ? dim / 2 : dim);
    if (begin < rows.packed)
      return dequantize_cache<is_key, Rows>(rows.kind, rows, piece.batch, head, begin, count, dim, params, out, out_stride,
                                            head == piece.kv_head ? span : 0);
    const auto& stride = is_key ? task.k_stride : task.v_stride;
    const T* from = static_cast<const T*>(is_key ? task.k : task.v) + piece.batch * stride[0] + head * stride[1];
    for (int64_t row = 0; row < count; ++row)
      for (int64_t i = 0; i < dim; ++i)
        out[row * out_stride + i] = Rows::from_float(S::to_float(from[(begin + row - rows.packed) * stride[2] + i]));
  }

  static int64_t block_floats(const AttentionTask& t) {
#if defined(__AVX512VNNI__)
    return larger(row_floats(t), CodeAttention<CacheKind::int8, Rows>::scratch_floats(t));
#endif
    return row_floats(t);
  }

  // Does the rows at the front whose codes can be met as they are; returns the first that is left.
  int64_t meet_codes(Attention<Rows>& work, const AttentionPiece& piece) {
#if defined(__AVX512VNNI__)
    const auto with = [&]<CacheKind kind>() { return CodeAttention<kind, Rows>(work, task, k, v, params).run(piece); };
    if (task.dim > longest_code_row) return piece.begin;
    if (k.kind == CacheKind::int8) return with.template operator()<CacheKind::int8>();
    if (k.kind == CacheKind::int4) return with.template operator()<CacheKind::int4>();
#endif
#if defined(__AVX512BF16__)
    if (k.kind == CacheKind::fp8) return with.template operator()<CacheKind::fp8>();
#endif
    return piece.begin;
  }

  void run(const AttentionPiece& piece, float* scratch) {
    Attention<Rows> work(block, scratch, piece.part);
    work.reads_ahead = false;
    work.start(piece);
    for (int64_t begin = meet_codes(work, piece); begin < piece.end;) {
      const int64_t border = begin < k.packed ? smaller(k.packed, piece.end) : piece.end;
      const int64_t count = smaller(key_block, border - begin);
      for (int64_t h = 0; h < task.together; ++h) {
        load_rows<true>(piece, piece.kv_head + h, begin, count);
        work.score_block(piece, h, h + 1, 0, count);
      }
      work.weigh_block(piece, begin, count);
      for (int64_t h = 0; h < task.together; ++h) {
        load_rows<false>(piece, piece.kv_head + h, begin, count);
        work.value_block(piece, h, h + 1, 0, count);
      }
      begin += count;
    }
    work.finish(piece);
  }
};

}  // namespace
