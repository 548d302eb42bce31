// Skeleton 1: few rows of x, in integers. Written once over V, which an instruction set provides.
#pragma once
#include "weight.h"

namespace {

using namespace qcpu;

// The codes of a unit, 4 columns of 16 rows at a time. Bits add up from planes of 4, 2 and 1, or are one plane of 8.
template <class V, int kBits>
struct Unit {
  static constexpr bool kFour = (kBits & 4) != 0, kTwo = (kBits & 2) != 0, kOne = (kBits & 1) != 0;
  static constexpr int kTwoAt = kFour ? 256 : 0, kOneAt = kTwoAt + (kTwo ? 128 : 0);
  static constexpr int kTwoShift = kFour ? 4 : 0, kOneShift = kTwoShift + (kTwo ? 2 : 0);

  static inline typename V::Bytes step(const uint8_t* unit, int s) {
    if constexpr (kBits == 8) {
      return V::load(unit + 64 * s);
    } else {
      typename V::Bytes codes = V::no_bytes();
      if constexpr (kFour) codes = V::mask(V::right(V::load(unit + 64 * (s / 2)), 4 * (s % 2)), 15);
      if constexpr (kTwo) {
        const typename V::Bytes two = V::mask(V::right(V::load(unit + kTwoAt + 64 * (s / 4)), 2 * (s % 4)), 3);
        codes = V::either(codes, V::left(two, kTwoShift));
      }
      if constexpr (kOne) {
        const typename V::Bytes one = V::mask(V::right(V::load(unit + kOneAt), s), 1);
        codes = V::either(codes, V::left(one, kOneShift));
      }
      return codes;
    }
  }
};

// Scale and zero of 16 rows in one group.
template <class V>
struct Factors {
  typename V::Floats scale, zero;

  static inline Factors of(const Weight& w, int64_t block, int64_t group) {
    const int64_t at = (block * w.groups + group) * kRows;
    return {w.scale_type ? V::load_any(w.scale, w.scale_type, at) : V::all(1.0f),
            w.zero_type ? V::load_any(w.zero, w.zero_type, at) : V::all(w.zero_of_all)};
  }
};

template <class V, int kBits, int kM, bool kRounded, bool kMapped>
struct Dot {
  using Sums = typename V::template Sums<kRounded>;
  static constexpr int kStep = kRounded ? 4 : 8;

  const Weight& w;
  const Integers& x;
  const int64_t m0, block;
  const uint8_t* q[kM];
  typename V::Floats total[kM];
  Sums sums[kM];
  typename V::Small small;

  inline void add(const uint8_t* unit, int s, int64_t column) {
    typename V::Bytes codes = Unit<V, kBits>::step(unit, s);
    if constexpr (kMapped) codes = V::map(codes, small);
    const auto ready = V::template ready<kRounded, kBits>(codes);
#pragma GCC unroll 8
    for (int m = 0; m < kM; m++) V::template add<kRounded>(sums[m], ready, q[m] + column / 4 * kStep);
  }

  inline void finish(int64_t chunk) {
    const Factors<V> factors = Factors<V>::of(w, block, chunk * w.chunk / w.group);
    auto zero = kMapped ? V::all(w.small_zero) : factors.zero;
    if constexpr (V::template kOffset<kRounded, kBits> != 0)
      zero = V::minus(zero, V::all(float(V::template kOffset<kRounded, kBits>)));
    const auto scale = kMapped ? V::times(factors.scale, V::all(w.small_unit)) : factors.scale;
#pragma GCC unroll 8
    for (int m = 0; m < kM; m++) {
      const int64_t at = (m0 + m) * w.chunks + chunk;
      const auto product = V::times(V::template sum<kRounded>(sums[m]), V::all(x.scale[at]));
      total[m] = V::plus(V::minus_product(product, zero, V::all(x.sum[at])), scale, total[m]);
      sums[m] = V::template no_sums<kRounded>();
    }
  }

  void run(float* y, int64_t ldy) {
    small = kMapped ? V::load_small(w.small) : V::no_small();
    for (int m = 0; m < kM; m++) {
      q[m] = x.q + (m0 + m) * x.row_bytes;
      total[m] = V::all(0.0f);
      sums[m] = V::template no_sums<kRounded>();
    }
    if (w.chunk < kColumns) by_parts_of_units();
    else by_units();
    for (int m = 0; m < kM; m++) V::store(y + m * ldy, total[m]);
  }

  void by_units() {
    const uint8_t* unit = codes_of(w, block);
    const int64_t per = w.chunk / kColumns;
    for (int64_t u = 0, chunk = 0; chunk < w.chunks; chunk++) {
      for (const int64_t stop = least(u + per, w.units); u < stop; u++, unit += 64 * kBits) {
        V::prefetch(unit + 2048, 64 * kBits);
#pragma GCC unroll 8
        for (int s = 0; s < 8; s++) add(unit, s, u * kColumns + 4 * s);
      }
      finish(chunk);
    }
  }

  void by_parts_of_units() {
    const uint8_t* unit = codes_of(w, block);
    const int steps = int(w.chunk / 4);
    for (int64_t u = 0, chunk = 0; u < w.units; u++, unit += 64 * kBits)
      for (int s = 0; s < 8;) {
        for (const int stop = s + steps; s < stop; s++) add(unit, s, u * kColumns + 4 * s);
        finish(chunk++);
      }
  }
};

template <class V, int kBits, bool kRounded, bool kMapped, int kM>
inline void dot_tile(const Weight& w, const Integers& x, int64_t m, int64_t block, float* y, int64_t ldy) {
  Dot<V, kBits, kM, kRounded, kMapped> dot{w, x, m, block, {}, {}, {}, {}};
  dot.run(y + m * ldy, ldy);
}

template <class V, int kBits, bool kRounded, bool kMapped>
void dot_rows(const Weight& w, const Integers& x, int64_t block, float* y, int64_t ldy) {
  constexpr int kMost = V::kDotRows;
  int64_t m = 0;
  for (; m + kMost <= x.rows; m += kMost) dot_tile<V, kBits, kRounded, kMapped, kMost>(w, x, m, block, y, ldy);
  if constexpr (kMost > 2)
    for (; m + 2 <= x.rows; m += 2) dot_tile<V, kBits, kRounded, kMapped, 2>(w, x, m, block, y, ldy);
  for (; m < x.rows; m++) dot_tile<V, kBits, kRounded, kMapped, 1>(w, x, m, block, y, ldy);
}

using DotRows = void(const Weight&, const Integers&, int64_t, float*, int64_t);

template <class V>
void dot_exact(const Weight& w, const Integers& x, int64_t block, float* y, int64_t ldy) {
  static DotRows* const by_bits[] = {
      dot_rows<V, 1, false, false>, dot_rows<V, 2, false, false>, dot_rows<V, 3, false, false>,
      dot_rows<V, 4, false, false>, dot_rows<V, 5, false, false>, dot_rows<V, 6, false, false>,
      dot_rows<V, 7, false, false>, dot_rows<V, 8, false, false>,
  };
  const auto rows = w.element == QCPU_TABLE ? dot_rows<V, 4, false, true> : by_bits[w.bits - 1];
  rows(w, x, block, y, ldy);
}

// Only of 4 bits, and of 8 where V takes them, as the plan of a product knows.
template <class V>
void dot_rounded(const Weight& w, const Integers& x, int64_t block, float* y, int64_t ldy) {
  const auto mapped = dot_rows<V, 4, true, true>, four = dot_rows<V, 4, true, false>;
  const auto eight = dot_rows<V, 8, V::kRoundsBytes, false>;
  const auto rows = w.element == QCPU_TABLE ? mapped : w.bits == 4 ? four : eight;
  rows(w, x, block, y, ldy);
}

template <class V>
void dot(const Weight& w, const Integers& x, int64_t block, float* y, int64_t ldy) {
  x.rounded ? dot_rounded<V>(w, x, block, y, ldy) : dot_exact<V>(w, x, block, y, ldy);
}

// The integers of a chunk of a row, in V's order within 4 columns.
template <class V>
void integers(const float* x, int64_t count, bool rounded, uint8_t* q, float* scale, float* sum) {
  uint32_t top = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  float largest;
  __builtin_memcpy(&largest, &top, 4);
  const bool finite = top < 0x7f800000u, tiny = largest < 1e-34f;  // below that the reciprocal is not finite
  const float most = rounded ? kMostRounded : kMostExact;
  const float inverse = finite && !tiny ? most / largest : 0.0f;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
  alignas(64) int32_t whole[kChunk];
  int32_t all = 0;
  for (int64_t i = 0; i < count; i++) {
    const float shifted = (finite ? x[i] : 0.0f) * inverse + magic;
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    whole[i] = bits - 0x4b400000;
    all += whole[i];
  }
  *scale = finite ? (tiny ? 0.0f : largest / most) : __builtin_nanf("");
  *sum = *scale * float(all);
  rounded ? V::write_rounded(whole, count, q) : V::write_exact(whole, count, q);
}

}  // namespace
