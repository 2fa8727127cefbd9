// Attention over the packed rows of a quantised KV cache without making numbers of their codes one by one.
//
// What belongs to many codes goes into what they are multiplied with: the scale of a channel into the query, once for each
// group of keys, the scale of a token into its weight. Such factors are made 16 bits wide (fixed point for integer codes,
// bf16 for floating ones; several of them for one factor where the model is of fp32), and bytes of codes become 16-bit
// words by shifts, so that one instruction multiplies 32 codes and adds the products of neighbours up. To have sums
// without sums across a vector, bytes are brought into an order first in which four that are summed up are one lane, a
// `quad`.
#pragma once

#include "attention.h"

#if defined(__AVX512VNNI__)
namespace {

using graphopt::CacheKind;
using graphopt::QuantizedRows;

constexpr int64_t code_columns = 32;  // bytes of a row that are worked on together
constexpr int64_t octets = key_block / 8;
constexpr int64_t longest_code_row = 512;  // products of int8 codes and 16-bit factors that a sum of 32 bits has room for

// How far ahead rows are asked for: the next block. Further ahead (24 KiB, as for plain rows) it took a quarter longer.
constexpr int64_t codes_ahead_bytes = 6 << 10;

// What is left of `count` bytes from `at` on, as a mask of a vector of 32.
INLINE __mmask32 columns_left(int64_t at, int64_t count) {
  return at + code_columns <= count ? ~__mmask32(0) : (__mmask32(1) << (count - at)) - 1;
}

// The same 32 bytes of two rows.
INLINE __m512i two_rows(const uint8_t* one, const uint8_t* other, __mmask32 columns) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi8(columns, one)), _mm256_maskz_loadu_epi8(columns, other), 1);
}

// Some of 16 numbers, zeros for the others.
INLINE F some(Fp32, const float* p, __mmask16 there) { return F(_mm512_maskz_loadu_ps(there, p)); }
INLINE F some(Fp16, const uint16_t* p, __mmask16 there) { return F(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, p))); }
INLINE F some(Bf16, const uint16_t* p, __mmask16 there) {
  return F(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, p)), 16)));
}

// Factors in fixed point: the first of `parts` in units of a power of two that gives the largest 15 bits, the second in
// units of a 65536th of it. Sums are exact.
template <int parts_>
struct IntegerFactors {
  using Sum = __m512i;
  static constexpr int parts = parts_, sums = parts_;
  static INLINE Sum zero() { return _mm512_setzero_si512(); }
  static INLINE Sum mad(Sum sum, __m512i codes, __m512i factors) { return _mm512_dpwssd_epi32(sum, codes, factors); }
  static INLINE F total(const Sum* sum) {
    F wide = F(_mm512_cvtepi32_ps(sum[0]));
    if constexpr (parts == 2) wide += F(_mm512_cvtepi32_ps(sum[1])) * 0x1p-16f;
    return wide;
  }
  // What factors are multiplied with to be whole numbers. The unit is NaN if one is not finite, so that it does not matter
  // what numbers they become, and 0 if all are as good as zero.
  static INLINE F inverse(const float* factors, int64_t count, F& unit) {
    __m512i top = _mm512_setzero_si512();  // magnitudes, NaN the largest of all
    for (int64_t i = 0; i < count; i += lanes)
      top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_loadu_si512(factors + i), _mm512_set1_epi32(0x7fffffff)));
    top = _mm512_max_epu32(top, _mm512_shuffle_i32x4(top, top, 0x4e)), top = _mm512_max_epu32(top, _mm512_shuffle_i32x4(top, top, 0xb1));
    top = _mm512_max_epu32(top, _mm512_shuffle_epi32(top, _MM_PERM_ENUM(0x4e))), top = _mm512_max_epu32(top, _mm512_shuffle_epi32(top, _MM_PERM_ENUM(0xb1)));
    const I power = I(top) & 0x7f800000;
    const I small = power < (20 << 23), lost = power == 0x7f800000;
    unit = reinterpret_cast<F>((power - (14 << 23)) & ~small | lost);
    return reinterpret_cast<F>((268 << 23) - power);
  }
  static INLINE void split(F factor, F inverse, __m256i (&words)[parts]) {
    const F units = factor * inverse;
    const __m512i whole = _mm512_cvtps_epi32(__m512(units));
    words[0] = _mm512_cvtsepi32_epi16(whole);
    if constexpr (parts == 2) words[1] = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(__m512((units - F(_mm512_cvtepi32_ps(whole))) * 0x1p16f)));
  }
};

#if defined(__AVX512BF16__)
// Factors as sums of bf16 numbers. Flushes subnormals.
template <int parts_>
struct FloatFactors {
  using Sum = F;
  static constexpr int parts = parts_, sums = 1;
  static INLINE Sum zero() { return F{}; }
  static INLINE Sum mad(Sum sum, __m512i codes, __m512i factors) {
    return F(_mm512_dpbf16_ps(__m512(sum), (__m512bh)codes, (__m512bh)factors));
  }
  static INLINE F total(const Sum* sum) { return sum[0]; }
  static INLINE F inverse(const float*, int64_t, F& unit) { return unit = splat(1.0f); }
  static INLINE void split(F factor, F, __m256i (&words)[parts]) {
    for (int part = 0; part < parts; ++part) {
      if (part) factor -= reinterpret_cast<F>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words[part - 1]), 16));
      words[part] = (__m256i)_mm512_cvtneps_pbh(__m512(factor));
    }
  }
};
#endif

// Of each kind of codes: what its factors are, and how the four bytes of each lane become two words of the first and third
// byte and two of the second and fourth; of nibbles the low ones first.
template <CacheKind kind>
struct CodeWords;
template <>
struct CodeWords<CacheKind::int8> {
  using Tokens = uint16_t;
  static constexpr int halves = 1;
  template <bool wide>
  struct Of { using Keys = IntegerFactors<wide ? 2 : 1>; using Values = Keys; };
  static INLINE void words(__m512i quads, __m512i (&out)[2]) {
    out[0] = _mm512_srai_epi16(_mm512_slli_epi16(quads, 8), 8), out[1] = _mm512_srai_epi16(quads, 8);
  }
};
template <>
struct CodeWords<CacheKind::int4> {
  using Tokens = uint32_t;  // the parameters of a token
  static constexpr int halves = 2;
  template <bool wide>
  struct Of { using Keys = IntegerFactors<wide ? 2 : 1>; using Values = Keys; };
  static INLINE void words(__m512i quads, __m512i (&out)[4]) {
    const __m512i nibble = _mm512_set1_epi16(15);
    out[0] = _mm512_and_si512(quads, nibble), out[1] = _mm512_and_si512(_mm512_srli_epi16(quads, 8), nibble);
    out[2] = _mm512_and_si512(_mm512_srli_epi16(quads, 4), nibble), out[3] = _mm512_srli_epi16(quads, 12);
  }
};
#if defined(__AVX512BF16__)
struct E4m3Table {
  uint16_t number[128] = {};
  // The code of NaN comes out as 480: it occurs only under a scale that is not finite, which makes NaN of it.
  constexpr E4m3Table() {
    for (int code = 0; code < 128; ++code) {
      const int exponent = code >> 3, mantissa = code & 7;
      const float value = exponent ? float(8 + mantissa) * float(1 << exponent) : float(2 * mantissa);
      number[code] = __builtin_bit_cast(uint32_t, value * 0x1p-10f) >> 16;
    }
  }
};
alignas(64) constexpr E4m3Table e4m3_table;

template <>
struct CodeWords<CacheKind::fp8> {
  using Tokens = uint16_t;
  static constexpr int halves = 1;
  // Of a bf16 model scaled queries get two parts: one would double the error of scores that a bf16 query has by itself.
  template <bool wide>
  struct Of { using Keys = FloatFactors<wide ? 3 : 2>; using Values = FloatFactors<wide ? 3 : 1>; };
  static INLINE __m512i number(__m512i code) {
    const auto table = [](int i) INLINE_LAMBDA { return _mm512_load_si512(e4m3_table.number + 32 * i); };
    const __m512i small = _mm512_permutex2var_epi16(table(0), code, table(1)), large = _mm512_permutex2var_epi16(table(2), code, table(3));
    const __m512i magnitude = _mm512_mask_mov_epi16(small, _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40)), large);
    // magnitude | (shifted & sign)
    return _mm512_ternarylogic_epi64(magnitude, _mm512_slli_epi16(code, 8), _mm512_set1_epi16(int16_t(0x8000)), 0xf8);
  }
  static INLINE void words(__m512i quads, __m512i (&out)[2]) {
    out[0] = number(_mm512_and_si512(quads, _mm512_set1_epi16(255))), out[1] = number(_mm512_srli_epi16(quads, 8));
  }
};
#endif

// Parts of factors: `count` words of each. Gives what sums are to be multiplied with.
template <class Factors>
INLINE F pack_factors(const float* factors, int64_t count, uint16_t* out) {
  F unit;
  const F inverse = Factors::inverse(factors, count, unit);
  for (int64_t i = 0; i < count; i += lanes) {
    __m256i words[Factors::parts];
    Factors::split(load(factors + i), inverse, words);
    for (int part = 0; part < Factors::parts; ++part)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + part * count + i), words[part]);
  }
  return unit;
}

INLINE __m512i factor_pair(const uint16_t* at) {
  int32_t pair;
  __builtin_memcpy(&pair, at, sizeof pair);
  return _mm512_set1_epi32(pair);
}

// Quads of 16 keys' 32 bytes: 8 vectors, a lane for each key, `stride` bytes of `out` apart.
INLINE void key_quads(const uint8_t* codes, int64_t row_bytes, __mmask32 columns, uint8_t* out, int64_t stride) {
  __m512i rows[8], pairs[8], fours[8];
  for (int i = 0; i < 8; ++i) rows[i] = two_rows(codes + i * row_bytes, codes + (i + 8) * row_bytes, columns);
  for (int i = 0; i < 8; i += 2) pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + 2 + j]);
      fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + 2 + j]);
    }
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + i * stride, _mm512_permutex2var_epi64(fours[i], low, fours[4 + i]));
    _mm512_storeu_si512(out + (4 + i) * stride, _mm512_permutex2var_epi64(fours[i], high, fours[4 + i]));
  }
}

// Quads of 8 values' 32 bytes, in the order 0, 2, 1, 3, so that words are of neighbours: the second half of a vector has
// the fourth keys behind those of the first, each quarter of vector i the bytes from 4 * i on.
INLINE void value_quads(const uint8_t* codes, int64_t row_bytes, __mmask32 columns, __m512i (&quads)[4]) {
  __m512i rows[4];
  for (int i = 0; i < 4; ++i) rows[i] = two_rows(codes + i * row_bytes, codes + (i + 4) * row_bytes, columns);
  const __m512i low[2] = {_mm512_unpacklo_epi8(rows[0], rows[2]), _mm512_unpacklo_epi8(rows[1], rows[3])};
  const __m512i high[2] = {_mm512_unpackhi_epi8(rows[0], rows[2]), _mm512_unpackhi_epi8(rows[1], rows[3])};
  quads[0] = _mm512_unpacklo_epi16(low[0], low[1]), quads[1] = _mm512_unpackhi_epi16(low[0], low[1]);
  quads[2] = _mm512_unpacklo_epi16(high[0], high[1]), quads[3] = _mm512_unpackhi_epi16(high[0], high[1]);
}

// The sums that belong to such quads, in the order of the bytes: quarters of the same bytes added up.
INLINE void in_order(const F (&sums)[4], F (&out)[2]) {
  const __m512 a(sums[0]), b(sums[1]), c(sums[2]), d(sums[3]);
  const __m512 first[2] = {_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(c, d, 0x88)};
  const __m512 second[2] = {_mm512_shuffle_f32x4(a, b, 0xdd), _mm512_shuffle_f32x4(c, d, 0xdd)};
  out[0] = F(_mm512_shuffle_f32x4(first[0], first[1], 0x88)) + F(_mm512_shuffle_f32x4(first[0], first[1], 0xdd));
  out[1] = F(_mm512_shuffle_f32x4(second[0], second[1], 0x88)) + F(_mm512_shuffle_f32x4(second[0], second[1], 0xdd));
}

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

  template <int many>
  INLINE void score_rows(int64_t first, int64_t column) {
    uint16_t* const packed = factors;
    const uint8_t* const four = quads;
    const int64_t columns = this->columns, width = this->width;
    F unit[many], added[many];
    for (int r = 0; r < many; ++r) {
      const float *q = queries + (first + r) * width, *by = scale, *plus = offset;
      float* const product = scaled;
      F dot{};
      for (int64_t i = 0; i < width; i += lanes) {
        store(product + i, load(q + i) * load(by + i));
        if (has_offset) dot += load(q + i) * load(plus + i);
      }
      unit[r] = pack_factors<Keys>(product, width, packed + r * Keys::parts * width);
      added[r] = has_offset ? splat(sum(dot)) : F{};
    }
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
      const float *weights = work.scores + (first + r) * key_block, *by = scale, *plus = offset;
      alignas(64) float product[key_block];
      alignas(64) uint16_t words[Values::parts * key_block];
      F dot{};
      for (int64_t i = 0; i < key_block; i += lanes) {
        store(product + i, load(weights + i) * load(by + i));
        if (has_offset) dot += load(weights + i) * load(plus + i);
      }
      unit[r] = pack_factors<Values>(product, key_block, words);
      added[r] = has_offset ? splat(sum(dot)) : F{};
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
