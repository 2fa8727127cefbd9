// The library that torch loads: all operators, in one translation unit because reading torch's headers is most of its
// compile time. The kernels they call come from tables that are libraries of their own (kernels.cpp).
#include "direct.h"

#include <torch/library.h>

#include <memory>
#include <new>

#include "attention_op.h"
#include "attention_paged_op.h"
#include "attention_quantized_op.h"
#include "chain_op.h"
#include "kernels.h"
#include "linear_op.h"
#include "operators.h"
#include "quantized_op.h"
#include "reserve.h"
#include "tables.h"
#include "unchanged.h"

namespace graphopt {

void* scratch(Scratch use, size_t bytes) {
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  struct Block {
    std::unique_ptr<void, Free> memory;
    size_t capacity = 0;
  };
  thread_local Block blocks[2];
  Block& block = blocks[static_cast<int>(use)];
  if (bytes > block.capacity) {
    block.memory.reset();
    block.capacity = 0;
    block.memory.reset(::operator new(bytes, std::align_val_t{64}));
    block.capacity = bytes;
  }
  return block.memory.get();
}

namespace {

TORCH_LIBRARY(graphopt_cpp, m) {
  m.def("add_table(str path) -> ()", add_table);
  m.def("isa() -> str", isa);
  m.def("set_isa(str name) -> ()", set_isa);
  m.def("may_use_tiles() -> bool", may_use_tiles);
}

}  // namespace
}  // namespace graphopt

// The module of the direct functions: those of torch.ops.graphopt_cpp that compiled graphs call, what guards packs,
// and what makes room in caches.
extern "C" __attribute__((visibility("default"))) PyObject* graphopt_direct() {
  using namespace graphopt;
  static PyMethodDef functions[] = {
      direct<grouped_linear_cpu>("grouped_linear"),
      direct<linear_cpu>("linear"),
      direct<parallel_linear>("parallel_linear"),
      direct<quantized_linear_cpu>("quantized_linear"),
      direct<parallel_quantized_linear>("parallel_quantized_linear"),
      direct<quantized_embedding_cpu>("quantized_embedding"),
      direct<chain_cpu>("chain"),
      direct<chain_into_cpu>("chain_into"),
      direct<attention_cpu>("attention"),
      direct<quantized_cache::attention_quantized_cpu>("attention_quantized"),
      direct<paged_cache::attention_paged_cpu>("attention_paged"),
      direct<unchanged>("unchanged"),
      {"reserve", reserve, METH_O, nullptr},
      {nullptr, nullptr, 0, nullptr},
  };
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "graphopt_direct", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
