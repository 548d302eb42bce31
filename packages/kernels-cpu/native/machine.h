// Which instruction sets this library has, this processor runs, and a call uses.
#pragma once
#include "weight.h"

namespace qcpu {

struct Machine {
  const char* name;
  const Kernels* kernels;
  const PairKernels* pairs;  // null where they gain nothing
};

const Machine& machine();  // the one in use

}  // namespace qcpu
