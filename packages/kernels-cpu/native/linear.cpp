// What the functions of the interface share: checks, the path of a product, scratch, and the work of each thread.
#include <string.h>

#include <atomic>

#include "machine.h"
#include "threads.h"

namespace qcpu {
namespace {

constexpr int64_t kMost = int64_t(1) << 31;
constexpr int64_t kAtOnce = 4;          // blocks that a thread multiplies together with the same rows of x
constexpr int64_t kInputBytes = 1 << 19;  // of inputs that are made ready at a time: they stay in the second cache
constexpr int64_t kFewRows = 2;           // of x, whose sums lie in registers beside the decoded weights

bool holds(const int32_t* values, int64_t count, int64_t first, int64_t end) {
  int32_t low = values[0], high = values[0];
  for (int64_t i = 1; i < count; i++) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  return low >= first && high < end;
}

bool is_size(int64_t value) { return value > 0 && value < kMost; }
bool is_float(int type) { return type == QCPU_F32 || type == QCPU_BF16 || type == QCPU_F16; }
int64_t bytes_of(int type) { return type == QCPU_F32 ? 4 : 2; }
bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

int check_shape(const qcpu_weight& w) {
  if (!is_size(w.rows) || !is_size(w.columns) || !is_size(w.blocks) || !is_size(w.padded) || !is_size(w.group))
    return QCPU_BAD_SHAPE;
  if (w.padded % kColumns || (w.padded < w.columns && !w.order)) return QCPU_BAD_SHAPE;
  const bool part = w.group == 4 || w.group == 8 || w.group == 16;
  if ((!part && w.group % kColumns) || w.groups != (w.padded + w.group - 1) / w.group) return QCPU_BAD_SHAPE;
  if (!w.row_of && w.blocks != (w.rows + kRows - 1) / kRows) return QCPU_BAD_SHAPE;
  if (w.bits < 1 || w.bits > 8 || w.classes < 1 || w.classes > w.blocks) return QCPU_BAD_SHAPE;
  return QCPU_OK;
}

int check_types(const qcpu_weight& w) {
  const bool scale = w.scale_type == QCPU_NONE || is_float(w.scale_type);
  const bool zero = w.zero_type == QCPU_NONE || w.zero_type == QCPU_U8 || is_float(w.zero_type);
  if (!scale || !zero || w.element < QCPU_INTEGER || w.element > QCPU_FLOAT) return QCPU_BAD_TYPE;
  if (w.element != QCPU_FLOAT) return QCPU_OK;
  const bool parts = w.float_exponent >= 1 && w.float_exponent <= 7 && w.float_mantissa >= 0 && w.float_mantissa <= 6;
  if (!parts || 1 + w.float_exponent + w.float_mantissa != w.bits || w.bits < 3) return QCPU_BAD_TYPE;
  return w.float_bias >= 0 && w.float_bias <= 64 ? QCPU_OK : QCPU_BAD_TYPE;
}

int check_pointers(const qcpu_weight& w) {
  if (!w.codes || !is_aligned(w.codes) || (w.scale_type && !w.scale) || (w.zero_type && !w.zero))
    return QCPU_BAD_POINTER;
  if (w.element == QCPU_TABLE && !w.levels) return QCPU_BAD_POINTER;
  for (int i = 0; w.small && i < 16; i++)
    if (w.small[i] > 127) return QCPU_BAD_SHAPE;
  if ((w.column_scale == nullptr) != (w.column_zero == nullptr)) return QCPU_BAD_POINTER;
  if (w.class_of && !w.column_scale) return QCPU_BAD_POINTER;
  if (w.order && !holds(w.order, w.padded, -1, w.columns)) return QCPU_BAD_SHAPE;
  if (w.row_of && !holds(w.row_of, w.blocks * kRows, -1, w.rows)) return QCPU_BAD_SHAPE;
  if (w.class_of && !holds(w.class_of, w.blocks, 0, w.classes)) return QCPU_BAD_SHAPE;
  return QCPU_OK;
}

// Columns whose integer products are summed under one scale of the input: a group, or equal parts of one.
int64_t chunk_of(const qcpu_weight& w) {
  if (w.group <= kChunk) return least(w.group, w.padded);
  if (w.groups == 1) return kChunk;
  int64_t chunk = kChunk;
  while (w.group % chunk) chunk -= kColumns;
  return chunk;
}

int check(const qcpu_weight* w, Weight& out) {
  if (!w || w->size != int64_t(sizeof *w)) return QCPU_BAD_STRUCT;
  if (const int status = check_shape(*w)) return status;
  if (const int status = check_types(*w)) return status;
  if (const int status = check_pointers(*w)) return status;
  static_cast<qcpu_weight&>(out) = *w;
  out.units = w->padded / kColumns;
  out.chunk = chunk_of(*w);
  out.chunks = (w->padded + out.chunk - 1) / out.chunk;
  return QCPU_OK;
}

int check(const qcpu_product* p, const qcpu_weight& w, bool with_scratch) {
  if (!p || p->size != int64_t(sizeof *p)) return QCPU_BAD_STRUCT;
  if (p->x_rows < 0 || p->x_rows >= kMost || p->threads < 1 || p->threads > 4096) return QCPU_BAD_SHAPE;
  if (p->x_stride < w.columns || p->y_stride < w.rows) return QCPU_BAD_SHAPE;
  if (!is_float(p->x_type) || !is_float(p->y_type) || (p->bias && !is_float(p->bias_type))) return QCPU_BAD_TYPE;
  if (p->path < QCPU_AUTO || p->path > QCPU_PAIRS) return QCPU_BAD_TYPE;
  if (p->x_rows && with_scratch && (!p->x || !p->y || !p->scratch || !is_aligned(p->scratch))) return QCPU_BAD_POINTER;
  return QCPU_OK;
}

bool serves_dot(const Weight& w) {
  if (w.column_scale) return false;
  return w.element == QCPU_INTEGER || (w.element == QCPU_TABLE && w.bits == 4 && w.small && !w.zero_type);
}

bool serves_pairs(const Machine& m, const qcpu_product& p) { return m.pairs && p.x_type == QCPU_BF16; }

// Integers hold what bfloat16 and float16 inputs hold; float32 inputs are multiplied as floats unless they may be rounded.
// Pairs round weights, as dequantizing to bfloat16 does, never inputs.
int choose_path(const Machine& m, const Weight& w, const qcpu_product& p) {
  const bool dot = serves_dot(w) && (p.x_type != QCPU_F32 || p.rounded);
  const int64_t few = dot ? w.chunk / 2 : kFewRows;  // the sums of a chunk are scaled for each row, pairs are not
  if (p.x_rows > few && serves_pairs(m, p) && !(dot && p.rounded)) return QCPU_PAIRS;
  return dot && p.x_rows <= m.kernels->dot_rows ? QCPU_DOT : QCPU_FMA;
}

int path_of(const Machine& m, const Weight& w, const qcpu_product& p) {
  switch (p.path) {
    case QCPU_AUTO: return choose_path(m, w, p);
    case QCPU_DOT: return serves_dot(w) ? int(QCPU_DOT) : int(QCPU_NOT_HERE);
    case QCPU_PAIRS: return serves_pairs(m, p) ? int(QCPU_PAIRS) : int(QCPU_NOT_HERE);
    default: return QCPU_FMA;
  }
}

// How much of x is made ready at a time, and where in the scratch everything lies.
struct Plan {
  int path;
  bool rounded;
  int64_t rows, row_bytes, ldx;
  int64_t inputs, scales, sums, row, panels, outputs, total;  // offsets
  int64_t row_size, panel_size, output_size;                  // of one thread, in bytes

  int64_t take(int64_t bytes) {
    const int64_t at = total;
    total = round_up(total + bytes, 64);
    return at;
  }
};

int64_t rows_at_once(const Plan& plan, const Weight& w, int64_t rows) {
  const int64_t most = kInputBytes * (plan.path == QCPU_FMA ? 4 : 2) / (plan.path == QCPU_FMA ? 4 * plan.ldx : 2 * w.padded);
  const int64_t whole = round_up(most < 48 ? 48 : most, 48);  // tiles of 6, 12 and 16 rows fill it
  const int64_t parts = (rows + whole - 1) / whole;
  return parts <= 1 ? rows : least(rows, round_up((rows + parts - 1) / parts, 48));
}

Plan plan_of(const Machine& m, const Weight& w, const qcpu_product& p) {
  Plan plan{};
  plan.path = path_of(m, w, p);
  plan.rounded = p.rounded && (w.bits == 4 || (w.bits == 8 && m.kernels->rounds_bytes));
  plan.ldx = w.padded + 16;  // not a power of two, or all rows would share a few sets of the first cache
  plan.rows = rows_at_once(plan, w, p.x_rows);
  plan.row_bytes = plan.rounded ? w.padded : 2 * w.padded;
  const int64_t input = plan.path == QCPU_DOT ? plan.row_bytes : (plan.path == QCPU_FMA ? 4 : 2) * plan.ldx;
  const int64_t factors = plan.path == QCPU_DOT ? w.chunks : 0;
  plan.inputs = plan.take(plan.rows * input + 64);
  plan.scales = plan.take(plan.rows * factors * 4);
  plan.sums = plan.take(plan.rows * factors * 4);
  plan.row_size = round_up(4 * plan.ldx + 4 * w.columns, 64);
  plan.panel_size = 4 * kRows * kPanel * kAtOnce;
  plan.output_size = 4 * kRows * plan.rows * kAtOnce;
  plan.row = plan.take(plan.row_size * p.threads);
  plan.panels = plan.take(plan.panel_size * p.threads);
  plan.outputs = plan.take(plan.output_size * p.threads);
  return plan;
}

struct Work {
  const Machine& m;
  const Weight& w;
  const qcpu_product& p;
  const Plan& plan;
  int64_t first, rows;  // of x
  std::atomic<int64_t> next_input{0}, next_block{0};

  template <class T>
  T* at(int64_t offset) const { return reinterpret_cast<T*>(static_cast<uint8_t*>(p.scratch) + offset); }
  const void* x(int64_t row) const {
    return static_cast<const uint8_t*>(p.x) + (first + row) * p.x_stride * bytes_of(p.x_type);
  }
  Integers integers() const {
    return {at<uint8_t>(plan.inputs), at<float>(plan.scales), at<float>(plan.sums), rows, plan.row_bytes, plan.rounded};
  }
};

// A row of x as float32, its columns in the order of the packed weight.
void load_row(const Work& work, int64_t row, float* out, float* plain) {
  const Weight& w = work.w;
  if (!w.order) {
    work.m.kernels->load(work.x(row), work.p.x_type, w.columns, out);
    memset(out + w.columns, 0, size_t(w.padded - w.columns) * 4);
    return;
  }
  work.m.kernels->load(work.x(row), work.p.x_type, w.columns, plain);
  for (int64_t k = 0; k < w.padded; k++) out[k] = w.order[k] < 0 ? 0.0f : plain[w.order[k]];
}

void ready_dot(Work& work, int64_t row, float* values, float* plain) {
  const Weight& w = work.w;
  load_row(work, row, values, plain);
  uint8_t* q = work.at<uint8_t>(work.plan.inputs) + row * work.plan.row_bytes;
  float* scale = work.at<float>(work.plan.scales) + row * w.chunks;
  float* sum = work.at<float>(work.plan.sums) + row * w.chunks;
  const int64_t bytes = work.plan.rounded ? 1 : 2;
  for (int64_t c = 0, k = 0; c < w.chunks; c++, k += w.chunk)
    work.m.kernels->integers(values + k, least(w.chunk, w.padded - k), work.plan.rounded, q + k * bytes, scale + c, sum + c);
}

void ready_inputs(void* argument, int thread) {
  Work& work = *static_cast<Work*>(argument);
  const int64_t ldx = work.plan.ldx;
  float* values = work.at<float>(work.plan.row + thread * work.plan.row_size);
  float* plain = values + ldx;
  for (int64_t i; (i = work.next_input.fetch_add(1)) < work.rows;) {
    if (work.plan.path == QCPU_DOT) {
      ready_dot(work, i, values, plain);
    } else if (work.plan.path == QCPU_FMA) {
      load_row(work, i, work.at<float>(work.plan.inputs) + i * ldx, plain);
    } else {
      load_row(work, i, values, plain);
      work.m.kernels->store(values, work.w.padded, work.at<uint16_t>(work.plan.inputs) + i * ldx, QCPU_BF16);
    }
  }
}

void decode(const Machine& m, const Weight& w, int64_t block, int64_t unit, int64_t units, float* panel) {
  m.kernels->decode(w, block, unit, units, panel);
  if (!w.column_scale) return;
  const int64_t at = (w.class_of ? w.class_of[block] : 0) * w.padded + unit * kColumns;
  m.kernels->columns(panel, units * kColumns, w.column_scale + at, w.column_zero + at);
}

// Adds the bias to a block's sums [rows][16] and writes them where they belong.
void finish(const Work& work, int64_t block, float* sums) {
  const Weight& w = work.w;
  const int64_t row0 = block * kRows, count = w.row_of ? kRows : least(kRows, w.rows - row0);
  const int64_t x_bytes = bytes_of(work.p.y_type);
  float bias[kRows] = {};
  for (int64_t n = 0; work.p.bias && n < count; n++) {
    const int64_t row = w.row_of ? w.row_of[row0 + n] : row0 + n;
    if (row < 0) continue;
    const uint8_t* at = static_cast<const uint8_t*>(work.p.bias) + row * bytes_of(work.p.bias_type);
    work.m.kernels->load(at, work.p.bias_type, 1, bias + n);
  }
  for (int64_t m = 0; m < work.rows; m++, sums += kRows) {
    if (work.p.bias)
      for (int n = 0; n < kRows; n++) sums[n] += bias[n];
    uint8_t* y = static_cast<uint8_t*>(work.p.y) + (work.first + m) * work.p.y_stride * x_bytes;
    if (!w.row_of) {
      work.m.kernels->store(sums, count, y + row0 * x_bytes, work.p.y_type);
      continue;
    }
    uint8_t made[4 * kRows];
    work.m.kernels->store(sums, kRows, made, work.p.y_type);
    for (int n = 0; n < kRows; n++)
      if (w.row_of[row0 + n] >= 0) memcpy(y + w.row_of[row0 + n] * x_bytes, made + n * x_bytes, size_t(x_bytes));
  }
}

void multiply_floats(const Work& work, int64_t block, int64_t count, float* panel, float* sums) {
  const Weight& w = work.w;
  const float* x = work.at<float>(work.plan.inputs);
  if (work.rows <= kFewRows && !w.column_scale) {
    for (int64_t b = 0; b < count; b++)
      work.m.kernels->few(w, x, work.plan.ldx, work.rows, block + b, sums + b * work.rows * kRows);
    return;
  }
  const int64_t tile = work.m.kernels->tile_rows, ahead = kPanel / kColumns;
  for (int64_t unit = 0; unit < w.units; unit += ahead) {
    const int64_t units = least(ahead, w.units - unit);
    for (int64_t b = 0; b < count; b++) decode(work.m, w, block + b, unit, units, panel + b * kPanel * kRows);
    const Panels panels{panel, kPanel * kRows, count, units * kColumns, unit == 0};
    for (int64_t m = 0; m < work.rows; m += tile)
      work.m.kernels->multiply(x + m * work.plan.ldx + unit * kColumns, work.plan.ldx, least(tile, work.rows - m), panels,
                               sums + m * kRows, work.rows * kRows);
  }
}

void multiply_pairs(const Work& work, int64_t block, int64_t count, float* panel, float* sums) {
  const Weight& w = work.w;
  const PairKernels& kernels = *work.m.pairs;
  const int64_t ldx = work.plan.ldx / 2, tile = kernels.tile_rows, ahead = kPanel / kColumns, size = kPanel * kRows / 2;
  const float* x = work.at<float>(work.plan.inputs);
  float* pairs = panel + kPanel * kRows;  // those of all blocks take the room of two panels
  for (int64_t unit = 0; unit < w.units; unit += ahead) {
    const int64_t units = least(ahead, w.units - unit), columns = units * kColumns;
    for (int64_t b = 0; b < count; b++) {
      decode(work.m, w, block + b, unit, units, panel);
      kernels.round(panel, columns, pairs + b * size);
    }
    const Panels panels{pairs, size, count, columns / 2, unit == 0};
    for (int64_t m = 0; m < work.rows; m += tile)
      kernels.multiply(x + m * ldx + unit * kColumns / 2, ldx, least(tile, work.rows - m), panels, sums + m * kRows,
                       work.rows * kRows);
  }
}

void multiply_blocks(const Work& work, int64_t block, int64_t count, float* panel, float* sums) {
  if (work.plan.path == QCPU_FMA) return multiply_floats(work, block, count, panel, sums);
  if (work.plan.path == QCPU_PAIRS) return multiply_pairs(work, block, count, panel, sums);
  for (int64_t b = 0; b < count; b++, sums += work.rows * kRows)
    work.m.kernels->dot(work.w, work.integers(), block + b, sums, kRows);
}

void multiply(void* argument, int thread) {
  Work& work = *static_cast<Work*>(argument);
  float* panel = work.at<float>(work.plan.panels + thread * work.plan.panel_size);
  float* sums = work.at<float>(work.plan.outputs + thread * work.plan.output_size);
  for (int64_t block; (block = work.next_block.fetch_add(kAtOnce)) < work.w.blocks;) {
    const int64_t count = least(kAtOnce, work.w.blocks - block);
    multiply_blocks(work, block, count, panel, sums);
    for (int64_t b = 0; b < count; b++) finish(work, block + b, sums + b * work.rows * kRows);
  }
}

constexpr int64_t kAloneRows = 4;  // of x, which one thread makes ready sooner than several start

int linear(const Machine& m, const Weight& w, const qcpu_product& p) {
  if (p.x_rows == 0) return QCPU_OK;
  const Plan plan = plan_of(m, w, p);
  if (plan.path < 0) return plan.path;
  if (p.scratch_bytes < plan.total) return QCPU_BAD_SCRATCH;
  for (int64_t first = 0; first < p.x_rows; first += plan.rows) {
    Work work{m, w, p, plan, first, least(plan.rows, p.x_rows - first)};
    run_on_threads(ready_inputs, &work, work.rows <= kAloneRows ? 1 : p.threads);
    run_on_threads(multiply, &work, p.threads);
  }
  return QCPU_OK;
}

// The product of the rows of one expert, as a product of its own.
qcpu_product part_of(const qcpu_product& p, int64_t first, int64_t end) {
  qcpu_product part = p;
  if (p.x) part.x = static_cast<const uint8_t*>(p.x) + first * p.x_stride * bytes_of(p.x_type);
  if (p.y) part.y = static_cast<uint8_t*>(p.y) + first * p.y_stride * bytes_of(p.y_type);
  part.x_rows = end - first;
  part.bias = nullptr;
  return part;
}

template <class Visit>
int each_expert(const qcpu_weight* const* weights, const int64_t* ends, int64_t experts, const qcpu_product* p,
                bool with_scratch, Visit visit) {
  if (!weights || !ends || experts < 0 || experts >= kMost) return QCPU_BAD_POINTER;
  if (!p || p->size != int64_t(sizeof *p)) return QCPU_BAD_STRUCT;
  int64_t first = 0;
  for (int64_t e = 0; e < experts; first = ends[e++]) {
    if (ends[e] < first || ends[e] > p->x_rows) return QCPU_BAD_SHAPE;
    if (ends[e] == first) continue;
    Weight w;
    if (const int status = check(weights[e], w)) return status;
    if (const int status = check(p, w, with_scratch)) return status;
    if (const int status = visit(w, part_of(*p, first, ends[e]))) return status;
  }
  return QCPU_OK;
}

struct Dequantizing {
  const Machine& m;
  const Weight& w;
  const int64_t* rows;
  int64_t first, count;
  void* out;
  int type;
  std::atomic<int64_t> next{0};
};

int64_t row_of(const Weight& w, int64_t packed_row) {
  if (w.row_of) return w.row_of[packed_row];
  return packed_row < w.rows ? packed_row : -1;
}

int64_t packed_row_of(const Weight& w, int64_t row) {
  if (!w.row_of) return row;
  for (int64_t i = 0; i < w.blocks * kRows; i++)
    if (w.row_of[i] == row) return i;
  return -1;
}

// One row of a decoded panel of columns [unit * 32, ...) to its place in a row of the output.
void write_row(const Dequantizing& d, const float* panel, int64_t lane, int64_t first, int64_t columns, int64_t to) {
  uint8_t* out = static_cast<uint8_t*>(d.out) + to * d.w.columns * bytes_of(d.type);
  float values[kPanel];
  for (int64_t k = 0; k < columns; k++) values[k] = panel[k * kRows + lane];
  if (!d.w.order) {
    const int64_t count = least(columns, d.w.columns - first);
    if (count > 0) d.m.kernels->store(values, count, out + first * bytes_of(d.type), d.type);
    return;
  }
  for (int64_t k = 0; k < columns; k++)
    if (d.w.order[first + k] >= 0)
      d.m.kernels->store(values + k, 1, out + d.w.order[first + k] * bytes_of(d.type), d.type);
}

template <class Visit>
void each_panel(const Dequantizing& d, int64_t block, Visit visit) {
  float panel[kPanel * kRows];
  for (int64_t unit = 0; unit < d.w.units; unit += kPanel / kColumns) {
    const int64_t units = least(kPanel / kColumns, d.w.units - unit);
    decode(d.m, d.w, block, unit, units, panel);
    visit(panel, unit * kColumns, units * kColumns);
  }
}

void dequantize_blocks(void* argument, int) {
  Dequantizing& d = *static_cast<Dequantizing*>(argument);
  const auto wanted = [&](int64_t row) { return row >= d.first && row < d.first + d.count; };
  for (int64_t block; (block = d.next.fetch_add(1)) < d.w.blocks;) {
    bool any = false;
    for (int64_t lane = 0; lane < kRows; lane++) any |= wanted(row_of(d.w, block * kRows + lane));
    if (!any) continue;
    each_panel(d, block, [&](const float* panel, int64_t first, int64_t columns) {
      for (int64_t lane = 0; lane < kRows; lane++) {
        const int64_t row = row_of(d.w, block * kRows + lane);
        if (wanted(row)) write_row(d, panel, lane, first, columns, row - d.first);
      }
    });
  }
}

void dequantize_rows(void* argument, int) {
  Dequantizing& d = *static_cast<Dequantizing*>(argument);
  for (int64_t i; (i = d.next.fetch_add(1)) < d.count;) {
    const int64_t at = packed_row_of(d.w, d.rows[i]);
    if (at < 0) continue;
    each_panel(d, at / kRows, [&](const float* panel, int64_t first, int64_t columns) {
      write_row(d, panel, at % kRows, first, columns, i);
    });
  }
}

int dequantize(const Weight& w, const int64_t* rows, int64_t first, int64_t count, void* out, int type, int threads) {
  if (!is_float(type)) return QCPU_BAD_TYPE;
  if (first < 0 || count < 0 || count >= kMost || threads < 1) return QCPU_BAD_SHAPE;
  if (!rows && (first > w.rows || count > w.rows - first)) return QCPU_BAD_SHAPE;
  if (count == 0) return QCPU_OK;
  if (!out) return QCPU_BAD_POINTER;
  for (int64_t i = 0; rows && i < count; i++)
    if (rows[i] < 0 || rows[i] >= w.rows) return QCPU_BAD_SHAPE;
  Dequantizing d{machine(), w, rows, first, count, out, type};
  run_on_threads(rows ? dequantize_rows : dequantize_blocks, &d, threads);
  return QCPU_OK;
}

}  // namespace
}  // namespace qcpu

extern "C" {

using namespace qcpu;

int qcpu_abi(void) { return QCPU_ABI; }
const char* qcpu_threading(void) { return threading(); }

const char* qcpu_message(int status) {
  static const char* const messages[] = {
      "ok",
      "a struct is missing or of another version",
      "a size is negative, too large, or does not fit another",
      "an unknown type, element or path",
      "an array is missing or not aligned",
      "the scratch is too small",
      "this machine cannot run what was asked for",
  };
  return status <= 0 && status >= QCPU_NOT_HERE ? messages[-status] : "an unknown status";
}

int qcpu_check(const qcpu_weight* weight) {
  Weight w;
  return check(weight, w);
}

int qcpu_path_of(const qcpu_weight* weight, const qcpu_product* product) {
  Weight w;
  if (const int status = check(weight, w)) return status;
  if (const int status = check(product, w, false)) return status;
  return path_of(machine(), w, *product);
}

int64_t qcpu_scratch(const qcpu_weight* weight, const qcpu_product* product) {
  Weight w;
  if (const int status = check(weight, w)) return status;
  if (const int status = check(product, w, false)) return status;
  const Plan plan = plan_of(machine(), w, *product);
  return plan.path < 0 ? plan.path : plan.total;
}

int qcpu_linear(const qcpu_weight* weight, const qcpu_product* product) {
  Weight w;
  if (const int status = check(weight, w)) return status;
  if (const int status = check(product, w, true)) return status;
  return linear(machine(), w, *product);
}

int64_t qcpu_grouped_scratch(const qcpu_weight* const* weights, const int64_t* ends, int64_t experts, const qcpu_product* p) {
  int64_t most = 0;
  const int status = each_expert(weights, ends, experts, p, false, [&](const Weight& w, const qcpu_product& part) {
    const Plan plan = plan_of(machine(), w, part);
    most = plan.total > most ? plan.total : most;
    return plan.path < 0 ? plan.path : int(QCPU_OK);
  });
  return status ? status : most;
}

int qcpu_grouped(const qcpu_weight* const* weights, const int64_t* ends, int64_t experts, const qcpu_product* p) {
  const Machine& m = machine();
  return each_expert(weights, ends, experts, p, true,
                     [&](const Weight& w, const qcpu_product& part) { return linear(m, w, part); });
}

int qcpu_dequantize(const qcpu_weight* weight, const int64_t* rows, int64_t first, int64_t count, void* out, int type,
                    int threads) {
  Weight w;
  if (const int status = check(weight, w)) return status;
  return dequantize(w, rows, first, count, out, type, threads);
}

}
