// Rows of packed weights as numbers in the order of the weight: for products of many rows and for look-ups.
#pragma once

#include "codes.h"
#include "quantized.h"

namespace {

constexpr int run_vectors = run / lanes;

template <class Code>
struct ByteRuns {
  static constexpr int bytes = run;
  explicit ByteRuns(Codes) {}
  INLINE void decode(const uint8_t* p, F (&out)[run_vectors]) const {
    for (int i = 0; i < run_vectors; ++i) out[i] = Code::decode(p + i * lanes);
  }
};

template <bool linear>
struct NibbleRuns {
  static constexpr int bytes = run / 2;
  Nibbles<linear> table;
  explicit NibbleRuns(Codes codes) : table(codes) {}
  INLINE void decode(const uint8_t* p, F (&out)[run_vectors]) const {
    for (int i = 0; i < run_vectors / 2; ++i) {
      const U index = reinterpret_cast<U>(widened(p + i * lanes) & 255);
      out[i] = table.decode(index), out[run_vectors / 2 + i] = table.decode(index >> 4);
    }
  }
};

INLINE void store_run(Fp32, float* p, const F (&v)[run_vectors]) {
  for (int i = 0; i < run_vectors; ++i) store(p + i * lanes, v[i]);
}
INLINE void store_run(Bf16, uint16_t* p, const F (&v)[run_vectors]) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(__m512(v[1]), __m512(v[0])));
#elif defined(__AVX512F__)
  for (int i = 0; i < run_vectors; ++i)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i * lanes), _mm512_cvtepi32_epi16(__m512i(Bf16::round(v[i]))));
#else
  for (int i = 0; i < run_vectors; ++i) *reinterpret_cast<Hm*>(p + i * lanes) = __builtin_convertvector(Bf16::round(v[i]), H);
#endif
}
INLINE void store_run(Fp16, uint16_t* p, const F (&v)[run_vectors]) {
  for (int i = 0; i < run; ++i) p[i] = Fp16::from_float(v[i / lanes][i % lanes]);
}

// Rows [begin, end) of the weight, each of ld elements; where ld has room for it the last run is written as a whole.
template <class S, class R>
void dequantize(const QuantizedTask& task, bool scaled, typename S::T* out, int64_t ld, int64_t begin, int64_t end) {
  const R runs(task.kind);
  const int64_t count = (task.k + run - 1) / run;
  for (int64_t n = begin; n < end; ++n, out += ld) {
    const auto* codes = static_cast<const uint8_t*>(task.codes) + n * task.row_bytes;
    F scales = splat(1.0f), offsets = {};
    if (!task.group && scaled) {
      scales = splat(static_cast<const float*>(task.scales)[n]);
      offsets = scales - scales;  // NaN under a scale that is not finite
    }
    for (int64_t first = 0; first < count; first += lanes) {
      if (task.group)
        with_parameters<false>(task, [&]<class P>() INLINE_LAMBDA {
          scales = P::scales(task, n, first);
          if (task.offsets) offsets = P::offsets(task, n, first, scales);
        });
      float scale[lanes], offset[lanes];
      store(scale, scales), store(offset, offsets);
      for (int64_t j = first; j < smaller(first + lanes, count); ++j) {
        F values[run_vectors];
        uint8_t buffer[64];
        const int64_t left = task.row_bytes - j * R::bytes, wanted = smaller(larger(task.k, ld) - j * run, run);
        runs.decode(left < R::bytes ? padded(codes + j * R::bytes, left, buffer) : codes + j * R::bytes, values);
        for (F& value : values) value = value * splat(scale[j - first]) + splat(offset[j - first]);
        if (wanted == run) {
          store_run(S{}, out + j * run, values);
        } else {
          typename S::T last[run];
          store_run(S{}, last, values);
          __builtin_memcpy(out + j * run, last, wanted * sizeof *last);
        }
      }
    }
  }
}

template <class S>
void dequantize(const QuantizedTask& task, bool scaled, typename S::T* out, int64_t ld, int64_t begin, int64_t end) {
  switch (task.kind) {
    case Codes::int8: return dequantize<S, ByteRuns<Int8>>(task, scaled, out, ld, begin, end);
    case Codes::fp8: return dequantize<S, ByteRuns<E4m3>>(task, scaled, out, ld, begin, end);
    case Codes::int4: return dequantize<S, NibbleRuns<true>>(task, scaled, out, ld, begin, end);
    default: return dequantize<S, NibbleRuns<false>>(task, scaled, out, ld, begin, end);
  }
}

void dequantized_rows(Dtype dtype, const QuantizedTask& task, bool scaled, void* out, int64_t begin, int64_t end) {
  with_storage(dtype, [&]<class S>(S) { dequantize<S>(task, scaled, static_cast<typename S::T*>(out), task.k, begin, end); });
}

#if defined(__AVX512BF16__)
constexpr int64_t dense_ld(int64_t k) { return round_up(k, run); }

// Several rows of x: the weight rows of one batch of outputs are made bf16 once, in memory that stays in the cache.
// Those with one scale to a row stay codes until the sum is there.
void dense_range(Dtype out, const QuantizedTask& task, PackedRows rows, int64_t begin, int64_t end) {
  const PackedX<Dense> packed(rows.data, rows.m, rows.k);
  uint16_t* numbers = packed.end(rows.m);
  const Dense reader(task.kind);
  const RowParameters parameters(task);  // numbers have none
  for (int64_t first = begin; first < end; first += outputs_at_once) {
    const int64_t count = smaller(outputs_at_once, end - first), ld = dense_ld(task.k);
    dequantize<Bf16>(task, false, numbers, ld, first, first + count);
    QuantizedTask dense{};
    dense.codes = numbers, dense.n = count, dense.k = task.k, dense.row_bytes = 2 * ld;
    const Ahead ahead = Ahead::of(dense.row_bytes, dense.row_bytes, 1);
    for (int64_t i = 0; i < count; i += 4)
      for (int64_t m = 0; m < rows.m; m += 4)
        quantized_block<Dense, false, 4, 4>(dense, reader, parameters, packed, i, smaller(m, rows.m - 4), i, ahead);
    store_totals_of(out, task, packed, rows.m, first, count);
  }
}
#endif

}  // namespace
