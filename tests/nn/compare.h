#pragma once

#include <ATen/ops/allclose.h>
#include <gtest/gtest.h>
#include <torch/nn/module.h>

#include <set>
#include <string>
#include <vector>

namespace remnant::test {

inline void expect_close(const at::Tensor& got, const at::Tensor& expected, const std::string& what,
                         double tolerance = 1e-10) {
  ASSERT_EQ(got.defined(), expected.defined()) << what;
  if (!got.defined()) return;
  ASSERT_EQ(got.sizes(), expected.sizes()) << what;
  EXPECT_TRUE(at::allclose(got, expected, tolerance, tolerance))
      << what << ": largest difference "
      << (got.numel() > 0 ? (got - expected).abs().max().item<double>() : 0.0);
}

inline std::set<std::string> parameter_names(const torch::nn::Module& module) {
  std::set<std::string> names;
  for (const auto& item : module.named_parameters()) names.insert(item.key());
  return names;
}

/// Copies `from`'s parameters into `to`; a failure unless names and shapes match one to one.
inline void copy_parameters(const torch::nn::Module& from, torch::nn::Module& to) {
  ASSERT_EQ(parameter_names(from), parameter_names(to));
  const torch::NoGradGuard no_grad;
  const auto source = from.named_parameters();
  for (auto& item : to.named_parameters()) {
    ASSERT_EQ(item->sizes(), source[item.key()].sizes()) << item.key();
    item->copy_(source[item.key()]);
  }
}

/// Every parameter drawn anew, so that no zero bias or unit scale hides a mistake.
inline void randomize_parameters(torch::nn::Module& module) {
  const torch::NoGradGuard no_grad;
  for (auto& parameter : module.parameters()) parameter.normal_(0.0, 0.4);
}

inline void expect_same_gradients(const torch::nn::Module& got, const torch::nn::Module& expected) {
  const auto reference = expected.named_parameters();
  for (const auto& item : got.named_parameters()) {
    ASSERT_TRUE(item->grad().defined()) << item.key();
    expect_close(item->grad(), reference[item.key()].grad(), "gradient of " + item.key(), 1e-9);
  }
}

/// `expression` must throw a c10::Error whose message holds every one of `parts`.
template <typename Expression>
void expect_error(const Expression& expression, const std::vector<std::string>& parts) {
  try {
    expression();
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    for (const auto& part : parts) EXPECT_NE(message.find(part), std::string::npos) << message;
    return;
  }
  ADD_FAILURE() << "no error; expected one with \"" << parts.front() << '"';
}

}  // namespace remnant::test
