// The C interface of the native kernels. Only integers, floats and pointers cross it; nothing throws or allocates.
//
// A weight [rows, columns] is packed in blocks of 16 rows and units of 32 columns. The units of a block run along the
// columns, blocks follow one another. A unit of `bits` bits takes 64 * bits bytes: one plane after another of 4, 2 and
// 1 bits (or one of 8), low bits of a code in the first. 64 bytes of a plane are 16 dwords, dword n is row n:
//   8 bits: 4 columns,  byte j = column j
//   4 bits: 8 columns,  byte j = column j in the low nibble, column j + 4 in the high one
//   2 bits: 16 columns, byte j = column 4 i + j in bits 2 i and 2 i + 1
//   1 bit:  32 columns, byte j = column 4 i + j in bit i
// Scales and zeros are [blocks][groups][16], in a type of their own. Columns are padded to whole units and groups, and
// may be in any order: `order` tells which column of the input a packed column is multiplied with, -1 for none.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define QCPU_EXPORT __declspec(dllexport)
#else
#define QCPU_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { QCPU_ABI = 2 };

enum qcpu_status {
  QCPU_OK = 0,
  QCPU_BAD_STRUCT = -1,   // `size` is not that of the struct, or a struct is missing
  QCPU_BAD_SHAPE = -2,    // a size is negative, too large, or does not fit another
  QCPU_BAD_TYPE = -3,     // an unknown type, element or path
  QCPU_BAD_POINTER = -4,  // an array that is needed is null, or not aligned
  QCPU_BAD_SCRATCH = -5,  // the scratch is smaller than qcpu_scratch says
  QCPU_NOT_HERE = -6,     // this machine cannot run the instruction set or path asked for
};

enum qcpu_type { QCPU_NONE = 0, QCPU_F32 = 1, QCPU_BF16 = 2, QCPU_F16 = 3, QCPU_U8 = 4 };

enum qcpu_element {
  QCPU_INTEGER = 0,  // value = code
  QCPU_TABLE = 1,    // value = levels[code]
  QCPU_FLOAT = 2,    // value = the float of 1 sign bit, float_exponent and float_mantissa bits; no code is inf or NaN
};

enum qcpu_path {
  QCPU_AUTO = 0,
  QCPU_DOT = 1,    // integers: inputs as 16-bit (or 8-bit) integers under a scale for each group of columns
  QCPU_FMA = 2,    // floats: weights decoded to float32, multiplied in float32
  QCPU_PAIRS = 3,  // bfloat16 inputs: weights decoded and rounded to bfloat16, pairs of columns multiplied at once
};

typedef struct {
  int64_t size;  // sizeof(qcpu_weight)
  int64_t rows, columns;
  int64_t blocks;         // of 16 packed rows; those of `rows` without row_of
  int64_t padded;         // packed columns, a multiple of 32
  int64_t group, groups;  // columns of a group: 4, 8, 16, a multiple of 32, or all
  const uint8_t* codes;   // 64-byte aligned
  const void* scale;      // null with scale_type QCPU_NONE: 1
  const void* zero;       // null with zero_type QCPU_NONE: zero_of_all
  const float* levels;    // [2^bits] of QCPU_TABLE
  const uint8_t* small;   // [16] up to 127, of a 4-bit QCPU_TABLE whose levels are (small - small_zero) * small_unit, or null
  const int32_t* order;   // [padded], or null: packed columns are the weight's
  const int32_t* row_of;  // [blocks * 16]: the row of each packed row, -1 for none; or null: as they are
  const int32_t* class_of;    // [blocks]: the class of the rows of a block, or null: one class
  const float* column_scale;  // [classes][padded]: factors of the columns for rows of a class, or null
  const float* column_zero;   // [classes][padded]: zeros of the columns, with column_scale
  int64_t classes;            // 1 without classes
  int32_t bits, element;
  int32_t scale_type, zero_type;
  int32_t float_exponent, float_mantissa, float_bias;
  float zero_of_all;
  float small_zero, small_unit;
} qcpu_weight;

typedef struct {
  int64_t size;  // sizeof(qcpu_product)
  const void* x;
  void* y;
  const void* bias;  // [rows], or null
  void* scratch;     // 64-byte aligned
  int64_t scratch_bytes;
  int64_t x_rows, x_stride, y_stride;  // strides in elements
  int32_t x_type, y_type, bias_type;
  int32_t path;     // qcpu_path
  int32_t rounded;  // 1: inputs may be rounded to 8 bits
  int32_t threads;
} qcpu_product;

typedef struct {
  int64_t size;         // sizeof(qcpu_source)
  int64_t rows, columns, stride;  // of the codes, stride in bytes
  int64_t padded;
  const uint8_t* codes;   // one code a byte
  const int32_t* order;   // [padded] or null
  const int32_t* row_of;  // [blocks * 16] or null
  int64_t blocks;
  int32_t bits, threads;
} qcpu_source;

QCPU_EXPORT int qcpu_abi(void);
// Names of the instruction sets that this library has and this machine runs, best first, separated by spaces.
QCPU_EXPORT const char* qcpu_available(void);
QCPU_EXPORT const char* qcpu_isa(void);          // the one in use
QCPU_EXPORT int qcpu_use(const char* isa);       // null or "": the best
QCPU_EXPORT const char* qcpu_threading(void);    // whose threads are used: "gomp", "kmp" or "none"
QCPU_EXPORT const char* qcpu_message(int status);

QCPU_EXPORT int64_t qcpu_packed_bytes(int64_t blocks, int64_t padded, int bits);  // or a status
QCPU_EXPORT int qcpu_pack(const qcpu_source*, uint8_t* packed);
QCPU_EXPORT int qcpu_unpack(const qcpu_source*, const uint8_t* packed);  // writes source->codes

QCPU_EXPORT int qcpu_check(const qcpu_weight*);
QCPU_EXPORT int qcpu_path_of(const qcpu_weight*, const qcpu_product*);  // the path that QCPU_AUTO takes, or a status
QCPU_EXPORT int64_t qcpu_scratch(const qcpu_weight*, const qcpu_product*);  // bytes, or a status
QCPU_EXPORT int qcpu_linear(const qcpu_weight*, const qcpu_product*);
// Products of consecutive rows of x with one weight after another: those from ends[e - 1] to ends[e] with weight e.
QCPU_EXPORT int qcpu_grouped(const qcpu_weight* const*, const int64_t* ends, int64_t experts, const qcpu_product*);
QCPU_EXPORT int64_t qcpu_grouped_scratch(const qcpu_weight* const*, const int64_t* ends, int64_t, const qcpu_product*);
// Rows of a weight as floats [count, columns] of a type: those that `rows` [count] numbers, or without it `count` rows
// from `first` on.
QCPU_EXPORT int qcpu_dequantize(const qcpu_weight*, const int64_t* rows, int64_t first, int64_t count, void* out, int type,
                                int threads);

#ifdef __cplusplus
}
#endif
