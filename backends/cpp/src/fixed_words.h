// Fixed-point rows by products of 16-bit and 8-bit numbers (AVX2), of which an instruction makes two or four times as many
// as of floats.
//
// Each 64 elements of x become X = round(x / max|x| * largest) of 16 bits under a factor of their own. Codes of 8 bits
// meet X as words. Nibbles meet its two digits of 8 bits, X = 256 high + low, and count from 0 there: what that adds is
// known of X and taken off, so that zeros are zeros, unless the groups have offsets, which say what 0 stands for: they meet
// the sums of X over the groups. The sums that meet in a lane are exact.
#pragma once

#include "quantized.h"

namespace {

// 64 codes as words.
struct Words { __m256i part[4]; };

struct ByteWords {
  static constexpr int64_t step_bytes = 64;
  static constexpr bool has_offsets = false;
  explicit ByteWords(Codes) {}
  INLINE Words operator()(const uint8_t* p) const {
    Words words;
    for (int i = 0; i < 4; ++i) words.part[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
    return words;
  }
};

// By how much nibbles without offsets count too much: int4 is -8..7, mxfp4 in halves -12..12.
INLINE int raised(Codes codes) { return codes == Codes::mxfp4 ? 12 : 8; }

// Two runs of nibbles, one in each half of the vectors, as bytes from 0 on: the first 16 codes of a run and the others.
template <bool raised>
struct NibbleBytes { __m256i first, second; };

template <bool linear, bool has_offsets_>
struct NibblesFromZero {
  static constexpr int64_t step_bytes = 32;
  static constexpr bool has_offsets = has_offsets_;
  __m256i table{};
  explicit NibblesFromZero(Codes codes) {
    if constexpr (linear) return;
    alignas(16) int8_t values[16];
    for (int i = 0; i < 16; ++i) values[i] = int8_t(values_of(codes)[i] * 2 + raised(codes));
    table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(values)));
  }
  INLINE NibbleBytes<!has_offsets> operator()(const uint8_t* p) const {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), four = _mm256_set1_epi8(15);
    const __m256i first = _mm256_and_si256(bytes, four), second = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), four);
    if constexpr (linear) return {first, second};
    return {_mm256_shuffle_epi8(table, first), _mm256_shuffle_epi8(table, second)};
  }
};

constexpr float largest_word = 127 * 256 + 127;  // whose digits are no larger than a signed byte

struct FixedWords {
  using Vector = __m256i;
  // Of x for a step of 64 codes: four of words or digits, the factor in every lane, and what raised nibbles add.
  static constexpr int64_t vectors = 6;

  static constexpr bool takes(Codes codes) { return codes == Codes::int8 || codes == Codes::int4 || codes == Codes::mxfp4; }
  template <class Call>
  static INLINE void with_reader(const QuantizedTask& task, const Call& f) {
    if (task.kind == Codes::int8) return by_group<ByteWords>(task, f);
    if (task.kind == Codes::mxfp4) return f.template operator()<NibblesFromZero<false, false>, run>();
    task.offsets ? by_group<NibblesFromZero<true, true>>(task, f) : by_group<NibblesFromZero<true, false>>(task, f);
  }

  // Packs a row, its factor and, for offsets, adds what is packed to the sums of its groups. False if it is not one for fixed
  // point: if rounding could take more than bf16 had lost of these elements.
  static INLINE bool place(const QuantizedTask& task, const uint16_t* row, Vector* x, float& unit, float* sums) {
    float lost = 0, all = 0;
    for (int64_t first = 0; first < round_up(task.k, 128); first += 64, x += vectors) {
      alignas(32) float values[64] = {};
      for (int64_t i = 0, count = smaller(64, task.k - first); i < count; ++i) values[i] = Bf16::to_float(row[first + i]);
      F most = {}, total = {};
      for (int i = 0; i < 64; i += lanes) {
        const F size = reinterpret_cast<F>(reinterpret_cast<U>(load(values + i)) & 0x7fffffffu);
        most = select(size > most, size, most), total += size;
      }
      float largest = 0;
      for (int i = 0; i < lanes; ++i) largest = most[i] > largest ? most[i] : largest;
      const float sum_of_sizes = sum(total);
      if (!(largest == 0 ? sum_of_sizes == 0 : largest > 0x1p-90f && sum_of_sizes < 0x1p120f)) return false;  // NaN too
      lost += 64 * largest * (0.5f / largest_word), all += sum_of_sizes - largest;
      const float factor = largest == 0 ? 0 : largest_word / largest;
      __m256i words[4];
      for (int i = 0; i < 4; ++i) {
        const __m256i low = _mm256_cvtps_epi32(__m256(load(values + 16 * i) * factor)), high = _mm256_cvtps_epi32(__m256(load(values + 16 * i + 8) * factor));
        words[i] = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
      }
      const float factor_back = largest / largest_word;
      store(reinterpret_cast<float*>(x + 4), splat(factor_back));
      if (task.kind != Codes::int8)
        place_digits(words, raised(task.kind), x);
      else
        for (int i = 0; i < 4; ++i) _mm256_storeu_si256(x + i, words[i]);
      for (int half = 0; task.offsets && half < 2; ++half)
        if (const int64_t at = first + half * run; at < task.k) sums[at / task.group] += factor_back * sum_of(words[2 * half], words[2 * half + 1]);
    }
    unit = task.kind == Codes::mxfp4 ? 0.5f : 1.0f;
    return lost <= all * 0x1p-9f || all == 0;
  }

  static INLINE float sum_of(__m256i a, __m256i b) {
    const __m256i ones = _mm256_set1_epi16(1), pairs = _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones));
    return sum(F(_mm256_cvtepi32_ps(pairs)));
  }

  // Words of two runs as NibbleBytes meet them: high digits of both of its vectors, then low ones.
  static INLINE void place_digits(const __m256i (&words)[4], int raised, Vector* x) {
    for (int i = 0; i < 2; ++i) {
      const __m256i a = words[i], b = words[i + 2], half = _mm256_set1_epi16(128);
      const __m256i high_a = _mm256_srai_epi16(_mm256_add_epi16(a, half), 8), high_b = _mm256_srai_epi16(_mm256_add_epi16(b, half), 8);
      const __m256i low_a = _mm256_sub_epi16(a, _mm256_slli_epi16(high_a, 8)), low_b = _mm256_sub_epi16(b, _mm256_slli_epi16(high_b, 8));
      _mm256_storeu_si256(x + i, _mm256_permute4x64_epi64(_mm256_packs_epi16(high_a, high_b), 0xd8));
      _mm256_storeu_si256(x + 2 + i, _mm256_permute4x64_epi64(_mm256_packs_epi16(low_a, low_b), 0xd8));
    }
    const __m256i all = _mm256_set1_epi8(int8_t(raised));
    _mm256_storeu_si256(x + 5, sums(all, all, x));
  }

  // Four products meet in a word: at most 4 * 24 * 128 of them; the sum of two words times 256 has room in 32 bits.
  static INLINE __m256i sums(__m256i first, __m256i second, const Vector* x) {
    auto products = [&](int i) INLINE_LAMBDA {
      return _mm256_add_epi16(_mm256_maddubs_epi16(first, _mm256_loadu_si256(x + i)), _mm256_maddubs_epi16(second, _mm256_loadu_si256(x + i + 1)));
    };
    return _mm256_add_epi32(_mm256_madd_epi16(products(0), _mm256_set1_epi16(256)), _mm256_madd_epi16(products(2), _mm256_set1_epi16(1)));
  }

  // Adds step number s under its scales. group: of columns under one scale; 0 if one serves the row.
  template <int group>
  static INLINE F add(F sum, const Words& codes, const Vector* x, const float* scales, int64_t s) {
    auto products = [&](int i) INLINE_LAMBDA {
      return _mm256_add_epi32(_mm256_madd_epi16(codes.part[i], _mm256_loadu_si256(x + i)), _mm256_madd_epi16(codes.part[i + 1], _mm256_loadu_si256(x + i + 1)));
    };
    const F factor = load(reinterpret_cast<const float*>(x + 4));
    const __m256i low = products(0), high = products(2);
    if constexpr (group == 32)
      return sum + F(_mm256_cvtepi32_ps(low)) * (factor * scales[2 * s]) + F(_mm256_cvtepi32_ps(high)) * (factor * scales[2 * s + 1]);
    const F both = F(_mm256_cvtepi32_ps(_mm256_add_epi32(low, high)));
    if constexpr (group == 0)
      return sum + both * factor;
    else
      return sum + both * (factor * scales[s * 64 / group]);
  }

  template <int group, bool raised>
  static INLINE F add(F sum, const NibbleBytes<raised>& codes, const Vector* x, const float* scales, int64_t s) {
    __m256i exact = sums(codes.first, codes.second, x);
    if constexpr (raised) exact = _mm256_sub_epi32(exact, _mm256_loadu_si256(x + 5));
    return sum + F(_mm256_cvtepi32_ps(exact)) * (load(reinterpret_cast<const float*>(x + 4)) * of_lanes<group>(scales, s));
  }

  // The scales of step number s, those of its first run in the lower lanes.
  template <int group>
  static INLINE F of_lanes(const float* scales, int64_t s) {
    if constexpr (group != run) return splat(scales[s * 64 / (group ? group : 1)]);
    const __m256d pair = _mm256_broadcast_sd(reinterpret_cast<const double*>(scales + 2 * s));
    return F(_mm256_permutevar_ps(_mm256_castpd_ps(pair), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)));
  }
};

using Fixed = FixedWords;
#define GRAPHOPT_FIXED

}  // namespace
