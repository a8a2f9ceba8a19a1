#include <ATen/record_function.h>
#include <compare.h>
#include <remnant/nn/attention.h>
#include <torch/nn/modules/activation.h>

#include <cmath>
#include <limits>
#include <memory>
#include <ostream>
#include <sstream>
#include <tuple>
#include <utility>

namespace {

using at::Tensor;
using remnant::Policy;
using remnant::nn::KeyValueCache;
using remnant::nn::MultiheadAttention;
using remnant::nn::MultiheadAttentionOptions;
using remnant::test::copy_parameters;
using remnant::test::expect_close;
using remnant::test::expect_error;
using remnant::test::expect_same_gradients;
using remnant::test::randomize_parameters;

constexpr int64_t kBatch = 3, kHeads = 2, kEmbed = 8;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

enum class Inputs { self, memory, separate };
enum class Mask { none, boolean, floating };
enum class Padding { none, boolean, floating };

struct Case {
  const char* name;
  Inputs inputs = Inputs::self;
  Mask mask = Mask::none;
  Padding padding = Padding::none;
  bool causal = false;
  int64_t kdim = 0, vdim = 0;
  bool add_bias_kv = false, add_zero_attn = false, bias = true;
};

std::ostream& operator<<(std::ostream& stream, const Case& c) { return stream << c.name; }

const Case kCases[] = {
    {.name = "self"},
    {.name = "self_without_bias", .bias = false},
    {.name = "memory", .inputs = Inputs::memory},
    {.name = "separate", .inputs = Inputs::separate},
    {.name = "boolean_mask", .inputs = Inputs::memory, .mask = Mask::boolean},
    {.name = "floating_mask", .inputs = Inputs::memory, .mask = Mask::floating},
    {.name = "padding", .padding = Padding::boolean},
    {.name = "floating_padding", .inputs = Inputs::memory, .padding = Padding::floating},
    {.name = "causal", .causal = true},
    {.name = "causal_over_memory", .inputs = Inputs::memory, .causal = true},
    {.name = "causal_padding", .padding = Padding::boolean, .causal = true},
    {.name = "causal_floating_padding", .padding = Padding::floating, .causal = true},
    {.name = "causal_boolean_mask", .mask = Mask::boolean, .causal = true},
    {.name = "boolean_mask_padding",
     .inputs = Inputs::memory,
     .mask = Mask::boolean,
     .padding = Padding::boolean},
    {.name = "floating_mask_padding", .mask = Mask::floating, .padding = Padding::boolean},
    {.name = "boolean_mask_floating_padding", .mask = Mask::boolean, .padding = Padding::floating},
    {.name = "floating_mask_floating_padding", .mask = Mask::floating, .padding = Padding::floating},
    {.name = "kdim_vdim", .inputs = Inputs::separate, .kdim = 6, .vdim = 6},
    {.name = "kdim_vdim_without_bias", .inputs = Inputs::separate, .kdim = 6, .vdim = 6, .bias = false},
    {.name = "bias_kv", .inputs = Inputs::memory, .add_bias_kv = true},
    {.name = "zero_attn", .inputs = Inputs::memory, .add_zero_attn = true},
    {.name = "bias_kv_zero_attn_masks",
     .inputs = Inputs::memory,
     .mask = Mask::boolean,
     .padding = Padding::boolean,
     .add_bias_kv = true,
     .add_zero_attn = true},
    {.name = "bias_kv_causal_padding", .padding = Padding::boolean, .causal = true, .add_bias_kv = true},
    {.name = "zero_attn_causal_floating_mask", .mask = Mask::floating, .causal = true, .add_zero_attn = true},
};

/// Key 0 is never masked: a query with nothing to attend is a case of its own.
Tensor draw_mask(Mask kind, int64_t queries, int64_t keys) {
  if (kind == Mask::none) return {};
  if (kind == Mask::floating) return torch::randn({queries, keys}, at::kDouble);
  Tensor mask = torch::rand({queries, keys}) < 0.4;
  mask.select(1, 0).fill_(false);
  return mask;
}

Tensor draw_padding(Padding kind, int64_t keys) {
  if (kind == Padding::none) return {};
  if (kind == Padding::floating) return torch::randn({kBatch, keys}, at::kDouble);
  Tensor mask = torch::rand({kBatch, keys}) < 0.4;
  mask.select(1, 0).fill_(false);
  return mask;
}

Tensor as_added(const Tensor& mask) {
  return mask.scalar_type() == at::kBool
             ? torch::zeros(mask.sizes(), at::kDouble).masked_fill(mask, -kInfinity)
             : mask;
}

/// All masks of one sequence as the one [Nq, Nk] that is added to the scores.
Tensor added_mask(const Tensor& mask, const Tensor& padding, bool causal, int64_t queries, int64_t keys) {
  Tensor all = torch::zeros({queries, keys}, at::kDouble);
  if (mask.defined()) all = all + as_added(mask);
  if (padding.defined()) all = all + as_added(padding);
  if (causal) all = all + as_added(torch::ones({queries, keys}, at::kBool).triu(1));
  return all;
}

torch::nn::MultiheadAttention make_reference(const Case& c) {
  auto options = torch::nn::MultiheadAttentionOptions(kEmbed, kHeads)
                     .bias(c.bias)
                     .add_bias_kv(c.add_bias_kv)
                     .add_zero_attn(c.add_zero_attn);
  options.kdim(c.kdim > 0 ? c.kdim : kEmbed).vdim(c.vdim > 0 ? c.vdim : kEmbed);
  torch::nn::MultiheadAttention module(options);
  module->to(at::kDouble);
  return module;
}

MultiheadAttention make_module(const Case& c, const Policy& policy, bool batch_first) {
  MultiheadAttention module(MultiheadAttentionOptions(kEmbed, kHeads)
                                .bias(c.bias)
                                .add_bias_kv(c.add_bias_kv)
                                .add_zero_attn(c.add_zero_attn)
                                .kdim(c.kdim)
                                .vdim(c.vdim)
                                .batch_first(batch_first)
                                .policy(policy));
  module->to(at::kDouble);
  return module;
}

struct Sequences {
  Tensor query, key, value;
};

/// Leaves [N, B, E]; one tensor where the case says so.
Sequences draw_inputs(const Case& c) {
  const auto leaf = [](int64_t length, int64_t width) {
    return torch::randn({length, kBatch, width}, torch::dtype(at::kDouble).requires_grad(true));
  };
  const Tensor query = leaf(5, kEmbed);
  if (c.inputs == Inputs::self) return {query, query, query};
  const Tensor key = leaf(7, c.kdim > 0 ? c.kdim : kEmbed);
  if (c.inputs == Inputs::memory) return {query, key, key};
  return {query, key, leaf(7, c.vdim > 0 ? c.vdim : kEmbed)};
}

Sequences copy_of(const Sequences& x) {
  const auto leaf = [](const Tensor& t) { return t.detach().clone().requires_grad_(true); };
  const Tensor query = leaf(x.query);
  const Tensor key = x.key.is_same(x.query) ? query : leaf(x.key);
  return {query, key, x.value.is_same(x.key) ? key : leaf(x.value)};
}

Sequences transposed(const Sequences& x) {
  const Tensor query = x.query.transpose(0, 1);
  const Tensor key = x.key.is_same(x.query) ? query : x.key.transpose(0, 1);
  return {query, key, x.value.is_same(x.key) ? key : x.value.transpose(0, 1)};
}

using Parameters = std::tuple<Case, const char*, bool, bool>;

class AgainstTorch : public testing::TestWithParam<Parameters> {};

TEST_P(AgainstTorch, SameOutputsWeightsAndGradients) {
  const auto& [c, policy, batch_first, train] = GetParam();
  torch::manual_seed(7);
  auto reference = make_reference(c);
  randomize_parameters(*reference);
  auto module = make_module(c, Policy::parse(policy), batch_first);
  ASSERT_NO_FATAL_FAILURE(copy_parameters(*reference, *module));
  reference->train(train);
  module->train(train);

  const Sequences expected_in = draw_inputs(c), in = copy_of(expected_in);
  const int64_t queries = in.query.size(0), keys = in.key.size(0);
  const Tensor mask = draw_mask(c.mask, queries, keys), padding = draw_padding(c.padding, keys);
  // torch::nn adds even a boolean attn_mask, and takes only [Nq, Nk]: give it one sequence at a time.
  std::vector<Tensor> outputs, all_weights;
  for (int64_t b = 0; b < kBatch; ++b) {
    const auto [y, w] = reference(
        expected_in.query.narrow(1, b, 1), expected_in.key.narrow(1, b, 1), expected_in.value.narrow(1, b, 1),
        Tensor(), true, added_mask(mask, padding.defined() ? padding[b] : Tensor(), c.causal, queries, keys),
        false);
    outputs.push_back(y);
    all_weights.push_back(w);
  }
  const Tensor expected = torch::cat(outputs, 1), expected_weights = torch::cat(all_weights, 0);

  const Sequences laid_out = batch_first ? transposed(in) : in;
  auto [output, weights] = module(laid_out.query, laid_out.key, laid_out.value, padding,
                                  /*need_weights=*/true, mask, /*average_attn_weights=*/false, c.causal);
  if (batch_first) output = output.transpose(0, 1);
  expect_close(output, expected, "output");
  expect_close(weights, expected_weights, "weights");

  auto [alone, no_weights] =
      module(laid_out.query, laid_out.key, laid_out.value, padding, false, mask, true, c.causal);
  if (batch_first) alone = alone.transpose(0, 1);
  EXPECT_FALSE(no_weights.defined());
  expect_close(alone, expected, "output without weights");

  const Tensor direction = torch::randn_like(expected);
  (expected * direction).sum().backward();
  (alone * direction).sum().backward();
  expect_same_gradients(*module, *reference);
  expect_close(in.query.grad(), expected_in.query.grad(), "gradient of query", 1e-9);
  expect_close(in.key.grad(), expected_in.key.grad(), "gradient of key", 1e-9);
  expect_close(in.value.grad(), expected_in.value.grad(), "gradient of value", 1e-9);
}

std::string case_name(const testing::TestParamInfo<Parameters>& info) {
  const auto& [c, policy, batch_first, train] = info.param;
  return std::string(c.name) + "_" + policy + (batch_first ? "_batch_first" : "") +
         (train ? "_train" : "_eval");
}

INSTANTIATE_TEST_SUITE_P(MultiheadAttention, AgainstTorch,
                         testing::Combine(testing::ValuesIn(kCases), testing::Values("exact", "recompute"),
                                          testing::Bool(), testing::Bool()),
                         case_name);

/// A float64 module with random parameters and random inputs [N, B, E].
struct MultiheadAttentionTest : testing::Test {
  void SetUp() override {
    torch::manual_seed(11);
    randomize_parameters(*module);
  }
  MultiheadAttention module = make_module({.name = ""}, Policy::recompute(), false);
  Tensor x = torch::randn({5, kBatch, kEmbed}, at::kDouble);
};

TEST(MultiheadAttentionInit, OneSeedGivesTorchsParameters) {
  for (const Case& c : {Case{.name = "packed"}, Case{.name = "separate", .kdim = 6, .vdim = 6},
                        Case{.name = "bias_kv", .add_bias_kv = true}}) {
    SCOPED_TRACE(c.name);
    torch::manual_seed(3);
    const auto expected = make_reference(c)->named_parameters();
    torch::manual_seed(3);
    const auto module = make_module(c, Policy::recompute(), false);
    ASSERT_EQ(module->named_parameters().size(), expected.size());
    for (const auto& item : module->named_parameters()) {
      EXPECT_TRUE(item->equal(expected[item.key()])) << item.key();
      EXPECT_TRUE(item->requires_grad()) << item.key();
    }
  }
}

TEST_F(MultiheadAttentionTest, AveragesWeightsOverHeads) {
  const auto per_head = std::get<1>(module(x, x, x, Tensor(), true, Tensor(), false));
  const auto averaged = std::get<1>(module(x, x, x));
  EXPECT_EQ(per_head.sizes(), at::IntArrayRef({kBatch, kHeads, 5, 5}));
  expect_close(averaged, per_head.mean(1), "averaged weights");
}

TEST_F(MultiheadAttentionTest, UnbatchedEqualsBatchOfOne) {
  const Tensor mask = draw_mask(Mask::boolean, 5, 5), padding = draw_padding(Padding::boolean, 5);
  const Tensor one = x.narrow(1, 0, 1), flat = one.squeeze(1);
  for (const bool batch_first : {false, true}) {
    module->options.batch_first(batch_first);
    const Tensor batch = batch_first ? one.transpose(0, 1) : one;
    const auto [expected, expected_weights] =
        module(batch, batch, batch, padding.narrow(0, 0, 1), true, mask);
    const auto [output, weights] = module(flat, flat, flat, padding[0], true, mask);
    expect_close(output, expected.reshape({5, kEmbed}), "output");
    expect_close(weights, expected_weights[0], "weights");
    const auto per_head = std::get<1>(module(flat, flat, flat, padding[0], true, mask, false));
    EXPECT_EQ(per_head.sizes(), at::IntArrayRef({kHeads, 5, 5}));
  }
}

TEST_F(MultiheadAttentionTest, UnbatchedTakesMaskPerHead) {
  const Tensor one = x.narrow(1, 0, 1), flat = one.squeeze(1);
  const Tensor mask = torch::rand({kHeads, 5, 5}) < 0.4;
  expect_close(std::get<0>(module(flat, flat, flat, Tensor(), false, mask)),
               std::get<0>(module(one, one, one, Tensor(), false, mask)).squeeze(1), "output");
}

TEST_F(MultiheadAttentionTest, SameTensorOrEqualTensorsGiveTheSame) {
  const auto packed = std::get<0>(module(x, x, x));
  expect_close(std::get<0>(module(x, x.clone(), x.clone())), packed, "three tensors");
  const Tensor memory = x.clone();
  expect_close(std::get<0>(module(x, memory, memory)), packed, "two tensors");
}

TEST_F(MultiheadAttentionTest, CausalHintBesideACausalMaskChangesNothing) {
  const Tensor mask = torch::ones({5, 5}, at::kBool).triu(1);
  expect_close(std::get<0>(module(x, x, x, Tensor(), false, mask, true, true)),
               std::get<0>(module(x, x, x, Tensor(), false, Tensor(), true, true)), "output");
}

TEST_F(MultiheadAttentionTest, GradientFlowsToAFloatingMask) {
  Tensor bias = torch::randn({5, 5}, torch::dtype(at::kDouble).requires_grad(true));
  auto reference = make_reference({.name = ""});
  ASSERT_NO_FATAL_FAILURE(copy_parameters(*module, *reference));
  const Tensor direction = torch::randn_like(x);
  (std::get<0>(module(x, x, x, Tensor(), false, bias)) * direction).sum().backward();
  const Tensor got = bias.grad().clone();
  bias.mutable_grad().zero_();
  (std::get<0>(reference(x, x, x, Tensor(), false, bias)) * direction).sum().backward();
  expect_close(got, bias.grad(), "gradient of attn_mask", 1e-9);
}

TEST_F(MultiheadAttentionTest, FullyMaskedQueryGivesTheOutputBias) {
  Tensor padding = torch::zeros({kBatch, 5}, at::kBool);
  padding[1].fill_(true);
  const Tensor leaf = x.clone().requires_grad_(true);
  const auto [output, weights] = module(leaf, leaf, leaf, padding);
  expect_close(output.select(1, 1), module->out_proj->bias.expand({5, kEmbed}), "masked sequence");
  EXPECT_EQ(weights[1].abs().max().item<double>(), 0.0);
  output.sum().backward();
  EXPECT_TRUE(leaf.grad().isfinite().all().item<bool>());
  EXPECT_EQ(leaf.grad().select(1, 1).abs().max().item<double>(), 0.0);
  EXPECT_GT(leaf.grad().select(1, 0).abs().max().item<double>(), 0.0);
}

TEST_F(MultiheadAttentionTest, DropsOutInTrainingOnly) {
  const auto expected = std::get<0>(module(x, x, x));
  module->options.dropout(0.5);
  const auto [dropped, weights] = module(x, x, x);
  EXPECT_FALSE(at::allclose(dropped, expected));
  // Weights are those before dropout.
  expect_close(weights.sum(-1), torch::ones({kBatch, 5}, at::kDouble), "sum of weights");
  module->eval();
  expect_close(std::get<0>(module(x, x, x)), expected, "eval");
}

TEST_F(MultiheadAttentionTest, CloneIsDeepAndKeepsOptions) {
  module->options.dropout(0.25).policy(Policy::curve(3));
  module->eval();
  const auto copy = std::dynamic_pointer_cast<remnant::nn::MultiheadAttentionImpl>(module->clone());
  ASSERT_NE(copy, nullptr);
  EXPECT_EQ(copy->options.policy(), Policy::curve(3));
  EXPECT_EQ(copy->options.dropout(), 0.25);
  EXPECT_FALSE(copy->is_training());
  const auto expected = std::get<0>(module(x, x, x));
  expect_close(std::get<0>(copy->forward(x, x, x)), expected, "clone");
  {
    const torch::NoGradGuard no_grad;
    for (auto& parameter : module->parameters()) parameter.zero_();
  }
  expect_close(std::get<0>(copy->forward(x, x, x)), expected, "clone after the original changed");
}

TEST(MultiheadAttentionPrint, NamesSizesAndPolicy) {
  std::ostringstream text;
  text << MultiheadAttention(MultiheadAttentionOptions(kEmbed, kHeads).policy(Policy::curve(4)));
  for (const char* part : {"embed_dim=8", "num_heads=2", "policy=curve:m=4"}) {
    EXPECT_NE(text.str().find(part), std::string::npos) << text.str();
  }
}

TEST_F(MultiheadAttentionTest, CausalAndPaddingMasksAreNotMaterialised) {
  static thread_local int64_t ops = 0, largest = 0;
  ops = largest = 0;
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback([](const at::RecordFunction& fn) -> std::unique_ptr<at::ObserverContext> {
        if (std::string(fn.name()).rfind("remnant::", 0) != 0) return nullptr;
        ++ops;
        for (const auto& input : fn.inputs()) {
          if (!input.isTensor() || !input.toTensor().defined()) continue;
          if (input.toTensor().scalar_type() == at::kBool)
            largest = std::max(largest, input.toTensor().numel());
        }
        return nullptr;
      }).needsInputs(true));
  const Tensor padding = torch::zeros({kBatch, 5}, at::kBool);
  module(x, x, x, padding, false, Tensor(), true, true);
  module(x, x, x, padding, false);
  const int64_t with_padding = largest;
  largest = 0;
  module(x, x, x, Tensor(), false, Tensor(), true, true);
  at::removeCallback(handle);
  EXPECT_GT(ops, 0) << "the op is not seen by the dispatcher's callbacks";
  EXPECT_EQ(with_padding, kBatch * 5);
  EXPECT_EQ(largest, 0);
}

TEST_F(MultiheadAttentionTest, CachedSelfAttentionEqualsFullCausal) {
  for (const bool extra_keys : {false, true}) {
    auto cached = make_module({.name = "", .add_bias_kv = extra_keys, .add_zero_attn = extra_keys},
                              Policy::recompute(), /*batch_first=*/false);
    randomize_parameters(*cached);
    const Tensor batch = x.transpose(0, 1);
    const Tensor full =
        std::get<0>(cached(x, x, x, Tensor(), false, Tensor(), true, /*is_causal=*/true)).transpose(0, 1);
    KeyValueCache cache;
    for (int64_t i = 0; i < 5; ++i) {
      expect_close(cached->forward_self_cached(batch.narrow(1, i, 1), cache), full.narrow(1, i, 1),
                   "position " + std::to_string(i));
    }
    EXPECT_EQ(cache.key.sizes(), at::IntArrayRef({kBatch, kHeads, 5, kEmbed / kHeads}));

    KeyValueCache chunks;
    expect_close(cached->forward_self_cached(batch.narrow(1, 0, 2), chunks), full.narrow(1, 0, 2),
                 "first two");
    expect_close(cached->forward_self_cached(batch.narrow(1, 2, 3), chunks), full.narrow(1, 2, 3),
                 "last three");
  }
}

TEST_F(MultiheadAttentionTest, CachedCrossAttentionEqualsForward) {
  for (const int64_t kdim : {int64_t{0}, int64_t{6}}) {
    auto cached = make_module({.name = "", .kdim = kdim, .vdim = kdim}, Policy::recompute(), true);
    randomize_parameters(*cached);
    const Tensor query = torch::randn({kBatch, 4, kEmbed}, at::kDouble);
    const Tensor memory = torch::randn({kBatch, 7, kdim > 0 ? kdim : kEmbed}, at::kDouble);
    const Tensor padding = draw_padding(Padding::boolean, 7);
    const Tensor full = std::get<0>(cached(query, memory, memory, padding, false));
    KeyValueCache cache;
    for (int64_t i = 0; i < 4; ++i) {
      // Once the cache is filled the memory is not read again.
      const Tensor given = i == 0 ? memory : Tensor();
      expect_close(cached->forward_cross_cached(query.narrow(1, i, 1), given, padding, cache),
                   full.narrow(1, i, 1), "position " + std::to_string(i));
    }
  }
}

TEST(MultiheadAttentionErrors, Options) {
  expect_error([] { MultiheadAttention(10, 3); }, {"embed_dim should be a multiple of num_heads", "10", "3"});
  expect_error([] { MultiheadAttention(8, 0); }, {"should be positive", "num_heads = 0"});
  expect_error([] { MultiheadAttention(MultiheadAttentionOptions(8, 2).dropout(1.0)); },
               {"dropout should be in [0, 1)", "got 1"});
  expect_error([] { MultiheadAttention(MultiheadAttentionOptions(8, 2).kdim(-1)); }, {"kdim", "-1"});
}

TEST_F(MultiheadAttentionTest, ErrorsNameTheArgumentAndShapes) {
  const auto zeros = [](std::vector<int64_t> shape) { return torch::zeros(shape, at::kDouble); };
  expect_error([&] { module(zeros({5, 3, 6}), x, x); },
               {"query's last dimension", "embed_dim = 8", "[5, 3, 6]"});
  expect_error([&] { module(x, zeros({5, 3, 6}), x); }, {"key's last dimension", "[5, 3, 6]"});
  expect_error([&] { module(x, x, zeros({5, 3, 6})); }, {"value's last dimension", "[5, 3, 6]"});
  expect_error([&] { module(zeros({8}), x, x); }, {"query should be", "[8]"});
  expect_error([&] { module(x, x[0], x[0]); }, {"as many dimensions as query", "[3, 8]"});
  expect_error([&] { module(x, x, zeros({4, 3, 8})); }, {"agree in batch and length", "[4, 3, 8]"});
  expect_error([&] { module(x, zeros({5, 2, 8}), zeros({5, 2, 8})); }, {"same batch size", "batch_first"});
  expect_error([&] { module(x, x, x, torch::zeros({5, 3}, at::kBool)); },
               {"key_padding_mask should be [B, Nk] = [3, 5]", "got shape [5, 3]"});
  expect_error([&] { module(x, x, x, torch::zeros({3, 5}, at::kLong)); },
               {"key_padding_mask should be boolean", "Long"});
  expect_error([&] { module(x, x, x, Tensor(), false, torch::zeros({5, 4}, at::kBool)); },
               {"attn_mask should be [Nq, Nk] = [5, 5]", "[6, 5, 5]", "got shape [5, 4]"});
  expect_error([&] { module(x, x, x, Tensor(), false, torch::zeros({3, 5, 5}, at::kBool)); },
               {"[B * num_heads, Nq, Nk] = [6, 5, 5]", "got shape [3, 5, 5]"});
  expect_error([&] { module(x, x, x, Tensor(), false, torch::zeros({5, 5}, at::kInt)); },
               {"attn_mask should be boolean", "Int"});
}

TEST_F(MultiheadAttentionTest, ErrorsOfTheCachedForwards) {
  KeyValueCache cache;
  const Tensor query = x.transpose(0, 1).narrow(1, 0, 1);
  expect_error([&] { module->forward_self_cached(x[0], cache); }, {"[B, N, E]", "[3, 8]"});
  expect_error([&] { module->forward_cross_cached(query, x, Tensor(), cache); }, {"memory", "batch size 3"});
  module->forward_self_cached(query, cache);
  expect_error([&] { module->forward_self_cached(query.narrow(0, 0, 2), cache); },
               {"batch size 2", "select the cache's rows"});
}

}  // namespace
