// Any processor: plain loops over 16 rows, which compilers turn into what the baseline of the platform has.
#include "fma.h"

namespace {

struct Generic {
  static constexpr int kDotRows = 2, kTileRows = 4, kTileBlocks = 1;
  static constexpr int64_t kDotTo = 4;
  static constexpr bool kRoundsBytes = true;
  template <bool kRounded, int kBits>
  static constexpr int kOffset = 0;

  // Vectors of the compiler, which makes of them what the platform has.
  typedef uint8_t Bytes __attribute__((vector_size(64)));
  typedef uint32_t Ints __attribute__((vector_size(64)));
  typedef int32_t Whole __attribute__((vector_size(64)));
  typedef float Floats __attribute__((vector_size(64)));
  struct Small { uint8_t v[16]; };
  struct Table { float v[16]; };
  template <bool kRounded>
  struct Sums { Whole v; };

  static inline Bytes no_bytes() { return Bytes{}; }
  static inline Bytes load(const uint8_t* p) {
    Bytes b;
    __builtin_memcpy(&b, p, 64);
    return b;
  }
  static inline Bytes mask(Bytes b, int m) { return b & uint8_t(m); }
  static inline Bytes right(Bytes b, int n) { return b >> uint8_t(n); }
  static inline Bytes left(Bytes b, int n) { return b << uint8_t(n); }
  static inline Bytes either(Bytes a, Bytes b) { return a | b; }
  static inline Small no_small() { return {}; }
  static inline Small load_small(const uint8_t* p) {
    Small s;
    __builtin_memcpy(s.v, p, 16);
    return s;
  }
  static inline Bytes map(Bytes b, const Small& s) {
    for (int i = 0; i < 64; i++) b[i] = s.v[b[i] & 15];
    return b;
  }
  static inline Ints byte(Bytes b, int j) { return (Ints)b >> uint32_t(8 * j) & 255u; }

  template <bool kRounded, int kBits>
  static inline Bytes ready(Bytes b) { return b; }
  template <bool kRounded>
  static inline Sums<kRounded> no_sums() { return {Whole{}}; }
  template <bool kRounded>
  static inline void add(Sums<kRounded>& sums, Bytes b, const uint8_t* q) {
    for (int j = 0; j < 4; j++) {
      int16_t x = int8_t(q[j]);
      if (!kRounded) __builtin_memcpy(&x, q + 2 * j, 2);
      sums.v += (Whole)byte(b, j) * int32_t(x);
    }
  }
  template <bool kRounded>
  static inline Floats sum(Sums<kRounded> s) { return __builtin_convertvector(s.v, Floats); }
  static void write_rounded(const int32_t* whole, int64_t count, uint8_t* q) {
    for (int64_t i = 0; i < count; i++) q[i] = uint8_t(whole[i]);
  }
  static void write_exact(const int32_t* whole, int64_t count, uint8_t* q) {
    for (int64_t i = 0; i < count; i++) {
      const int16_t value = int16_t(whole[i]);
      __builtin_memcpy(q + 2 * i, &value, 2);
    }
  }

  static inline Floats all(float f) { return Floats{} + f; }
  static inline Floats load_floats(const float* p) {
    Floats f;
    __builtin_memcpy(&f, p, 64);
    return f;
  }
  static inline void store(float* p, Floats f) { __builtin_memcpy(p, &f, 64); }
  static inline Floats times(Floats a, Floats b) { return a * b; }
  static inline Floats minus(Floats a, Floats b) { return a - b; }
  static inline Floats plus(Floats a, Floats b, Floats c) { return a * b + c; }
  static inline Floats minus_product(Floats a, Floats b, Floats c) { return a - b * c; }
  static inline Floats to_floats(Ints a) { return __builtin_convertvector((Whole)a, Floats); }
  static inline Ints mask_ints(Ints a, uint32_t m) { return a & m; }
  static inline Ints left_ints(Ints a, int n) { return a << uint32_t(n); }
  static inline Ints plus_ints(Ints a, uint32_t b) { return a + b; }
  static inline Floats as_floats(Ints a) { return (Floats)a; }
  static inline Floats if_less(Ints a, uint32_t b, Floats yes, Floats no) {
    const Ints chosen = (Ints)(a < b);
    return (Floats)((chosen & (Ints)yes) | (~chosen & (Ints)no));
  }
  static inline Floats with_sign(Floats f, Ints sign) { return (Floats)((Ints)f | sign); }
  static inline Table load_table(const float* p) {
    Table t;
    __builtin_memcpy(t.v, p, 64);
    return t;
  }
  static inline Floats look_up(const Table& t, Bytes b, int j) { return gather(t.v, byte(b, j)); }
  static inline Floats gather(const float* t, Ints c) {
    Floats f;
    for (int i = 0; i < 16; i++) f[i] = t[c[i]];
    return f;
  }

  static inline float half(uint16_t h) {  // subnormals by a subtraction, without a subnormal float32 in between
    const uint32_t sign = uint32_t(h & 0x8000) << 16, size = h & 0x7fffu;
    uint32_t bits = size >= 0x7c00 ? size << 13 | 0x7f800000u : (size << 13) + (112u << 23);
    float value;
    if (size < 0x400) {
      bits = (size << 13) + (113u << 23);
      __builtin_memcpy(&value, &bits, 4);
      value -= 6.103515625e-05f;
      __builtin_memcpy(&bits, &value, 4);
    }
    bits |= sign;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
  static inline uint16_t to_half(float f) {  // ties to even
    uint32_t bits;
    __builtin_memcpy(&bits, &f, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00);
    if (bits >= 0x47800000u) return uint16_t(sign | 0x7c00);
    if (bits < 0x38800000u) {  // subnormal: the sum's last bit is a half's least value
      float value;
      __builtin_memcpy(&value, &bits, 4);
      value += 0.5f;
      __builtin_memcpy(&bits, &value, 4);
      return uint16_t(sign | (bits - 0x3f000000u));
    }
    return uint16_t(sign | ((bits + 0xfffu + (bits >> 13 & 1) - (112u << 23)) >> 13));
  }
  static inline Floats load_any(const void* p, int type, int64_t at) {
    if (type == QCPU_F32) return load_floats(static_cast<const float*>(p) + at);
    float values[16];
    for (int i = 0; i < 16; i++) values[i] = load_one(p, type, at + i);
    return load_floats(values);
  }
  static inline float load_one(const void* p, int type, int64_t at) {
    if (type == QCPU_U8) return float(static_cast<const uint8_t*>(p)[at]);
    const uint16_t h = static_cast<const uint16_t*>(p)[at];
    if (type == QCPU_F16) return half(h);
    const uint32_t bits = uint32_t(h) << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
  }
  static inline uint16_t to_bf16(float f) {  // ties to even, NaN stays one
    uint32_t bits;
    __builtin_memcpy(&bits, &f, 4);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return nan ? uint16_t(bits >> 16 | 64) : uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  }
  static inline void store_any(Floats f, void* p, int type, int64_t at) {
    if (type == QCPU_F32) return store(static_cast<float*>(p) + at, f);
    for (int i = 0; i < 16; i++)
      static_cast<uint16_t*>(p)[at + i] = type == QCPU_F16 ? to_half(f[i]) : to_bf16(f[i]);
  }
  static inline void prefetch(const uint8_t*, int) {}
};

}  // namespace

namespace qcpu {

const Kernels* generic_kernels() {
  static constexpr Kernels kernels = kernels_of<Generic>("generic");
  return &kernels;
}

}  // namespace qcpu
