#include "neon.h"

namespace qcpu {

const Kernels* neon_kernels() {
  static constexpr Kernels kernels = kernels_of<Neon<kPlain>>("neon");
  return &kernels;
}

}  // namespace qcpu
