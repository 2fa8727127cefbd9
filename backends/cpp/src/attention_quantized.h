// Decode attention over quantised keys and values: each block of keys is dequantised into memory of its own, which stays
// in the first-level cache, and attended to as plain floats. The layout is that of graphopt/quantization/
// cache_operations.py: packed rows first, then a tail of rows in the model's dtype.
#pragma once

#include "attention.h"

namespace {

using graphopt::CacheKind;
using graphopt::QuantizedRows;

// One row of codes as floats: code * scale + offset, with one scale for each channel (keys) or for all (values).
template <CacheKind kind, bool keys>
INLINE void cache_row(const uint8_t* codes, const float* scale, const float* offset, int64_t dim, float* out) {
  auto scale_of = [&](int64_t i) INLINE_LAMBDA { return keys ? scale[i] : scale[0]; };
  if constexpr (kind == CacheKind::int8) {
    for (int64_t i = 0; i < dim; ++i) out[i] = float(int8_t(codes[i])) * scale_of(i);
  } else if constexpr (kind == CacheKind::fp8) {
    // Exponent and mantissa go to their places; the product mends the bias and makes small numbers normal.
    for (int64_t i = 0; i < dim; ++i)
      out[i] = bits_to_float((uint32_t(int32_t(int8_t(codes[i]))) << 20) & 0x87f00000u) * 0x1p120f * scale_of(i);
  } else {
    const int64_t half = dim / 2;
    auto offset_of = [&](int64_t i) INLINE_LAMBDA { return keys ? offset[i] : offset[0]; };
    for (int64_t i = 0; i < half; ++i) out[i] = float(codes[i] & 15) * scale_of(i) + offset_of(i);
    for (int64_t i = 0; i < half; ++i) out[half + i] = float(codes[i] >> 4) * scale_of(half + i) + offset_of(half + i);
  }
}

// Packed rows [begin, begin + count) of one (batch, head), `stride` floats apart.
template <CacheKind kind, bool keys>
void cache_rows(const QuantizedRows& rows, int64_t batch, int64_t head, int64_t begin, int64_t count, int64_t dim, float* params,
                     float* out, int64_t stride) {
  constexpr bool has_offset = kind == CacheKind::int4;
  const int64_t numbers = keys ? dim : 1;
  const uint8_t* codes = rows.codes + batch * rows.code_stride[0] + head * rows.code_stride[1];
  const uint16_t* stored = rows.params + batch * rows.param_stride[0] + head * rows.param_stride[1];
  int64_t loaded = -1;
  for (int64_t row = begin; row < begin + count; ++row) {
    const int64_t at = keys ? row / rows.group : row;
    if (at != loaded) {
      for (int64_t i = 0; i < numbers * (1 + has_offset); ++i) params[i] = Fp16::to_float(stored[at * rows.param_stride[2] + i]);
      loaded = at;
    }
    cache_row<kind, keys>(codes + row * rows.code_stride[2], params, params + numbers, dim, out + (row - begin) * stride);
  }
}

template <bool keys, class... Arguments>
void dequantize_cache(CacheKind kind, Arguments... arguments) {
  if (kind == CacheKind::int8) return cache_rows<CacheKind::int8, keys>(arguments...);
  if (kind == CacheKind::fp8) return cache_rows<CacheKind::fp8, keys>(arguments...);
  return cache_rows<CacheKind::int4, keys>(arguments...);
}

// One (batch, kv head) of quantised keys and values; q, mask and result are floats. S is the tail's storage type.
template <class S>
struct QuantizedAttention {
  using T = typename S::T;
  const AttentionTask& task;
  const QuantizedRows &k, &v;
  AttentionTask block;  // the block of keys that is being worked on, as a task of its own
  float *keys, *values, *params;

  static int64_t block_floats(const AttentionTask& t) {
    return key_block * (round_up(t.dim, Fp32::step) + round_up(t.dim_v, Fp32::step)) + 2 * larger(t.dim, t.dim_v);
  }

  QuantizedAttention(const AttentionTask& t, const QuantizedRows& k, const QuantizedRows& v, float* memory)
      : task(t), k(k), v(v), block(t), keys(memory), values(keys + key_block * round_up(t.dim, Fp32::step)),
        params(values + key_block * round_up(t.dim_v, Fp32::step)) {
    block.k = keys, block.v = values;
    for (int i = 0; i < 2; ++i) block.k_stride[i] = block.v_stride[i] = 0;
    block.k_stride[2] = round_up(t.dim, Fp32::step), block.v_stride[2] = round_up(t.dim_v, Fp32::step);
  }

  void load_tail(const void* tail, const int64_t (&stride)[3], const AttentionPiece& piece, int64_t begin, int64_t count, int64_t dim,
                 float* out, int64_t out_stride) const {
    const T* from = static_cast<const T*>(tail) + piece.batch * stride[0] + piece.kv_head * stride[1];
    for (int64_t row = 0; row < count; ++row)
      for (int64_t i = 0; i < dim; ++i) out[row * out_stride + i] = S::to_float(from[(begin + row - k.packed) * stride[2] + i]);
  }

  void load_block(const AttentionPiece& piece, int64_t begin, int64_t count) {
    if (begin >= k.packed) {
      load_tail(task.k, task.k_stride, piece, begin, count, task.dim, keys, block.k_stride[2]);
      return load_tail(task.v, task.v_stride, piece, begin, count, task.dim_v, values, block.v_stride[2]);
    }
    dequantize_cache<true>(k.kind, k, piece.batch, piece.kv_head, begin, count, task.dim, params, keys, block.k_stride[2]);
    dequantize_cache<false>(v.kind, v, piece.batch, piece.kv_head, begin, count, task.dim_v, params, values, block.v_stride[2]);
  }

  void run(const AttentionPiece& piece, float* scratch) {
    Attention<Fp32> work(block, scratch, piece.part);
    work.start(piece);
    for (int64_t begin = piece.begin; begin < piece.end;) {
      const int64_t border = begin < k.packed ? smaller(k.packed, piece.end) : piece.end;
      const int64_t count = smaller(key_block, border - begin);
      load_block(piece, begin, count);
      work.score_block(piece, 0, count);
      work.weigh_block(piece, begin, count);
      work.value_block(piece, 0, count);
      begin += count;
    }
    work.finish(piece);
  }
};

}  // namespace
