#define QCPU_NEON_DOT
#define QCPU_NEON_I8MM
#include "neon.h"

namespace qcpu {

const Kernels* i8mm_kernels() {
  static constexpr Kernels kernels = kernels_of<Neon<kMatrixInt8>>("i8mm");
  return &kernels;
}

}  // namespace qcpu
