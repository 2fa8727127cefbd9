// Fixed-point rows by products of 16-bit numbers (AVX2), which are twice as many to an instruction as floats.
//
// Each 64 elements of x become X = round(x / max|x| * 2^15) under a factor of their own. The sums of eight products of X
// and a code that meet in a lane are exact (8 * 128 * 2^15 = 2^25). Rounding loses at most 2^-16 of the largest of the 64.
#pragma once

#include "quantized.h"

namespace {

// 64 codes as words.
struct Words { __m256i part[4]; };

struct ByteWords {
  static constexpr int64_t step_bytes = 64;
  static constexpr bool in_runs = false;
  explicit ByteWords(Codes) {}
  INLINE Words operator()(const uint8_t* p) const {
    Words words;
    for (int i = 0; i < 4; ++i) words.part[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
    return words;
  }
};

// Two runs of nibbles, which count in the units of int4 or, so that they are whole numbers, in halves of those of mxfp4.
struct NibbleWords {
  static constexpr int64_t step_bytes = 32;
  static constexpr bool in_runs = true;
  __m256i table;
  explicit NibbleWords(Codes codes) {
    alignas(16) int8_t values[16];
    for (int i = 0; i < 16; ++i) values[i] = int8_t(values_of(codes)[i] / unit_of(codes));
    table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(values)));
  }
  static constexpr float unit_of(Codes codes) { return codes == Codes::mxfp4 ? 0.5f : 1.0f; }
  INLINE Words operator()(const uint8_t* p) const {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), four = _mm256_set1_epi8(15);
    const __m256i first = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, four));
    const __m256i second = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), four));
    return {{_mm256_cvtepi8_epi16(_mm256_castsi256_si128(first)), _mm256_cvtepi8_epi16(_mm256_castsi256_si128(second)),
             _mm256_cvtepi8_epi16(_mm256_extracti128_si256(first, 1)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(second, 1))}};
  }
};

constexpr float largest_word = 0x1p15f - 1;

struct FixedWords {
  using Vector = __m256i;
  static constexpr int64_t vectors = 5;  // of x for a step of 64 codes: four of words, and the factor in every lane

  static constexpr bool takes(Codes codes) { return codes == Codes::int8 || codes == Codes::int4 || codes == Codes::mxfp4; }
  template <class Call>
  static INLINE void with_reader(const QuantizedTask& task, const Call& f) {
    task.kind == Codes::int8 ? by_group<ByteWords>(task, f) : f.template operator()<NibbleWords, run>();
  }

  // Packs a row, its factor and, if asked, the sums of its runs. False if it is not one for fixed point: if rounding could
  // take more than bf16 had lost of these elements.
  static INLINE bool place(Codes codes, const uint16_t* row, int64_t k, Vector* x, float& unit, float* sums) {
    float lost = 0, all = 0;
    for (int64_t first = 0; first < round_up(k, 128); first += 64, x += vectors) {
      alignas(32) float values[64] = {};
      for (int64_t i = 0, count = smaller(64, k - first); i < count; ++i) values[i] = Bf16::to_float(row[first + i]);
      F most = {}, total = {};
      for (int i = 0; i < 64; i += lanes) {
        const F size = reinterpret_cast<F>(reinterpret_cast<U>(load(values + i)) & 0x7fffffffu);
        most = select(size > most, size, most), total += size;
      }
      float largest = 0;
      for (int i = 0; i < lanes; ++i) largest = most[i] > largest ? most[i] : largest;
      const float sum_of_sizes = sum(total);
      if (!(largest == 0 ? sum_of_sizes == 0 : largest > 0x1p-90f && sum_of_sizes < 0x1p120f)) return false;  // NaN too
      lost += 64 * largest * 0x1p-16f, all += sum_of_sizes - largest;
      const float factor = largest == 0 ? 0 : largest_word / largest;
      for (int i = 0; i < 4; ++i) {
        const __m256i low = _mm256_cvtps_epi32(__m256(load(values + 16 * i) * factor)), high = _mm256_cvtps_epi32(__m256(load(values + 16 * i + 8) * factor));
        _mm256_storeu_si256(x + i, _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
      }
      store(reinterpret_cast<float*>(x + 4), splat(largest / largest_word));
      for (int half = 0; sums && half < 2; ++half) {
        F part = {};
        for (int i = 0; i < run; i += lanes) part += load(values + half * run + i);
        *sums++ = sum(part);
      }
    }
    unit = codes == Codes::int8 ? 1 : NibbleWords::unit_of(codes);
    return lost <= all * 0x1p-9f || all == 0;
  }

  static INLINE __m256i products(const Words& codes, const Vector* x, int i) {
    return _mm256_add_epi32(_mm256_madd_epi16(codes.part[i], _mm256_loadu_si256(x + i)), _mm256_madd_epi16(codes.part[i + 1], _mm256_loadu_si256(x + i + 1)));
  }

  // Adds step number s under its scales. group: of columns under one scale; 0 if one serves the row.
  template <int group>
  static INLINE F add(F sum, const Words& codes, const Vector* x, const float* scales, int64_t s) {
    const F factor = load(reinterpret_cast<const float*>(x + 4));
    const __m256i low = products(codes, x, 0), high = products(codes, x, 2);
    if constexpr (group == 32)
      return sum + F(_mm256_cvtepi32_ps(low)) * (factor * scales[2 * s]) + F(_mm256_cvtepi32_ps(high)) * (factor * scales[2 * s + 1]);
    const F both = F(_mm256_cvtepi32_ps(_mm256_add_epi32(low, high)));
    if constexpr (group == 0)
      return sum + both * factor;
    else
      return sum + both * (factor * scales[s * 64 / group]);
  }
};

using Fixed = FixedWords;
#define GRAPHOPT_FIXED

}  // namespace
