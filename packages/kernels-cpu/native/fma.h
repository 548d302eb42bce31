// Skeleton 2: weights decoded to float32, multiplied in float32. Serves every element and any number of rows: many of
// them from panels in the first cache, a few from registers.
#pragma once
#include "dot.h"

namespace {

template <class V>
struct IntegerValues {
  static IntegerValues of(const Weight&) { return {}; }
  inline typename V::Floats operator()(typename V::Bytes codes, int j) const { return V::to_floats(V::byte(codes, j)); }
};

template <class V>
struct TableValues {  // up to 16 levels in registers
  typename V::Table table;
  static TableValues of(const Weight& w) {
    float levels[16];
    for (int i = 0; i < 16; i++) levels[i] = w.levels[i & ((1 << w.bits) - 1)];
    return {V::load_table(levels)};
  }
  inline typename V::Floats operator()(typename V::Bytes codes, int j) const { return V::look_up(table, codes, j); }
};

template <class V>
struct LevelValues {  // any levels, in memory
  const float* levels;
  static LevelValues of(const Weight& w) { return {w.levels}; }
  inline typename V::Floats operator()(typename V::Bytes codes, int j) const { return V::gather(levels, V::byte(codes, j)); }
};

template <class V>
struct FloatValues {  // one sign, float_exponent and float_mantissa bits
  int sign_shift, mantissa_shift;
  uint32_t sign, magnitude, first_normal, bias;
  float least;  // the value of magnitude 1
  static FloatValues of(const Weight& w) {
    const int width = w.float_exponent + w.float_mantissa;
    FloatValues f;
    f.sign = 1u << width, f.magnitude = f.sign - 1, f.sign_shift = 31 - width;
    f.mantissa_shift = 23 - w.float_mantissa, f.first_normal = 1u << w.float_mantissa;
    f.bias = uint32_t(127 - w.float_bias) << 23;
    const uint32_t least_bits = uint32_t(127 + 1 - w.float_bias - w.float_mantissa) << 23;
    __builtin_memcpy(&f.least, &least_bits, 4);
    return f;
  }
  inline typename V::Floats operator()(typename V::Bytes four, int j) const {
    const auto codes = V::byte(four, j);
    const auto size = V::mask_ints(codes, magnitude);
    const auto normal = V::as_floats(V::plus_ints(V::left_ints(size, mantissa_shift), bias));
    const auto small = V::times(V::to_floats(size), V::all(least));
    const auto value = V::if_less(size, first_normal, small, normal);
    return V::with_sign(value, V::left_ints(V::mask_ints(codes, sign), sign_shift));
  }
};

template <class V, int kBits, template <class> class Values>
void decode_units(const Weight& w, int64_t block, int64_t first, int64_t units, float* panel) {
  const Values<V> values = Values<V>::of(w);
  const uint8_t* unit = codes_of(w, block) + first * 64 * kBits;
  int64_t column = first * kColumns, group = column / w.group, left = (group + 1) * w.group - column;
  Factors<V> factors = Factors<V>::of(w, block, group);
  for (int64_t u = 0; u < units; u++, unit += 64 * kBits) {
    V::prefetch(unit + 2048, 64 * kBits);
#pragma GCC unroll 8
    for (int s = 0; s < 8; s++, panel += 4 * kRows, left -= 4) {
      if (left == 0) {
        factors = Factors<V>::of(w, block, ++group);
        left = w.group;
      }
      const typename V::Bytes codes = Unit<V, kBits>::step(unit, s);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const auto value = values(codes, j);
        V::store(panel + j * kRows, V::times(V::minus(value, factors.zero), factors.scale));
      }
    }
  }
}

// kM rows of x times a block, its weights never stored. Columns are summed in kChains sums, so that none waits for another.
template <class V, int kBits, template <class> class Values, int kM>
struct Few {
  static constexpr int kChains = kM == 1 ? 4 : 2;
  typename V::Floats sums[kM][kChains], totals[kM];

  void fold(const Factors<V>& factors) {
#pragma GCC unroll 2
    for (int m = 0; m < kM; m++) {
      auto sum = sums[m][0];
#pragma GCC unroll 4
      for (int i = 1; i < kChains; i++) sum = V::plus(sums[m][i], V::all(1.0f), sum);
      totals[m] = V::plus(sum, factors.scale, totals[m]);
      clear(m);
    }
  }
  void clear(int m) {
    for (int i = 0; i < kChains; i++) sums[m][i] = V::all(0.0f);
  }
  void run(const Weight& w, const float* x, int64_t ldx, int64_t block, float* y) {
    const Values<V> values = Values<V>::of(w);
    const bool moved = w.zero_type || w.zero_of_all != 0.0f;
    const uint8_t* unit = codes_of(w, block);
    int64_t group = 0, left = w.group;
    Factors<V> factors = Factors<V>::of(w, block, group);
    for (int m = 0; m < kM; m++) totals[m] = V::all(0.0f), clear(m);
    for (int64_t u = 0; u < w.units; u++, unit += 64 * kBits) {
      V::prefetch(unit + 2048, 64 * kBits);
#pragma GCC unroll 8
      for (int s = 0; s < 8; s++, x += 4, left -= 4) {
        if (left == 0) {
          fold(factors);
          factors = Factors<V>::of(w, block, ++group);
          left = w.group;
        }
        const typename V::Bytes codes = Unit<V, kBits>::step(unit, s);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          auto value = values(codes, j);
          if (moved) value = V::minus(value, factors.zero);
#pragma GCC unroll 2
          for (int m = 0; m < kM; m++)
            sums[m][j % kChains] = V::plus(value, V::all(x[m * ldx + j]), sums[m][j % kChains]);
        }
      }
    }
    fold(factors);
    for (int m = 0; m < kM; m++) V::store(y + m * kRows, totals[m]);
  }
};

template <class V, int kBits, template <class> class Values>
void few_rows(const Weight& w, const float* x, int64_t ldx, int64_t rows, int64_t block, float* y) {
  rows == 1 ? Few<V, kBits, Values, 1>().run(w, x, ldx, block, y) : Few<V, kBits, Values, 2>().run(w, x, ldx, block, y);
}

// A function of every width and element, as decode_units is one: [element][bits - 1].
#define QCPU_OF_ELEMENTS(name, function)                                                                              \
  template <class V>                                                                                                  \
  constexpr auto name##_of(const Weight& w) {                                                                         \
    using Function = decltype(&function<V, 8, IntegerValues>);                                                        \
    constexpr Function by_element[3][8] = {                                                                           \
        {function<V, 1, IntegerValues>, function<V, 2, IntegerValues>, function<V, 3, IntegerValues>,                 \
         function<V, 4, IntegerValues>, function<V, 5, IntegerValues>, function<V, 6, IntegerValues>,                 \
         function<V, 7, IntegerValues>, function<V, 8, IntegerValues>},                                               \
        {function<V, 1, TableValues>, function<V, 2, TableValues>, function<V, 3, TableValues>,                       \
         function<V, 4, TableValues>, function<V, 5, LevelValues>, function<V, 6, LevelValues>,                       \
         function<V, 7, LevelValues>, function<V, 8, LevelValues>},                                                   \
        {nullptr, nullptr, function<V, 3, FloatValues>, function<V, 4, FloatValues>, function<V, 5, FloatValues>,     \
         function<V, 6, FloatValues>, function<V, 7, FloatValues>, function<V, 8, FloatValues>}};                     \
    return by_element[w.element][w.bits - 1];                                                                         \
  }

QCPU_OF_ELEMENTS(decode, decode_units)
QCPU_OF_ELEMENTS(few, few_rows)
#undef QCPU_OF_ELEMENTS

template <class V>
void decode(const Weight& w, int64_t block, int64_t first, int64_t units, float* panel) {
  decode_of<V>(w)(w, block, first, units, panel);
}

template <class V>
void few(const Weight& w, const float* x, int64_t ldx, int64_t rows, int64_t block, float* y) {
  few_of<V>(w)(w, x, ldx, rows, block, y);
}

template <class V>
void columns(float* panel, int64_t count, const float* scale, const float* zero) {
  for (int64_t k = 0; k < count; k++, panel += kRows)
    V::store(panel, V::times(V::minus(V::load_floats(panel), V::all(zero[k])), V::all(scale[k])));
}

// kM rows of x times kB blocks: an input that is loaded serves all of these.
template <class V, int kB, int kM>
inline void multiply_tile(const float* x, int64_t ldx, const Panels& panels, float* y, int64_t next_y) {
  typename V::Floats sums[kM][kB];
  for (int m = 0; m < kM; m++)
    for (int b = 0; b < kB; b++) sums[m][b] = panels.begins ? V::all(0.0f) : V::load_floats(y + m * kRows + b * next_y);
  for (int64_t k = 0; k < panels.columns; k++) {
    typename V::Floats weights[kB];
    for (int b = 0; b < kB; b++) weights[b] = V::load_floats(panels.values + b * panels.next + k * kRows);
#pragma GCC unroll 16
    for (int m = 0; m < kM; m++) {
      const auto input = V::all(x[m * ldx + k]);
#pragma GCC unroll 2
      for (int b = 0; b < kB; b++) sums[m][b] = V::plus(weights[b], input, sums[m][b]);
    }
  }
  for (int m = 0; m < kM; m++)
    for (int b = 0; b < kB; b++) V::store(y + m * kRows + b * next_y, sums[m][b]);
}

template <class V, int kB, int kM>
inline void multiply_rest(const float* x, int64_t ldx, int64_t rows, const Panels& panels, float* y, int64_t next_y) {
  if constexpr (kM > 0) {
    if (rows == kM) return multiply_tile<V, kB, kM>(x, ldx, panels, y, next_y);
    multiply_rest<V, kB, kM - 1>(x, ldx, rows, panels, y, next_y);
  }
}

template <class V, int kB>
void multiply_blocks(const float* x, int64_t ldx, int64_t rows, const Panels& panels, float* y, int64_t next_y) {
  constexpr int kM = V::kTileRows;
  for (; rows >= kM; rows -= kM, x += kM * ldx, y += kM * kRows) multiply_tile<V, kB, kM>(x, ldx, panels, y, next_y);
  multiply_rest<V, kB, kM - 1>(x, ldx, rows, panels, y, next_y);
}

template <class V>
void multiply(const float* x, int64_t ldx, int64_t rows, const Panels& panels, float* y, int64_t next_y) {
  constexpr int kB = V::kTileBlocks;
  Panels left = panels;
  for (; left.count >= kB; left.count -= kB, left.values += kB * left.next, y += kB * next_y)
    multiply_blocks<V, kB>(x, ldx, rows, left, y, next_y);
  for (; left.count > 0; left.count--, left.values += left.next, y += next_y)
    multiply_blocks<V, 1>(x, ldx, rows, left, y, next_y);
}

template <class V>
void load(const void* x, int type, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) V::store(out + i, V::load_any(x, type, i));
  if (i == count) return;
  alignas(64) uint8_t rest[kRows * 4] = {};  // what is left, as a whole vector
  const int64_t bytes = type == QCPU_F32 ? 4 : type == QCPU_U8 ? 1 : 2;
  __builtin_memcpy(rest, static_cast<const uint8_t*>(x) + i * bytes, size_t((count - i) * bytes));
  alignas(64) float values[kRows];
  V::store(values, V::load_any(rest, type, 0));
  __builtin_memcpy(out + i, values, size_t((count - i) * 4));
}

template <class V>
void store(const float* values, int64_t count, void* out, int type) {
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) V::store_any(V::load_floats(values + i), out, type, i);
  if (i == count) return;
  alignas(64) float rest[kRows] = {};
  __builtin_memcpy(rest, values + i, size_t((count - i) * 4));
  alignas(64) uint8_t made[kRows * 4];
  V::store_any(V::load_floats(rest), made, type, 0);
  const int64_t bytes = type == QCPU_F32 ? 4 : 2;
  __builtin_memcpy(static_cast<uint8_t*>(out) + i * bytes, made, size_t((count - i) * bytes));
}

template <class V>
constexpr Kernels kernels_of(const char* name) {
  return {name,        V::kTileRows, V::kDotTo, V::kRoundsBytes, load<V>,     store<V>,
          integers<V>, dot<V>,       decode<V>, few<V>,          columns<V>, multiply<V>};
}

}  // namespace
