// Attention over the packed rows of a quantised KV cache without making numbers of their codes one by one.
//
// What belongs to many codes goes into what they are multiplied with: the scale of a channel into the query, once for each
// group of keys, the scale of a token into its weight. Such factors are made 16 bits wide (fixed point for integer codes,
// bf16 for floating ones; several of them for one factor where the model is of fp32), and bytes of codes become 16-bit
// words by shifts, so that one instruction multiplies 32 codes and adds the products of neighbours up. To have sums
// without sums across a vector, bytes are brought into an order first in which four that are summed up are one lane, a
// `quad`.
#pragma once

#include "code_words.h"

#if defined(__AVX512VNNI__)
namespace {

// The packed rows of a piece. Rows: the type of q. Numbers of channels are in the order of codes here: for each half (of
// nibbles: low, high) `columns` of them, zeros behind the channels, each four in the order 0, 2, 1, 3 of a quad's words.
template <CacheKind kind, class Rows>
struct CodeAttention {
  using Words = CodeWords<kind>;
  using Keys = typename Words::template Of<sizeof(typename Rows::T) == 4>::Keys;
  using Values = typename Words::template Of<sizeof(typename Rows::T) == 4>::Values;
  static constexpr int halves = Words::halves;
  static constexpr bool has_offset = kind == CacheKind::int4;
  static constexpr int most_parts = 3;

  Attention<Rows>& work;
  const AttentionTask& task;
  const QuantizedRows &k, &v;
  const int64_t half, half_v, columns, width;  // channels of a half of keys, of values; of keys: columns, floats of a row
  float *queries, *sums, *scale, *offset, *scaled;
  uint8_t* quads;
  uint16_t* factors;

  static int64_t widest(const AttentionTask& t) { return round_up(larger(larger(t.dim, t.dim_v), key_block), 2 * code_columns); }
  static int64_t of_head(const AttentionTask& t) { return t.heads / t.kv_heads * t.queries; }
  static int64_t scratch_floats(const AttentionTask& t) {
    const int64_t wide = widest(t), factor_words = most_parts * of_head(t) * larger(wide, 2 * octets * 2 * lanes);
    return 2 * of_head(t) * t.together * wide + 3 * wide + 8 * wide + factor_words / 2;
  }

  CodeAttention(Attention<Rows>& work, const AttentionTask& t, const QuantizedRows& k, const QuantizedRows& v, float* memory)
      : work(work), task(t), k(k), v(v), half(t.dim / halves), half_v(t.dim_v / halves), columns(round_up(half, code_columns)),
        width(halves * columns), queries(memory) {
    const int64_t wide = widest(t);
    sums = queries + work.rows * wide, scale = sums + work.rows * wide, offset = scale + wide, scaled = offset + wide;
    quads = reinterpret_cast<uint8_t*>(scaled + wide);
    factors = reinterpret_cast<uint16_t*>(scaled + 9 * wide);
  }

  INLINE const uint8_t* codes(const QuantizedRows& rows, const AttentionPiece& piece, int64_t h, int64_t row) const {
    return rows.codes + piece.batch * rows.code_stride[0] + (piece.kv_head + h) * rows.code_stride[1] + row * rows.code_stride[2];
  }
  INLINE const uint16_t* params(const QuantizedRows& rows, const AttentionPiece& piece, int64_t h, int64_t at) const {
    return rows.params + piece.batch * rows.param_stride[0] + (piece.kv_head + h) * rows.param_stride[1] + at * rows.param_stride[2];
  }

  // Asks for `count` rows that will be read after these, of all heads that are served together.
  INLINE void read_ahead(const QuantizedRows& rows, const uint8_t* at, int64_t count, int64_t size) const {
    const int64_t span = (task.together - 1) * rows.code_stride[1] + size;
    prefetch_rows(at + larger(1, codes_ahead_bytes / span) * rows.code_stride[2], count, rows.code_stride[2], span);
  }

  // A row's channels in the order of codes.
  template <class S>
  INLINE void load_channels(const typename S::T* from, float* out) const {
    for (int64_t h = 0; h < halves; ++h)
      for (int64_t i = 0; i < columns; i += lanes) {
        const int64_t left = half - i;
        const __mmask16 there = left >= lanes ? 0xffff : left <= 0 ? 0 : (1 << left) - 1;
        store(out + h * columns + i, F(_mm512_permute_ps(__m512(some(S{}, from + h * half + i, there)), 0xd8)));
      }
  }

  void load_queries(const AttentionPiece& piece) {
    for (int64_t row = 0; row < work.rows; ++row)
      load_channels<Rows>(static_cast<const typename Rows::T*>(task.q) + piece.batch * task.q_stride[0] +
                              work.head(piece, row) * task.q_stride[1] + work.query(row) * task.q_stride[2],
                          queries + row * width);
  }

  // Scores of the group of keys from `begin` on of kv head h, in the block's columns from `column` on.
  void score_group(const AttentionPiece& piece, int64_t h, int64_t begin, int64_t column) {
    const uint8_t* from = codes(k, piece, h, begin);
    for (int64_t key = 0; key < k.group; key += lanes, from += lanes * k.code_stride[2]) {
      if (h == 0) read_ahead(k, from, lanes, half);
      for (int64_t at = 0; at < columns; at += code_columns)
        key_quads(from + at, k.code_stride[2], columns_left(at, half), quads + at / 4 * 128 + key * 4, 128);
    }
    const uint16_t* stored = params(k, piece, h, begin / k.group);
    load_channels<Fp16>(stored, scale);
    if (has_offset) load_channels<Fp16>(stored + task.dim, offset);
    const int64_t first = h * work.of_head;
    work.template in_passes<4>(0, work.of_head, [&]<int many>(int64_t row) INLINE_LAMBDA { score_rows<many>(first + row, column); });
  }

  // Packs `count` numbers times the scales, by way of `product`. Gives what sums are to be multiplied with, and in `added`
  // what the offsets add to them.
  template <class Factors>
  INLINE F scaled_factors(const float* numbers, int64_t count, float* product, uint16_t* words, F& added) const {
    const float *by = scale, *plus = offset;
    F dot{};
    for (int64_t i = 0; i < count; i += lanes) {
      store(product + i, load(numbers + i) * load(by + i));
      if (has_offset) dot += load(numbers + i) * load(plus + i);
    }
    added = has_offset ? splat(sum(dot)) : F{};
    return pack_factors<Factors>(product, count, words);
  }

  template <int many>
  INLINE void score_rows(int64_t first, int64_t column) {
    uint16_t* const packed = factors;
    const uint8_t* const four = quads;
    const int64_t columns = this->columns, width = this->width;
    F unit[many], added[many];
    for (int r = 0; r < many; ++r)
      unit[r] = scaled_factors<Keys>(queries + (first + r) * width, width, scaled, packed + r * Keys::parts * width, added[r]);
    typename Keys::Sum totals[many * 2 * Keys::sums];
#pragma GCC unroll 24
    for (auto& total : totals) total = Keys::zero();
    for (int64_t quad = 0; quad < columns / 4; ++quad) {
      __m512i words[2][2 * halves];
      for (int side = 0; side < 2; ++side) Words::words(_mm512_loadu_si512(four + quad * 128 + side * 64), words[side]);
#pragma GCC unroll 4
      for (int r = 0; r < many; ++r)
#pragma GCC unroll 3
        for (int part = 0; part < Keys::parts; ++part)
#pragma GCC unroll 4
          for (int word = 0; word < 2 * halves; ++word) {
            const __m512i pair = factor_pair(packed + (r * Keys::parts + part) * width + word / 2 * columns + quad * 4 + word % 2 * 2);
#pragma GCC unroll 2
            for (int side = 0; side < 2; ++side) {
              auto& total = totals[(2 * r + side) * Keys::sums + part % Keys::sums];
              total = Keys::mad(total, words[side][word], pair);
            }
          }
    }
#pragma GCC unroll 4
    for (int r = 0; r < many; ++r)
#pragma GCC unroll 2
      for (int side = 0; side < 2; ++side)
        store(work.scores + (first + r) * key_block + column + side * lanes, (Keys::total(totals + (2 * r + side) * Keys::sums) * unit[r] + added[r]) * task.scale);
  }

  // Parameters of values [begin, begin + count); zeros up to key_block.
  INLINE void load_tokens(const uint16_t* from, int64_t count) const {
    using Stored = typename Words::Tokens;
    alignas(64) Stored all[key_block];
    const int64_t stride = v.param_stride[2];
    for (int64_t i = 0; i < count; ++i) __builtin_memcpy(all + i, from + i * stride, sizeof *all);
    for (int64_t i = count; i < key_block; ++i) all[i] = 0;
    for (int64_t i = 0; i < key_block; i += lanes) {
      if constexpr (has_offset) {
        const __m512i both = _mm512_load_si512(all + i);
        store(scale + i, F(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(both))));
        store(offset + i, F(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)))));
      } else {
        store(scale + i, Fp16::widen(all + i));
      }
    }
  }

  // sums += weights . values [begin, begin + count) of kv head h.
  void value_block(const AttentionPiece& piece, int64_t h, int64_t begin, int64_t count) {
    load_tokens(params(v, piece, h, begin), count);
    const int64_t from = h * count / task.together, to = (h + 1) * count / task.together;
    read_ahead(v, codes(v, piece, 0, begin + from), to - from, half_v);
    constexpr int most = Values::sums * halves >= 4 ? 1 : Values::sums * halves >= 2 ? 2 : 3;
    work.template in_passes<most>(0, work.of_head, [&]<int many>(int64_t row) INLINE_LAMBDA { add_rows<many>(piece, h, h * work.of_head + row, begin, count); });
  }

  // Which of the pairs of 32 keys' factors meets the words of an octet: one in each half of a vector.
  static INLINE __m512i of_octet(int pair) {
    const int first = pair / 2 * 4 + pair % 2;
    return _mm512_mask_mov_epi32(_mm512_set1_epi32(first), 0xff00, _mm512_set1_epi32(first + 2));
  }

  template <int many>
  static INLINE void sum_values(const uint8_t* from, int64_t row_bytes, __mmask32 columns, int64_t count, const uint16_t* factors,
                                typename Values::Sum (&totals)[many * halves * 4 * Values::sums]) {
    for (int64_t octet = 0; octet < count; ++octet, from += 8 * row_bytes, factors += 4 * lanes) {
      __m512i fours[4];
      value_quads(from, row_bytes, columns, fours);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        __m512i words[2 * halves];
        Words::words(fours[n], words);
#pragma GCC unroll 4
        for (int r = 0; r < many; ++r)
#pragma GCC unroll 3
          for (int part = 0; part < Values::parts; ++part)
#pragma GCC unroll 4
            for (int word = 0; word < 2 * halves; ++word) {
              auto& total = totals[((r * halves + word / 2) * 4 + n) * Values::sums + part % Values::sums];
              total = Values::mad(total, words[word], _mm512_loadu_si512(factors + ((r * Values::parts + part) * 2 * octets + word % 2) * 2 * lanes));
            }
      }
    }
  }

  template <int many>
  INLINE void add_rows(const AttentionPiece& piece, int64_t h, int64_t first, int64_t begin, int64_t count) {
    uint16_t* const packed = factors;
    F unit[many], added[many];
    for (int r = 0; r < many; ++r) {
      alignas(64) float product[key_block];
      alignas(64) uint16_t words[Values::parts * key_block];
      unit[r] = scaled_factors<Values>(work.scores + (first + r) * key_block, key_block, product, words, added[r]);
      for (int part = 0; part < Values::parts; ++part)
        for (int64_t i = 0; i < 2; ++i) {
          const __m512i pairs = _mm512_load_si512(words + part * key_block + i * 2 * lanes);
          for (int pair = 0; pair < octets; ++pair)
            _mm512_storeu_si512(packed + (((r * Values::parts + part) * 2 + i) * octets + pair) * 2 * lanes,
                                _mm512_permutexvar_epi32(of_octet(pair), pairs));
        }
    }
    const uint8_t* const from = codes(v, piece, h, begin);
    for (int64_t at = 0; at < half_v; at += code_columns) {
      typename Values::Sum totals[many * halves * 4 * Values::sums];
#pragma GCC unroll 24
      for (auto& total : totals) total = Values::zero();
      sum_values<many>(from + at, v.code_stride[2], columns_left(at, half_v), (count + 7) / 8, packed, totals);
#pragma GCC unroll 4
      for (int r = 0; r < many; ++r)
#pragma GCC unroll 2
        for (int side = 0; side < halves; ++side) {
          F parts[4], whole[2];
#pragma GCC unroll 4
          for (int n = 0; n < 4; ++n) parts[n] = Values::total(totals + ((r * halves + side) * 4 + n) * Values::sums);
          in_order(parts, whole);
          float* to = sums + (first + r) * work.dim_v + side * half_v + at;
          for (int i = 0; i < 2; ++i) {
            const __mmask16 there = __mmask16(columns_left(at, half_v) >> (i * lanes));
            const F before = F(_mm512_maskz_loadu_ps(there, to + i * lanes));
            _mm512_mask_storeu_ps(to + i * lanes, there, __m512(before + whole[i] * unit[r] + added[r]));
          }
        }
    }
  }

  // Does the packed rows; returns the first that is left.
  int64_t run(const AttentionPiece& piece) {
    const int64_t end = smaller(k.packed, piece.end);
    if (end <= piece.begin) return piece.begin;
    load_queries(piece);
    for (int64_t i = 0; i < work.rows * work.dim_v; ++i) sums[i] = 0.0f;
    for (int64_t begin = piece.begin; begin < end; begin += key_block) {
      const int64_t count = smaller(key_block, end - begin);
      for (int64_t h = 0; h < task.together; ++h)
        for (int64_t group = 0; group < count; group += k.group) score_group(piece, h, begin + group, group);
      work.template weigh_block<Fp32>(piece, begin, count, sums);
      for (int64_t h = 0; h < task.together; ++h) value_block(piece, h, begin, count);
    }
    work.take(sums);
    return end;
  }
};

}  // namespace
#endif
