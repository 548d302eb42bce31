// x86 with AVX-512 (F, BW, VL, DQ, VNNI, VBMI): 16 rows are one register. Exact inputs are two signed bytes each.
#pragma once
#include <immintrin.h>

#include "fma.h"

namespace {

struct Avx512 {
  static constexpr int kDotRows = 8, kTileRows = 12, kTileBlocks = 2;
  static constexpr int64_t kDotTo = int64_t(1) << 40;  // two products of bytes take half the time of one of floats
  static constexpr bool kRoundsBytes = true;
  template <bool kRounded, int kBits>
  static constexpr int kOffset = 0;

  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;
  using Small = __m512i;
  using Table = __m512;
  template <bool kRounded>
  struct Sums { __m512i high, low; };

  static inline Bytes no_bytes() { return _mm512_setzero_si512(); }
  static inline Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static inline Bytes mask(Bytes v, int m) { return _mm512_and_si512(v, _mm512_set1_epi8(char(m))); }
  static inline Bytes right(Bytes v, int n) { return _mm512_srli_epi16(v, unsigned(n)); }
  static inline Bytes left(Bytes v, int n) { return _mm512_slli_epi16(v, unsigned(n)); }
  static inline Bytes either(Bytes x, Bytes y) { return _mm512_or_si512(x, y); }
  static inline Small no_small() { return _mm512_setzero_si512(); }
  static inline Small load_small(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
  static inline Bytes map(Bytes v, Small s) { return _mm512_shuffle_epi8(s, v); }
  static inline Ints byte(Bytes v, int j) {
    return _mm512_and_si512(_mm512_srli_epi32(v, unsigned(8 * j)), _mm512_set1_epi32(255));
  }

  template <bool kRounded, int kBits>
  static inline Bytes ready(Bytes v) { return v; }
  template <bool kRounded>
  static inline Sums<kRounded> no_sums() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  static inline __m512i spread(const uint8_t* q) {
    int32_t four;
    __builtin_memcpy(&four, q, 4);
    return _mm512_set1_epi32(four);
  }
  template <bool kRounded>
  static inline void add(Sums<kRounded>& sums, Bytes codes, const uint8_t* q) {
    sums.high = _mm512_dpbusd_epi32(sums.high, codes, spread(q));
    if constexpr (!kRounded) sums.low = _mm512_dpbusd_epi32(sums.low, codes, spread(q + 4));
  }
  template <bool kRounded>
  static inline Floats sum(Sums<kRounded> s) {
    const __m512 high = _mm512_cvtepi32_ps(s.high);
    if constexpr (kRounded) return high;
    return _mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(s.low));
  }
  static void write_rounded(const int32_t* whole, int64_t count, uint8_t* q) {
    for (int64_t i = 0; i < count; i++) q[i] = uint8_t(whole[i]);
  }
  static void write_exact(const int32_t* whole, int64_t count, uint8_t* q) {  // 4 high bytes, 4 low ones
    for (int64_t i = 0; i < count; i += 4)
      for (int j = 0; j < 4; j++) {
        q[2 * i + j] = uint8_t((whole[i + j] + 128) >> 8);
        q[2 * i + 4 + j] = uint8_t(whole[i + j]);
      }
  }

  static inline Floats all(float f) { return _mm512_set1_ps(f); }
  static inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, Floats f) { _mm512_storeu_ps(p, f); }
  static inline Floats times(Floats x, Floats y) { return _mm512_mul_ps(x, y); }
  static inline Floats minus(Floats x, Floats y) { return _mm512_sub_ps(x, y); }
  static inline Floats plus(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x, y, z); }
  static inline Floats minus_product(Floats x, Floats y, Floats z) { return _mm512_fnmadd_ps(y, z, x); }
  static inline Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
  static inline Ints mask_ints(Ints v, uint32_t m) { return _mm512_and_si512(v, _mm512_set1_epi32(int(m))); }
  static inline Ints left_ints(Ints v, int n) { return _mm512_sllv_epi32(v, _mm512_set1_epi32(n)); }
  static inline Ints plus_ints(Ints v, uint32_t n) { return _mm512_add_epi32(v, _mm512_set1_epi32(int(n))); }
  static inline Floats as_floats(Ints v) { return _mm512_castsi512_ps(v); }
  static inline Floats if_less(Ints v, uint32_t n, Floats yes, Floats no) {
    return _mm512_mask_blend_ps(_mm512_cmplt_epu32_mask(v, _mm512_set1_epi32(int(n))), no, yes);
  }
  static inline Floats with_sign(Floats f, Ints sign) {
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(f), sign));
  }
  static inline Table load_table(const float* p) { return _mm512_loadu_ps(p); }
  static inline Floats look_up(const Table& t, Bytes v, int j) {  // of an index, 4 bits are read
    return _mm512_permutexvar_ps(_mm512_srli_epi32(v, unsigned(8 * j)), t);
  }
  static inline Floats gather(const float* t, Ints c) { return _mm512_i32gather_ps(c, t, 4); }
  static inline Floats load_any(const void* p, int type, int64_t at) {
    if (type == QCPU_F32) return load_floats((const float*)p + at);
    if (type == QCPU_U8) return to_floats(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)((const uint8_t*)p + at))));
    const __m256i half = _mm256_loadu_si256((const __m256i*)((const uint16_t*)p + at));
    if (type == QCPU_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static inline __m512i to_bf16(__m512 f) {  // in the low halves; ties to even, NaN stays one
    const __m512i bits = _mm512_castps_si512(f), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    return _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), high, _mm512_set1_epi32(64));
  }
  static inline void store_any(Floats f, void* p, int type, int64_t at) {
    if (type == QCPU_F32) return store((float*)p + at, f);
    __m256i* out = (__m256i*)((uint16_t*)p + at);
    if (type == QCPU_F16) return _mm256_storeu_si256(out, _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
    _mm256_storeu_si256(out, _mm512_cvtepi32_epi16(to_bf16(f)));
  }
  static inline void prefetch(const uint8_t* p, int bytes) {
    for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char*)p + i, _MM_HINT_T0);
  }
};

}  // namespace
