// The steps of a chain as a text, made by chain.py, with values (v0, v1 ...: the inputs, then each step's results), weights (w0
// ...: also other tensors that are no rows) and rooms of caches (r0 ...):
//     linear plain v0 w0 w1; add v1 v2; rms_norm v3 w2 1e-06 0 1; linear int8-g64 v4 w3 - w5 -; out v3 v5
// A linear gives one result for each weight, by the weight's first tensor and its bias. Heads of rows are turned, and their new
// keys (v1) and values (v2) are stored in rooms and met there by the queries (v0), perhaps under a mask, by
//     rope v0 w0 w1 64 0; rope v1 w0 w1 64 0; attend v3 v4 v2 r0 r1 - 0.125 0 0 0; out v5
// where numbers are the size of a head and whether pairs are interleaved; scale, softcap, window, and whether rows that see no
// key are NaN.
#pragma once

#include <charconv>
#include <string>
#include <unordered_map>

#include "quantized_op.h"

namespace graphopt {
namespace {

struct Operand {
  enum Kind { none, value, weight, room, number } kind = none;
  int64_t index = 0;
  double amount = 0;
};

// Threads share the work of a linear and of attention, and wait for each other behind them; rows each computes for itself.
struct Step {
  enum Kind { rows, linear, attend } kind = rows;
  RowOp op{};                    // of rows
  std::optional<Scheme> scheme;  // of a linear's weights; none: plain ones
  std::vector<Operand> operands;
  std::vector<int64_t> last_reads;  // the values that no later step reads

  size_t tensors() const { return scheme ? scheme->parts() : 1; }  // of each weight
  size_t results() const { return kind == linear ? operands.size() / 2 : 1; }
  double number(size_t i) const { return i < operands.size() ? operands[i].amount : 0; }
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
  operand.kind = word[0] == 'v' ? Operand::value : word[0] == 'w' ? Operand::weight : word[0] == 'r' ? Operand::room : Operand::number;
  const char *begin = word.data() + (operand.kind != Operand::number), *end = word.data() + word.size();
  const auto read = operand.kind == Operand::number ? std::from_chars(begin, end, operand.amount) : std::from_chars(begin, end, operand.index);
  TORCH_CHECK(read.ec == std::errc() && read.ptr == end && operand.index >= 0, "chain: no operand '", word, "'");
  return operand;
}

Steps parsed(std::string_view text) {
  static const std::unordered_map<std::string_view, RowOp> ops = {
      {"add", RowOp::add},   {"mul", RowOp::mul},   {"cube", RowOp::cube},           {"relu", RowOp::relu},         {"tanh", RowOp::tanh},
      {"silu", RowOp::silu}, {"gelu", RowOp::gelu}, {"gelu_tanh", RowOp::gelu_tanh}, {"rms_norm", RowOp::rms_norm}, {"layer_norm", RowOp::layer_norm},
      {"rope", RowOp::rope},
  };
  Steps steps;
  while (!text.empty()) {
    const size_t length = std::min(text.find(';'), text.size());
    std::string_view words = text.substr(0, length);
    text.remove_prefix(std::min(length + 1, text.size()));
    const std::string_view name = next_word(words);
    Step step;
    if (name == "attend") {
      step.kind = Step::attend;
    } else if (name == "linear") {
      step.kind = Step::linear;
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
  std::unordered_map<int64_t, Step*> last;
  for (Step& step : steps.all)
    for (const Operand& operand : step.operands)
      if (operand.kind == Operand::value) last[operand.index] = &step;
  for (const auto& [value, step] : last) step->last_reads.push_back(value);
  return steps;
}

// The parsed steps of a text, which compiled graphs give again and again.
const Steps& steps_of(c10::string_view text) {
  thread_local std::unordered_map<std::string, Steps> known;
  std::string key(text.data(), text.size());
  const auto found = known.find(key);
  return found != known.end() ? found->second : known.emplace(key, parsed(key)).first->second;
}

}  // namespace
}  // namespace graphopt
