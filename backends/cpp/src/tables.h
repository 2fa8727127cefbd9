// The tables of kernels that were loaded, each compiled for one instruction set, and which of them is in use.
#pragma once

#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace graphopt {
namespace {

std::mutex tables_lock;
std::vector<const Kernels*> tables;  // in the order of loading: the first is the best this machine runs
std::atomic<const Kernels*> selected{nullptr};

// Empty before a table is loaded.
std::string isa() { return selected ? kernels().isa : ""; }

// Process wide, as set_isa is: neither is for use while operators run.
void add_table(std::string path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library, "add_table: ", dlerror());
  auto* table_of = reinterpret_cast<decltype(&graphopt_table)>(dlsym(library, "graphopt_table"));
  TORCH_CHECK(table_of, "add_table: ", dlerror());
  std::lock_guard hold(tables_lock);
  if (std::find(tables.begin(), tables.end(), table_of()) == tables.end()) tables.push_back(table_of());
  if (!selected) selected = tables.front();
}

// For tests and measurements. Empty: back to the best.
void set_isa(std::string name) {
  std::lock_guard hold(tables_lock);
  std::string names;
  for (const Kernels* table : tables) {
    if (name.empty() || name == table->isa) {
      selected = table;
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(table->isa);
  }
  TORCH_CHECK(false, "set_isa: '", name, "' is not one of those loaded: ", names);
}

// Linux grants the tile registers to a process, with all its threads, only when asked.
bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace

const Kernels& kernels() {
  const Kernels* table = selected.load(std::memory_order_acquire);
  TORCH_CHECK(table, "graphopt's C++ kernels: no table was loaded");
  return *table;
}

}  // namespace graphopt
