// What one instruction set offers to the operators: a table of plain C functions over raw memory.
//
// kernels.cpp is compiled to one library for an instruction set, which gives one such table. Neither this header nor
// anything kernels.cpp includes may pull in torch or a standard header with inline functions: it compiles in seconds, and
// no copy of such a function, compiled for AVX-512, can be the one another library ends up with.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace graphopt {

enum class Dtype : int { fp32 = 0, bf16 = 1, fp16 = 2 };

inline constexpr int64_t max_decode_rows = 16;

// out[m][n] = sum_k x[m][k] * weight[n][k] + bias[n]. Rows may be strided (ld*), elements of a row are dense.
struct LinearTask {
  const void* weight;
  const void* bias;  // dense, of the weight's dtype, or null
  void* out;
  int64_t n, k;
  int64_t ldw, ldo;
};

// x as the inner loop wants to read it; made by pack_rows, understood only by the same table's other functions.
struct PackedRows {
  void* data;
  int64_t m, k;
};

// A step on m rows of n dense elements, and its dense result. b, dense: an operand of a's rows, or with ldb 0 one row for
// all; where null, `number` takes its place. Norms: b and c are weight and bias or null, number is their eps; what offset
// and cast_first mean says graphopt::rms_norm. rope: heads of `width` elements turn by cos (b) and sin (c), of which there are
// `period` rows for the rows of a in turn.
enum class RowOp : int { add, mul, cube, relu, tanh, silu, gelu, gelu_tanh, rms_norm, layer_norm, rope };
struct RowTask {
  RowOp op;
  const void *a, *b, *c;
  void* out;
  int64_t m, n, lda, ldb;
  float number, offset;
  bool cast_first, interleaved;
  int64_t width, period;
};

// Memory of one attention call; strides in elements, the last dimension of q, k, v and out is dense.
struct AttentionTask {
  const void *q, *k, *v, *mask;
  void* out;
  int64_t batch, heads, kv_heads, queries, keys, dim, dim_v;
  int64_t together;  // kv heads that are served together, a divisor of kv_heads
  int64_t q_stride[3], k_stride[3], v_stride[3];  // batch, head, position
  int64_t mask_stride[4];                         // batch, head, query, key
  int64_t out_stride[3];                          // batch, head, query
  enum Mask : int { none, boolean, additive, additive_fp32 } mask_kind;
  bool causal;
  float scale, softcap;
  int64_t window;
  float of_nothing;  // the factor for a row that saw no key: 0, or NaN as a plain softmax gives
};

// Keys [begin, end) of `together` kv heads, from kv_head on, and all their query rows. With part == null the result is written to out,
// otherwise it is left there unnormalised, for attention_merge.
struct AttentionPiece {
  int64_t batch, kv_head, begin, end;
  float* part;
};

// Packed rows of a quantised KV cache, one of keys or of values; strides in elements: batch, head, row (of params: of
// keys one for each `group` rows). Rows from `packed` on are plain ones of the task's dtype.
enum class CacheKind : int { int8 = 0, fp8 = 1, int4 = 2 };
struct QuantizedRows {
  CacheKind kind;
  const uint8_t* codes;
  const uint16_t* params;  // fp16
  int64_t packed, group;
  int64_t code_stride[3], param_stride[3];
};

// How many queries make a tile and keys a block, and the bytes of a packed block and of a thread's scratch memory. Without
// queries: the table leaves this to torch.
struct AttentionTiling {
  int64_t queries, keys, block_bytes, scratch_bytes;
};

// Rows of a KV cache in blocks [heads, block_rows, size], one of keys or of values: block i lies i * block_elements behind
// `first`; the table [batch, blocks] says which blocks. Rows from `sealed` on are those of the task.
struct PagedRows {
  const void* first;
  const int64_t* table;
  int64_t table_stride;  // from one sequence of the batch to the next
  int64_t sealed, block_rows, block_elements;
};

// The kinds of codes of packed weights (graphopt/quantization/schemes.py has the layouts).
enum class Codes : int { int8 = 0, fp8 = 1, int4 = 2, nf4 = 3, mxfp4 = 4 };

// A linear, n rows of k columns, on a packed weight: dense rows of codes. With group 0 one float scale for each row;
// otherwise `groups` of so many columns in each row, with half precision scales and offsets (or null), or with the
// exponents of mxfp4. With units, a half for every eight groups, scales and offsets are bytes that count in them, offsets
// downwards. dynamic: rows of x are rounded to the same codes first.
struct QuantizedTask {
  const void *codes, *scales, *offsets;
  const void *scale_units, *offset_units;
  const void* bias;  // dense, of the dtype of x, or null
  void* out;
  Codes kind;
  bool dynamic;
  int64_t n, k;
  int64_t group, groups, row_bytes, ldo;
};

inline constexpr int unit_shift = 3;  // of how many groups have one unit
constexpr int64_t unit_count(int64_t groups) { return (groups + (1 << unit_shift) - 1) >> unit_shift; }

// What a matrix product by torch takes and gives.
enum class Element : int { integer, bf16, fp32 };

struct Kernels {
  const char* isa;
  // Small-batch linear, m <= max_decode_rows.
  size_t (*packed_bytes)(Dtype, int64_t m, int64_t k);
  void (*pack_rows)(Dtype, const void* x, int64_t ldx, PackedRows);
  void (*linear_rows)(Dtype, const LinearTask&, PackedRows, int64_t n_begin, int64_t n_end);
  // A step between linears: few rows, which are in the cache.
  void (*row_step)(Dtype, const RowTask&);
  // Large-batch linear in bf16, or null where the library's own is as fast. Rows are packed in groups of 32.
  void (*pack_panel)(const void* x, int64_t ldx, PackedRows, int64_t m_begin, int64_t m_end);
  void (*linear_panel)(const LinearTask&, PackedRows, int64_t n_begin, int64_t n_end);
  // Small-batch linear on packed weights, x and out of one dtype. The task stands for all that share x.
  size_t (*quantized_bytes)(Dtype, const QuantizedTask&, int64_t m);
  void (*quantized_pack)(Dtype, const QuantizedTask&, const void* x, int64_t ldx, PackedRows);
  void (*quantized_rows)(Dtype, const QuantizedTask&, PackedRows, int64_t n_begin, int64_t n_end);
  // Rows of a packed weight as numbers, dense, in `out`; those of a task with group 0 are left unscaled if so asked.
  void (*dequantized_rows)(Dtype out_dtype, const QuantizedTask&, bool scaled, void* out, int64_t n_begin, int64_t n_end);
  // The parts of a product of many rows that torch does not make: codes of x for dynamic schemes, as int8 or as
  // numbers, and from the sums y [m, count], int32 or numbers, to the output's columns from n.
  void (*rounded_rows)(Dtype x_dtype, Codes, const void* x, int64_t ldx, int64_t k, Element, void* out, float* factors, int64_t m_begin, int64_t m_end);
  void (*finished_rows)(Dtype out_dtype, const QuantizedTask&, Element, const void* y, const float* factors, int64_t n, int64_t count, int64_t m_begin, int64_t m_end);
  // Decode attention, queries <= max_decode_rows.
  void (*attention_floats)(Dtype, const AttentionTask&, int64_t* scratch, int64_t* part);
  void (*attention_piece)(Dtype, const AttentionTask&, const AttentionPiece&, float* scratch);
  void (*attention_merge)(Dtype, const AttentionTask&, const AttentionPiece* pieces, int64_t count);
  // Attention of any number of queries, where this table is faster than torch: tiles of tile_queries rows of a head over
  // the packed blocks of its kv head.
  AttentionTiling (*attention_tiling)(Dtype, const AttentionTask&);
  void (*attention_pack)(Dtype, const AttentionTask&, int64_t batch, int64_t kv_head, int64_t first_key, void* out);
  void (*attention_tile)(Dtype, const AttentionTask&, int64_t batch, int64_t head, int64_t first_query, const void* packed, float* scratch);
  // The same over quantised keys and values: `tail` is the dtype of the rows that are not; all else is bf16 if they are,
  // otherwise fp32. The scratch of the task in that dtype is followed by quantized_floats more.
  int64_t (*quantized_floats)(const AttentionTask&);
  void (*attention_quantized)(Dtype tail, const AttentionTask&, const QuantizedRows& k, const QuantizedRows& v, const AttentionPiece&,
                              float* scratch, float* block);
  // The same over keys and values in blocks.
  void (*attention_paged)(Dtype, const AttentionTask&, const PagedRows& k, const PagedRows& v, const AttentionPiece&, float* scratch);
};

// The table in use: the best this machine runs, or the one named by set_isa.
const Kernels& kernels();

}  // namespace graphopt

// What the library of one instruction set gives.
extern "C" __attribute__((visibility("default"))) const graphopt::Kernels* graphopt_table();
