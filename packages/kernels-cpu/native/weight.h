// What the skeletons read: a checked weight, inputs made ready for them, and the table of an instruction set's functions.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "quantcore_cpu.h"

namespace qcpu {

constexpr int64_t kRows = 16;      // of a block
constexpr int64_t kColumns = 32;   // of a unit
constexpr int64_t kChunk = 256;    // most columns whose products are summed as integers: 256 * 32767 * 255 < 2^31
constexpr int64_t kPanel = 256;    // columns that are decoded at a time, 16 KiB of floats
constexpr float kMostExact = 32639.0f;  // 127 * 256 + 127: two signed bytes hold it, and so does an int16
constexpr float kMostRounded = 127.0f;

// Static: a copy compiled for one instruction set must not serve the others.
static inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Weight : qcpu_weight {
  int64_t units;
  int64_t chunk, chunks;  // columns whose integer products share one scale of the input; a group or a part of one
};

static inline const uint8_t* codes_of(const Weight& w, int64_t block) { return w.codes + block * w.units * 64 * w.bits; }

// Inputs as integers: 4 columns take 8 bytes (exact) or 4 (rounded), in the order that an instruction set asks for.
struct Integers {
  const uint8_t* q;
  const float* scale;  // [rows][chunks]
  const float* sum;    // [rows][chunks]: scale * sum of a chunk's integers
  int64_t rows, row_bytes;
  bool rounded;
};

// Decoded columns of `count` blocks, each [columns][16], `next` floats apart; `begins` with those that sums begin with.
struct Panels {
  const float* values;
  int64_t next, count, columns;
  bool begins;
};

struct Kernels {
  const char* name;
  int64_t tile_rows;     // rows of x that `multiply` takes at a time
  int64_t dot_rows;      // up to how many rows integers serve better than floats; all of them: a large number
  bool rounds_bytes;     // whether rounded inputs serve 8-bit codes
  void (*load)(const void* x, int type, int64_t count, float* out);
  void (*store)(const float* values, int64_t count, void* out, int type);
  // One chunk of one row: count floats to integers in steps of 4 columns. A row that is not finite gets a scale of NaN.
  void (*integers)(const float* x, int64_t count, bool rounded, uint8_t* q, float* scale, float* sum);
  void (*dot)(const Weight&, const Integers&, int64_t block, float* y, int64_t ldy);
  void (*decode)(const Weight&, int64_t block, int64_t unit, int64_t units, float* panel);  // [columns][16]
  // One or two rows of x [rows][padded] times a block without factors of columns: y [rows][16].
  void (*few)(const Weight&, const float* x, int64_t ldx, int64_t rows, int64_t block, float* y);
  // Panel columns under factors of their own: (value - zero[k]) * scale[k].
  void (*columns)(float* panel, int64_t columns, const float* scale, const float* zero);
  // y: [blocks][rows][16], next_y floats from block to block.
  void (*multiply)(const float* x, int64_t ldx, int64_t rows, const Panels&, float* y, int64_t next_y);
};

// Beside the others, of a processor that multiplies a pair of bfloat16 columns in the time of one of float32.
struct PairKernels {
  int64_t tile_rows;
  // A panel [columns][16], rounded to pairs [columns / 2][16] of bfloat16; a pair is as large as a float.
  void (*round)(const float* panel, int64_t columns, float* pairs);
  // As that of Kernels, for pairs of x and of the panels; ldx and columns count pairs.
  void (*multiply)(const float* x, int64_t ldx, int64_t rows, const Panels&, float* y, int64_t next_y);
};

const Kernels* generic_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();
const Kernels* dotprod_kernels();
const Kernels* i8mm_kernels();
const PairKernels* avx512_bf16_pairs();

}  // namespace qcpu
