#include "avx512.h"

namespace qcpu {

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = kernels_of<Avx512>("avx512");
  return &kernels;
}

}  // namespace qcpu
