// AVX-512 with products of bfloat16 pairs: a register holds two columns of 16 rows.
#include "avx512.h"

namespace {

struct Pairs : Avx512 {
  static inline Floats plus(Floats x, Floats y, Floats z) { return _mm512_dpbf16_ps(z, __m512bh(x), __m512bh(y)); }
};

void round_pairs(const float* panel, int64_t columns, float* pairs) {
  alignas(64) uint16_t from[32];  // lane n: row n of the first column, then of the second
  for (int i = 0; i < 32; i++) from[i] = uint16_t(i % 2 * 16 + i / 2);
  const __m512i order = _mm512_load_si512(from);
  for (int64_t k = 0; k < columns; k += 2, panel += 2 * kRows, pairs += kRows) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(panel + kRows), _mm512_loadu_ps(panel));
    _mm512_storeu_si512(pairs, _mm512_permutexvar_epi16(order, __m512i(both)));
  }
}

}  // namespace

namespace qcpu {

const PairKernels* avx512_bf16_pairs() {
  static constexpr PairKernels kernels = {Pairs::kTileRows, round_pairs, multiply<Pairs>};
  return &kernels;
}

}  // namespace qcpu
