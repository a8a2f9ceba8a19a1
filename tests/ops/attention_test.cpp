// The C++ interface; the arithmetic is held against references in tests/kernels and tests/python.

#include <remnant/ops/attention.h>
#include <remnant/ops/softmax_approximation.h>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>

namespace remnant {
namespace {

TEST(Attention, DefaultsToScaledDotProduct) {
  const at::Tensor q = at::randn({2, 3, 7, 8}), k = at::randn({2, 3, 9, 8}), v = at::randn({2, 3, 9, 5});
  const at::Tensor weights = at::softmax(at::matmul(q, k.transpose(-2, -1)) / std::sqrt(8.0), -1);
  EXPECT_TRUE(at::allclose(attention(q, k, v), at::matmul(weights, v), 1e-5, 1e-6));
  const auto [output, seen] = attention_with_weights(q, k, v);
  EXPECT_TRUE(at::allclose(seen, weights, 1e-5, 1e-6));
  EXPECT_TRUE(at::equal(output, attention(q, k, v)));
}

TEST(Attention, SameResultForEveryThreadCountAndRun) {
  const at::Tensor q = at::randn({2, 4, 150, 16}).requires_grad_();
  AttentionOptions options;
  options.dropout = 0.2;
  options.causal = true;
  std::vector<at::Tensor> outputs, gradients;
  const int threads = at::get_num_threads();
  for (int count : {1, 2, 2}) {
    at::set_num_threads(count);
    at::manual_seed(3);
    q.mutable_grad() = at::Tensor();
    const at::Tensor output = attention(q, q, q, options);
    output.sum().backward();
    outputs.push_back(output.detach());
    gradients.push_back(q.grad().clone());
  }
  at::set_num_threads(threads);
  EXPECT_TRUE(at::equal(outputs[0], outputs[1]));
  EXPECT_TRUE(at::equal(outputs[1], outputs[2]));
  EXPECT_TRUE(at::equal(gradients[1], gradients[2]));
  EXPECT_TRUE(at::allclose(gradients[0], gradients[1], 1e-5, 1e-6));
}

TEST(Attention, OutputMergesHeadsWithoutACopy) {
  const at::Tensor q = at::randn({2, 4, 6, 8});
  const at::Tensor output = attention(q, q, q);
  EXPECT_TRUE(output.transpose(1, 2).is_contiguous());
}

TEST(Attention, MistakesAreNamed) {
  const auto error_of = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "";
  };
  const at::Tensor x = at::randn({1, 4, 6, 8});
  EXPECT_NE(error_of([&] { attention(x[0], x, x); }).find("query must have 4 dimensions"), std::string::npos);
  EXPECT_NE(error_of([&] { attention(x, x.narrow(1, 0, 3), x.narrow(1, 0, 3)); }).find("must divide"),
            std::string::npos);
  EXPECT_NE(error_of([&] { attention(x, x, x.narrow(2, 0, 5)); }).find("key has length 6, value 5"),
            std::string::npos);
  AttentionOptions options;
  options.mask = at::ones({5, 6}, at::kBool);
  EXPECT_NE(error_of([&] { attention(x, x, x, options); }).find("does not broadcast"), std::string::npos);
  options.mask = at::ones({6, 6}, at::kLong);
  EXPECT_NE(error_of([&] { attention(x, x, x, options); }).find("boolean"), std::string::npos);
  options.mask.reset();
  options.dropout = 1.0;
  EXPECT_NE(error_of([&] { attention(x, x, x, options); }).find("[0, 1)"), std::string::npos);
}

TEST(SoftmaxApproximation, InputIsRebuiltFromOutput) {
  // Eq. 5 of the paper.
  const at::Tensor z = at::randn({3, 5, 11}, at::kDouble) * 4;
  const at::Tensor rebuilt = softmax_input_from_output(at::softmax(z, -1), z.logsumexp({-1}));
  EXPECT_TRUE(at::allclose(rebuilt, z, 1e-10, 1e-10));
}

}  // namespace
}  // namespace remnant
