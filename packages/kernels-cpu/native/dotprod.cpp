#define QCPU_NEON_DOT
#include "neon.h"

namespace qcpu {

const Kernels* dotprod_kernels() {
  static constexpr Kernels kernels = kernels_of<Neon<kDotProduct>>("dotprod");
  return &kernels;
}

}  // namespace qcpu
