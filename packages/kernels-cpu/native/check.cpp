// Every instruction set that this machine runs, every path, against doubles. Without Python, so that it also runs under
// an emulator of another processor. Prints what is wrong and how much was compared.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "quantcore_cpu.h"

namespace {

int failures = 0, comparisons = 0;

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return uint32_t(state >> 33);
  }
  int below(int end) { return int(next() % uint32_t(end)); }
  float unit() { return float(next() & 0xffff) / 32768.0f - 1.0f; }
};

float from_bf16(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

uint16_t to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_half(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float f = exponent ? ldexpf(float(1024 + mantissa), exponent - 25) : ldexpf(float(mantissa), -24);
  return h >> 15 ? -f : f;
}

struct Buffer {  // 64-byte aligned, ending where it is allocated, so that a sanitizer sees a read beyond it
  uint8_t* data;
  explicit Buffer(int64_t bytes) : data(static_cast<uint8_t*>(aligned_alloc(64, size_t((bytes + 63) / 64 * 64)))) {
    memset(data, 0xff, size_t((bytes + 63) / 64 * 64));  // NaN wherever nobody writes
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(data); }
};

struct Case {
  int rows, columns, group, bits, element;
  int scale_type, zero_type;
  bool ordered, scattered, by_columns;
};

std::string name_of(const Case& c) {
  char text[160];
  snprintf(text, sizeof text, "[%d, %d] group %d bits %d element %d scale %d zero %d%s%s%s", c.rows, c.columns, c.group,
           c.bits, c.element, c.scale_type, c.zero_type, c.ordered ? " ordered" : "", c.scattered ? " scattered" : "",
           c.by_columns ? " by columns" : "");
  return text;
}

double float_value(const qcpu_weight& w, int code) {
  const int width = w.float_exponent + w.float_mantissa;
  const int exponent = code >> w.float_mantissa & ((1 << w.float_exponent) - 1), mantissa = code & ((1 << w.float_mantissa) - 1);
  const double value = exponent ? ldexp(1.0 + ldexp(mantissa, -w.float_mantissa), exponent - w.float_bias)
                                : ldexp(mantissa, 1 - w.float_bias - w.float_mantissa);
  return code >> width & 1 ? -value : value;
}

// A random weight, packed, and the same as doubles.
struct Sample {
  qcpu_weight w{};
  std::vector<uint8_t> codes;
  std::vector<int32_t> order, row_of, class_of;
  std::vector<uint8_t> scale, zero, small;
  std::vector<float> levels, column_scale, column_zero;
  std::vector<double> values;
  Buffer* packed = nullptr;

  Sample(const Case& c, Random& random) {
    w.size = sizeof w;
    w.rows = c.rows, w.columns = c.columns, w.bits = c.bits, w.element = c.element;
    w.padded = (c.columns + 31) / 32 * 32;
    w.group = c.group ? c.group : w.padded;
    w.groups = (w.padded + w.group - 1) / w.group;
    w.blocks = (c.rows + 15) / 16, w.classes = 1;
    w.scale_type = c.scale_type, w.zero_type = c.zero_type, w.zero_of_all = c.element == QCPU_INTEGER ? 3.0f : 0.0f;
    codes.resize(size_t(c.rows) * c.columns);
    for (auto& code : codes) code = uint8_t(random.below(1 << c.bits));
    if (c.ordered) shuffle_columns(random);
    if (c.scattered) scatter_rows(random);
    describe_element(random);
    factors(scale, w.scale_type, random, 0.01f, 0.001f);
    factors(zero, w.zero_type, random, float(1 << c.bits), 0.0f);
    w.scale = w.scale_type ? scale.data() : nullptr;
    w.zero = w.zero_type ? zero.data() : nullptr;
    if (c.by_columns) factor_columns(random);
    pack();
    compute_values();
  }
  ~Sample() { delete packed; }

  void shuffle_columns(Random& random) {
    w.padded += 32;  // some packed columns stay empty
    w.groups = (w.padded + w.group - 1) / w.group;
    order.assign(size_t(w.padded), -1);
    for (int k = 0; k < w.columns; k++) order[size_t(k)] = k;
    for (size_t i = order.size(); i-- > 1;) std::swap(order[i], order[size_t(random.below(int(i + 1)))]);
    w.order = order.data();
  }
  void scatter_rows(Random& random) {
    w.blocks += 1;
    row_of.assign(size_t(w.blocks * 16), -1);
    for (int n = 0; n < w.rows; n++) row_of[size_t(n)] = n;
    for (size_t i = row_of.size(); i-- > 1;) std::swap(row_of[i], row_of[size_t(random.below(int(i + 1)))]);
    w.row_of = row_of.data();
  }
  void describe_element(Random& random) {
    if (w.element == QCPU_TABLE) {
      for (int i = 0; i < 1 << w.bits; i++) levels.push_back(random.unit());
      if (w.bits == 4 && random.below(2)) {
        for (int i = 0; i < 16; i++) small.push_back(uint8_t(random.below(128)));
        w.small_zero = 12.0f, w.small_unit = 0.5f;
        for (int i = 0; i < 16; i++) levels[size_t(i)] = (float(small[size_t(i)]) - w.small_zero) * w.small_unit;
        w.small = small.data();
      }
      w.levels = levels.data();
    }
    if (w.element == QCPU_FLOAT) {
      w.float_mantissa = 1 + random.below(w.bits - 2);
      w.float_exponent = w.bits - 1 - w.float_mantissa;
      w.float_bias = w.float_exponent > 1 ? (1 << (w.float_exponent - 1)) - 1 : 1;
    }
  }
  void factors(std::vector<uint8_t>& out, int type, Random& random, float spread, float least) {
    for (int64_t i = 0; i < w.blocks * w.groups * 16; i++) {
      const float value = least + spread * (random.unit() * 0.5f + 0.5f);
      uint8_t bytes[4];
      const uint16_t half = type == QCPU_BF16 ? to_bf16(value) : uint16_t(0x1400 + random.below(0x800));
      if (type == QCPU_F32) memcpy(bytes, &value, 4);
      else if (type == QCPU_U8) bytes[0] = uint8_t(value);
      else memcpy(bytes, &half, 2);
      out.insert(out.end(), bytes, bytes + (type == QCPU_F32 ? 4 : type == QCPU_U8 ? 1 : 2));
    }
  }
  static double read(const std::vector<uint8_t>& from, int type, int64_t at) {
    float f;
    uint16_t h;
    if (type == QCPU_U8) return from[size_t(at)];
    if (type == QCPU_F32) return memcpy(&f, from.data() + 4 * at, 4), f;
    memcpy(&h, from.data() + 2 * at, 2);
    return type == QCPU_BF16 ? from_bf16(h) : from_half(h);
  }
  void factor_columns(Random& random) {
    w.classes = w.blocks > 1 ? 2 : 1;
    for (int64_t b = 0; b < w.blocks; b++) class_of.push_back(int32_t(b % w.classes));
    for (int64_t i = 0; i < w.classes * w.padded; i++) {
      column_scale.push_back(0.01f + random.unit() * 0.005f);
      column_zero.push_back(float(random.below(1 << w.bits)) + 0.25f);
    }
    w.scale_type = w.zero_type = QCPU_NONE;
    w.scale = w.zero = nullptr;
    w.zero_of_all = 0.0f;
    w.class_of = class_of.data(), w.column_scale = column_scale.data(), w.column_zero = column_zero.data();
  }
  qcpu_source source(uint8_t* from) const {
    return {int64_t(sizeof(qcpu_source)), w.rows, w.columns, w.columns, w.padded, from, w.order, w.row_of, w.blocks, w.bits, 1};
  }
  void pack() {
    packed = new Buffer(qcpu_packed_bytes(w.blocks, w.padded, w.bits));
    w.codes = packed->data;
    const qcpu_source from = source(codes.data());
    std::vector<uint8_t> back(codes.size());
    const qcpu_source to = source(back.data());
    if (qcpu_pack(&from, packed->data) || qcpu_unpack(&to, packed->data) || back != codes) {
      printf("BAD pack and unpack differ at %d bits\n", w.bits);
      failures++;
    }
  }
  double level(int code) const {
    if (w.element == QCPU_INTEGER) return code;
    return w.element == QCPU_TABLE ? double(levels[size_t(code)]) : float_value(w, code);
  }
  void compute_values() {
    values.resize(codes.size());
    for (int64_t r = 0; r < w.blocks * 16; r++)
      for (int64_t k = 0; k < w.padded; k++) {
        const int64_t row = w.row_of ? w.row_of[r] : r < w.rows ? r : -1;
        const int64_t column = w.order ? w.order[k] : k < w.columns ? k : -1;
        if (row < 0 || column < 0) continue;
        const int64_t at = (r / 16 * w.groups + k / w.group) * 16 + r % 16;
        double s = w.scale_type ? read(scale, w.scale_type, at) : 1.0, z = w.zero_type ? read(zero, w.zero_type, at) : w.zero_of_all;
        if (w.column_scale) {
          const int64_t i = class_of[size_t(r / 16)] * w.padded + k;
          s = column_scale[size_t(i)], z = column_zero[size_t(i)];
        }
        values[size_t(row * w.columns + column)] = (level(codes[size_t(row * w.columns + column)]) - z) * s;
      }
  }
};

void compare(const std::vector<double>& expected, const std::vector<double>& found, double most, const std::string& what) {
  double difference = 0, norm = 1e-30;
  for (size_t i = 0; i < expected.size(); i++) {
    difference += pow(expected[i] - found[i], 2);
    norm += pow(expected[i], 2);
  }
  const double error = sqrt(difference / norm);
  comparisons++;
  if (error <= most) return;
  printf("BAD %s: error %.2g, at most %.2g\n", what.c_str(), error, most);
  failures++;
}

struct Input {
  int rows, x_type, y_type;
  bool biased, rounded;
};

double most_error(const Sample& s, const Input& in, int path) {
  const double output = in.y_type == QCPU_BF16 ? 4e-3 : in.y_type == QCPU_F16 ? 1e-3 : 0;
  const double product = path == QCPU_DOT ? (in.rounded ? 3e-2 : 2e-4) : path == QCPU_PAIRS ? 4e-3 : 1e-5;
  return output + product;
}

std::vector<uint8_t> random_x(const Input& in, int64_t columns, Random& random, std::vector<double>& exact) {
  std::vector<uint8_t> x;
  for (int64_t i = 0; i < in.rows * columns; i++) {
    const float value = random.unit();
    uint8_t bytes[4];
    uint16_t half = in.x_type == QCPU_BF16 ? to_bf16(value) : uint16_t(0x3000 + random.below(0xc00) + (random.below(2) << 15));
    if (in.x_type == QCPU_F32) memcpy(bytes, &value, 4);
    else memcpy(bytes, &half, 2);
    exact.push_back(in.x_type == QCPU_F32 ? value : in.x_type == QCPU_BF16 ? from_bf16(half) : from_half(half));
    x.insert(x.end(), bytes, bytes + (in.x_type == QCPU_F32 ? 4 : 2));
  }
  return x;
}

std::vector<double> read_floats(const uint8_t* data, int64_t count, int type) {
  std::vector<double> out;
  for (int64_t i = 0; i < count; i++) {
    float f;
    uint16_t h;
    if (type == QCPU_F32) memcpy(&f, data + 4 * i, 4);
    else memcpy(&h, data + 2 * i, 2), f = type == QCPU_BF16 ? from_bf16(h) : from_half(h);
    out.push_back(f);
  }
  return out;
}

void check_product(const Sample& s, const Input& in, int path, Random& random, const std::string& name) {
  const int64_t K = s.w.columns, N = s.w.rows;
  std::vector<double> x, expected;
  const std::vector<uint8_t> stored = random_x(in, K, random, x);
  std::vector<float> bias;
  for (int64_t n = 0; n < N; n++) bias.push_back(random.unit());
  Buffer y(in.rows * N * 4);
  qcpu_product p{int64_t(sizeof(qcpu_product)), stored.data(), y.data, in.biased ? bias.data() : nullptr, nullptr, 0,
                 in.rows, K, N, in.x_type, in.y_type, QCPU_F32, path, in.rounded, 1};
  const int64_t bytes = qcpu_scratch(&s.w, &p);
  if (bytes == QCPU_NOT_HERE) return;
  Buffer scratch(bytes);
  p.scratch = scratch.data, p.scratch_bytes = bytes;
  const int status = qcpu_linear(&s.w, &p);
  const int taken = qcpu_path_of(&s.w, &p);
  const std::string what = std::string(qcpu_isa()) + " path " + std::to_string(taken) + " M " + std::to_string(in.rows) + " x " +
                           std::to_string(in.x_type) + " y " + std::to_string(in.y_type) + (in.rounded ? " rounded " : " ") + name;
  if (status) {
    printf("BAD %s: %s\n", what.c_str(), qcpu_message(status));
    failures++;
    return;
  }
  for (int m = 0; m < in.rows; m++)
    for (int64_t n = 0; n < N; n++) {
      double sum = in.biased ? bias[size_t(n)] : 0;
      for (int64_t k = 0; k < K; k++) sum += x[size_t(m * K + k)] * s.values[size_t(n * K + k)];
      expected.push_back(sum);
    }
  compare(expected, read_floats(y.data, in.rows * N, in.y_type), most_error(s, in, taken), what);
}

void check_dequantize(const Sample& s, Random& random, const std::string& name) {
  const int64_t K = s.w.columns, N = s.w.rows;
  for (int type : {QCPU_F32, QCPU_BF16, QCPU_F16}) {
    Buffer out(N * K * 4);
    qcpu_dequantize(&s.w, nullptr, 0, N, out.data, type, 1);
    const double most = type == QCPU_F32 ? 1e-6 : type == QCPU_BF16 ? 4e-3 : 1e-3;
    compare(s.values, read_floats(out.data, N * K, type), most, std::string(qcpu_isa()) + " dequantize " + name);
  }
  const int64_t first = N / 3, count = N - first;
  Buffer part(count * K * 4);
  qcpu_dequantize(&s.w, nullptr, first, count, part.data, QCPU_F32, 1);
  const std::vector<double> tail(s.values.begin() + first * K, s.values.end());
  compare(tail, read_floats(part.data, count * K, QCPU_F32), 1e-6, std::string(qcpu_isa()) + " part " + name);
  std::vector<int64_t> rows;
  std::vector<double> expected;
  for (int i = 0; i < 5; i++) {
    rows.push_back(random.below(int(N)));
    expected.insert(expected.end(), s.values.begin() + rows.back() * K, s.values.begin() + (rows.back() + 1) * K);
  }
  Buffer out(5 * K * 4);
  qcpu_dequantize(&s.w, rows.data(), 0, 5, out.data, QCPU_F32, 1);
  compare(expected, read_floats(out.data, 5 * K, QCPU_F32), 1e-6, std::string(qcpu_isa()) + " rows " + name);
}

void check_case(const Case& c) {
  Random random{uint64_t(c.rows * 131 + c.columns * 7 + c.bits * 1001 + c.group)};
  const Sample s(c, random);
  const std::string name = name_of(c);
  if (const int status = qcpu_check(&s.w)) {
    printf("BAD %s: %s\n", name.c_str(), qcpu_message(status));
    failures++;
    return;
  }
  const Input inputs[] = {
      {1, QCPU_BF16, QCPU_F32, true, false},   {1, QCPU_F32, QCPU_F32, false, false},
      {3, QCPU_F16, QCPU_F32, false, false},   {5, QCPU_BF16, QCPU_BF16, true, false},
      {17, QCPU_BF16, QCPU_F32, true, false},  {35, QCPU_F16, QCPU_F16, false, false},
      {65, QCPU_BF16, QCPU_F32, false, false}, {11, QCPU_F32, QCPU_F32, true, true},
      {2, QCPU_BF16, QCPU_F32, false, true},
  };
  for (const Input& in : inputs)
    for (int path : {QCPU_AUTO, QCPU_DOT, QCPU_FMA, QCPU_PAIRS}) check_product(s, in, path, random, name);
  check_dequantize(s, random, name);
}

// A row with NaN or infinity gives no finite number; the others are as they would be alone.
void check_not_finite() {
  const Case c{40, 96, 32, 4, QCPU_INTEGER, QCPU_F16, QCPU_U8, false, false, false};
  Random random{9};
  const Sample s(c, random);
  for (float bad : {NAN, INFINITY, -INFINITY})
    for (int path : {QCPU_DOT, QCPU_FMA}) {
      std::vector<float> x(3 * 96, 0.5f);
      x[96 + 40] = bad;
      Buffer y(3 * 40 * 4);
      qcpu_product p{int64_t(sizeof(qcpu_product)), x.data(), y.data, nullptr, nullptr, 0, 3, 96, 40, QCPU_F32, QCPU_F32, 0, path, 1, 1};
      const int64_t bytes = qcpu_scratch(&s.w, &p);
      Buffer scratch(bytes);
      p.scratch = scratch.data, p.scratch_bytes = bytes;
      qcpu_linear(&s.w, &p);
      const std::vector<double> found = read_floats(y.data, 120, QCPU_F32);
      bool fine = true;
      for (int i = 0; i < 120; i++) fine &= (i / 40 == 1) != bool(std::isfinite(found[size_t(i)])) || i / 40 == 1;
      int finite = 0;
      for (int i = 40; i < 80; i++) finite += std::isfinite(found[size_t(i)]);
      comparisons++;
      if (fine && finite <= 4) continue;  // a code equal to its zero: 0 times infinity is NaN, in floats
      printf("BAD %s path %d: a row with %f gives %d finite numbers\n", qcpu_isa(), path, double(bad), finite);
      failures++;
    }
}

void check_refusals() {
  const Case c{16, 64, 32, 4, QCPU_INTEGER, QCPU_F32, QCPU_NONE, false, false, false};
  Random random{3};
  const Sample s(c, random);
  const auto refused = [&](auto change) {
    qcpu_weight w = s.w;
    change(w);
    comparisons++;
    if (qcpu_check(&w) < 0) return;
    printf("BAD a faulty weight is accepted (%d)\n", comparisons);
    failures++;
  };
  refused([](qcpu_weight& w) { w.size = 8; });
  refused([](qcpu_weight& w) { w.rows = -1; });
  refused([](qcpu_weight& w) { w.columns = int64_t(1) << 40; });
  refused([](qcpu_weight& w) { w.padded = 40; });
  refused([](qcpu_weight& w) { w.padded = 32; });
  refused([](qcpu_weight& w) { w.group = 0; });
  refused([](qcpu_weight& w) { w.group = 20; });
  refused([](qcpu_weight& w) { w.groups = 7; });
  refused([](qcpu_weight& w) { w.blocks = 2; });
  refused([](qcpu_weight& w) { w.bits = 9; });
  refused([](qcpu_weight& w) { w.bits = 0; });
  refused([](qcpu_weight& w) { w.element = 5; });
  refused([](qcpu_weight& w) { w.element = QCPU_TABLE; });
  refused([](qcpu_weight& w) { w.scale_type = 77; });
  refused([](qcpu_weight& w) { w.codes = nullptr; });
  refused([](qcpu_weight& w) { w.codes += 1; });
  refused([](qcpu_weight& w) { w.scale = nullptr; });
  refused([](qcpu_weight& w) { w.zero_type = QCPU_U8; });
  std::vector<int32_t> order(64, 64);
  refused([&](qcpu_weight& w) { w.order = order.data(); });
  comparisons++;
  if (qcpu_use("no such") != QCPU_NOT_HERE || qcpu_check(nullptr) != QCPU_BAD_STRUCT || qcpu_linear(&s.w, nullptr) != QCPU_BAD_STRUCT) {
    printf("BAD a faulty call is accepted\n");
    failures++;
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (int bits = 1; bits <= 8; bits++) {
    all.push_back({48, 256, 64, bits, QCPU_INTEGER, QCPU_F16, QCPU_F16, false, false, false});
    all.push_back({33, 100, 32, bits, QCPU_INTEGER, QCPU_BF16, QCPU_U8, false, false, false});
    all.push_back({20, 64, 16, bits, QCPU_INTEGER, QCPU_F32, QCPU_NONE, true, false, false});
    all.push_back({17, 608, 0, bits, QCPU_INTEGER, QCPU_F32, QCPU_F32, false, true, false});
    all.push_back({70, 96, 0, bits, QCPU_INTEGER, QCPU_NONE, QCPU_NONE, true, true, true});
    all.push_back({31, 96, 32, bits, QCPU_TABLE, QCPU_F32, QCPU_NONE, false, false, false});
    if (bits >= 3) all.push_back({31, 160, 32, bits, QCPU_FLOAT, QCPU_BF16, QCPU_NONE, true, false, false});
  }
  all.push_back({1, 1, 4, 4, QCPU_INTEGER, QCPU_F32, QCPU_NONE, false, false, false});
  all.push_back({15, 33, 8, 4, QCPU_INTEGER, QCPU_F16, QCPU_U8, false, false, false});
  all.push_back({64, 1000, 320, 4, QCPU_INTEGER, QCPU_F16, QCPU_U8, false, false, false});
  all.push_back({130, 512, 128, 4, QCPU_INTEGER, QCPU_F16, QCPU_F16, false, false, false});
  all.push_back({130, 512, 16, 4, QCPU_TABLE, QCPU_F16, QCPU_NONE, false, false, false});
  all.push_back({130, 512, 64, 4, QCPU_TABLE, QCPU_F32, QCPU_NONE, false, false, false});
  return all;
}

}  // namespace

int main() {
  const std::string available = qcpu_available();
  for (size_t at = 0; at < available.size();) {
    const size_t end = std::min(available.find(' ', at), available.size());
    const std::string isa = available.substr(at, end - at);
    at = end + 1;
    if (qcpu_use(isa.c_str())) failures++;
    const int before = comparisons;
    for (const Case& c : cases()) check_case(c);
    check_not_finite();
    printf("%s: %d comparisons\n", isa.c_str(), comparisons - before);
  }
  check_refusals();
  printf("%d passed, %d failed\n", comparisons - failures, failures);
  return failures ? 1 : 0;
}
