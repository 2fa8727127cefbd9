// What is neither a kernel nor one operator: scratch memory and the choice of instruction set.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <memory>
#include <new>

#include "kernels.h"
#include "operators.h"

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

std::string isa() { return kernels().isa; }
std::string isas() { return runnable_isas(); }

// Process wide; for tests and measurements, not while operators run.
void set_isa(std::string name) {
  TORCH_CHECK(select_isa(name.c_str()), "set_isa: '", name, "' is not one of: ", runnable_isas());
}

TORCH_LIBRARY(graphopt_cpp, m) {
  m.def("isa() -> str", isa);
  m.def("isas() -> str", isas);
  m.def("set_isa(str name) -> ()", set_isa);
}

}  // namespace
}  // namespace graphopt
