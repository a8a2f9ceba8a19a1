#include <compare.h>
#include <remnant/memory.h>
#include <remnant/nn/transformer.h>
#include <torch/nn/functional/activation.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/transformerlayer.h>

#include <limits>
#include <memory>
#include <tuple>

namespace {

using at::Tensor;
using remnant::Policy;
using remnant::nn::Activation;
using remnant::nn::DecoderCache;
using remnant::nn::KeyValueCache;
using remnant::nn::TransformerDecoderLayer;
using remnant::nn::TransformerEncoderLayer;
using remnant::nn::TransformerLayerOptions;
using remnant::test::copy_parameters;
using remnant::test::expect_close;
using remnant::test::expect_error;
using remnant::test::expect_same_gradients;
using remnant::test::parameter_names;
using remnant::test::randomize_parameters;

constexpr int64_t kBatch = 3, kModel = 8, kHeads = 2, kWidth = 12, kSource = 6, kTarget = 5;

TransformerLayerOptions layer_options() {
  return TransformerLayerOptions(kModel, kHeads).dim_feedforward(kWidth).dropout(0.0);
}

Tensor leaf(int64_t length) {
  return torch::randn({length, kBatch, kModel}, torch::dtype(at::kDouble).requires_grad(true));
}

Tensor padding_mask(int64_t length) {
  Tensor mask = torch::rand({kBatch, length}) < 0.4;
  mask.select(1, 0).fill_(false);
  return mask;
}

Tensor causal_mask(int64_t length) { return torch::ones({length, length}, at::kBool).triu(1); }

/// torch::nn takes an attn_mask only as what is added.
Tensor added_causal_mask(int64_t length) {
  return torch::zeros({length, length}, at::kDouble)
      .masked_fill(causal_mask(length), -std::numeric_limits<double>::infinity());
}

/// What one layer is compared on: policy, norm_first, activation, batch_first, train.
using Parameters = std::tuple<const char*, bool, Activation, bool, bool>;

std::string case_name(const testing::TestParamInfo<Parameters>& info) {
  const auto& [policy, norm_first, activation, batch_first, train] = info.param;
  return std::string(policy) + (norm_first ? "_pre_norm" : "_post_norm") +
         (activation == Activation::gelu ? "_gelu" : "_relu") + (batch_first ? "_batch_first" : "") +
         (train ? "_train" : "_eval");
}

struct AgainstTorch : testing::TestWithParam<Parameters> {
  void SetUp() override { torch::manual_seed(5); }

  TransformerLayerOptions options() const {
    const auto& [policy, norm_first, activation, batch_first, train] = GetParam();
    return layer_options()
        .policy(Policy::parse(policy))
        .norm_first(norm_first)
        .activation(activation)
        .batch_first(batch_first);
  }
  bool norm_first() const { return std::get<1>(GetParam()); }
  bool gelu() const { return std::get<2>(GetParam()) == Activation::gelu; }
  bool train() const { return std::get<4>(GetParam()); }
  Tensor laid_out(const Tensor& x) const { return std::get<3>(GetParam()) ? x.transpose(0, 1) : x; }

  template <typename Layer>
  Tensor feed_forward(Layer& layer, const Tensor& x) const {
    const Tensor hidden = layer->linear1(x);
    return layer->linear2(gelu() ? torch::gelu(hidden) : torch::relu(hidden));
  }
};

struct EncoderAgainstTorch : AgainstTorch {};
struct DecoderAgainstTorch : AgainstTorch {};

TEST_P(EncoderAgainstTorch, SameOutputsAndGradients) {
  auto reference_options =
      torch::nn::TransformerEncoderLayerOptions(kModel, kHeads).dim_feedforward(kWidth).dropout(0.0);
  if (gelu()) reference_options.activation(torch::kGELU);
  torch::nn::TransformerEncoderLayer reference(reference_options);
  TransformerEncoderLayer layer(options());
  reference->to(at::kDouble);
  layer->to(at::kDouble);
  randomize_parameters(*reference);
  ASSERT_NO_FATAL_FAILURE(copy_parameters(*reference, *layer));
  reference->train(train());
  layer->train(train());

  const Tensor expected_src = leaf(kSource), src = expected_src.detach().clone().requires_grad_(true);
  const Tensor padding = padding_mask(kSource), causal = added_causal_mask(kSource);
  // torch::nn has no norm_first: its parts, composed by hand.
  const auto pre_norm = [&] {
    const Tensor y = reference->norm1(expected_src);
    const Tensor x = expected_src + std::get<0>(reference->self_attn(y, y, y, padding, false, causal));
    return x + feed_forward(reference, reference->norm2(x));
  };
  const Tensor expected = norm_first() ? pre_norm() : reference(expected_src, causal, padding);

  const Tensor with_mask = laid_out(layer(laid_out(src), causal_mask(kSource), padding));
  const Tensor output = laid_out(layer(laid_out(src), Tensor(), padding, /*is_causal=*/true));
  expect_close(with_mask, expected, "output by attn_mask");
  expect_close(output, expected, "output by is_causal");

  const Tensor direction = torch::randn_like(expected);
  (expected * direction).sum().backward();
  (output * direction).sum().backward();
  expect_same_gradients(*layer, *reference);
  expect_close(src.grad(), expected_src.grad(), "gradient of src", 1e-9);
}

TEST_P(DecoderAgainstTorch, SameOutputsAndGradients) {
  auto reference_options =
      torch::nn::TransformerDecoderLayerOptions(kModel, kHeads).dim_feedforward(kWidth).dropout(0.0);
  if (gelu()) reference_options.activation(torch::kGELU);
  torch::nn::TransformerDecoderLayer reference(reference_options);
  TransformerDecoderLayer layer(options());
  reference->to(at::kDouble);
  layer->to(at::kDouble);
  randomize_parameters(*reference);
  ASSERT_NO_FATAL_FAILURE(copy_parameters(*reference, *layer));
  reference->train(train());
  layer->train(train());

  const Tensor expected_tgt = leaf(kTarget), tgt = expected_tgt.detach().clone().requires_grad_(true);
  const Tensor expected_memory = leaf(kSource),
               memory = expected_memory.detach().clone().requires_grad_(true);
  const Tensor padding = padding_mask(kSource), tgt_padding = padding_mask(kTarget);
  const Tensor causal = added_causal_mask(kTarget);
  const Tensor memory_mask = torch::randn({kTarget, kSource}, at::kDouble);
  const auto pre_norm = [&] {
    const Tensor y = reference->norm1(expected_tgt);
    Tensor x = expected_tgt + std::get<0>(reference->self_attn(y, y, y, tgt_padding, false, causal));
    x = x + std::get<0>(reference->multihead_attn(reference->norm2(x), expected_memory, expected_memory,
                                                  padding, false, memory_mask));
    return x + feed_forward(reference, reference->norm3(x));
  };
  const Tensor expected =
      norm_first() ? pre_norm()
                   : reference(expected_tgt, expected_memory, causal, memory_mask, tgt_padding, padding);

  const Tensor output = laid_out(layer(laid_out(tgt), laid_out(memory), Tensor(), memory_mask, tgt_padding,
                                       padding, /*tgt_is_causal=*/true));
  const Tensor with_mask = laid_out(
      layer(laid_out(tgt), laid_out(memory), causal_mask(kTarget), memory_mask, tgt_padding, padding));
  expect_close(output, expected, "output by tgt_is_causal");
  expect_close(with_mask, expected, "output by tgt_mask");

  const Tensor direction = torch::randn_like(expected);
  (expected * direction).sum().backward();
  (output * direction).sum().backward();
  expect_same_gradients(*layer, *reference);
  expect_close(tgt.grad(), expected_tgt.grad(), "gradient of tgt", 1e-9);
  expect_close(memory.grad(), expected_memory.grad(), "gradient of memory", 1e-9);
}

const auto kAllParameters =
    testing::Combine(testing::Values("exact", "recompute"), testing::Bool(),
                     testing::Values(Activation::relu, Activation::gelu), testing::Bool(), testing::Bool());
INSTANTIATE_TEST_SUITE_P(Layers, EncoderAgainstTorch, kAllParameters, case_name);
INSTANTIATE_TEST_SUITE_P(Layers, DecoderAgainstTorch, kAllParameters, case_name);

TEST(TransformerLayer, OneSeedGivesTorchsParameters) {
  const auto compare = [](const torch::nn::Module& got, const torch::nn::Module& expected) {
    const auto reference = expected.named_parameters();
    ASSERT_EQ(parameter_names(got), parameter_names(expected));
    for (const auto& item : got.named_parameters())
      EXPECT_TRUE(item->equal(reference[item.key()])) << item.key();
  };
  torch::manual_seed(2);
  const torch::nn::TransformerEncoderLayer encoder(
      torch::nn::TransformerEncoderLayerOptions(kModel, kHeads).dim_feedforward(kWidth));
  torch::manual_seed(2);
  compare(*TransformerEncoderLayer(layer_options()), *encoder);
  torch::manual_seed(2);
  const torch::nn::TransformerDecoderLayer decoder(
      torch::nn::TransformerDecoderLayerOptions(kModel, kHeads).dim_feedforward(kWidth));
  torch::manual_seed(2);
  compare(*TransformerDecoderLayer(layer_options()), *decoder);
}

TEST(TransformerLayer, UnbatchedEqualsBatchOfOne) {
  torch::manual_seed(4);
  const Tensor src = torch::randn({kSource, kModel}), tgt = torch::randn({kTarget, kModel});
  const Tensor padding = padding_mask(kSource)[0];
  TransformerEncoderLayer encoder(layer_options());
  expect_close(encoder(src, Tensor(), padding),
               encoder(src.unsqueeze(1), Tensor(), padding.unsqueeze(0)).squeeze(1), "encoder", 1e-5);
  TransformerDecoderLayer decoder(layer_options());
  expect_close(
      decoder(tgt, src, Tensor(), Tensor(), Tensor(), padding, true),
      decoder(tgt.unsqueeze(1), src.unsqueeze(1), Tensor(), Tensor(), Tensor(), padding.unsqueeze(0), true)
          .squeeze(1),
      "decoder", 1e-5);
}

TEST(TransformerLayer, LayerNormEpsIsUsed) {
  torch::manual_seed(4);
  const Tensor src = leaf(kSource).detach();
  auto layer = TransformerEncoderLayer(layer_options().layer_norm_eps(1e6));
  layer->to(at::kDouble);
  // With so large an epsilon the norm's output vanishes.
  EXPECT_LT(layer(src).abs().max().item<double>(), 0.1);
}

TEST(TransformerLayer, WithoutBiasThereIsNone) {
  torch::manual_seed(9);
  const std::set<std::string> expected = {"self_attn.in_proj_weight",
                                          "self_attn.out_proj.weight",
                                          "linear1.weight",
                                          "linear2.weight",
                                          "norm1.weight",
                                          "norm2.weight"};
  auto layer = TransformerEncoderLayer(layer_options().bias(false));
  EXPECT_EQ(parameter_names(*layer), expected);

  auto with_bias = TransformerEncoderLayer(layer_options());
  {
    const torch::NoGradGuard no_grad;
    for (auto& item : with_bias->named_parameters()) {
      if (expected.count(item.key()) > 0) {
        item->copy_(layer->named_parameters()[item.key()].normal_());
      } else {
        item->zero_();
      }
    }
  }
  const Tensor src = torch::randn({kSource, kBatch, kModel});
  expect_close(layer(src), with_bias(src), "output", 1e-5);

  const auto copy = std::dynamic_pointer_cast<remnant::nn::TransformerEncoderLayerImpl>(layer->clone());
  EXPECT_EQ(parameter_names(*copy), expected);
  expect_close(copy->forward(src), layer(src), "clone", 1e-6);
}

TEST(TransformerLayer, CloneIsDeepAndKeepsOptions) {
  torch::manual_seed(9);
  auto layer = TransformerDecoderLayer(
      layer_options().dropout(0.3).norm_first(true).activation(Activation::gelu).policy(Policy::exact()));
  layer->eval();
  const Tensor tgt = torch::randn({kTarget, kBatch, kModel}),
               memory = torch::randn({kSource, kBatch, kModel});
  const Tensor expected = layer(tgt, memory);
  const auto copy = std::dynamic_pointer_cast<remnant::nn::TransformerDecoderLayerImpl>(layer->clone());
  ASSERT_NE(copy, nullptr);
  {
    const torch::NoGradGuard no_grad;
    for (auto& parameter : layer->parameters()) parameter.zero_();
  }
  expect_close(copy->forward(tgt, memory), expected, "clone", 1e-6);
  EXPECT_EQ(copy->self_attn->options.policy(), Policy::exact());
  EXPECT_EQ(copy->multihead_attn->options.dropout(), 0.3);
}

TEST(TransformerLayer, DropsOutInTrainingOnly) {
  torch::manual_seed(6);
  auto layer = TransformerEncoderLayer(layer_options().dropout(0.4));
  auto plain = TransformerEncoderLayer(layer_options());
  ASSERT_NO_FATAL_FAILURE(copy_parameters(*layer, *plain));
  const Tensor src = torch::randn({kSource, kBatch, kModel});
  const Tensor expected = plain(src);
  EXPECT_FALSE(at::allclose(layer(src), expected));
  layer->eval();
  expect_close(layer(src), expected, "eval", 1e-6);
}

TEST(TransformerLayer, PoliciesReachBothAttentions) {
  const auto layer = TransformerDecoderLayer(layer_options().policy(Policy::quantized(4)));
  EXPECT_EQ(layer->self_attn->options.policy(), Policy::quantized(4));
  EXPECT_EQ(layer->multihead_attn->options.policy(), Policy::quantized(4));
}

TEST(TransformerLayer, KeptBytesBelongToTheirAttention) {
  auto layer = TransformerDecoderLayer(layer_options());
  const Tensor tgt = torch::randn({kTarget, kBatch, kModel}),
               memory = torch::randn({kSource, kBatch, kModel});
  const remnant::memory::Recorder recorder(layer.get());
  const auto report = recorder.report({layer(tgt, memory)}, {tgt, memory});
  std::set<std::string> layers;
  for (const auto& row : report.rows) layers.insert(row.layer);
  EXPECT_EQ(layers.count("self_attn"), 1u) << report.table();
  EXPECT_EQ(layers.count("multihead_attn"), 1u) << report.table();
}

TEST(TransformerLayer, CachedDecodingEqualsForward) {
  for (const bool norm_first : {false, true}) {
    for (const bool batch_first : {false, true}) {
      SCOPED_TRACE(testing::Message() << "norm_first " << norm_first << ", batch_first " << batch_first);
      torch::manual_seed(8);
      auto layer = TransformerDecoderLayer(
          layer_options().dropout(0.2).norm_first(norm_first).batch_first(batch_first));
      layer->to(at::kDouble);
      randomize_parameters(*layer);
      layer->eval();
      const torch::NoGradGuard no_grad;
      const Tensor tgt = torch::randn({kBatch, kTarget, kModel}, at::kDouble);
      const Tensor memory = torch::randn({kBatch, kSource, kModel}, at::kDouble);
      const Tensor padding = padding_mask(kSource);
      const auto swap = [&](const Tensor& x) { return batch_first ? x : x.transpose(0, 1); };
      const Tensor full =
          swap(layer(swap(tgt), swap(memory), Tensor(), Tensor(), Tensor(), padding, /*tgt_is_causal=*/true));
      DecoderCache cache;
      for (int64_t i = 0; i < kTarget; ++i) {
        expect_close(layer->forward_cached(tgt.narrow(1, i, 1), memory, padding, cache), full.narrow(1, i, 1),
                     "position " + std::to_string(i));
      }
    }
  }
}

TEST(TransformerLayer, CachedEncodingEqualsCausalForward) {
  for (const bool norm_first : {false, true}) {
    for (const bool batch_first : {false, true}) {
      SCOPED_TRACE(testing::Message() << "norm_first " << norm_first << ", batch_first " << batch_first);
      torch::manual_seed(8);
      auto layer = TransformerEncoderLayer(layer_options()
                                               .dropout(0.2)
                                               .norm_first(norm_first)
                                               .batch_first(batch_first)
                                               .activation(Activation::gelu));
      layer->to(at::kDouble);
      randomize_parameters(*layer);
      layer->eval();
      const torch::NoGradGuard no_grad;
      const Tensor src = torch::randn({kBatch, kSource, kModel}, at::kDouble);
      const auto swap = [&](const Tensor& x) { return batch_first ? x : x.transpose(0, 1); };
      const Tensor full = swap(layer(swap(src), Tensor(), Tensor(), /*is_causal=*/true));
      KeyValueCache cache;
      // Several positions at once, then one by one.
      expect_close(layer->forward_cached(src.narrow(1, 0, 3), cache), full.narrow(1, 0, 3),
                   "the first three");
      for (int64_t i = 3; i < kSource; ++i) {
        expect_close(layer->forward_cached(src.narrow(1, i, 1), cache), full.narrow(1, i, 1),
                     "position " + std::to_string(i));
      }
    }
  }
}

TEST(TransformerLayer, SelectedCacheRowsContinueTheirSentence) {
  torch::manual_seed(8);
  auto layer = TransformerDecoderLayer(layer_options());
  layer->to(at::kDouble);
  randomize_parameters(*layer);
  const Tensor tgt = torch::randn({kBatch, 2, kModel}, at::kDouble);
  const Tensor memory = torch::randn({kBatch, kSource, kModel}, at::kDouble);
  const Tensor rows = torch::tensor({2, 0, 2});
  DecoderCache cache;
  layer->forward_cached(tgt.narrow(1, 0, 1), memory, Tensor(), cache);
  for (auto* part : {&cache.self, &cache.cross}) {
    part->key = part->key.index_select(0, rows);
    part->value = part->value.index_select(0, rows);
  }
  const Tensor chosen = tgt.index_select(0, rows).transpose(0, 1);
  const Tensor full = layer(chosen, memory.index_select(0, rows).transpose(0, 1), Tensor(), Tensor(),
                            Tensor(), Tensor(), true);
  expect_close(layer->forward_cached(chosen.transpose(0, 1).narrow(1, 1, 1), Tensor(), Tensor(), cache),
               full.transpose(0, 1).narrow(1, 1, 1), "second position");
}

TEST(TransformerLayer, ErrorsNameTheArgument) {
  auto encoder = TransformerEncoderLayer(layer_options());
  auto decoder = TransformerDecoderLayer(layer_options());
  const Tensor good = torch::zeros({kSource, kBatch, kModel}), bad = torch::zeros({kSource, kBatch, 7});
  expect_error([&] { encoder(bad); },
               {"TransformerEncoderLayer", "src's last dimension", "d_model = 8", "[6, 3, 7]"});
  expect_error(
      [&] {
        KeyValueCache cache;
        encoder->forward_cached(bad, cache);
      },
      {"TransformerEncoderLayer", "src's last dimension", "[6, 3, 7]"});
  expect_error([&] { decoder(bad, good); }, {"TransformerDecoderLayer", "tgt's last dimension", "[6, 3, 7]"});
  expect_error([&] { decoder(good, bad); }, {"memory's last dimension", "[6, 3, 7]"});
  expect_error([] { TransformerEncoderLayer(TransformerLayerOptions(10, 3)); }, {"multiple of num_heads"});
  expect_error([] { TransformerEncoderLayer(TransformerLayerOptions(8, 2).dim_feedforward(0)); },
               {"dim_feedforward should be positive"});
  expect_error([&] { encoder(good, torch::zeros({2, 2}, at::kBool)); }, {"attn_mask should be", "[2, 2]"});
}

}  // namespace
