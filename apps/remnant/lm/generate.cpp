#include "lm/generate.h"

#include "common/error.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

namespace remnant::app::lm {
namespace {

using at::Tensor;

int64_t draw(const Tensor& logits, const Sampling& sampling, std::mt19937_64& random) {
  const Tensor row = logits.to(at::kDouble).contiguous();
  const double* const value = row.const_data_ptr<double>();
  const int64_t words = row.numel();
  if (!std::all_of(value, value + words, [](double x) { return std::isfinite(x); })) {
    throw Error("the model's outputs are not finite: its training has diverged");
  }
  std::vector<int64_t> order(words);
  std::iota(order.begin(), order.end(), 0);
  // Ties go to the smaller number, so that the order is one and the same everywhere.
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return value[a] != value[b] ? value[a] > value[b] : a < b; });
  if (sampling.temperature == 0) return order.front();
  if (sampling.top_k > 0 && sampling.top_k < words) order.resize(sampling.top_k);
  std::vector<double> sums;
  sums.reserve(order.size());
  double sum = 0;
  for (const int64_t token : order) {
    sums.push_back(sum += std::exp((value[token] - value[order.front()]) / sampling.temperature));
  }
  const double place = sum * (static_cast<double>(random() >> 11) * 0x1p-53);
  const auto chosen = std::upper_bound(sums.begin(), sums.end() - 1, place);
  return order[chosen - sums.begin()];
}

}  // namespace

void generate(LanguageModelImpl& model, const std::vector<int64_t>& prompt, const Sampling& sampling,
              const std::function<void(int64_t token)>& emit) {
  const at::NoGradGuard no_grad;
  const auto context = static_cast<size_t>(model.options().positions);
  std::mt19937_64 random(sampling.seed);
  std::vector<int64_t> window = prompt;
  std::vector<nn::KeyValueCache> caches;
  size_t cached = 0;
  for (int64_t i = 0; i < sampling.length; ++i) {
    if (window.size() > context) {
      window.erase(window.begin(), window.end() - static_cast<int64_t>(std::max<size_t>(1, context / 2)));
      caches.clear();
      cached = 0;
    }
    const std::vector<int64_t> fresh(window.begin() + static_cast<int64_t>(cached), window.end());
    const Tensor logits =
        model.next_logits(at::tensor(fresh).unsqueeze(0), static_cast<int64_t>(cached), caches);
    cached = window.size();
    window.push_back(draw(logits[0], sampling, random));
    emit(window.back());
  }
}

}  // namespace remnant::app::lm
