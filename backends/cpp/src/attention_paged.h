// Decode attention over keys and values in blocks: each run of rows that lie together is attended to where it lies. The
// layout is that of graphopt/runtime/kv_paged.py: whole blocks first, found by a table, then a tail.
#pragma once

#include "attention.h"

namespace {

using graphopt::PagedRows;

// Some kv heads of keys and values in blocks; the task's k and v are the tails.
template <class S>
struct PagedAttention {
  using T = typename S::T;
  const AttentionTask& task;
  const PagedRows &k, &v;
  AttentionTask run_of_rows;  // the rows that are being worked on, as a task of their own

  PagedAttention(const AttentionTask& t, const PagedRows& k, const PagedRows& v) : task(t), k(k), v(v), run_of_rows(t) {}

  static const void* block(const PagedRows& rows, int64_t batch, int64_t row) {
    return static_cast<const T*>(rows.first) + rows.table[batch * rows.table_stride + row / rows.block_rows] * rows.block_elements;
  }

  // Asks for the block that will be read some rows after `row`, if there is one.
  static INLINE void read_ahead(const PagedRows& rows, const AttentionPiece& piece, int64_t row) {
    const int64_t size = rows.block_elements * int64_t(sizeof(T)), later = row + larger(1, rows_ahead_bytes / size) * rows.block_rows;
    if (later < rows.sealed) prefetch_rows(static_cast<const T*>(block(rows, piece.batch, later)), 1, 0, rows.block_elements);
  }

  // Calls f(row within the run, count) for each run of rows (of k or of v) in [begin, begin + count), the task pointing at
  // it.
  template <class Call>
  INLINE void for_runs(Attention<S>& work, const PagedRows& rows, const AttentionPiece& piece, int64_t begin, int64_t count, const Call& f) {
    for (work.column = 0; work.column < count;) {
      const int64_t row = begin + work.column;
      int64_t at = row - k.sealed, here = count - work.column;
      if (row < k.sealed) {
        at = row % k.block_rows, here = smaller(here, k.block_rows - at);
        run_of_rows.k = block(k, piece.batch, row), run_of_rows.v = block(v, piece.batch, row);
        run_of_rows.k_stride[0] = run_of_rows.v_stride[0] = 0;
        run_of_rows.k_stride[1] = k.block_rows * task.dim, run_of_rows.v_stride[1] = v.block_rows * task.dim_v;
        run_of_rows.k_stride[2] = task.dim, run_of_rows.v_stride[2] = task.dim_v;
        read_ahead(rows, piece, row);
      } else {
        run_of_rows.k = task.k, run_of_rows.v = task.v;
        for (int i = 0; i < 3; ++i) run_of_rows.k_stride[i] = task.k_stride[i], run_of_rows.v_stride[i] = task.v_stride[i];
      }
      f(at, here);
      work.column += here;
    }
    work.column = 0;
  }

  void run(const AttentionPiece& piece, float* scratch) {
    Attention<S> work(run_of_rows, scratch, piece.part);
    work.reads_ahead = false;
    work.start(piece);
    for (int64_t begin = piece.begin; begin < piece.end; begin += key_block) {
      const int64_t count = smaller(key_block, piece.end - begin);
      for_runs(work, k, piece, begin, count, [&](int64_t at, int64_t here) INLINE_LAMBDA { work.score_block(piece, 0, task.together, at, here); });
      work.weigh_block(piece, begin, count);
      for_runs(work, v, piece, begin, count, [&](int64_t at, int64_t here) INLINE_LAMBDA { work.value_block(piece, 0, task.together, at, here); });
    }
    work.finish(piece);
  }
};

}  // namespace
