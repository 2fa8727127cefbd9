// graphopt_cpp::chain as a torch operator: a few rows through linears, attentions and the steps between them, in one parallel
// region.
//
// Threads share the work of a linear and of an attention, and wait for each other behind it; what lies between each of them
// computes for itself, which is cheaper than to wait.
#pragma once

#include <omp.h>
#include <torch/library.h>

#include <deque>

#include "chain_attention.h"
#include "chain_text.h"
#include "decode.h"
#include "linear_op.h"

namespace graphopt {
namespace {

// Memory handed out in pieces that come back: the same places serve step after step.
class Places {
 public:
  size_t take(size_t bytes) {
    bytes = aligned(bytes);
    std::vector<size_t>& left = left_[bytes];
    if (left.empty()) return used_ += bytes, used_ - bytes;
    const size_t place = left.back();
    left.pop_back();
    return place;
  }
  void give_back(size_t place, size_t bytes) { left_[aligned(bytes)].push_back(place); }
  size_t bytes() const { return used_; }

  static size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

 private:
  std::unordered_map<size_t, std::vector<size_t>> left_;
  size_t used_ = 0;
};

// One call.
class Chain {
 public:
  // outs: memory for the outputs; none if they are to be made.
  Chain(const Steps& steps, at::TensorList inputs, at::TensorList weights, at::TensorList rooms, at::TensorList outs = {})
      : steps_(steps), weights_(weights), rooms_(rooms), like_(inputs.front()), outs_(outs.begin(), outs.end()) {
    const auto dtype = dtype_of(like_.scalar_type());
    TORCH_CHECK(dtype && like_.dim() >= 1 && like_.numel() > 0, "chain: values must be floating-point rows, got ", like_.dtype(), " ", like_.sizes());
    dtype_ = *dtype;
    m_ = like_.numel() / like_.size(-1);
    TORCH_CHECK(m_ <= max_decode_rows, "chain: at most ", max_decode_rows, " rows, got ", m_);
    for (const Tensor& input : inputs) {
      TORCH_CHECK(input.scalar_type() == like_.scalar_type() && input.numel() == m_ * input.size(-1), "chain: values must be ", m_, " rows of ",
                  like_.dtype(), ", got ", input.sizes(), " of ", input.dtype());
      rows_.push_back(rows_of(input, m_).contiguous());
      values_.push_back({rows_.back().size(1), rows_.back().mutable_data_ptr()});
    }
    for (const Step& step : steps_.all) step.kind == Step::rows ? add_rows(step) : step.kind == Step::linear ? add_linear(step) : add_attend(step);
    lay_out();
  }

  std::vector<Tensor> run() {
    int64_t threads = std::max(plain_.threads(dtype_), quantized_.threads(dtype_));
    for (const Attend& attend : attends_) threads = std::max(threads, attend.threads());
    size_t work_bytes = std::max(plain_.prepare(dtype_, m_, threads), quantized_.prepare(dtype_, m_, threads));
    for (const Attend& attend : attends_) work_bytes = std::max(work_bytes, attend.scratch_bytes());
    const size_t own_bytes = own_.bytes() + Places::aligned(work_bytes);
    char* memory = static_cast<char*>(scratch(Scratch::per_call, shared_.bytes() + threads * own_bytes));
    for (Value& value : values_)
      if (!value.shared && !value.row_step) value.shared = memory + value.place;
    set_outs(memory);
#pragma omp parallel num_threads(threads)
    {
      const int64_t thread = omp_get_thread_num();
      char* own = memory + shared_.bytes() + thread * own_bytes;
      run_thread(thread, omp_get_num_threads(), own, own + own_.bytes());
    }
    return std::move(outs_);
  }

 private:
  // m_ rows of n dense elements: at `shared` for all threads, else at `place` in each thread's own memory. A row step's
  // value that is an output is written by thread 0.
  struct Value {
    int64_t n;
    void* shared = nullptr;
    bool row_step = false;
    size_t place = 0;
  };
  // The linears of one kind, in their order: `ends[i]` is where the tasks of the one behind number i begin.
  template <class Task>
  struct Linears {
    c10::SmallVector<Task, 8> tasks;
    c10::SmallVector<size_t, 8> ends;
    std::deque<Decode<Task>> decodes;

    at::ArrayRef<Task> of(size_t i) const {
      const size_t begin = i ? ends[i - 1] : 0;
      return at::ArrayRef<Task>(tasks).slice(begin, ends[i] - begin);
    }
    int64_t threads(Dtype dtype) const {
      int64_t most = 1;
      for (size_t i = 0; i < ends.size(); ++i) most = std::max(most, Decode<Task>::threads(dtype, of(i)));
      return most;
    }
    // Returns the bytes that packed rows of x take.
    size_t prepare(Dtype dtype, int64_t m, int64_t threads) {
      size_t bytes = 0;
      for (size_t i = 0; i < ends.size(); ++i) bytes = std::max(bytes, decodes.emplace_back(dtype, m, of(i), threads).scratch_bytes());
      return bytes;
    }
  };

  const Value& value(const Operand& operand) const {
    TORCH_CHECK(operand.kind == Operand::value && operand.index < int64_t(values_.size()), "chain: no value ", operand.index);
    return values_[operand.index];
  }
  const Tensor& weight(const Operand& operand, size_t more = 0) const {
    TORCH_CHECK(operand.kind == Operand::weight && operand.index + more < weights_.size(), "chain: no weight ", operand.index);
    return weights_[operand.index];
  }
  MaybeTensor maybe_weight(const Operand& operand) const {
    return operand.kind == Operand::none ? MaybeTensor() : MaybeTensor(weight(operand));
  }

  const Tensor& room(const Operand& operand) const {
    TORCH_CHECK(operand.kind == Operand::room && operand.index < int64_t(rooms_.size()), "chain: no room ", operand.index);
    TORCH_CHECK(rooms_[operand.index].scalar_type() == like_.scalar_type(), "chain: rows of ", like_.dtype(), " do not go into a room of ",
                rooms_[operand.index].dtype());
    return rooms_[operand.index];
  }

  void add_rows(const Step& step) {
    const int64_t n = value(step.operands[0]).n, size = head_size(step, n);
    for (const Operand& operand : step.operands) {
      if (operand.kind == Operand::value) TORCH_CHECK(value(operand).n == n, "chain: rows of ", n, " and of ", value(operand).n, " elements");
      if (operand.kind != Operand::weight) continue;
      const Tensor& row = weight(operand);
      if (step.op == RowOp::rope) {
        check_turn(step, row, n);
        continue;
      }
      TORCH_CHECK(row.dim() == 1 && row.size(0) == size && row.is_contiguous() && row.scalar_type() == like_.scalar_type(), "chain: ", row.sizes(), " of ",
                  row.dtype(), " is no row of ", size, " elements of ", like_.dtype());
    }
    values_.push_back({n, nullptr, true});
  }

  // cos or sin of a rope: rows of one head, that fit the chain's rows in turn.
  void check_turn(const Step& step, const Tensor& row, int64_t n) const {
    const int64_t width = head_size(step, n), period = row.numel() / width;
    TORCH_CHECK(width % 2 == 0 && row.numel() == weight(step.operands[1]).numel() && period > 0 && row.numel() == period * width && m_ % period == 0 &&
                    row.is_contiguous() && row.scalar_type() == like_.scalar_type(),
                "chain: ", row.sizes(), " of ", row.dtype(), " do not turn ", m_, " rows of heads of ", width, " elements of ", like_.dtype());
  }

  // Of rows of n elements: what the step takes apart, or all of them.
  int64_t head_size(const Step& step, int64_t n) const {
    const size_t place = step.op == RowOp::rope ? 3 : 5;
    if (step.op != RowOp::rope && (step.op != RowOp::rms_norm || step.operands.size() <= place)) return n;
    const auto size = int64_t(step.number(place));
    TORCH_CHECK(size > 0 && n % size == 0, "chain: rows of ", n, " elements have no heads of ", size);
    return size;
  }

  void add_attend(const Step& step) {
    TORCH_CHECK(step.operands.size() == 10, "chain: attend takes 10 operands, got ", step.operands.size());
    const auto& [q, k, v] = std::tie(value(step.operands[0]), value(step.operands[1]), value(step.operands[2]));
    attends_.emplace_back(dtype_, m_, q.n, k.n, v.n, room(step.operands[3]), room(step.operands[4]), maybe_weight(step.operands[5]), step.number(6),
                          step.number(7), step.number(8), step.number(9) != 0);
    values_.push_back({attends_.back().out_size()});
  }

  // The tasks of a linear, still without outputs.
  void add_linear(const Step& step) {
    TORCH_CHECK(step.operands.size() % 2 == 1, "chain: a linear has a weight and a bias for each result");
    const int64_t k = value(step.operands[0]).n;
    for (size_t i = 1; i < step.operands.size(); i += 2) {
      const MaybeTensor bias = maybe_weight(step.operands[i + 1]);
      const Tensor& first = weight(step.operands[i], step.tensors() - 1);
      if (step.scheme) {
        quantized_.tasks.push_back(task_of(*step.scheme, weights_.slice(step.operands[i].index, step.tensors()), k, like_.scalar_type(), bias));
      } else {
        TORCH_CHECK(first.size(-1) == k && kernel_takes(like_.scalar_type(), first, bias), "chain: a weight ", first.sizes(), " of ", first.dtype(),
                    " is not for ", k, " columns of ", like_.dtype());
        plain_.tasks.push_back(task_of(first, bias, nullptr));
      }
      values_.push_back({first.size(0)});
    }
    step.scheme ? quantized_.ends.push_back(quantized_.tasks.size()) : plain_.ends.push_back(plain_.tasks.size());
  }

  // The outputs, and the places of all other values.
  void lay_out() {
    const bool given = !outs_.empty();
    TORCH_CHECK(!given || outs_.size() == steps_.outputs.size(), "chain: memory for ", outs_.size(), " of ", steps_.outputs.size(), " results");
    for (size_t i = 0; i < steps_.outputs.size(); ++i) {
      const int64_t output = steps_.outputs[i];
      TORCH_CHECK(output >= int64_t(rows_.size()) && output < int64_t(values_.size()), "chain: v", output, " is no result");
      Value& value = values_[output];
      if (!given) outs_.push_back(at::empty(out_sizes(like_, value.n), like_.options().requires_grad(false)));
      const Tensor& out = outs_[i];
      TORCH_CHECK(out.numel() == m_ * value.n && out.is_contiguous() && out.scalar_type() == like_.scalar_type(), "chain: ", m_, " rows of ", value.n,
                  " elements do not go into memory of ", out.sizes(), " ", out.dtype());
      value.shared = out.mutable_data_ptr();
    }
    // What threads share may be in use until they have waited for each other.
    c10::SmallVector<std::pair<size_t, size_t>, 8> read;
    auto bytes_of = [&](const Value& value) { return size_t(m_ * value.n * like_.element_size()); };
    size_t next = rows_.size(), attend = 0;
    for (const Step& step : steps_.all) {
      for (size_t i = 0; i < step.results(); ++i, ++next) {
        Value& value = values_[next];
        if (value.row_step || !value.shared) value.place = (value.row_step ? own_ : shared_).take(bytes_of(value));
      }
      for (const int64_t index : step.last_reads) {
        const Value& value = values_[index];
        if (index < int64_t(rows_.size())) continue;
        if (value.row_step)
          own_.give_back(value.place, bytes_of(value));
        else if (!value.shared)
          read.emplace_back(value.place, bytes_of(value));
      }
      if (step.kind == Step::attend) {
        const size_t bytes = attends_[attend++].part_bytes();
        parts_.push_back(shared_.take(bytes));
        read.emplace_back(parts_.back(), bytes);
      }
      if (step.kind == Step::rows) continue;
      for (const auto& [place, bytes] : read) shared_.give_back(place, bytes);
      read.clear();
    }
  }

  void set_outs(char* memory) {
    size_t next = rows_.size(), plain = 0, quantized = 0, attend = 0;
    for (const Step& step : steps_.all)
      for (size_t i = 0; i < step.results(); ++i, ++next) {
        void* out = values_[next].shared;
        if (step.kind == Step::linear) (step.scheme ? quantized_.tasks[quantized++].out : plain_.tasks[plain++].out) = out;
        if (step.kind == Step::attend) attends_[attend].set_memory(memory + parts_[attend], out), ++attend;
      }
  }

  // threads: as many as came, which may be fewer than were asked for.
  void run_thread(int64_t thread, int64_t threads, char* own, void* work_memory) {
    auto memory_of = [&](const Value& value) -> void* { return value.shared && (!value.row_step || thread == 0) ? value.shared : own + value.place; };
    size_t next = rows_.size(), plain = 0, quantized = 0, attend = 0;
    for (const Step& step : steps_.all) {
      const Value& x = values_[step.operands[0].index];
      if (step.kind == Step::rows) {
        row_step(step, memory_of, values_[next]);
      } else if (step.kind == Step::attend) {
        const Attend& task = attends_[attend++];
        auto rows = [&](size_t i) { return memory_of(values_[step.operands[i].index]); };
        for (int64_t part = thread; part < task.threads(); part += threads) task.run(part, rows(0), rows(1), rows(2), work_memory);
        if (task.merges()) {
#pragma omp barrier
          task.merge(thread, threads);
        }
#pragma omp barrier
      } else {
        auto scratch_memory = [&] { return work_memory; };
        if (step.scheme)
          quantized_.decodes[quantized++].run(thread, memory_of(x), x.n, scratch_memory);
        else
          plain_.decodes[plain++].run(thread, memory_of(x), x.n, scratch_memory);
        if (&step != &steps_.all.back()) {
#pragma omp barrier
        }
      }
      next += step.results();
    }
  }

  template <class Memory>
  void row_step(const Step& step, const Memory& memory_of, const Value& result) const {
    RowTask task{step.op};
    auto place = [&](size_t i) -> const void* {
      if (i >= step.operands.size()) return nullptr;
      const Operand& operand = step.operands[i];
      if (operand.kind == Operand::value) return memory_of(values_[operand.index]);
      return operand.kind == Operand::weight ? weights_[operand.index].const_data_ptr() : nullptr;
    };
    task.a = place(0), task.b = place(1), task.c = place(2);
    task.out = memory_of(result);
    const int64_t size = head_size(step, result.n);
    task.m = m_, task.n = task.lda = result.n;
    if (task.op == RowOp::rope) {
      task.width = size, task.period = weights_[step.operands[1].index].numel() / size, task.interleaved = step.number(4) != 0;
    } else {
      task.m = m_ * (result.n / size), task.n = task.lda = size;
    }
    const bool norm = task.op == RowOp::rms_norm || task.op == RowOp::layer_norm;
    if (norm) {
      const bool layer = task.op == RowOp::layer_norm;
      task.number = float(step.number(layer ? 3 : 2)), task.offset = layer ? 0 : float(step.number(3)), task.cast_first = !layer && step.number(4) != 0;
      if (!layer) task.c = nullptr;
    } else {
      task.number = float(step.number(1));
      task.ldb = step.operands.size() > 1 && step.operands[1].kind == Operand::value ? result.n : 0;
    }
    kernels().row_step(dtype_, task);
  }

  const Steps& steps_;
  at::TensorList weights_, rooms_;
  const Tensor& like_;
  std::vector<Tensor> outs_;
  Dtype dtype_{};
  int64_t m_ = 0;
  c10::SmallVector<Tensor, 4> rows_;
  c10::SmallVector<Value, 24> values_;
  Places shared_, own_;
  Linears<LinearTask> plain_;
  Linears<QuantizedTask> quantized_;
  std::deque<Attend> attends_;
  c10::SmallVector<size_t, 4> parts_;  // of each attention, in shared memory
};

std::vector<Tensor> chain_cpu(at::TensorList values, at::TensorList weights, at::TensorList rooms, c10::string_view steps) {
  TORCH_CHECK(!values.empty(), "chain: no values");
  return Chain(steps_of(steps), values, weights, rooms).run();
}

// With the outputs in memory that is there already.
void chain_into_cpu(at::TensorList values, at::TensorList weights, at::TensorList rooms, at::TensorList outs, c10::string_view steps) {
  TORCH_CHECK(!values.empty() && !outs.empty(), "chain: no values, or no memory for results");
  Chain(steps_of(steps), values, weights, rooms, outs).run();
}

std::vector<Tensor> chain_meta(at::TensorList values, at::TensorList weights, at::TensorList rooms, c10::string_view text) {
  const Steps& steps = steps_of(text);
  std::vector<c10::SymInt> sizes;
  for (const Tensor& value : values) sizes.push_back(value.sym_size(-1));
  for (const Step& step : steps.all)
    for (size_t i = 0; i < step.results(); ++i) {
      const auto first = sizes[step.operands[0].index];
      if (step.kind == Step::linear) sizes.push_back(weights[step.operands[2 * i + 1].index].sym_size(0));
      if (step.kind == Step::rows) sizes.push_back(first);
      if (step.kind != Step::attend) continue;
      const Tensor &keys = rooms[step.operands[3].index], &values = rooms[step.operands[4].index];
      sizes.push_back(first / keys.sym_size(3) * values.sym_size(3));
    }
  std::vector<Tensor> outs;
  for (const int64_t output : steps.outputs) {
    auto size = values[0].sym_sizes().vec();
    size.back() = sizes[output];
    outs.push_back(values[0].new_empty_symint(size));
  }
  return outs;
}

TORCH_LIBRARY_FRAGMENT(graphopt_cpp, m) {
  // Rooms are written as well: only what the next one says of itself may stand in a graph that has any.
  m.def("chain(Tensor[] values, Tensor[] weights, Tensor[] rooms, str steps) -> Tensor[]", {at::Tag::pt2_compliant_tag});
  m.def("chain_into(Tensor[] values, Tensor[] weights, Tensor(a!)[] rooms, Tensor(b!)[] outs, str steps) -> ()", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(graphopt_cpp, CPU, m) {
  m.impl("chain", chain_cpu);
  m.impl("chain_into", chain_into_cpu);
}

TORCH_LIBRARY_IMPL(graphopt_cpp, Meta, m) {
  m.impl("chain", chain_meta);
  m.impl("chain_into", [](at::TensorList, at::TensorList, at::TensorList, at::TensorList, c10::string_view) {});
}

}  // namespace
}  // namespace graphopt
