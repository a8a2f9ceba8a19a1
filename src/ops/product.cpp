#include "ops/product.h"

#include "kernels/cpu/step_kernels.h"
#include "ops/attention_common.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <mutex>
#include <string_view>
#include <vector>

namespace remnant::ops {

namespace {

// A panel of b: its columns, and the depth at which it and a block of a's rows share a core's second cache.
constexpr int64_t kPanelColumns = 64, kPanelDepth = 512, kBlockRows = 256;
// Products below it are not worth packing for.
constexpr int64_t kLeastWork = int64_t{1} << 18;

struct Operand {
  const float* data = nullptr;
  int64_t stride = 0;  // of rows, or where transposed of columns
  bool transposed = false;
};

std::optional<Operand> operand_of(const at::Tensor& x) {
  const auto* data = x.const_data_ptr<float>();
  if (x.stride(1) == 1 && x.stride(0) >= x.size(1)) return Operand{data, x.stride(0), false};
  if (x.stride(0) == 1 && x.stride(1) >= x.size(0)) return Operand{data, x.stride(1), true};
  return std::nullopt;
}

struct Problem {
  int64_t rows = 0, columns = 0, depth = 0;
  Operand a, b;
  const float* bias = nullptr;
  bool add = false;
  float* out = nullptr;
  int64_t out_stride = 0;
};

std::optional<Problem> problem_of(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                                  const std::optional<at::Tensor>& bias, bool add) {
  Problem p;
  p.rows = a.size(0), p.columns = b.size(1), p.depth = a.size(1);
  const bool small = p.rows * p.columns * p.depth < kLeastWork || p.rows < 8;
  if (small || b.scalar_type() != at::kFloat || out.scalar_type() != at::kFloat || out.stride(1) != 1) {
    return std::nullopt;
  }
  if (bias.has_value() && (bias->scalar_type() != at::kFloat || bias->stride(0) != 1)) return std::nullopt;
  const auto left = operand_of(a), right = operand_of(b);
  if (!left.has_value() || !right.has_value()) return std::nullopt;
  p.a = *left, p.b = *right, p.add = add;
  if (bias.has_value()) p.bias = bias->const_data_ptr<float>();
  p.out = out.mutable_data_ptr<float>(), p.out_stride = out.stride(0);
  return p;
}

// Rows [first, last) and columns [left, right) of out; `left` a multiple of kPanelColumns.
void run(const Problem& p, int64_t first, int64_t last, int64_t left, int64_t right, float* scratch) {
  const auto transpose = kernels::step_kernels().transpose_floats;
  float* const panel = scratch;
  float* const turned = scratch + kPanelColumns * kPanelDepth;
  for (int64_t k = 0; k < p.depth; k += kPanelDepth) {
    const int64_t depth = std::min(kPanelDepth, p.depth - k);
    // Rows outermost where a has to be turned, so that it is turned once.
    const int64_t tall = p.a.transposed ? kBlockRows : last - first;
    for (int64_t top = first; top < last; top += tall) {
      const int64_t bottom = std::min(top + tall, last);
      if (p.a.transposed) {
        transpose(p.a.data + k * p.a.stride + top, p.a.stride, depth, bottom - top, turned, kPanelDepth);
      }
      for (int64_t column = left; column < right; column += kPanelColumns) {
        const int64_t columns = std::min(kPanelColumns, right - column);
        if (p.b.transposed) {
          transpose(p.b.data + column * p.b.stride + k, p.b.stride, columns, depth, panel, kPanelColumns);
        } else {
          const float* const b = p.b.data + k * p.b.stride + column;
          for (int64_t i = 0; i < depth; ++i) {
            std::memcpy(panel + i * kPanelColumns, b + i * p.b.stride, columns * sizeof(float));
          }
        }
        for (int64_t row = top; row < bottom; row += kBlockRows) {
          const int64_t rows = std::min(kBlockRows, bottom - row);
          float* const out = p.out + row * p.out_stride + column;
          if (k == 0 && p.bias != nullptr) {
            for (int64_t i = 0; i < rows; ++i) {
              std::memcpy(out + i * p.out_stride, p.bias + column, columns * sizeof(float));
            }
          }
          const bool add = k > 0 || p.add || p.bias != nullptr;
          const float* const a = p.a.transposed ? turned : p.a.data + row * p.a.stride + k;
          at::native::cpublas::brgemm(rows, columns, depth, p.a.transposed ? kPanelDepth : p.a.stride,
                                      kPanelColumns, p.out_stride, add, a, panel, out);
        }
      }
    }
  }
}

// A part of the rows, or where they are few of the columns, a task.
void run(const Problem& p) {
  const int64_t threads = std::max(1, at::get_num_threads());
  const int64_t panels = (p.columns + kPanelColumns - 1) / kPanelColumns;
  const bool by_rows = p.rows >= threads * 16 * (p.b.transposed ? 4 : 1) || p.rows >= p.columns;
  const int64_t unit = by_rows ? 16 : kPanelColumns, units = by_rows ? (p.rows + 15) / 16 : panels;
  const int64_t most = by_rows ? 1024 / unit : 16;  // so that what is read twice is still near
  const int64_t each = std::min(most, (units + threads - 1) / threads), tasks = (units + each - 1) / each;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t floats = (kPanelColumns + kBlockRows) * kPanelDepth;
    const at::Tensor scratch = at::empty({floats}, at::TensorOptions().dtype(at::kFloat));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t from = task * each * unit;
      const int64_t to = std::min(from + each * unit, by_rows ? p.rows : p.columns);
      if (by_rows) {
        run(p, from, to, 0, p.columns, scratch.mutable_data_ptr<float>());
      } else {
        run(p, 0, p.rows, from, to, scratch.mutable_data_ptr<float>());
      }
    }
    at::native::cpublas::brgemm_release(false);
  });
}

void run_aten(at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
              const std::optional<at::Tensor>& bias) {
  if (bias.has_value()) {
    at::addmm_out(out, *bias, a, b);
  } else {
    at::mm_out(out, a, b);
  }
}

// The share of ATen's time up to which panels are taken. The two round differently, so a machine should
// always choose alike: the bound lies far from what either maker's processors measure, 0.46 to 0.97 on AMD's,
// whose half MKL leaves unused in some shapes, and 1.03 to 1.06 on Intel's.
double most_time() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return 1.35;
#endif
  return 0.8;
}

// Of this thread's own work: what else the machine does is not in it.
double thread_seconds() {
  timespec now{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// The three products of a linear layer, as layers have them.
bool panels_are_faster() {
  constexpr int64_t m = 512, n = 256, k = 256;
  // Not from the allocator that reports: this is no part of a step.
  std::vector<float> memory(2 * m * n + 2 * m * k + n * k, 0.5f);
  float* next = memory.data();
  const auto make = [&](int64_t rows, int64_t columns) {
    const at::Tensor made = at::from_blob(next, {rows, columns}, at::TensorOptions().dtype(at::kFloat));
    next += rows * columns;
    return made;
  };
  at::Tensor x = make(m, k), w = make(n, k), y = make(m, n), g = make(m, n), dx = make(m, k);
  const auto seconds = [&](const auto& product) {
    const double start = thread_seconds();
    product(y, x, w.t());
    product(dx, g, w);
    product(w, g.t(), x);
    return thread_seconds() - start;
  };
  const auto panels = [](at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
    run(*problem_of(out, a, b, std::nullopt, false));
  };
  const auto aten = [](at::Tensor out, const at::Tensor& a, const at::Tensor& b) { at::mm_out(out, a, b); };
  // The least of each: other work, by sharing caches, only adds to a time.
  double mine = std::numeric_limits<double>::infinity(), others = mine;
  for (int i = 0; i < 16; ++i) {
    w.fill_(0.5);
    const double first = seconds(panels);
    w.fill_(0.5);
    const double second = seconds(aten);
    if (i == 0) continue;  // which builds micro-kernels
    mine = std::min(mine, first);
    others = std::min(others, second);
  }
  return mine < most_time() * others;
}

// On one thread, whatever their number: other work on the machine disturbs that least.
bool measure() {
  if (at::get_num_threads() == 1) return panels_are_faster();
  bool faster = false;
#pragma omp parallel num_threads(2)
  {
#pragma omp single
    try {
      faster = panels_are_faster();
    } catch (...) {  // not out of a parallel region; ATen's products will say what is wrong
      faster = false;
    }
  }
  return faster;
}

enum class Choice { unknown, panels, aten };

Choice forced() {
  const char* text = std::getenv("REMNANT_PRODUCTS");
  const std::string_view name = text == nullptr ? "" : text;
  return name == "panels" ? Choice::panels : name == "aten" ? Choice::aten : Choice::unknown;
}

}  // namespace

bool uses_panels(const at::Tensor& x) {
  static std::atomic<Choice> choice{forced()};
  static std::mutex mutex;
  if (x.scalar_type() != at::kFloat || !x.device().is_cpu() || !fused_on_cpu()) return false;
  if (choice == Choice::unknown) {
    if (at::in_parallel_region()) return false;  // no place to measure
    const std::lock_guard<std::mutex> lock(mutex);
    if (choice == Choice::unknown) choice = measure() ? Choice::panels : Choice::aten;
  }
  return choice == Choice::panels;
}

void product_into(at::Tensor out, const at::Tensor& a, const at::Tensor& b,
                  const std::optional<at::Tensor>& bias) {
  if (uses_panels(a)) {
    if (const auto problem = problem_of(out, a, b, bias, false)) return run(*problem);
  }
  run_aten(out, a, b, bias);
}

void product_add(at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
  if (uses_panels(a)) {
    if (const auto problem = problem_of(out, a, b, std::nullopt, true)) return run(*problem);
  }
  out.addmm_(a, b);
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias) {
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  product_into(out, a, b, bias);
  return out;
}

}  // namespace remnant::ops
