// AArch64: 16 rows are four registers. The level chooses how integers are multiplied.
#pragma once
#include <arm_neon.h>

#include "fma.h"

namespace {

enum NeonLevel { kPlain, kDotProduct, kMatrixInt8 };

template <NeonLevel kLevel>
struct Neon {
  static constexpr int kDotRows = kLevel == kPlain ? 1 : 2, kTileRows = 6, kTileBlocks = 1;
  static constexpr int64_t kDotTo = kLevel == kPlain ? 2 : int64_t(1) << 40;
  static constexpr bool kRoundsBytes = true;
  // sdot takes signed codes: those of 8 bits are moved by 128. usdot of i8mm takes them as they are.
  template <bool kRounded, int kBits>
  static constexpr int kOffset = kLevel == kDotProduct && kBits == 8 ? 128 : 0;

  struct Bytes { uint8x16_t v[4]; };
  struct Ints { uint32x4_t v[4]; };
  struct Floats { float32x4_t v[4]; };
  struct Small { uint8x16_t v; };
  struct Table { float v[16]; };
  template <bool kRounded>
  struct Sums { int32x4_t high[4], low[4]; };

#define EACH(type, expression) \
  type r;                      \
  for (int i = 0; i < 4; i++) r.v[i] = expression; \
  return r;

  static inline Bytes no_bytes() { EACH(Bytes, vdupq_n_u8(0)) }
  static inline Bytes load(const uint8_t* p) { EACH(Bytes, vld1q_u8(p + 16 * i)) }
  static inline Bytes mask(Bytes b, int m) { EACH(Bytes, vandq_u8(b.v[i], vdupq_n_u8(uint8_t(m)))) }
  static inline Bytes right(Bytes b, int n) { EACH(Bytes, vshlq_u8(b.v[i], vdupq_n_s8(int8_t(-n)))) }
  static inline Bytes left(Bytes b, int n) { EACH(Bytes, vshlq_u8(b.v[i], vdupq_n_s8(int8_t(n)))) }
  static inline Bytes either(Bytes a, Bytes b) { EACH(Bytes, vorrq_u8(a.v[i], b.v[i])) }
  static inline Small no_small() { return {vdupq_n_u8(0)}; }
  static inline Small load_small(const uint8_t* p) { return {vld1q_u8(p)}; }
  static inline Bytes map(Bytes b, Small s) { EACH(Bytes, vqtbl1q_u8(s.v, b.v[i])) }
  static inline Ints byte(Bytes b, int j) {
    EACH(Ints, vandq_u32(vshlq_u32(vreinterpretq_u32_u8(b.v[i]), vdupq_n_s32(-8 * j)), vdupq_n_u32(255)))
  }

  template <bool kRounded, int kBits>
  static inline Bytes ready(Bytes b) {
    if constexpr (kOffset<kRounded, kBits> == 0) return b;
    EACH(Bytes, veorq_u8(b.v[i], vdupq_n_u8(128)))
  }
  template <bool kRounded>
  static inline Sums<kRounded> no_sums() {
    Sums<kRounded> s;
    for (int i = 0; i < 4; i++) s.high[i] = s.low[i] = vdupq_n_s32(0);
    return s;
  }
  static inline int8x16_t spread(const uint8_t* q) {
    int32_t four;
    __builtin_memcpy(&four, q, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
#if defined(QCPU_NEON_DOT)
  static inline int32x4_t dot4(int32x4_t sum, uint8x16_t codes, int8x16_t x) {
#if defined(QCPU_NEON_I8MM)
    return vusdotq_s32(sum, codes, x);
#else
    return vdotq_s32(sum, vreinterpretq_s8_u8(codes), x);
#endif
  }
  template <bool kRounded>
  static inline void add(Sums<kRounded>& s, const Bytes& b, const uint8_t* q) {
    const int8x16_t high = spread(q);
    for (int i = 0; i < 4; i++) s.high[i] = dot4(s.high[i], b.v[i], high);
    if constexpr (!kRounded) {
      const int8x16_t low = spread(q + 4);
      for (int i = 0; i < 4; i++) s.low[i] = dot4(s.low[i], b.v[i], low);
    }
  }
  template <bool kRounded>
  static inline Floats sum(const Sums<kRounded>& s) {
    if constexpr (kRounded) { EACH(Floats, vcvtq_f32_s32(s.high[i])) }
    EACH(Floats, vfmaq_n_f32(vcvtq_f32_s32(s.low[i]), vcvtq_f32_s32(s.high[i]), 256.0f))
  }
  static void write_exact(const int32_t* whole, int64_t count, uint8_t* q) {  // 4 high bytes, 4 low ones
    for (int64_t i = 0; i < count; i += 4)
      for (int j = 0; j < 4; j++) {
        q[2 * i + j] = uint8_t((whole[i + j] + 128) >> 8);
        q[2 * i + 4 + j] = uint8_t(whole[i + j]);
      }
  }
#else
  // Widened to 16 bits: `high` and `low` hold the sums of two halves of 4 rows, two columns each.
  template <bool kRounded>
  static inline void add(Sums<kRounded>& s, const Bytes& b, const uint8_t* q) {
    int16x4_t x;
    if constexpr (kRounded) x = vget_low_s16(vmovl_s8(vget_low_s8(spread(q))));
    else __builtin_memcpy(&x, q, 8);
    for (int i = 0; i < 4; i++) {
      const int16x8_t first = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(b.v[i])));
      const int16x8_t second = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(b.v[i])));
      const int32x4_t rows01 = vpaddq_s32(vmull_s16(vget_low_s16(first), x), vmull_s16(vget_high_s16(first), x));
      const int32x4_t rows23 = vpaddq_s32(vmull_s16(vget_low_s16(second), x), vmull_s16(vget_high_s16(second), x));
      s.high[i] = vaddq_s32(s.high[i], vpaddq_s32(rows01, rows23));
    }
  }
  template <bool kRounded>
  static inline Floats sum(const Sums<kRounded>& s) { EACH(Floats, vcvtq_f32_s32(s.high[i])) }
  static void write_exact(const int32_t* whole, int64_t count, uint8_t* q) {
    for (int64_t i = 0; i < count; i++) {
      const int16_t value = int16_t(whole[i]);
      __builtin_memcpy(q + 2 * i, &value, 2);
    }
  }
#endif
  static void write_rounded(const int32_t* whole, int64_t count, uint8_t* q) {
    for (int64_t i = 0; i < count; i++) q[i] = uint8_t(whole[i]);
  }

  static inline Floats all(float f) { EACH(Floats, vdupq_n_f32(f)) }
  static inline Floats load_floats(const float* p) { EACH(Floats, vld1q_f32(p + 4 * i)) }
  static inline void store(float* p, const Floats& f) { for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, f.v[i]); }
  static inline Floats times(Floats a, Floats b) { EACH(Floats, vmulq_f32(a.v[i], b.v[i])) }
  static inline Floats minus(Floats a, Floats b) { EACH(Floats, vsubq_f32(a.v[i], b.v[i])) }
  static inline Floats plus(Floats a, Floats b, Floats c) { EACH(Floats, vfmaq_f32(c.v[i], a.v[i], b.v[i])) }
  static inline Floats minus_product(Floats a, Floats b, Floats c) { EACH(Floats, vfmsq_f32(a.v[i], b.v[i], c.v[i])) }
  static inline Floats to_floats(Ints a) { EACH(Floats, vcvtq_f32_u32(a.v[i])) }
  static inline Ints mask_ints(Ints a, uint32_t m) { EACH(Ints, vandq_u32(a.v[i], vdupq_n_u32(m))) }
  static inline Ints left_ints(Ints a, int n) { EACH(Ints, vshlq_u32(a.v[i], vdupq_n_s32(n))) }
  static inline Ints plus_ints(Ints a, uint32_t n) { EACH(Ints, vaddq_u32(a.v[i], vdupq_n_u32(n))) }
  static inline Floats as_floats(Ints a) { EACH(Floats, vreinterpretq_f32_u32(a.v[i])) }
  static inline Floats if_less(Ints a, uint32_t n, Floats yes, Floats no) {
    EACH(Floats, vbslq_f32(vcltq_u32(a.v[i], vdupq_n_u32(n)), yes.v[i], no.v[i]))
  }
  static inline Floats with_sign(Floats f, Ints sign) {
    EACH(Floats, vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(f.v[i]), sign.v[i])))
  }
  static inline Table load_table(const float* p) {
    Table t;
    __builtin_memcpy(t.v, p, 64);
    return t;
  }
  static inline Floats look_up(const Table& t, const Bytes& b, int j) { return gather(t.v, byte(b, j)); }
  static inline Floats gather(const float* t, Ints c) {
    float found[16];
    uint32_t at[16];
    for (int i = 0; i < 4; i++) vst1q_u32(at + 4 * i, c.v[i]);
    for (int i = 0; i < 16; i++) found[i] = t[at[i]];
    return load_floats(found);
  }
  static inline Floats load_any(const void* p, int type, int64_t at) {
    if (type == QCPU_F32) return load_floats((const float*)p + at);
    if (type == QCPU_U8) {
      const uint8x16_t v = vld1q_u8((const uint8_t*)p + at);
      const uint16x8_t low = vmovl_u8(vget_low_u8(v)), high = vmovl_u8(vget_high_u8(v));
      return to_floats({{vmovl_u16(vget_low_u16(low)), vmovl_u16(vget_high_u16(low)), vmovl_u16(vget_low_u16(high)),
                         vmovl_u16(vget_high_u16(high))}});
    }
    const uint16_t* h = (const uint16_t*)p + at;
    if (type == QCPU_F16) { EACH(Floats, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(h + 4 * i)))) }
    EACH(Floats, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(h + 4 * i), 16)))
  }
  static inline uint16x4_t to_bf16(float32x4_t f) {  // ties to even, NaN stays one
    const uint32x4_t bits = vreinterpretq_u32_f32(f), high = vshrq_n_u32(bits, 16);
    const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    return vmovn_u32(vbslq_u32(vceqq_f32(f, f), rounded, vorrq_u32(high, vdupq_n_u32(64))));
  }
  static inline void store_any(Floats f, void* p, int type, int64_t at) {
    if (type == QCPU_F32) return store((float*)p + at, f);
    uint16_t* out = (uint16_t*)p + at;
    for (int i = 0; i < 4; i++)
      vst1_u16(out + 4 * i, type == QCPU_F16 ? vreinterpret_u16_f16(vcvt_f16_f32(f.v[i])) : to_bf16(f.v[i]));
  }
  static inline void prefetch(const uint8_t* p, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
  }
#undef EACH
};

}  // namespace
