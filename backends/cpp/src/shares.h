// A range of units shared among threads.
//
// Each thread has a stretch of its own and takes pieces from its front, so that it reads memory as one stream: pieces
// dealt out in turn to two threads were read at half the rate (a stream begun anew each 32 KiB). A thread that is done
// takes pieces from the back of another's stretch: one that wakes late or runs on a busy core does less, and none waits
// long for another.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace graphopt {

class Shares {
 public:
  Shares(int64_t units, int64_t threads, int64_t piece) : piece_(uint32_t(std::min<int64_t>(piece, UINT32_MAX))), stretches_(threads) {
    for (int64_t t = 0; t < threads; ++t)
      stretches_[t].left.store(packed({uint32_t(units * t / threads), uint32_t(units * (t + 1) / threads)}), std::memory_order_relaxed);
  }

  int64_t threads() const { return int64_t(stretches_.size()); }

  struct Piece {
    uint32_t from, to;  // none if equal
  };

  // The next piece for this thread.
  Piece take(int64_t thread) {
    Piece piece = take_from(stretches_[thread].left, true);
    for (size_t other = 1; piece.from == piece.to && other < stretches_.size(); ++other)
      piece = take_from(stretches_[(thread + other) % stretches_.size()].left, false);
    return piece;
  }

 private:
  struct alignas(64) Stretch {
    std::atomic<uint64_t> left{0};
  };

  static uint64_t packed(Piece piece) { return uint64_t(piece.from) << 32 | piece.to; }

  Piece take_from(std::atomic<uint64_t>& left, bool front) const {
    uint64_t seen = left.load(std::memory_order_relaxed);
    for (;;) {
      const Piece all{uint32_t(seen >> 32), uint32_t(seen)};
      const uint32_t count = std::min(piece_, all.to - all.from);
      const uint32_t middle = front ? all.from + count : all.to - count;
      const Piece rest = front ? Piece{middle, all.to} : Piece{all.from, middle};
      if (count == 0 || left.compare_exchange_weak(seen, packed(rest), std::memory_order_relaxed))
        return front ? Piece{all.from, middle} : Piece{middle, all.to};
    }
  }

  uint32_t piece_;
  std::vector<Stretch> stretches_;
};

}  // namespace graphopt
