#include "machine.h"

#include <string.h>

#include <atomic>

#if defined(QCPU_X86)
#include <cpuid.h>
#elif defined(QCPU_ARM)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace qcpu {
namespace {

#if defined(QCPU_X86)

struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Leaf(unsigned leaf, unsigned part) { __get_cpuid_count(leaf, part, &a, &b, &c, &d); }
};

bool has(unsigned word, int bit) { return word >> bit & 1; }

uint64_t saved_state() {  // which registers the system saves
  if (!has(Leaf(1, 0).c, 27)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

bool has_avx2() {
  const Leaf one(1, 0), seven(7, 0);
  return (saved_state() & 6) == 6 && has(one.c, 12) && has(one.c, 29) && has(seven.b, 5);
}

#if defined(QCPU_HAS_AVX512)
bool has_avx512() {
  const Leaf seven(7, 0);
  const bool base = has(seven.b, 16) && has(seven.b, 17) && has(seven.b, 30) && has(seven.b, 31);
  return has_avx2() && (saved_state() & 0xe6) == 0xe6 && base && has(seven.c, 1) && has(seven.c, 11);
}
#endif

#if defined(QCPU_HAS_AVX512_BF16)
// Intel's processors take four times as long for a product of pairs as for one of floats, AMD's as long.
bool has_fast_pairs() {
  unsigned most, b = 0, c = 0, d = 0;
  __get_cpuid(0, &most, &b, &c, &d);
  const bool is_amd = b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
  return is_amd && has_avx512() && has(Leaf(7, 1).a, 5);
}
#endif

#elif defined(QCPU_ARM)

#if defined(__linux__)
bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1); }
#elif defined(__APPLE__)
bool has(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_dotprod() && has("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif

#endif

bool always() { return true; }
const PairKernels* no_pairs() { return nullptr; }

struct Candidate {
  const char* name;
  bool (*runs)();
  const Kernels* (*kernels)();
  const PairKernels* (*pairs)();
};

const Candidate kCandidates[] = {  // best first
#if defined(QCPU_X86)
#if defined(QCPU_HAS_AVX512_BF16)
    {"avx512_bf16", has_fast_pairs, avx512_kernels, avx512_bf16_pairs},
#endif
#if defined(QCPU_HAS_AVX512)
    {"avx512", has_avx512, avx512_kernels, no_pairs},
#endif
    {"avx2", has_avx2, avx2_kernels, no_pairs},
#elif defined(QCPU_ARM)
    {"i8mm", has_i8mm, i8mm_kernels, no_pairs},
    {"dotprod", has_dotprod, dotprod_kernels, no_pairs},
    {"neon", always, neon_kernels, no_pairs},
#endif
    {"generic", always, generic_kernels, no_pairs},
};
constexpr int kCount = sizeof kCandidates / sizeof kCandidates[0];

// Found when the library is loaded; nothing changes it but `qcpu_use`.
struct Found {
  Machine machines[kCount];
  int count = 0;
  char names[128] = "";

  Found() {
    for (const Candidate& candidate : kCandidates) {
      if (!candidate.runs()) continue;
      machines[count++] = {candidate.name, candidate.kernels(), candidate.pairs()};
      if (names[0]) strcat(names, " ");
      strcat(names, candidate.name);
    }
  }
};

const Found found;
std::atomic<int> used{0};

}  // namespace

const Machine& machine() { return found.machines[used.load(std::memory_order_relaxed)]; }

}  // namespace qcpu

extern "C" {

const char* qcpu_available(void) { return qcpu::found.names; }
const char* qcpu_isa(void) { return qcpu::machine().name; }

int qcpu_use(const char* isa) {
  if (!isa || !*isa) {
    qcpu::used = 0;
    return QCPU_OK;
  }
  for (int i = 0; i < qcpu::found.count; i++)
    if (strcmp(qcpu::found.machines[i].name, isa) == 0) {
      qcpu::used = i;
      return QCPU_OK;
    }
  return QCPU_NOT_HERE;
}

}
