// graphopt_cpp::chain as a torch operator: a few rows through linears and the steps between them, in one parallel region.
//
// Steps are a text, made by chain.py, with values (v0, v1 ...: the inputs, then each step's results) and weights (w0 ...):
//     linear plain v0 w0 w1; add v1 v2; rms_norm v3 w2 1e-06 0 1; linear int8-g64 v4 w3 - w5 -; out v3 v5
// A linear gives one result for each weight, by the weight's first tensor and its bias. Threads share a linear's rows, and
// wait for each other behind it; what lies between linears each of them computes for itself, which is cheaper than to wait.
#pragma once

#include <omp.h>
#include <torch/library.h>

#include <charconv>
#include <deque>
#include <string>
#include <unordered_map>

#include "decode.h"
#include "linear_op.h"
#include "quantized_op.h"

namespace graphopt {
namespace {

struct Operand {
  enum Kind { none, value, weight, number } kind = none;
  int64_t index = 0;
  float amount = 0;
};

struct Step {
  std::optional<RowOp> op;       // none: a linear
  std::optional<Scheme> scheme;  // of a linear's weights; none: plain ones
  std::vector<Operand> operands;
  size_t tensors() const { return scheme ? scheme->parts() : 1; }  // of each weight
  size_t results() const { return op ? 1 : operands.size() / 2; }
};

struct Steps {
  std::vector<Step> all;
  std::vector<int64_t> outputs;
};

// The next word of a text, which is taken off it.
std::string_view next_word(std::string_view& text) {
  const size_t begin = std::min(text.find_first_not_of(' '), text.size()), end = std::min(text.find(' ', begin), text.size());
  const std::string_view word = text.substr(begin, end - begin);
  text.remove_prefix(end);
  return word;
}

Operand operand_of(std::string_view word) {
  Operand operand;
  if (word == "-") return operand;
  operand.kind = word[0] == 'v' ? Operand::value : word[0] == 'w' ? Operand::weight : Operand::number;
  const char *begin = word.data() + (operand.kind != Operand::number), *end = word.data() + word.size();
  const auto read = operand.kind == Operand::number ? std::from_chars(begin, end, operand.amount) : std::from_chars(begin, end, operand.index);
  TORCH_CHECK(read.ec == std::errc() && read.ptr == end && operand.index >= 0, "chain: no operand '", word, "'");
  return operand;
}

Steps parsed(std::string_view text) {
  static const std::unordered_map<std::string_view, RowOp> ops = {
      {"add", RowOp::add},   {"mul", RowOp::mul},   {"cube", RowOp::cube},           {"relu", RowOp::relu},         {"tanh", RowOp::tanh},
      {"silu", RowOp::silu}, {"gelu", RowOp::gelu}, {"gelu_tanh", RowOp::gelu_tanh}, {"rms_norm", RowOp::rms_norm}, {"layer_norm", RowOp::layer_norm},
  };
  Steps steps;
  while (!text.empty()) {
    const size_t length = std::min(text.find(';'), text.size());
    std::string_view words = text.substr(0, length);
    text.remove_prefix(std::min(length + 1, text.size()));
    const std::string_view name = next_word(words);
    Step step;
    if (name == "linear") {
      if (const std::string_view scheme = next_word(words); scheme != "plain") step.scheme = scheme_of(scheme);
    } else if (const auto found = ops.find(name); found != ops.end()) {
      step.op = found->second;
    } else {
      TORCH_CHECK(name == "out", "chain: no step '", name, "'");
    }
    while (words.find_first_not_of(' ') != words.npos) step.operands.push_back(operand_of(next_word(words)));
    if (name != "out") {
      TORCH_CHECK(!step.operands.empty() && step.operands[0].kind == Operand::value, "chain: '", name, "' begins with a value");
      steps.all.push_back(std::move(step));
      continue;
    }
    for (const Operand& operand : step.operands) steps.outputs.push_back(operand.index);
  }
  return steps;
}

// The parsed steps of a text, which compiled graphs give again and again.
const Steps& steps_of(c10::string_view text) {
  thread_local std::unordered_map<std::string, Steps> known;
  std::string key(text.data(), text.size());
  const auto found = known.find(key);
  return found != known.end() ? found->second : known.emplace(key, parsed(key)).first->second;
}

// One call.
class Chain {
 public:
  Chain(const Steps& steps, at::TensorList inputs, at::TensorList weights) : steps_(steps), weights_(weights), like_(inputs[0]) {
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
    for (const Step& step : steps_.all) step.op ? add_rows(step) : add_linear(step);
    lay_out();
  }

  std::vector<Tensor> run() {
    const int64_t threads = std::max(plain_.threads(dtype_), quantized_.threads(dtype_));
    const size_t pack_bytes = std::max(plain_.prepare(dtype_, m_, threads), quantized_.prepare(dtype_, m_, threads));
    const size_t own_bytes = own_ + aligned(pack_bytes);
    char* memory = static_cast<char*>(scratch(Scratch::per_call, shared_ + threads * own_bytes));
    for (Value& value : values_)
      if (!value.shared && !value.row_step) value.shared = memory + value.place;
    set_outs();
#pragma omp parallel num_threads(threads)
    {
      const int64_t thread = omp_get_thread_num();
      char* own = memory + shared_ + thread * own_bytes;
      run_thread(thread, own, own + own_);
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

  static size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

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

  void add_rows(const Step& step) {
    const int64_t n = value(step.operands[0]).n;
    for (const Operand& operand : step.operands) {
      if (operand.kind == Operand::value) TORCH_CHECK(value(operand).n == n, "chain: rows of ", n, " and of ", value(operand).n, " elements");
      if (operand.kind != Operand::weight) continue;
      const Tensor& row = weight(operand);
      TORCH_CHECK(row.dim() == 1 && row.size(0) == n && row.is_contiguous() && row.scalar_type() == like_.scalar_type(), "chain: ", row.sizes(), " of ",
                  row.dtype(), " is no row of ", n, " elements of ", like_.dtype());
    }
    values_.push_back({n, nullptr, true});
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
    for (const int64_t output : steps_.outputs) {
      TORCH_CHECK(output >= int64_t(rows_.size()) && output < int64_t(values_.size()), "chain: v", output, " is no result");
      outs_.push_back(at::empty(out_sizes(like_, values_[output].n), like_.options().requires_grad(false)));
      values_[output].shared = outs_.back().mutable_data_ptr();
    }
    for (size_t i = rows_.size(); i < values_.size(); ++i) {
      Value& value = values_[i];
      size_t& used = value.row_step ? own_ : shared_;
      if (value.row_step || !value.shared) value.place = used, used += aligned(m_ * value.n * like_.element_size());
    }
  }

  void set_outs() {
    size_t next = rows_.size(), plain = 0, quantized = 0;
    for (const Step& step : steps_.all)
      for (size_t i = 0; i < step.results(); ++i, ++next)
        if (!step.op) (step.scheme ? quantized_.tasks[quantized++].out : plain_.tasks[plain++].out) = values_[next].shared;
  }

  void run_thread(int64_t thread, char* own, void* pack_memory) {
    auto memory_of = [&](const Value& value) -> void* { return value.shared && (!value.row_step || thread == 0) ? value.shared : own + value.place; };
    size_t next = rows_.size(), plain = 0, quantized = 0;
    for (const Step& step : steps_.all) {
      const Value& x = values_[step.operands[0].index];
      if (step.op) {
        row_step(step, memory_of, values_[next]);
      } else {
        auto scratch_memory = [&] { return pack_memory; };
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
    RowTask task{*step.op};
    auto place = [&](size_t i) -> const void* {
      if (i >= step.operands.size()) return nullptr;
      const Operand& operand = step.operands[i];
      if (operand.kind == Operand::value) return memory_of(values_[operand.index]);
      return operand.kind == Operand::weight ? weights_[operand.index].const_data_ptr() : nullptr;
    };
    task.a = place(0), task.b = place(1), task.c = place(2);
    task.out = memory_of(result);
    task.m = m_, task.n = task.lda = result.n;
    const bool norm = task.op == RowOp::rms_norm || task.op == RowOp::layer_norm;
    auto number = [&](size_t i) { return i < step.operands.size() ? step.operands[i].amount : 0.0f; };
    if (norm) {
      const bool layer = task.op == RowOp::layer_norm;
      task.number = number(layer ? 3 : 2), task.offset = layer ? 0 : number(3), task.cast_first = !layer && number(4) != 0;
      if (!layer) task.c = nullptr;
    } else {
      task.number = number(1);
      task.ldb = step.operands.size() > 1 && step.operands[1].kind == Operand::value ? result.n : 0;
    }
    kernels().row_step(dtype_, task);
  }

  const Steps& steps_;
  at::TensorList weights_;
  const Tensor& like_;
  Dtype dtype_{};
  int64_t m_ = 0;
  c10::SmallVector<Tensor, 4> rows_;
  c10::SmallVector<Value, 24> values_;
  std::vector<Tensor> outs_;
  size_t shared_ = 0, own_ = 0;
  Linears<LinearTask> plain_;
  Linears<QuantizedTask> quantized_;
};

std::vector<Tensor> chain_cpu(at::TensorList values, at::TensorList weights, c10::string_view steps) {
  TORCH_CHECK(!values.empty(), "chain: no values");
  return Chain(steps_of(steps), values, weights).run();
}

std::vector<Tensor> chain_meta(at::TensorList values, at::TensorList weights, c10::string_view text) {
  const Steps& steps = steps_of(text);
  std::vector<c10::SymInt> sizes;
  for (const Tensor& value : values) sizes.push_back(value.sym_size(-1));
  for (const Step& step : steps.all)
    for (size_t i = 0; i < step.results(); ++i)
      sizes.push_back(step.op ? sizes[step.operands[0].index] : weights[step.operands[2 * i + 1].index].sym_size(0));
  std::vector<Tensor> outs;
  for (const int64_t output : steps.outputs) {
    auto size = values[0].sym_sizes().vec();
    size.back() = sizes[output];
    outs.push_back(values[0].new_empty_symint(size));
  }
  return outs;
}

TORCH_LIBRARY_FRAGMENT(graphopt_cpp, m) {
  m.def("chain(Tensor[] values, Tensor[] weights, str steps) -> Tensor[]", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(graphopt_cpp, CPU, m) { m.impl("chain", chain_cpu); }

TORCH_LIBRARY_IMPL(graphopt_cpp, Meta, m) { m.impl("chain", chain_meta); }

}  // namespace
}  // namespace graphopt
