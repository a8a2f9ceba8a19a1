// The systems of convolutions against plain loops in float64, on every instruction set that this machine has:
// odd and even grids, samples smaller than the grid, groups; matrices whose pivots differ from lane to lane,
// singular ones and ones with NaN beside them. Also run under sanitizers.

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/step_kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>
#include <numbers>
#include <random>
#include <string>
#include <vector>

namespace remnant {
namespace {

using kernels::CpuKernels;
using kernels::Spectrum;
using kernels::StepKernels;
using kernels::SystemInverses;
using kernels::SystemProducts;
using Complex = std::complex<double>;

std::vector<const CpuKernels*> available() {
  std::vector<const CpuKernels*> found;
  for (const char* name : {"portable", "avx2", "avx512"}) {
    if (const CpuKernels* k = kernels::find_cpu_kernels(name)) found.push_back(k);
  }
  return found;
}

template <typename T>
struct Calls;
template <>
struct Calls<float> {
  static constexpr auto forward = &StepKernels::spectrum_forward_f32;
  static constexpr auto inverse = &StepKernels::spectrum_inverse_f32;
  static constexpr auto products = &StepKernels::system_products_f32;
  static constexpr auto inverses = &StepKernels::system_inverses_f32;
  static constexpr double tolerance = 2e-5;
};
template <>
struct Calls<double> {
  static constexpr auto forward = &StepKernels::spectrum_forward_f64;
  static constexpr auto inverse = &StepKernels::spectrum_inverse_f64;
  static constexpr auto products = &StepKernels::system_products_f64;
  static constexpr auto inverses = &StepKernels::system_inverses_f64;
  static constexpr double tolerance = 2e-13;
};

class SpectrumVariant : public testing::TestWithParam<const CpuKernels*> {
 protected:
  const StepKernels& step() const { return kernels::find_step_kernels(GetParam()); }
  template <typename F>
  void both(F&& f) const {
    f(float{});
    f(double{});
  }
};
INSTANTIATE_TEST_SUITE_P(Cpu, SpectrumVariant, testing::ValuesIn(available()),
                         [](const auto& info) { return std::string(info.param->name); });

std::vector<double> random(int64_t size, uint32_t seed) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<double> draw(-1, 1);
  std::vector<double> x(static_cast<size_t>(size));
  for (double& value : x) value = draw(engine);
  return x;
}

template <typename T>
std::vector<T> as(const std::vector<double>& x) {
  return std::vector<T>(x.begin(), x.end());
}

struct Size {
  int64_t samples, height, width, grid_height, grid_width, groups, channels;
  int64_t half() const { return grid_height / 2 + 1; }
};

std::vector<Size> sizes() {
  return {{3, 5, 4, 5, 4, 1, 3},  {2, 4, 6, 6, 7, 1, 17}, {1, 1, 1, 1, 1, 1, 1},    {4, 7, 5, 8, 6, 2, 5},
          {2, 9, 9, 9, 9, 3, 16}, {5, 3, 2, 4, 5, 1, 33}, {1, 34, 34, 34, 34, 1, 8}};
}

double angle(int64_t a, int64_t b, int64_t n) {
  return 2 * std::numbers::pi * static_cast<double>(a * b % n) / static_cast<double>(n);
}

// The matrices of ops::GridTransform.
std::vector<double> forward_rows(const Size& s) {
  std::vector<double> m;
  for (int64_t f = 0; f < s.half(); ++f) {
    for (int part = 0; part < 2; ++part) {
      for (int64_t h = 0; h < s.grid_height; ++h) {
        const double t = angle(f, h, s.grid_height);
        m.push_back(part == 0 ? std::cos(t) : -std::sin(t));
      }
    }
  }
  return m;
}

std::vector<double> forward_columns(const Size& s) {
  std::vector<double> m;
  for (int64_t f = 0; f < s.grid_width; ++f) {
    for (int to = 0; to < 2; ++to) {
      for (int from = 0; from < 2; ++from) {
        for (int64_t w = 0; w < s.grid_width; ++w) {
          const double t = angle(f, w, s.grid_width);
          m.push_back(to == from ? std::cos(t) : to == 0 ? std::sin(t) : -std::sin(t));
        }
      }
    }
  }
  return m;
}

std::vector<double> inverse_columns(const Size& s) {
  std::vector<double> m;
  for (int to = 0; to < 2; ++to) {
    for (int64_t w = 0; w < s.grid_width; ++w) {
      for (int from = 0; from < 2; ++from) {
        for (int64_t f = 0; f < s.grid_width; ++f) {
          const double t = angle(f, w, s.grid_width), scale = 1.0 / static_cast<double>(s.grid_width);
          m.push_back(scale * (to == from ? std::cos(t) : to == 0 ? -std::sin(t) : std::sin(t)));
        }
      }
    }
  }
  return m;
}

std::vector<double> inverse_rows(const Size& s) {
  std::vector<double> m;
  for (int64_t h = 0; h < s.grid_height; ++h) {
    for (int64_t f = 0; f < s.half(); ++f) {
      const bool alone = f == 0 || (s.grid_height % 2 == 0 && f == s.half() - 1);
      const double scale = (alone ? 1.0 : 2.0) / static_cast<double>(s.grid_height);
      m.push_back(scale * std::cos(angle(f, h, s.grid_height)));
      m.push_back(-scale * std::sin(angle(f, h, s.grid_height)));
    }
  }
  return m;
}

// The spectrum of x [samples, height, width, groups channels], in the order of the systems.
std::vector<double> reference(const Size& s, const std::vector<double>& x) {
  std::vector<double> y(static_cast<size_t>(s.half() * s.grid_width * s.groups * s.samples * 2 * s.channels));
  const int64_t channels = s.groups * s.channels;
  size_t next = 0;
  for (int64_t f = 0; f < s.half(); ++f) {
    for (int64_t g = 0; g < s.grid_width; ++g) {
      for (int64_t group = 0; group < s.groups; ++group) {
        for (int64_t n = 0; n < s.samples; ++n) {
          for (int part = 0; part < 2; ++part) {
            for (int64_t c = 0; c < s.channels; ++c) {
              double sum = 0;
              for (int64_t h = 0; h < s.height; ++h) {
                for (int64_t w = 0; w < s.width; ++w) {
                  const double t = angle(f, h, s.grid_height) + angle(g, w, s.grid_width);
                  const double v = x[static_cast<size_t>(((n * s.height + h) * s.width + w) * channels +
                                                         group * s.channels + c)];
                  sum += v * (part == 0 ? std::cos(t) : -std::sin(t));
                }
              }
              y[next++] = sum;
            }
          }
        }
      }
    }
  }
  return y;
}

TEST_P(SpectrumVariant, TransformsThereAndBack) {
  both([&]<typename T>(T) {
    for (const Size& s : sizes()) {
      SCOPED_TRACE(testing::Message() << s.grid_height << " x " << s.grid_width << ", " << s.groups << " x "
                                      << s.channels << " channels, " << sizeof(T) << " bytes");
      const std::vector<double> x = random(s.samples * s.height * s.width * s.groups * s.channels, 1);
      const std::vector<T> given = as<T>(x);
      const std::vector<double> wanted = reference(s, std::vector<double>(given.begin(), given.end()));
      std::vector<T> spectrum(wanted.size(), T{-7}), out(x.size(), T{-7});
      const auto rows = as<T>(forward_rows(s)), columns = as<T>(forward_columns(s));
      Spectrum<T> p;
      p.samples = s.samples, p.height = s.height, p.width = s.width, p.groups = s.groups;
      p.channels = s.channels, p.grid_height = s.grid_height, p.grid_width = s.grid_width;
      p.rows = rows.data(), p.columns = columns.data(), p.x = given.data(), p.spectrum = spectrum.data();
      std::vector<T> scratch(static_cast<size_t>(p.scratch_floats()));
      (step().*Calls<T>::forward)(p, 0, 1, scratch.data());
      (step().*Calls<T>::forward)(p, 1, s.samples, scratch.data());
      const double bound = Calls<T>::tolerance * std::sqrt(static_cast<double>(s.height * s.width));
      for (size_t i = 0; i < wanted.size(); ++i) ASSERT_NEAR(spectrum[i], wanted[i], bound) << i;
      const auto rows_back = as<T>(inverse_rows(s)), columns_back = as<T>(inverse_columns(s));
      p.rows = rows_back.data(), p.columns = columns_back.data(), p.z = spectrum.data(), p.out = out.data();
      (step().*Calls<T>::inverse)(p, 0, s.samples / 2, scratch.data());
      (step().*Calls<T>::inverse)(p, s.samples / 2, s.samples, scratch.data());
      for (size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(out[i], given[i], Calls<T>::tolerance) << i;
    }
  });
}

TEST_P(SpectrumVariant, MultipliesEachSystem) {
  both([&]<typename T>(T) {
    constexpr int64_t systems = 3;
    for (const auto& [rows, depth, columns] : {std::array<int64_t, 3>{1, 2, 2}, {5, 6, 34}, {16, 64, 64}}) {
      const auto y = as<T>(random(systems * rows * depth, 2)),
                 b = as<T>(random(systems * depth * columns, 3));
      std::vector<T> z(static_cast<size_t>(systems * rows * columns));
      SystemProducts<T> p;
      p.rows = rows, p.depth = depth, p.columns = columns, p.y = y.data(), p.blocks = b.data(),
      p.z = z.data();
      (step().*Calls<T>::products)(p, 0, 2);
      (step().*Calls<T>::products)(p, 2, systems);
      for (int64_t i = 0; i < systems * rows * columns; ++i) {
        const int64_t s = i / (rows * columns), row = i / columns % rows, column = i % columns;
        double sum = 0;
        for (int64_t k = 0; k < depth; ++k) {
          sum += static_cast<double>(y[static_cast<size_t>((s * rows + row) * depth + k)]) *
                 static_cast<double>(b[static_cast<size_t>((s * depth + k) * columns + column)]);
        }
        ASSERT_NEAR(z[static_cast<size_t>(i)], sum, Calls<T>::tolerance * 8);
      }
    }
  });
}

// Whether a times inverse is 1, and the blocks are what they should be.
template <typename T>
void check_inverse(int64_t n, const T* a, const T* inverse, const T* blocks, double tolerance) {
  const auto at = [&](const T* m, int64_t i, int64_t j) {
    return Complex(m[2 * (i * n + j)], m[2 * (i * n + j) + 1]);
  };
  double size = 0;
  for (int64_t i = 0; i < 2 * n * n; ++i) size = std::max(size, std::abs(static_cast<double>(inverse[i])));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      Complex sum = 0;
      for (int64_t k = 0; k < n; ++k) sum += at(a, i, k) * at(inverse, k, j);
      const double wanted = i == j ? 1 : 0;
      ASSERT_NEAR(std::abs(sum - wanted), 0, tolerance * size * static_cast<double>(n)) << i << ", " << j;
      const Complex turned = at(inverse, j, i);  // blocks hold the transpose
      EXPECT_EQ(blocks[i * 2 * n + j], turned.real());
      EXPECT_EQ(blocks[i * 2 * n + n + j], turned.imag());
      EXPECT_EQ(blocks[(n + i) * 2 * n + j], -turned.imag());
      EXPECT_EQ(blocks[(n + i) * 2 * n + n + j], turned.real());
    }
  }
}

TEST_P(SpectrumVariant, InvertsWithPivotsOfEachLane) {
  both([&]<typename T>(T) {
    for (const int64_t n : {1, 2, 3, 5, 8, 16, 17, 33}) {
      SCOPED_TRACE(testing::Message() << n << " x " << n << ", " << sizeof(T) << " bytes");
      constexpr int64_t systems = 37;
      const int64_t numbers = 2 * n * n;
      auto a = as<T>(random(systems * numbers, static_cast<uint32_t>(n)));
      for (int64_t s = 0; s < systems; s += 2) {  // nothing on the diagonal: rows have to be exchanged
        for (int64_t i = 0; i < n && n > 1; ++i) {
          a[static_cast<size_t>(s * numbers + 2 * (i * n + i))] = 0;
          a[static_cast<size_t>(s * numbers + 2 * (i * n + i) + 1)] = 0;
          a[static_cast<size_t>(s * numbers + 2 * (i * n + (i + 1 + s / 2 % (n - 1)) % n))] += 3;
        }
      }
      for (int64_t s = 1; s < systems; s += 2) {
        for (int64_t i = 0; i < n; ++i) a[static_cast<size_t>(s * numbers + 2 * (i * n + i))] += 3;
      }
      const bool spoiled = n > 1;
      if (spoiled) {
        a[static_cast<size_t>(5 * numbers)] = std::numeric_limits<T>::quiet_NaN();
        std::fill_n(a.begin() + 9 * numbers, 2 * n, T{0});  // a row of zeros
      }
      std::vector<T> inverse(a.size()), blocks(2 * a.size());
      SystemInverses<T> p;
      p.n = n, p.a = a.data(), p.inverse = inverse.data(), p.blocks = blocks.data();
      std::vector<T> scratch(static_cast<size_t>(p.scratch_floats()));
      (step().*Calls<T>::inverses)(p, 0, 18, scratch.data());
      (step().*Calls<T>::inverses)(p, 18, systems, scratch.data());
      for (int64_t s = 0; s < systems; ++s) {
        SCOPED_TRACE(testing::Message() << "system " << s);
        const T* const found = inverse.data() + s * numbers;
        if (spoiled && (s == 5 || s == 9)) {
          EXPECT_FALSE(std::all_of(found, found + numbers, [](T x) { return std::isfinite(x); }));
        } else {
          check_inverse<T>(n, a.data() + s * numbers, found, blocks.data() + 2 * s * numbers,
                           Calls<T>::tolerance);
        }
      }
      std::vector<T> only(2 * a.size());
      p.inverse = nullptr, p.blocks = only.data();
      (step().*Calls<T>::inverses)(p, 0, systems, scratch.data());
      for (size_t i = 0; i < only.size(); ++i) {
        if (!std::isnan(blocks[i])) {
          ASSERT_EQ(only[i], blocks[i]);
        }
      }
    }
  });
}

}  // namespace
}  // namespace remnant
