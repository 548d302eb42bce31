// x86 with AVX2, FMA and F16C: 16 rows are two registers. Integers are multiplied as int16, exact for codes of 8 bits.
#include <immintrin.h>

#include "fma.h"

namespace {

struct Avx2 {
  static constexpr int kDotRows = 4, kTileRows = 6, kTileBlocks = 1;
  static constexpr int64_t kDotTo = 5;
  static constexpr bool kRoundsBytes = false;  // maddubs saturates above 127
  template <bool kRounded, int kBits>
  static constexpr int kOffset = 0;

  struct Bytes { __m256i a, b; };
  struct Ints { __m256i a, b; };
  struct Floats { __m256 a, b; };
  struct Small { __m256i v; };
  struct Table { __m256 low, high; };
  template <bool kRounded>
  struct Sums { __m256i a, b; };

  static inline Bytes no_bytes() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static inline Bytes load(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
  }
  static inline Bytes mask(Bytes v, int m) {
    const __m256i all = _mm256_set1_epi8(char(m));
    return {_mm256_and_si256(v.a, all), _mm256_and_si256(v.b, all)};
  }
  static inline Bytes right(Bytes v, int n) { return {_mm256_srli_epi16(v.a, n), _mm256_srli_epi16(v.b, n)}; }
  static inline Bytes left(Bytes v, int n) { return {_mm256_slli_epi16(v.a, n), _mm256_slli_epi16(v.b, n)}; }
  static inline Bytes either(Bytes x, Bytes y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  static inline Small no_small() { return {_mm256_setzero_si256()}; }
  static inline Small load_small(const uint8_t* p) {
    return {_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p))};
  }
  static inline Bytes map(Bytes v, Small s) { return {_mm256_shuffle_epi8(s.v, v.a), _mm256_shuffle_epi8(s.v, v.b)}; }
  static inline Ints byte(Bytes v, int j) {
    const __m256i low = _mm256_set1_epi32(255);
    return {_mm256_and_si256(_mm256_srli_epi32(v.a, 8 * j), low), _mm256_and_si256(_mm256_srli_epi32(v.b, 8 * j), low)};
  }

  struct Wide { __m256i even_a, odd_a, even_b, odd_b; };  // columns 0 and 2, 1 and 3 as int16
  template <bool kRounded, int kBits>
  static inline auto ready(Bytes v) {
    if constexpr (kRounded) {
      return v;
    } else {
      const __m256i low = _mm256_set1_epi16(255);
      return Wide{_mm256_and_si256(v.a, low), _mm256_srli_epi16(v.a, 8), _mm256_and_si256(v.b, low),
                  _mm256_srli_epi16(v.b, 8)};
    }
  }
  template <bool kRounded>
  static inline Sums<kRounded> no_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static inline __m256i spread(const uint8_t* q) {
    int32_t four;
    __builtin_memcpy(&four, q, 4);
    return _mm256_set1_epi32(four);
  }
  template <bool kRounded, class Ready>
  static inline void add(Sums<kRounded>& sums, const Ready& r, const uint8_t* q) {
    if constexpr (kRounded) {
      const __m256i x = spread(q), one = _mm256_set1_epi16(1);
      sums.a = _mm256_add_epi32(sums.a, _mm256_madd_epi16(_mm256_maddubs_epi16(r.a, x), one));
      sums.b = _mm256_add_epi32(sums.b, _mm256_madd_epi16(_mm256_maddubs_epi16(r.b, x), one));
    } else {
      const __m256i even = spread(q), odd = spread(q + 4);
      sums.a = _mm256_add_epi32(sums.a, _mm256_add_epi32(_mm256_madd_epi16(r.even_a, even), _mm256_madd_epi16(r.odd_a, odd)));
      sums.b = _mm256_add_epi32(sums.b, _mm256_add_epi32(_mm256_madd_epi16(r.even_b, even), _mm256_madd_epi16(r.odd_b, odd)));
    }
  }
  template <bool kRounded>
  static inline Floats sum(Sums<kRounded> s) { return {_mm256_cvtepi32_ps(s.a), _mm256_cvtepi32_ps(s.b)}; }
  static void write_rounded(const int32_t* whole, int64_t count, uint8_t* q) {
    for (int64_t i = 0; i < count; i++) q[i] = uint8_t(whole[i]);
  }
  static void write_exact(const int32_t* whole, int64_t count, uint8_t* q) {  // in the order 0 2 1 3
    for (int64_t i = 0; i < count; i += 8) {
      const __m256i v = _mm256_loadu_si256((const __m256i*)(whole + i));
      const __m256i mixed = _mm256_shuffle_epi32(v, 0xd8), narrow = _mm256_packs_epi32(mixed, mixed);
      const __m256i packed = _mm256_permute4x64_epi64(narrow, 0x08);
      if (i + 8 <= count) _mm_storeu_si128((__m128i*)(q + 2 * i), _mm256_castsi256_si128(packed));
      else _mm_storel_epi64((__m128i*)(q + 2 * i), _mm256_castsi256_si128(packed));
    }
  }

  static inline Floats all(float f) { return {_mm256_set1_ps(f), _mm256_set1_ps(f)}; }
  static inline Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static inline void store(float* p, Floats f) { _mm256_storeu_ps(p, f.a), _mm256_storeu_ps(p + 8, f.b); }
  static inline Floats times(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static inline Floats minus(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static inline Floats plus(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static inline Floats minus_product(Floats x, Floats y, Floats z) {
    return {_mm256_fnmadd_ps(y.a, z.a, x.a), _mm256_fnmadd_ps(y.b, z.b, x.b)};
  }
  static inline Floats to_floats(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
  static inline Ints mask_ints(Ints v, uint32_t m) {
    const __m256i all = _mm256_set1_epi32(int(m));
    return {_mm256_and_si256(v.a, all), _mm256_and_si256(v.b, all)};
  }
  static inline Ints left_ints(Ints v, int n) {
    const __m128i by = _mm_cvtsi32_si128(n);
    return {_mm256_sll_epi32(v.a, by), _mm256_sll_epi32(v.b, by)};
  }
  static inline Ints plus_ints(Ints v, uint32_t n) {
    const __m256i all = _mm256_set1_epi32(int(n));
    return {_mm256_add_epi32(v.a, all), _mm256_add_epi32(v.b, all)};
  }
  static inline Floats as_floats(Ints v) { return {_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)}; }
  static inline Floats if_less(Ints v, uint32_t n, Floats yes, Floats no) {
    const __m256i all = _mm256_set1_epi32(int(n));
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(all, v.a))),
            _mm256_blendv_ps(no.b, yes.b, _mm256_castsi256_ps(_mm256_cmpgt_epi32(all, v.b)))};
  }
  static inline Floats with_sign(Floats f, Ints sign) {
    const Floats bits = as_floats(sign);
    return {_mm256_or_ps(f.a, bits.a), _mm256_or_ps(f.b, bits.b)};
  }
  static inline Table load_table(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static inline __m256 look_up_half(const Table& t, __m256i v, int j) {  // of an index, 3 bits are read
    const __m256i at = _mm256_srli_epi32(v, 8 * j);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(v, 28 - 8 * j));  // bit 3 to the sign, which blendv reads
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, at), _mm256_permutevar8x32_ps(t.high, at), upper);
  }
  static inline Floats look_up(const Table& t, Bytes v, int j) { return {look_up_half(t, v.a, j), look_up_half(t, v.b, j)}; }
  static inline Floats gather(const float* t, Ints c) {
    return {_mm256_i32gather_ps(t, c.a, 4), _mm256_i32gather_ps(t, c.b, 4)};
  }
  static inline Floats load_any(const void* p, int type, int64_t at) {
    if (type == QCPU_F32) return load_floats((const float*)p + at);
    if (type == QCPU_U8) {
      const __m128i v = _mm_loadu_si128((const __m128i*)((const uint8_t*)p + at));
      return to_floats({_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))});
    }
    const __m128i low = _mm_loadu_si128((const __m128i*)((const uint16_t*)p + at));
    const __m128i high = _mm_loadu_si128((const __m128i*)((const uint16_t*)p + at + 8));
    if (type == QCPU_F16) return {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
    return as_floats({_mm256_slli_epi32(_mm256_cvtepu16_epi32(low), 16), _mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16)});
  }
  static inline __m256i to_bf16(__m256 f) {  // in the low halves; ties to even, NaN stays one
    const __m256i bits = _mm256_castps_si256(f), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(64)), nan);
  }
  static inline void store_any(Floats f, void* p, int type, int64_t at) {
    if (type == QCPU_F32) return store((float*)p + at, f);
    __m128i* out = (__m128i*)((uint16_t*)p + at);
    if (type == QCPU_F16) {
      _mm_storeu_si128(out, _mm256_cvtps_ph(f.a, _MM_FROUND_TO_NEAREST_INT));
      _mm_storeu_si128(out + 1, _mm256_cvtps_ph(f.b, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
    const __m256i both = _mm256_packus_epi32(to_bf16(f.a), to_bf16(f.b));
    _mm256_storeu_si256((__m256i*)out, _mm256_permute4x64_epi64(both, 0xd8));
  }
  static inline void prefetch(const uint8_t* p, int bytes) {
    for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char*)p + i, _MM_HINT_T0);
  }
};

// A few rows of x: codes of 8 rows and 4 columns become 4 registers, each of 4 columns of two rows. Bytes are looked up
// 32 at a time, where a look-up of floats takes two slow permutations for 8.
struct TableQuads {
  __m256i bytes[4];  // of 16 float32 levels

  static bool serves(const Weight& w) { return w.element == QCPU_TABLE && w.bits <= 4; }
  explicit TableQuads(const Weight& w) {
    alignas(16) uint8_t planes[4][16];
    for (int i = 0; i < 16; i++) {
      uint8_t level[4];
      __builtin_memcpy(level, w.levels + (i & ((1 << w.bits) - 1)), 4);
      for (int b = 0; b < 4; b++) planes[b][i] = level[b];
    }
    for (int b = 0; b < 4; b++) bytes[b] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)planes[b]));
  }
  float unit() const { return 1.0f; }
  inline void add(__m256i codes, __m256 x, __m256* sums) const {
    const __m256i b0 = _mm256_shuffle_epi8(bytes[0], codes), b1 = _mm256_shuffle_epi8(bytes[1], codes);
    const __m256i b2 = _mm256_shuffle_epi8(bytes[2], codes), b3 = _mm256_shuffle_epi8(bytes[3], codes);
    const __m256i low01 = _mm256_unpacklo_epi8(b0, b1), low23 = _mm256_unpacklo_epi8(b2, b3);
    const __m256i high01 = _mm256_unpackhi_epi8(b0, b1), high23 = _mm256_unpackhi_epi8(b2, b3);
    sums[0] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_unpacklo_epi16(low01, low23)), x, sums[0]);    // rows 0, 4
    sums[1] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_unpackhi_epi16(low01, low23)), x, sums[1]);    // rows 1, 5
    sums[2] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_unpacklo_epi16(high01, high23)), x, sums[2]);  // rows 2, 6
    sums[3] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_unpackhi_epi16(high01, high23)), x, sums[3]);  // rows 3, 7
  }
  static inline __m256 rows(const __m256* sums) {
    return _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
  }
};

struct FloatQuads {  // by float16, which holds each of these elements but for a power of two, subnormal ones too
  __m128i to_top, to_exponent;
  __m256i kept;
  float power;

  static bool serves(const Weight& w) { return w.element == QCPU_FLOAT && w.float_exponent <= 5; }
  explicit FloatQuads(const Weight& w) {
    const int free = 5 - w.float_exponent;
    to_top = _mm_cvtsi32_si128(8 - w.bits), to_exponent = _mm_cvtsi32_si128(free);
    kept = _mm256_set1_epi16(short(0x8000 | 0x7fff >> free));
    const uint32_t bits = uint32_t(127 + 15 - w.float_bias) << 23;
    __builtin_memcpy(&power, &bits, 4);
  }
  float unit() const { return power; }
  inline __m256i halves(__m256i codes) const {
    return _mm256_and_si256(_mm256_sra_epi16(_mm256_sll_epi16(codes, to_top), to_exponent), kept);
  }
  inline void add(__m256i codes, __m256 x, __m256* sums) const {
    const __m256i none = _mm256_setzero_si256();
    const __m256i low = halves(_mm256_unpacklo_epi8(none, codes)), high = halves(_mm256_unpackhi_epi8(none, codes));
    sums[0] = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(low)), x, sums[0]);        // rows 0, 1
    sums[1] = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(high)), x, sums[1]);       // rows 2, 3
    sums[2] = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(low, 1)), x, sums[2]);   // rows 4, 5
    sums[3] = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(high, 1)), x, sums[3]);  // rows 6, 7
  }
  static inline __m256 rows(const __m256* sums) {
    const __m256 mixed = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
    return _mm256_permutevar8x32_ps(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
};

template <class Quads, int kBits>
void quads_row(const Weight& w, const float* x, int64_t block, float* y) {
  const Quads quads(w);
  const uint8_t* unit = codes_of(w, block);
  const Avx2::Floats power = Avx2::all(quads.unit());
  Avx2::Floats totals = Avx2::all(0.0f);
  __m256 sums[8] = {};
  int64_t group = 0, left = w.group;
  const auto fold = [&] {
    const auto scale = Avx2::times(Factors<Avx2>::of(w, block, group++).scale, power);
    totals = Avx2::plus({Quads::rows(sums), Quads::rows(sums + 4)}, scale, totals);
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    left = w.group;
  };
  for (int64_t u = 0; u < w.units; u++, unit += 64 * kBits) {
    Avx2::prefetch(unit + 2048, 64 * kBits);
#pragma GCC unroll 8
    for (int s = 0; s < 8; s++, x += 4, left -= 4) {
      if (left == 0) fold();
      const Avx2::Bytes codes = Unit<Avx2, kBits>::step(unit, s);
      const __m256 four = _mm256_broadcast_ps((const __m128*)x);
      quads.add(codes.a, four, sums);
      quads.add(codes.b, four, sums + 4);
    }
  }
  fold();
  Avx2::store(y, totals);
}

void few_quads(const Weight& w, const float* x, int64_t ldx, int64_t rows, int64_t block, float* y) {
  using Row = void(const Weight&, const float*, int64_t, float*);
  static Row* const tables[] = {quads_row<TableQuads, 1>, quads_row<TableQuads, 2>, quads_row<TableQuads, 3>,
                                quads_row<TableQuads, 4>};
  static Row* const floats[] = {quads_row<FloatQuads, 3>, quads_row<FloatQuads, 4>, quads_row<FloatQuads, 5>,
                                quads_row<FloatQuads, 6>, quads_row<FloatQuads, 7>, quads_row<FloatQuads, 8>};
  const bool moved = w.zero_type || w.zero_of_all != 0.0f;
  if (moved || !(TableQuads::serves(w) || FloatQuads::serves(w))) return few<Avx2>(w, x, ldx, rows, block, y);
  Row* const row = w.element == QCPU_TABLE ? tables[w.bits - 1] : floats[w.bits - 3];
  for (int64_t m = 0; m < rows; m++) row(w, x + m * ldx, block, y + m * kRows);
}

constexpr Kernels with_quads(Kernels kernels) {
  kernels.few = few_quads;
  return kernels;
}

}  // namespace

namespace qcpu {

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = with_quads(kernels_of<Avx2>("avx2"));
  return &kernels;
}

}  // namespace qcpu
