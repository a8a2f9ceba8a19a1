// docs/memory.md, "What each op keeps": every row of the table is measured here.

#include <remnant/checkpoint.h>
#include <remnant/memory.h>
#include <remnant/nn/reversible.h>
#include <remnant/ops/activation.h>
#include <remnant/ops/attention.h>
#include <remnant/ops/conv.h>
#include <remnant/ops/conv_norm_act.h>
#include <remnant/ops/dropout.h>
#include <remnant/ops/dropout_add.h>
#include <remnant/ops/feed_forward.h>
#include <remnant/ops/linear.h>
#include <remnant/ops/linear_cross_entropy.h>
#include <remnant/ops/max_pool.h>
#include <remnant/ops/multihead_attention.h>
#include <remnant/ops/norm.h>
#include <remnant/ops/shortcut.h>
#include <remnant/ops/softmax_approximation.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>

#include <optional>
#include <string>
#include <vector>

namespace remnant {
namespace {

struct Shape {
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;
};

const Shape kShapes[] = {
    {2, 4, 4, 40, 40, 8, 8}, {1, 4, 2, 17, 300, 16, 4}, {3, 2, 1, 5, 1, 4, 4}, {1, 2, 1, 97, 11, 4, 4}};

int64_t measured(const Shape& s, const Policy& policy, double dropout, at::ScalarType type) {
  const auto options = at::TensorOptions().dtype(type);
  const at::Tensor q = at::randn({s.batch, s.heads, s.queries, s.dim}, options).requires_grad_();
  const at::Tensor k = at::randn({s.batch, s.kv_heads, s.keys, s.dim}, options).requires_grad_();
  const at::Tensor v = at::randn({s.batch, s.kv_heads, s.keys, s.value_dim}, options).requires_grad_();
  AttentionOptions call;
  call.policy = policy;
  call.dropout = dropout;
  // q, k and v are leaves and left out; the output is taken out by name.
  const at::Tensor output = attention(q, k, v, call);
  return memory::kept_bytes({output}, {output});
}

TEST(MemoryTable, AttentionKeepsWhatTheClosedFormSays) {
  for (const Shape& s : kShapes) {
    for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16}) {
      for (const char* text : {"exact", "recompute", "curve:m=1", "curve:m=4", "curve:m=4,paper_text",
                               "curve:m=200", "quantized:bits=2", "quantized:bits=4", "quantized:bits=8",
                               "sampled:m=8", "sampled:m=1000", "top:m=8", "top:m=1000"}) {
        for (double dropout : {0.0, 0.1}) {
          const Policy policy = Policy::parse(text);
          EXPECT_EQ(measured(s, policy, dropout, type),
                    attention_residual_bytes(policy, s.batch * s.heads, s.queries, s.keys,
                                             static_cast<int64_t>(c10::elementSize(type)), dropout > 0))
              << text << " " << type << " dropout " << dropout;
        }
      }
    }
  }
}

TEST(MemoryTable, EagerAttentionKeepsWholeMatrices) {
  const int64_t rows = 2 * 4 * 40, n = 50;
  const at::Tensor q = at::randn({2, 4, 40, 8}).requires_grad_(),
                   k = at::randn({2, 4, n, 8}).requires_grad_();
  const at::Tensor p = at::softmax(at::matmul(q, k.transpose(-2, -1)), -1);
  EXPECT_EQ(memory::kept_bytes({at::matmul(p, k)}), rows * 4 * n);
  EXPECT_EQ(memory::kept_bytes({at::matmul(at::dropout(p, 0.1, true), k)}), rows * 12 * n);
}

TEST(MemoryTable, CodedAttention) {
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16}) {
    const auto options = at::TensorOptions().dtype(type);
    const at::Tensor q = at::randn({2, 4, 17, 8}, options).requires_grad_(),
                     k = at::randn({2, 2, 30, 8}, options).requires_grad_(),
                     v = at::randn({2, 2, 30, 4}, options).requires_grad_();
    for (const int64_t bits : {8, 4, 2}) {
      for (const double dropout : {0.0, 0.1}) {
        AttentionOptions call;
        call.bits = bits;
        call.dropout = dropout;
        const at::Tensor output = attention(q, k, v, call);
        EXPECT_EQ(memory::kept_bytes({output}),
                  2 * 4 * 17 * (type == at::kDouble ? 8 : 4) + linear_code_bytes(q.numel(), 8) +
                      linear_code_bytes(k.numel(), 8) + linear_code_bytes(v.numel(), bits) +
                      linear_code_bytes(output.numel(), bits) + (dropout > 0 ? 16 : 0))
            << type << " " << bits << " dropout " << dropout;
      }
    }
  }
}

TEST(MemoryTable, TheClosedFormInNumbers) {
  // 1,000 rows of 40 keys in float32, as in the paper's translation model.
  EXPECT_EQ(attention_residual_bytes(Policy::exact(), 10, 100, 40, 4, false), 160000);
  EXPECT_EQ(attention_residual_bytes(Policy::recompute(), 10, 100, 40, 4, false), 4000);
  EXPECT_EQ(attention_residual_bytes(Policy::recompute(), 10, 100, 40, 4, true), 4016);
  EXPECT_EQ(attention_residual_bytes(Policy::curve(4), 10, 100, 40, 4, false), 1000 * (30 + 40));
  EXPECT_EQ(attention_residual_bytes(Policy::quantized(4), 10, 100, 40, 4, false), 1000 * (20 + 4));
  // 4,096 rows of as many keys: 64 tiles of 128 keys and weights, and a log-sum-exp a row.
  EXPECT_EQ(attention_residual_bytes(Policy::sampled(128), 1, 4096, 4096, 4, false), 4096 * 4 + 64 * 128 * 8);
  // The last tile is shorter and keeps as much.
  EXPECT_EQ(attention_residual_bytes(Policy::sampled(8), 3, 65, 40, 8, true), 3 * (65 * 8 + 2 * 8 * 12) + 16);
  EXPECT_EQ(attention_residual_bytes(Policy::top(32), 3, 33, 40, 4, true), 3 * 33 * (4 + 4 * 32) + 16);
  // The bound: n = 1000, m = 10 keeps at most 17 % of softmax input and output.
  EXPECT_LE(attention_residual_bytes(Policy::curve(10), 1, 1, 1000, 4, false), 0.17 * 2 * 4 * 1000);
}

TEST(MemoryTable, NothingIsKeptWithoutAGradient) {
  const at::Tensor q = at::randn({1, 2, 8, 4}), k = at::randn({1, 2, 8, 4});
  EXPECT_FALSE(attention(q, k, k).requires_grad());
  // Frozen query and key: recompute needs both and lse, curve only its codes; neither value nor output.
  const at::Tensor v = at::randn({1, 2, 8, 4}).requires_grad_();
  AttentionOptions options;
  at::Tensor output = attention(q, k, v, options);
  EXPECT_EQ(memory::kept_bytes({output}), 2 * 64 * 4 + 16 * 4);
  options.policy = Policy::curve(2);
  output = attention(q, k, v, options);
  EXPECT_EQ(memory::kept_bytes({output}), attention_residual_bytes(options.policy, 2, 8, 8, 4, false));
}

TEST(MemoryTable, SoftmaxApproximation) {
  const at::Tensor energy = at::randn({2, 3, 40}).requires_grad_();
  const at::Tensor weights = softmax_approximation(energy, std::nullopt, 4);
  EXPECT_EQ(memory::kept_bytes({weights}), 6 * (30 + 4 * 10));
}

TEST(MemoryTable, Dropout) {
  const at::Tensor x = at::randn({100, 33}).requires_grad_();
  EXPECT_EQ(memory::kept_bytes({dropout(x, 0.1)}), 16);
}

TEST(MemoryTable, DropoutAdd) {
  const at::Tensor x = at::randn({100, 33}).requires_grad_(),
                   residual = at::randn({100, 33}).requires_grad_();
  EXPECT_EQ(memory::kept_bytes({dropout_add(x, residual, 0.1)}), 16);
  EXPECT_EQ(memory::kept_bytes({dropout_add(x, residual, 0.0)}), 0);
  EXPECT_EQ(memory::kept_bytes({dropout_add(x.detach(), residual, 0.1)}), 0);
}

TEST(MemoryTable, Norms) {
  const int64_t rows = 50, columns = 33;
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16}) {
    const auto options = at::TensorOptions().dtype(type);
    const int64_t wide = type == at::kDouble ? 8 : 4;
    const at::Tensor x = at::randn({5, 10, columns}, options).requires_grad_();
    const at::Tensor residual = at::randn({5, 10, columns}, options).requires_grad_();
    const at::Tensor weight = at::ones({columns}, options).requires_grad_();
    const at::Tensor bias = at::zeros({columns}, options).requires_grad_();
    const int64_t output = rows * columns * static_cast<int64_t>(c10::elementSize(type));
    const auto beside_output = [](const at::Tensor& y) { return memory::kept_bytes({y}, {y}); };
    EXPECT_EQ(memory::kept_bytes({layer_norm(x, weight, bias)}), output + rows * wide);
    EXPECT_EQ(beside_output(layer_norm(x, weight, bias)), rows * wide);
    EXPECT_EQ(beside_output(layer_norm(x)), rows * wide);
    EXPECT_EQ(beside_output(rms_norm(x, weight)), rows * wide);
    const at::Tensor y = std::get<0>(dropout_add_layer_norm(x, residual, 0.1, weight, bias));
    EXPECT_EQ(beside_output(y), rows * wide + 16);
    EXPECT_EQ(beside_output(std::get<0>(dropout_add_layer_norm(x, residual, 0.0, weight, bias))),
              rows * wide);
    // Frozen parameters or a frozen input.
    EXPECT_EQ(beside_output(layer_norm(x.detach(), weight, bias)), 0);
    EXPECT_EQ(memory::kept_bytes({layer_norm(x.detach(), weight.detach(), bias)}), 0);
    // Two columns hide their normalised values, then all do.
    at::Tensor some = at::ones({columns}, options);
    some[3] = 0;
    some[30] = 1e-30;
    some.requires_grad_();
    EXPECT_EQ(beside_output(layer_norm(x, some, bias)), rows * wide * 3);
    const at::Tensor all = at::zeros({columns}, options).requires_grad_();
    EXPECT_EQ(memory::kept_bytes({layer_norm(x, all, bias)}), rows * wide * (1 + columns));
  }
}

TEST(MemoryTable, CodedNorms) {
  const int64_t rows = 50, columns = 128;
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16}) {
    const auto options = at::TensorOptions().dtype(type);
    const int64_t wide = type == at::kDouble ? 8 : 4;
    const at::Tensor x = at::randn({5, 10, columns}, options).requires_grad_();
    const at::Tensor residual = at::randn({5, 10, columns}, options).requires_grad_();
    const at::Tensor bias = at::zeros({columns}, options).requires_grad_();
    for (const int64_t bits : {8, 4, 2}) {
      const std::string policy = "quantized:bits=" + std::to_string(bits);
      const int64_t codes = linear_code_bytes(rows * columns, bits);
      const auto kept = [&](const at::Tensor& weight) {
        return memory::kept_bytes({layer_norm(x, weight, bias, 1e-5, policy)});
      };
      const at::Tensor weight = at::ones({columns}, options).requires_grad_();
      EXPECT_EQ(kept(weight), codes + rows * wide);
      EXPECT_EQ(memory::kept_bytes({rms_norm(x, weight, std::nullopt, policy)}), codes + rows * wide);
      const auto sum =
          dropout_add_layer_norm(x, residual, 0.1, weight, bias, 1e-5, std::nullopt, true, policy);
      EXPECT_EQ(memory::kept_bytes({std::get<0>(sum)}), codes + rows * wide + 16);
      // What reads the output finds its codes.
      const at::Tensor y = layer_norm(x, weight, bias, 1e-5, policy);
      const at::Tensor w = at::randn({20, columns}, options).requires_grad_();
      EXPECT_EQ(memory::kept_bytes({remnant::linear(y, w, std::nullopt, policy)}), codes + rows * wide);
      // A column that another of its group hides: just not and just so.
      at::Tensor spread = at::ones({columns}, options);
      spread[70] = bits == 8 ? 1.0 / 128 : 1.0 / 8;
      EXPECT_EQ(kept(spread.clone().requires_grad_()), codes + rows * wide);
      spread[70] = bits == 8 ? 1.0 / 129 : 1.0 / 9;
      EXPECT_EQ(kept(spread.clone().requires_grad_()), codes + rows * wide * 2);
      // Half of them are: codes of x^ take less.
      spread.narrow(0, 0, 32).fill_(1e-3);
      spread.narrow(0, 64, 32).fill_(1e-3);
      EXPECT_EQ(kept(spread.clone().requires_grad_()), codes + rows * wide);
    }
  }
}

TEST(MemoryTable, CodedActivations) {
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16}) {
    for (const int64_t size : {1, 64, 1000, 3300}) {
      const at::Tensor x = at::randn({size}, at::TensorOptions().dtype(type)).requires_grad_();
      for (const int64_t bits : {8, 4, 2}) {
        const std::string policy = "quantized:bits=" + std::to_string(bits);
        EXPECT_EQ(memory::kept_bytes({remnant::gelu(x, "none", policy)}), linear_code_bytes(size, bits));
        EXPECT_EQ(memory::kept_bytes({remnant::silu(x, policy)}), linear_code_bytes(size, bits));
      }
    }
  }
}

TEST(MemoryTable, Activations) {
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16}) {
    for (const int64_t size : {1, 8, 63, 64, 1000, 3300}) {
      const at::Tensor x = at::randn({size}, at::TensorOptions().dtype(type)).requires_grad_();
      const int64_t plane = (size + 7) / 8, marks = (size + 511) / 512;
      EXPECT_EQ(memory::kept_bytes({remnant::relu(x)}), plane);
      EXPECT_EQ(memory::kept_bytes({remnant::leaky_relu(x, 0.1)}), plane);
      EXPECT_EQ(memory::kept_bytes({remnant::gelu(x, "none", "fewbit:bits=2")}), 2 * plane + marks);
      EXPECT_EQ(memory::kept_bytes({remnant::gelu(x, "tanh", "fewbit:bits=3")}), 3 * plane + marks);
      EXPECT_EQ(memory::kept_bytes({remnant::silu(x, "fewbit:bits=4")}), 4 * plane + marks);
      const at::Tensor made = x * 2;
      EXPECT_EQ(memory::kept_bytes({remnant::gelu(made)}),
                size * static_cast<int64_t>(c10::elementSize(type)));
      EXPECT_EQ(memory::kept_bytes({remnant::silu(made)}, {made}), 0);
    }
  }
}

TEST(MemoryTable, Linear) {
  EXPECT_EQ(linear_code_bytes(1000, 4), 500 + 16 * 4);
  EXPECT_EQ(linear_code_bytes(33, 2), 9 + 4);
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16}) {
    const auto options = at::TensorOptions().dtype(type);
    const int64_t element = static_cast<int64_t>(c10::elementSize(type));
    const at::Tensor x = at::randn({30, 33}, options).requires_grad_();
    const at::Tensor made = x * 2;
    const at::Tensor w = at::randn({20, 33}, options).requires_grad_();
    const at::Tensor b = at::randn({20}, options).requires_grad_();
    EXPECT_EQ(memory::kept_bytes({remnant::linear(made, w, b)}), 30 * 33 * element);
    for (const int64_t bits : {8, 4, 2}) {
      const std::string policy = "quantized:bits=" + std::to_string(bits);
      const int64_t codes = linear_code_bytes(30 * 33, bits);
      const at::Tensor query = remnant::linear(made, w, b, policy);
      EXPECT_EQ(memory::kept_bytes({query}), codes);
      // A second and a third reader add nothing.
      const at::Tensor key = remnant::linear(made, w, b, policy);
      const at::Tensor value = remnant::linear(made.view({5, 6, 33}), w, b, policy);
      EXPECT_EQ(memory::kept_bytes({query, key, value}), codes);
      // Frozen weight: no codes; frozen input: no weight, which is a leaf and not counted anyway.
      EXPECT_EQ(memory::kept_bytes({remnant::linear(made, w.detach(), b, policy)}), 20 * 33 * element);
      EXPECT_EQ(memory::kept_bytes({remnant::linear(x.detach() * 3, w, b, policy)}), codes);
    }
  }
}

TEST(MemoryTable, FeedForward) {
  const int64_t rows = 300, in = 24, features = 100;
  const auto groups = [](int64_t size) { return (size + 63) / 64; };
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16}) {
    const auto options = at::TensorOptions().dtype(type);
    const at::Tensor x = at::randn({3, 100, in}, options).requires_grad_();
    const at::Tensor up = at::randn({features, in}, options).requires_grad_(),
                     down = at::randn({in, features}, options).requires_grad_(),
                     bias = at::randn({features}, options).requires_grad_();
    for (const char* activation : {"relu", "gelu"}) {
      for (const double dropout : {0.0, 0.1}) {
        const auto kept = [&](const std::string& policy) {
          return memory::kept_bytes(
              {feed_forward(x, up, bias, down, std::nullopt, activation, dropout, policy)});
        };
        EXPECT_EQ(kept("exact"), dropout > 0 ? 16 : 0);
        for (const int64_t bits : {8, 4, 2}) {
          const int64_t half = (features + 1) / 2, quarter = (features + 3) / 4;
          const int64_t relu = (features * bits + 7) / 8 + 2 * groups(features);
          const int64_t gelu = bits == 8 ? features : bits == 4 ? half + quarter : half;
          EXPECT_EQ(kept("quantized:bits=" + std::to_string(bits)),
                    linear_code_bytes(rows * in, bits) +
                        rows * (activation == std::string("relu") ? relu : gelu) + 16)
              << type << " " << activation << " " << bits;
        }
      }
    }
  }
}

TEST(MemoryTable, MultiheadAttention) {
  const int64_t batch = 9, queries = 300, keys = 40, width = 16, heads = 2;
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16}) {
    const auto options = at::TensorOptions().dtype(type);
    const int64_t element = static_cast<int64_t>(c10::elementSize(type)), wide = element == 8 ? 8 : 4;
    const at::Tensor x = at::randn({batch, queries, width}, options).requires_grad_(),
                     memory = at::randn({batch, keys, width}, options).requires_grad_();
    const at::Tensor in_weight = at::randn({3 * width, width}, options).requires_grad_(),
                     out_weight = at::randn({width, width}, options).requires_grad_();
    for (const std::optional<at::Tensor>& from : {std::optional<at::Tensor>(), std::optional(memory)}) {
      for (const double dropout : {0.0, 0.1}) {
        const auto kept = [&](bool keep_output) {
          MultiheadAttentionCall call;
          call.heads = heads;
          call.dropout = dropout;
          call.keep_output = keep_output;
          return memory::kept_bytes(
              {multihead_attention(x, from, in_weight, std::nullopt, out_weight, std::nullopt, call)});
        };
        // Three sequences of 300 positions are a group.
        const int64_t seeds = dropout > 0 ? 3 * 16 : 0;
        EXPECT_EQ(kept(false), seeds) << type;
        EXPECT_EQ(kept(true), seeds + batch * queries * width * element + batch * heads * queries * wide)
            << type;
      }
    }
  }
}

TEST(MemoryTable, Checkpoint) {
  const at::Tensor x = at::randn({30, 8}).requires_grad_();
  const auto function = [](const at::Tensor& a) { return at::dropout(a.exp().sin(), 0.1, true).cos(); };
  EXPECT_EQ(memory::kept_bytes({checkpoint(function, x)}), 5056);
}

TEST(MemoryTable, ReversibleChain) {
  const int64_t samples = 4, channels = 8, depth = 6;
  const int64_t input = samples * channels * 16 * 16 * 4, ring = samples * channels * (18 * 18 - 16 * 16) * 4;
  const int64_t statistics = 2 * channels * 4, sums = samples * 4 * 4, scalar = 8;
  const at::Tensor x = at::randn({samples, channels, 16, 16}).requires_grad_();
  for (const char* activation : {"leaky", "maxmin"}) {
    const int64_t signs = samples * channels * 16 * 16 / (activation == std::string("leaky") ? 8 : 16);
    const auto kept = [&](const std::vector<int64_t>& anchors, const std::vector<int64_t>& residues) {
      nn::ReversibleChainOptions options(channels, depth);
      options.activation = activation;
      nn::ReversibleChain chain(options);
      chain->set_plan(anchors, residues);
      const at::Tensor y = chain(x);
      return memory::kept_bytes({y}, {y});
    };
    // The first layer's input is the chain's, which is a leaf here.
    const int64_t every = depth * (signs + statistics + scalar);
    EXPECT_EQ(kept({}, {}), every + (depth - 1) * (ring + sums) + sums) << activation;
    EXPECT_EQ(kept({3}, {}), every + (depth - 2) * (ring + sums) + sums + input) << activation;
    EXPECT_EQ(kept({}, {2, 4}), every + (depth - 1) * (ring + sums) + sums + 2 * (input / 2 + scalar))
        << activation;
  }
}

TEST(MemoryTable, Coupling) {
  const int64_t samples = 3, state = 5056;
  const at::Tensor x = at::randn({samples, 8}).requires_grad_();
  for (const int64_t depth : {1, 7}) {
    std::vector<nn::Coupling> blocks;
    for (int64_t i = 0; i < depth; ++i)  // F draws, G does not.
      blocks.push_back(nn::additive_coupling(torch::nn::AnyModule(torch::nn::Dropout(0.1)),
                                             torch::nn::AnyModule(torch::nn::Linear(4, 4))));
    nn::ReversibleSequence sequence(blocks);
    const at::Tensor y = sequence(x);
    EXPECT_EQ(memory::kept_bytes({y}, {y}), samples * 4 * 4 + depth * state);
  }
}

TEST(MemoryTable, Conv2d) {
  const at::Tensor x = at::randn({4, 8, 20, 30}).requires_grad_();
  const at::Tensor made = x * 2;
  const at::Tensor b = at::randn({12}).requires_grad_();
  // Tall, so that nothing but the ring is missing.
  const at::Tensor w = at::randn({12, 8, 3, 3}).requires_grad_(),
                   point = at::randn({12, 8, 1, 1}).requires_grad_();
  const int64_t size = made.numel(), ring = 4 * 12 * (22 * 32 - 20 * 30), sums = 4 * 4, point_sums = 8 * 4;
  const auto kept = [&](const at::Tensor& weight, const std::string& policy) {
    const int64_t padding = weight.size(2) / 2;
    const at::Tensor y = remnant::conv2d(made, weight, b, {1, 1}, {padding, padding}, {1, 1}, 1, policy);
    return memory::kept_bytes({y}, {y});
  };
  EXPECT_EQ(kept(w, "exact"), size * 4);
  for (const int64_t bits : {8, 4, 2}) {
    EXPECT_EQ(kept(w, "quantized:bits=" + std::to_string(bits)), linear_code_bytes(size, bits));
  }
  EXPECT_EQ(kept(w, "invert"), (ring + sums) * 4);
  EXPECT_EQ(kept(w, "min_norm"), ring * 4);
  EXPECT_EQ(kept(point, "invert"), point_sums * 4);
  EXPECT_EQ(kept(point, "min_norm"), 0);
  // Four of twelve directions are lost on eight channels, and kept.
  const at::Tensor wide = at::randn({8, 12, 1, 1}).requires_grad_();
  const at::Tensor many = at::randn({4, 12, 20, 30}).requires_grad_() * 2;
  const at::Tensor y = remnant::conv2d(many, wide, std::nullopt, {1, 1}, {0, 0}, {1, 1}, 1, "invert");
  EXPECT_EQ(memory::kept_bytes({y}, {y}), (4 * 4 * 20 * 30 + 12 * 4) * 4);
}

TEST(MemoryTable, ConvNormAct) {
  const at::Tensor x = at::randn({4, 8, 20, 30}), w = at::randn({8, 8, 3, 3}).requires_grad_(),
                   point = at::randn({8, 8, 1, 1}).requires_grad_();
  const at::Tensor gamma = at::rand({8}).add_(0.5).requires_grad_(), beta = at::rand({8}).requires_grad_();
  const int64_t size = x.numel(), rows = 8 * 4 * 8;
  const auto unit = [&](const at::Tensor& input, const std::string& memory, const std::string& activation,
                        const at::Tensor& residual = {}, bool recompute = false) {
    ConvNormActOptions options;
    const at::Tensor& weight = recompute ? point : w;
    options.padding = {weight.size(2) / 2};
    options.memory = Memory::parse(memory);
    options.activation = activation;
    options.recompute = recompute;
    return conv_norm_act(input, weight, std::nullopt, gamma, beta, std::nullopt, std::nullopt,
                         residual.defined() ? std::optional(residual) : std::nullopt, options);
  };
  const auto kept = [&](const at::Tensor& y) { return memory::kept_bytes({y}, {x}); };

  for (const char* activation : {"relu", "leaky:slope=0.1", "identity", "silu"}) {
    EXPECT_EQ(kept(unit(x, "exact", activation)), 4 * size + rows) << activation;
  }
  // A second unit adds its own sum, and finds in the first's its input and its residual.
  const at::Tensor first = unit(x, "exact", "relu");
  EXPECT_EQ(kept(unit(first, "exact", "relu", first)), 2 * (4 * size + rows));
  // A residual that no unit made is kept.
  const at::Tensor made = at::randn_like(x).requires_grad_() * 2;
  EXPECT_EQ(kept(unit(x, "exact", "relu", made)), 8 * size + rows);
  // What convolves again keeps numbers a channel alone, for others that need its output too.
  const at::Tensor again = unit(x, "exact", "relu", {}, true);
  EXPECT_EQ(kept(again), rows + 4 * 8 * 4);
  EXPECT_EQ(kept(unit(again, "exact", "relu", again)), 4 * size + 2 * rows + 4 * 8 * 4);
  // So does a shortcut without parameters.
  const at::Tensor halved = shortcut(first, 2, 8);
  EXPECT_EQ(memory::kept_bytes({halved}, {x}), 4 * size + rows);
  const at::Tensor small = at::randn({4, 8, 10, 15});
  EXPECT_EQ(memory::kept_bytes({unit(small, "exact", "relu", halved)}, {x, small}),
            4 * size + size + 2 * rows);

  for (const int64_t bits : {8, 4, 2}) {
    const std::string memory = "unbiased:bits=" + std::to_string(bits);
    const int64_t codes = linear_code_bytes(size, bits), numbers = rows + 2 * 8 * 4;
    // x's codes and x^'s.
    const at::Tensor coded = unit(x, memory, "relu");
    EXPECT_EQ(kept(coded), 2 * codes + numbers);
    // The next one's x^ and sum; its input has codes already.
    EXPECT_EQ(kept(unit(coded, memory, "relu", coded)), 4 * codes + 2 * numbers);
    // No activation: the sum's are not needed.
    EXPECT_EQ(kept(unit(coded, memory, "identity", coded)), 3 * codes + 2 * numbers);
  }
}

TEST(MemoryTable, MaxPool) {
  const at::Tensor x = at::randn({2, 8, 9, 12}).requires_grad_();
  EXPECT_EQ(memory::kept_bytes({remnant::max_pool2d(x, {3}, {2}, {1})}, {x}), 2 * 8 * 5 * 6);
}

TEST(MemoryTable, LinearCrossEntropy) {
  const at::Tensor x = at::randn({50, 8}).requires_grad_();
  const at::Tensor w = at::randn({700, 8}).requires_grad_();
  const at::Tensor b = at::randn({700}).requires_grad_();
  const at::Tensor target = at::randint(0, 700, {50});
  EXPECT_EQ(memory::kept_bytes({linear_cross_entropy(x, w, b, target)}), 4 * (50 * 8 + 700 * 8 + 700));
  EXPECT_EQ(memory::kept_bytes({linear_cross_entropy(x, w.detach(), b.detach(), target)}), 4 * 50 * 8);
  // Reduction none: input, which some layer made, and the target.
  const at::Tensor made = x * 2;
  const at::Tensor losses = linear_cross_entropy(made, w, b, target, -100, 0.0, at::Reduction::None);
  EXPECT_EQ(memory::kept_bytes({losses}), 4 * 50 * 8 + 50 * 8);
  EXPECT_EQ(memory::kept_bytes({losses}, {made, target}), 0);
}

TEST(MemoryTable, RecomputeForwardNeverAllocatesTheWholeMatrix) {
  const int64_t n = 2048;
  const at::Tensor q = at::randn({1, 1, n, 16}).requires_grad_();
  memory::PeakMeter meter;
  const at::Tensor output = attention(q, q, q);
  EXPECT_LT(meter.peak_bytes(), n * n * 4 / 2);
  output.sum().backward();
  EXPECT_LT(meter.peak_bytes(), n * n * 4 / 2);
}

}  // namespace
}  // namespace remnant
