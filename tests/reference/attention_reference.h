#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

/// Attention in float64 plain loops, written from the formulas and not from the library: what every
/// policy's forward and backward is held against.
namespace remnant::reference {

struct Problem {
  int64_t batch = 1, heads = 1, kv_heads = 1, queries = 1, keys = 1, head_dim = 1, value_dim = 1;
  double scale = 1;
  std::vector<double> query, key, value;  // dense [B, H, N, D]
  /// Whether query i of (b, h) may attend key j, and what is added to its score.
  std::function<bool(int64_t, int64_t, int64_t, int64_t)> allowed = [](auto...) { return true; };
  std::function<double(int64_t, int64_t, int64_t, int64_t)> bias = [](auto...) { return 0.0; };
  /// Dropout factor D, 0 or 1 / keep rate.
  std::function<double(int64_t, int64_t, int64_t, int64_t)> drop = [](auto...) { return 1.0; };
};

struct Gradients {
  std::vector<double> query, key, value;
};

/// Turns a row's (logits, softmax) into the softmax that the backward believes in.
using Remember =
    std::function<std::vector<double>(const std::vector<double>& z, const std::vector<double>& p)>;

inline std::vector<double> scores(const Problem& x, int64_t b, int64_t h, int64_t i) {
  const int64_t kv = h / (x.heads / x.kv_heads);
  std::vector<double> z(static_cast<size_t>(x.keys));
  for (int64_t j = 0; j < x.keys; ++j) {
    double sum = 0;
    for (int64_t d = 0; d < x.head_dim; ++d) {
      sum += x.query[((b * x.heads + h) * x.queries + i) * x.head_dim + d] *
             x.key[((b * x.kv_heads + kv) * x.keys + j) * x.head_dim + d];
    }
    z[j] =
        x.allowed(b, h, i, j) ? x.scale * sum + x.bias(b, h, i, j) : -std::numeric_limits<double>::infinity();
  }
  return z;
}

inline std::vector<double> softmax(const std::vector<double>& z, double* lse = nullptr) {
  const double highest = *std::max_element(z.begin(), z.end());
  std::vector<double> p(z.size(), 0.0);
  if (lse != nullptr) *lse = highest;
  if (std::isinf(highest) && highest < 0) return p;
  double sum = 0;
  for (size_t j = 0; j < z.size(); ++j) sum += p[j] = std::exp(z[j] - highest);
  for (double& x : p) x /= sum;
  if (lse != nullptr) *lse = highest + std::log(sum);
  return p;
}

inline std::vector<double> forward(const Problem& x) {
  std::vector<double> out(static_cast<size_t>(x.batch * x.heads * x.queries * x.value_dim), 0.0);
  for (int64_t b = 0; b < x.batch; ++b) {
    for (int64_t h = 0; h < x.heads; ++h) {
      const int64_t kv = h / (x.heads / x.kv_heads);
      for (int64_t i = 0; i < x.queries; ++i) {
        const std::vector<double> p = softmax(scores(x, b, h, i));
        for (int64_t j = 0; j < x.keys; ++j) {
          for (int64_t d = 0; d < x.value_dim; ++d) {
            out[((b * x.heads + h) * x.queries + i) * x.value_dim + d] +=
                x.drop(b, h, i, j) * p[j] * x.value[((b * x.kv_heads + kv) * x.keys + j) * x.value_dim + d];
          }
        }
      }
    }
  }
  return out;
}

/// dz = p^ (D (g . v) - delta). delta = g . o for exact and unbiased p^, or sum_j p^_j a_j.
inline Gradients backward(const Problem& x, const std::vector<double>& grad, const Remember& remember,
                          bool delta_from_output) {
  Gradients result{std::vector<double>(x.query.size(), 0.0), std::vector<double>(x.key.size(), 0.0),
                   std::vector<double>(x.value.size(), 0.0)};
  const std::vector<double> out = forward(x);
  for (int64_t b = 0; b < x.batch; ++b) {
    for (int64_t h = 0; h < x.heads; ++h) {
      const int64_t kv = h / (x.heads / x.kv_heads);
      for (int64_t i = 0; i < x.queries; ++i) {
        const std::vector<double> z = scores(x, b, h, i);
        const std::vector<double> p = remember(z, softmax(z));
        const int64_t row = (b * x.heads + h) * x.queries + i;
        std::vector<double> a(static_cast<size_t>(x.keys), 0.0);
        double delta = 0;
        for (int64_t j = 0; j < x.keys; ++j) {
          const double factor = x.drop(b, h, i, j);
          for (int64_t d = 0; d < x.value_dim; ++d) {
            const int64_t at = ((b * x.kv_heads + kv) * x.keys + j) * x.value_dim + d;
            a[j] += factor * grad[row * x.value_dim + d] * x.value[at];
            result.value[at] += factor * p[j] * grad[row * x.value_dim + d];
          }
          if (!delta_from_output) delta += p[j] * a[j];
        }
        if (delta_from_output) {
          for (int64_t d = 0; d < x.value_dim; ++d)
            delta += grad[row * x.value_dim + d] * out[row * x.value_dim + d];
        }
        for (int64_t j = 0; j < x.keys; ++j) {
          const double dz = x.scale * p[j] * (a[j] - delta);
          for (int64_t d = 0; d < x.head_dim; ++d) {
            const int64_t at = ((b * x.kv_heads + kv) * x.keys + j) * x.head_dim + d;
            result.query[row * x.head_dim + d] += dz * x.key[at];
            result.key[at] += dz * x.query[row * x.head_dim + d];
          }
        }
      }
    }
  }
  return result;
}

/// The paper's Alg. 1 (Lee & Lee 2023) on one row: m highest and m lowest are kept, the N - 2 between
/// follow alpha exp(-beta k); the middle is rescaled so that the row sums to 1 unless `paper_text`,
/// under which the curve's own end point stands for l_m too. Rescaled, only the curve's shape matters:
/// it is written relative to its first element, which no row underflows. A row whose h_m is 0 has no
/// curve; its rest is spread evenly.
inline std::vector<double> curve(const std::vector<double>& z, const std::vector<double>& p, int64_t m,
                                 bool paper_text) {
  std::vector<size_t> order;
  for (size_t j = 0; j < z.size(); ++j) {
    if (!(std::isinf(z[j]) && z[j] < 0)) order.push_back(j);
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return z[a] > z[b]; });
  const auto n = static_cast<int64_t>(order.size());
  std::vector<double> result(z.size(), 0.0);
  if (n <= 2 * m) {
    for (size_t j : order) result[j] = p[j];
    return result;
  }
  const double high = p[order[m - 1]];
  const int64_t points = n - 2 * m + 2;
  const double log_ratio = z[order[m - 1]] - z[order[n - m]];
  const double beta = 1.0 / static_cast<double>(points) / std::max(1 - high, std::pow(2.0, -24)) *
                      (log_ratio + 2 * (high - p[order[m]]));
  double kept = 0, middle = 0;
  for (int64_t r = 0; r < n; ++r) {
    double value = p[order[r]];
    if (r >= m && r < n - m) {
      value = std::exp(-beta * static_cast<double>(r - m)) * (paper_text ? high * std::exp(-beta) : 1.0);
      if (!paper_text && high == 0) value = 1;
      middle += value;
    } else {
      kept += value;
      if (paper_text && r == n - m) value = high * std::exp(-beta * static_cast<double>(points - 1));
    }
    result[order[r]] = value;
  }
  if (paper_text) return result;
  const double target = std::max(0.0, 1 - kept);
  for (int64_t r = m; r < n - m; ++r) {
    result[order[r]] =
        middle > 0 ? result[order[r]] * target / middle : target / static_cast<double>(n - 2 * m);
  }
  return result;
}

/// Philox 4x32-10, one counter at a time.
inline std::vector<uint32_t> philox(std::vector<uint32_t> counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(a)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

}  // namespace remnant::reference
