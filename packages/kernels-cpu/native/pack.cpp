// Codes, one a byte, to the packed layout and back. The layout is told in quantcore_cpu.h.
#include <string.h>

#include <atomic>

#include "threads.h"
#include "weight.h"

namespace qcpu {
namespace {

struct Packing {
  const qcpu_source& source;
  uint8_t* packed;
  std::atomic<int64_t> next{0};
};

int64_t row_at(const qcpu_source& s, int64_t packed_row) {
  if (s.row_of) return s.row_of[packed_row];
  return packed_row < s.rows ? packed_row : -1;
}

using Steps = uint8_t[8][64];  // the codes of a unit, 4 columns of 16 rows in each step

// Calls visit(codes in their row, their place in a step, count) of all codes of a unit that are not padding.
template <class Visit>
void each_code(const qcpu_source& s, int64_t block, int64_t unit, Steps& steps, Visit visit) {
  const int64_t first = unit * kColumns;
  for (int n = 0; n < kRows; n++) {
    const int64_t row = row_at(s, block * kRows + n);
    if (row < 0) continue;
    uint8_t* codes = const_cast<uint8_t*>(s.codes) + row * s.stride;
    if (!s.order && first + kColumns <= s.columns) {
      for (int k = 0; k < kColumns; k += 4) visit(codes + first + k, steps[k / 4] + 4 * n, 4);
      continue;
    }
    for (int k = 0; k < kColumns; k++) {
      const int64_t column = s.order ? s.order[first + k] : first + k < s.columns ? first + k : -1;
      if (column >= 0) visit(codes + column, steps[k / 4] + 4 * n + k % 4, 1);
    }
  }
}

// Moves `width` bits of every code, from `shift` on, between the steps and a plane.
template <class Move>
void each_byte(Steps& steps, uint8_t* plane, int width, Move move) {
  const int per = 8 / width;
  for (int s = 0; s < 8; s++)
    for (int at = 0; at < 64; at++) move(steps[s][at], plane[64 * (s / per) + at], width * (s % per));
}

template <class Move>
void each_plane(int bits, uint8_t* unit, Move move) {
  int at = 0, shift = 0;
  for (int width = 8; width > 0; width /= 2) {
    if (!(bits & width)) continue;
    move(unit + at, width, shift);
    at += 64 * width, shift += width;
  }
}

template <class Unit>
void each_unit(Packing& p, Unit visit) {
  const int64_t units = p.source.padded / kColumns, bytes = 64 * p.source.bits;
  for (int64_t block; (block = p.next.fetch_add(1)) < p.source.blocks;)
    for (int64_t unit = 0; unit < units; unit++) visit(block, unit, p.packed + (block * units + unit) * bytes);
}

void pack(void* argument, int) {
  Packing& p = *static_cast<Packing*>(argument);
  each_unit(p, [&](int64_t block, int64_t unit, uint8_t* out) {
    Steps steps = {};
    each_code(p.source, block, unit, steps, [](uint8_t* code, uint8_t* step, int count) { memcpy(step, code, size_t(count)); });
    memset(out, 0, size_t(64 * p.source.bits));
    each_plane(p.source.bits, out, [&](uint8_t* plane, int width, int shift) {
      const int mask = (1 << width) - 1;
      each_byte(steps, plane, width, [=](uint8_t code, uint8_t& byte, int left) {
        byte = uint8_t(byte | (code >> shift & mask) << left);
      });
    });
  });
}

void unpack(void* argument, int) {
  Packing& p = *static_cast<Packing*>(argument);
  each_unit(p, [&](int64_t block, int64_t unit, uint8_t* in) {
    Steps steps = {};
    each_plane(p.source.bits, in, [&](uint8_t* plane, int width, int shift) {
      const int mask = (1 << width) - 1;
      each_byte(steps, plane, width, [=](uint8_t& code, uint8_t byte, int left) {
        code = uint8_t(code | (byte >> left & mask) << shift);
      });
    });
    each_code(p.source, block, unit, steps, [](uint8_t* code, uint8_t* step, int count) { memcpy(code, step, size_t(count)); });
  });
}

bool holds(const int32_t* values, int64_t count, int64_t least_value, int64_t end) {
  for (int64_t i = 0; i < count; i++)
    if (values[i] < least_value || values[i] >= end) return false;
  return true;
}

int check(const qcpu_source* s, const uint8_t* packed) {
  if (!s || s->size != int64_t(sizeof *s)) return QCPU_BAD_STRUCT;
  constexpr int64_t kMost = int64_t(1) << 31;
  const bool sizes = s->rows > 0 && s->rows < kMost && s->columns > 0 && s->columns < kMost && s->stride >= s->columns;
  const bool fits = s->padded > 0 && s->padded < kMost && s->padded % kColumns == 0 && s->blocks > 0 && s->blocks < kMost;
  if (!sizes || !fits || s->bits < 1 || s->bits > 8) return QCPU_BAD_SHAPE;
  if (!s->order && s->columns > s->padded) return QCPU_BAD_SHAPE;
  if (!s->row_of && s->blocks != (s->rows + kRows - 1) / kRows) return QCPU_BAD_SHAPE;
  if (!s->codes || !packed) return QCPU_BAD_POINTER;
  if (s->order && !holds(s->order, s->padded, -1, s->columns)) return QCPU_BAD_SHAPE;
  if (s->row_of && !holds(s->row_of, s->blocks * kRows, -1, s->rows)) return QCPU_BAD_SHAPE;
  return QCPU_OK;
}

int run(Job job, const qcpu_source* source, uint8_t* packed) {
  if (const int status = check(source, packed)) return status;
  Packing packing{*source, packed};
  run_on_threads(job, &packing, source->threads);
  return QCPU_OK;
}

}  // namespace
}  // namespace qcpu

extern "C" {

int64_t qcpu_packed_bytes(int64_t blocks, int64_t padded, int bits) {
  constexpr int64_t kMost = int64_t(1) << 31;
  if (blocks < 0 || blocks >= kMost || padded < 0 || padded >= kMost || padded % 32 || bits < 1 || bits > 8)
    return QCPU_BAD_SHAPE;
  return blocks * (padded / 32) * 64 * bits;
}

int qcpu_pack(const qcpu_source* source, uint8_t* packed) { return qcpu::run(qcpu::pack, source, packed); }

int qcpu_unpack(const qcpu_source* source, const uint8_t* packed) {
  return qcpu::run(qcpu::unpack, source, const_cast<uint8_t*>(packed));
}

}
