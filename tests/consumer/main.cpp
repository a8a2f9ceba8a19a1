// What a user's program does: one call of the op, one module, and a look at what they keep.
#include <ATen/ops/allclose.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/softmax.h>
#include <remnant/memory.h>
#include <remnant/nn/attention.h>
#include <remnant/ops/attention.h>

#include <cmath>
#include <iostream>

int main() {
  const auto options = at::TensorOptions().dtype(at::kDouble);
  const at::Tensor query = at::rand({2, 4, 7, 8}, options).requires_grad_();
  const at::Tensor key = at::rand({2, 4, 9, 8}, options).requires_grad_();
  const at::Tensor value = at::rand({2, 4, 9, 8}, options).requires_grad_();
  const at::Tensor expected =
      at::matmul(at::softmax(at::matmul(query, key.transpose(-2, -1)) / std::sqrt(8.0), -1), value);
  const int64_t kept_by_eager = remnant::memory::kept_bytes({expected});

  for (const char* name : {"exact", "recompute", "curve:m=2", "quantized:bits=4", "sampled:m=4", "top:m=4"}) {
    const at::Tensor output = remnant::attention(query, key, value, {.policy = remnant::Policy::parse(name)});
    if (!at::allclose(output, expected, 1e-4, 1e-5)) {
      std::cerr << "consumer: the output under policy " << name << " differs from the definition\n";
      return 1;
    }
    std::cout << name << " keeps " << remnant::memory::kept_bytes({output}) << " bytes, eager operations "
              << kept_by_eager << '\n';
  }

  remnant::nn::MultiheadAttention module(
      remnant::nn::MultiheadAttentionOptions(32, 4).batch_first(true).policy(remnant::Policy::recompute()));
  const at::Tensor x = at::rand({2, 5, 32});
  const auto [output, weights] = module->forward(x, x, x);
  output.sum().backward();
  const bool fits = output.sizes() == x.sizes() && weights.sizes() == at::IntArrayRef({2, 5, 5}) &&
                    module->out_proj->weight.grad().defined();
  if (!fits) {
    std::cerr << "consumer: MultiheadAttention gave unexpected shapes or no gradient\n";
    return 1;
  }
  return 0;
}
