// Which instruction sets this machine runs, and which of the compiled tables is in use.
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace graphopt {
namespace {

#if defined(__x86_64__)

struct Features {
  bool avx2 = false, avx512 = false, avx512vnni = false, avx512bf16 = false, amx = false;

  Features() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return;
    const bool fma = c & bit_FMA, f16c = c & bit_F16C;
    // A register file is usable only if the system saves it on a context switch.
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool saves_ymm = (low & 0x6) == 0x6, saves_zmm = (low & 0xe6) == 0xe6, saves_tiles = (low & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = saves_ymm && fma && f16c && (b & bit_AVX2);
    avx512 = avx2 && saves_zmm && (b & bit_AVX512F) && (b & bit_AVX512BW) && (b & bit_AVX512DQ) && (b & bit_AVX512VL);
    avx512vnni = avx512 && (c & (1u << 11));
    const bool tile = d & (1u << 24), tile_bf16 = d & (1u << 22);
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return;
    avx512bf16 = avx512vnni && (a & (1u << 5));
    amx = avx512bf16 && tile && tile_bf16 && saves_tiles && may_use_tiles();
  }

  // Linux grants the tile registers to a process, with all its threads, only when asked.
  static bool may_use_tiles() {
#if defined(__linux__)
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
  }
};

std::vector<const Kernels*> runnable_tables() {
  const Features cpu;
  std::vector<const Kernels*> tables;
  const std::pair<bool, const Kernels*> known[] = {
      {cpu.amx, amx_kernels()},       {cpu.avx512bf16, avx512bf16_kernels()}, {cpu.avx512vnni, avx512vnni_kernels()},
      {cpu.avx512, avx512_kernels()}, {cpu.avx2, avx2_kernels()},             {true, plain_kernels()},
  };
  for (auto [runs, table] : known)
    if (runs && table) tables.push_back(table);
  return tables;
}

#else

std::vector<const Kernels*> runnable_tables() { return {plain_kernels()}; }

#endif

const std::vector<const Kernels*>& tables() {
  static const std::vector<const Kernels*> found = runnable_tables();
  return found;
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = selected.load(std::memory_order_acquire);
  return table ? *table : *tables().front();
}

bool select_isa(const char* name) {
  if (!*name) return selected = nullptr, true;
  for (const Kernels* table : tables())
    if (!std::strcmp(table->isa, name)) return selected = table, true;
  return false;
}

const char* runnable_isas() {
  static const std::string names = [] {
    std::string all;
    for (const Kernels* table : tables()) all += (all.empty() ? "" : " ") + std::string(table->isa);
    return all;
  }();
  return names.c_str();
}

}  // namespace graphopt
