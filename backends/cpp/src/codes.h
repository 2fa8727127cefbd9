// How the codes of packed weights become numbers. The layouts are those of graphopt/quantization/schemes.py.
//
// Elements come in runs of 32: 32 bytes, or 16 bytes whose low nibbles are the first half and whose high nibbles are
// the second. A reader takes a step of whole runs and gives vectors in the order that costs it least; `place` puts x
// into the same order, once per call.
#pragma once

#include "vec.h"

namespace {

using graphopt::Codes;
using graphopt::QuantizedTask;

constexpr int run = 32;
// Scales for each run of a row, padded to whole steps of any reader and whole vectors.
constexpr int64_t runs_padded(int64_t k) { return round_up((k + run - 1) / run, 16); }

// Bytes as 32-bit lanes. By intrinsics: GCC converts between vectors of such different sizes element by element.
INLINE I widened(const uint8_t* p) {
#if defined(__AVX512F__)
  return I(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return I(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return I{int8_t(p[0]), int8_t(p[1]), int8_t(p[2]), int8_t(p[3])};
#endif
}

template <int... i>
INLINE I lane_numbers(Indices<i...>) { return I{i...}; }
INLINE I lane_number() { return lane_numbers(typename Count<lanes>::type{}); }

// Up to 64 bytes at p, zeros behind them; never reads past them.
INLINE const uint8_t* padded(const uint8_t* p, int64_t bytes, uint8_t (&buffer)[64]) {
#if defined(__AVX512F__)
  _mm512_storeu_si512(buffer, _mm512_maskz_loadu_epi8((__mmask64(1) << bytes) - 1, p));  // bytes < 64
#else
  __builtin_memset(buffer, 0, sizeof buffer);
  __builtin_memcpy(buffer, p, bytes);
#endif
  return buffer;
}

// One byte to an element.
struct Int8 {
  static constexpr bool has_groups = true;
  static INLINE F decode(const uint8_t* p) { return __builtin_convertvector(widened(p), F); }
};

struct E4m3 {
  static constexpr bool has_groups = false;
  // Exponent and mantissa go to their places; the product mends the bias and makes small numbers normal. The code of
  // NaN comes out as 480: it occurs only under a scale that is not finite, which makes NaN of it.
  static INLINE F decode(const uint8_t* p) {
    return reinterpret_cast<F>((widened(p) << 20) & int32_t(0x87f00000)) * splat(0x1p120f);
  }
};

// Four bits to an element: sixteen values, which need not lie at equal distances.
constexpr float int4_values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr float e2m1_values[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0f, -0.5, -1, -1.5, -2, -3, -4, -6};
constexpr float nf4_values[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

constexpr const float* values_of(Codes codes) {
  return codes == Codes::int4 ? int4_values : codes == Codes::nf4 ? nf4_values : e2m1_values;
}

// Looks the low four bits of each lane up. `linear`: the values are those of int4.
template <bool linear>
struct Nibbles {
#if defined(__AVX512F__)
  F values;
  explicit Nibbles(Codes codes) : values(load(values_of(codes))) {}
  INLINE F decode(U index) const { return F(_mm512_permutexvar_ps(__m512i(index), __m512(values))); }
#elif defined(__AVX2__)
  F low, high;
  explicit Nibbles(Codes codes) : low(load(values_of(codes))), high(load(values_of(codes) + 8)) {}
  INLINE F decode(U index) const {
    if (linear) return __builtin_convertvector(reinterpret_cast<I>(index & 15) - 8, F);
    __m256 a = _mm256_permutevar8x32_ps(__m256(low), __m256i(index)), b = _mm256_permutevar8x32_ps(__m256(high), __m256i(index));
    return F(_mm256_blendv_ps(a, b, __m256(index << 28)));
  }
#else
  const float* values;
  explicit Nibbles(Codes codes) : values(values_of(codes)) {}
  INLINE F decode(U index) const {
    if (linear) return __builtin_convertvector(reinterpret_cast<I>(index & 15) - 8, F);
    F out;
    for (int i = 0; i < lanes; ++i) out[i] = values[index[i] & 15];
    return out;
  }
#endif
};

// Readers. Sum is what products are added up in; X how x lies in memory: elements of a step, vector after vector, as
// `place` writes run after run of them. has_groups, has_rows: which layouts of scales occur with it.

template <class Code>
struct ByteReader {
  using X = float;
  using Sum = F;
  using Raw = const uint8_t*;
  static constexpr bool has_groups = Code::has_groups, has_rows = true;
  static constexpr int elements = run, bytes = run, vectors = run / lanes;
  explicit ByteReader(Codes) {}
  static INLINE Raw raw(const uint8_t* p) { return p; }
  INLINE F vector(Raw p, int i) const { return Code::decode(p + i * lanes); }
  static INLINE F row(const X* x, int i) { return load(x + i * lanes); }
  static INLINE F mad(F sum, F w, F x) { return sum + w * x; }
  static INLINE F spread(const float* scales) { return splat(*scales); }
  static INLINE void place(const X* from, X* x, int64_t number) { __builtin_memcpy(x + number * run, from, run * sizeof *x); }
};

// A step is one vector of 32-bit words, each with four bytes, eight nibbles: shifts alone bring every nibble to the
// low end of its lane.
template <bool linear>
struct NibbleReader {
  using X = float;
  using Sum = F;
  using Raw = U;
  static constexpr bool has_groups = true, has_rows = false;
  static constexpr int elements = lanes * 8, bytes = lanes * 4, vectors = 8;
  Nibbles<linear> table;
  explicit NibbleReader(Codes codes) : table(codes) {}
  static INLINE Raw raw(const uint8_t* p) { return *reinterpret_cast<const Um*>(p); }
  INLINE F vector(Raw words, int i) const { return table.decode(words >> (4 * i)); }
  static INLINE F row(const X* x, int i) { return load(x + i * lanes); }
  static INLINE F mad(F sum, F w, F x) { return sum + w * x; }
  static INLINE F spread(const float* scales) {
#if defined(__AVX512F__)
    return F(_mm512_permutexvar_ps(__m512i(lane_number() >> 2), _mm512_castps128_ps512(_mm_loadu_ps(scales))));
#else
    F out;
    for (int i = 0; i < lanes; ++i) out[i] = scales[i / 4];
    return out;
#endif
  }
  static INLINE void place(const X* from, X* x, int64_t number) {
    X* out = x + number / (lanes / 4) * elements + number % (lanes / 4) * 4;
    for (int half = 0; half < 2; ++half, from += 16, out += lanes)
      for (int byte = 0; byte < 4; ++byte)
        *reinterpret_cast<F4m*>(out + byte * 2 * lanes) = F4{from[byte], from[4 + byte], from[8 + byte], from[12 + byte]};
  }
};

#if defined(__AVX512BF16__)
// With x in bf16: codes are exact in bf16 too, and pairs of products are summed in fp32. Flushes subnormals.
struct Pairs {
  using X = uint16_t;
  using Sum = F;
  static INLINE __m512bh row(const X* x, int i) { return (__m512bh)_mm512_loadu_si512(x + i * 32); }
  static INLINE F mad(F sum, __m512bh w, __m512bh x) { return F(_mm512_dpbf16_ps(__m512(sum), w, x)); }
};

struct Fp8Pairs : Pairs {
  using Raw = const uint8_t*;
  static constexpr bool has_groups = E4m3::has_groups, has_rows = true;
  static constexpr int elements = run, bytes = run, vectors = 1;
  explicit Fp8Pairs(Codes) {}
  static INLINE Raw raw(const uint8_t* p) { return p; }
  INLINE __m512bh vector(Raw p, int) const { return _mm512_cvtne2ps_pbh(__m512(E4m3::decode(p + 16)), __m512(E4m3::decode(p))); }
  static INLINE F spread(const float* scales) { return splat(*scales); }
  static INLINE void place(const X* from, X* x, int64_t number) { __builtin_memcpy(x + number * run, from, run * sizeof *x); }
};

// As NibbleReader with 16-bit words of four nibbles; the table holds the sixteen values twice, since five bits count.
struct NibblePairs : Pairs {
  using Raw = __m512i;
  static constexpr bool has_groups = true, has_rows = false;
  static constexpr int elements = 128, bytes = 64, vectors = 4;
  __m512i table;
  explicit NibblePairs(Codes codes) {
    __m512 values = _mm512_loadu_ps(values_of(codes));
    table = (__m512i)_mm512_cvtne2ps_pbh(values, values);
  }
  static INLINE Raw raw(const uint8_t* p) { return _mm512_loadu_si512(p); }
  INLINE __m512bh vector(Raw words, int i) const { return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * i), table); }
  static INLINE F spread(const float* scales) { return NibbleReader<true>::spread(scales); }
  static INLINE void place(const X* from, X* x, int64_t number) {
    X* out = x + number / 4 * elements + number % 4 * 8;
    for (int half = 0; half < 2; ++half, from += 16, out += 32) {
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtepi32_epi16(words));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 64), _mm256_cvtepi32_epi16(_mm256_srli_epi32(words, 16)));
    }
  }
};
#endif

#if defined(__AVX512BF16__)
// Weight rows that were made bf16 before: see dense_range.
struct Dense : Pairs {
  using Raw = const uint8_t*;
  static constexpr bool has_groups = false, has_rows = false;
  static constexpr int elements = run, bytes = 2 * run, vectors = 1;
  explicit Dense(Codes) {}
  static INLINE Raw raw(const uint8_t* p) { return p; }
  INLINE __m512bh vector(Raw p, int) const { return (__m512bh)_mm512_loadu_si512(p); }
  static INLINE void place(const X* from, X* x, int64_t number) { __builtin_memcpy(x + number * run, from, run * sizeof *x); }
};
#endif

#if defined(__AVX512VNNI__)
// Codes of x in eight bits as well: four products to a lane, summed as integers. The instruction wants one factor
// unsigned: the weight's codes are raised by 128, and `raised` of x is taken off the sum again.
struct ByteDots {
  using X = int8_t;
  using Sum = I;
  using Raw = const uint8_t*;
  static constexpr bool has_groups = false, has_rows = true;
  static constexpr int elements = 64, bytes = 64, vectors = 1;
  explicit ByteDots(Codes) {}
  static INLINE Raw raw(const uint8_t* p) { return p; }
  INLINE __m512i vector(Raw p, int) const { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }
  static INLINE __m512i row(const X* x, int) { return _mm512_loadu_si512(x); }
  static INLINE I mad(I sum, __m512i w, __m512i x) { return I(_mm512_dpbusd_epi32(__m512i(sum), w, x)); }
  static INLINE void place(const X* from, X* x, int64_t number) { __builtin_memcpy(x + number * run, from, run * sizeof *x); }
};
#endif

}  // namespace
