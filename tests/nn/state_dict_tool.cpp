// Holds the modules against cases written by PyTorch (tests/python/test_nn_against_torch.py), a list
// of dictionaries in the file REMNANT_STATE_DICT_CASES:
//   name, module ("attention", "encoder", "decoder"), train,
//   options: number, bool or string by option's name
//   initial: the parameters that torch.manual_seed(seed) gives, float32
//   parameters, inputs: by name, float64;  flags: the other arguments of forward
//   outputs: output and perhaps weights;  direction: gradient of output
//   gradients: of parameters and inputs by name, empty when only outputs are compared

#include <compare.h>
#include <remnant/nn/transformer.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <tuple>

namespace {

using at::Tensor;
using remnant::Policy;
using remnant::nn::Activation;
using remnant::nn::MultiheadAttention;
using remnant::nn::MultiheadAttentionOptions;
using remnant::nn::TransformerDecoderLayer;
using remnant::nn::TransformerEncoderLayer;
using remnant::nn::TransformerLayerOptions;
using remnant::test::expect_close;
using remnant::test::parameter_names;

using Tensors = std::map<std::string, Tensor>;

class Dict {
 public:
  explicit Dict(const c10::IValue& value) : dict_(value.toGenericDict()) {}
  bool has(const char* key) const { return dict_.contains(key); }
  c10::IValue at(const char* key) const { return dict_.at(key); }
  Dict dict(const char* key) const { return Dict(at(key)); }
  bool flag(const char* key, bool absent) const { return has(key) ? at(key).toBool() : absent; }
  int64_t number(const char* key, int64_t absent) const { return has(key) ? at(key).toInt() : absent; }
  Tensors tensors(const char* key) const {
    Tensors result;
    for (const auto& item : at(key).toGenericDict())
      result[item.key().toStringRef()] = item.value().toTensor();
    return result;
  }

 private:
  c10::impl::GenericDict dict_;
};

Tensor find(const Tensors& tensors, const char* name) {
  const auto found = tensors.find(name);
  return found == tensors.end() ? Tensor() : found->second;
}

MultiheadAttention make_attention(const Dict& options, const Policy& policy) {
  return MultiheadAttention(
      MultiheadAttentionOptions(options.number("embed_dim", 0), options.number("num_heads", 0))
          .bias(options.flag("bias", true))
          .add_bias_kv(options.flag("add_bias_kv", false))
          .add_zero_attn(options.flag("add_zero_attn", false))
          .kdim(options.number("kdim", 0))
          .vdim(options.number("vdim", 0))
          .batch_first(options.flag("batch_first", false))
          .policy(policy));
}

TransformerLayerOptions layer_options(const Dict& options, const Policy& policy) {
  const bool gelu = options.has("activation") && options.at("activation").toStringRef() == "gelu";
  return TransformerLayerOptions(options.number("d_model", 0), options.number("nhead", 0))
      .dim_feedforward(options.number("dim_feedforward", 2048))
      .dropout(options.at("dropout").toDouble())
      .activation(gelu ? Activation::gelu : Activation::relu)
      .layer_norm_eps(options.has("layer_norm_eps") ? options.at("layer_norm_eps").toDouble() : 1e-5)
      .batch_first(options.flag("batch_first", false))
      .norm_first(options.flag("norm_first", false))
      .bias(options.flag("bias", true))
      .policy(policy);
}

/// The module of a case, and its forward from named inputs.
struct Subject {
  std::shared_ptr<torch::nn::Module> module;
  std::function<std::tuple<Tensor, Tensor>(const Tensors&)> forward;
};

Subject make_subject(const Dict& test_case, const Policy& policy) {
  const std::string kind = test_case.at("module").toStringRef();
  const Dict options = test_case.dict("options"), flags = test_case.dict("flags");
  if (kind == "attention") {
    const auto module = make_attention(options, policy).ptr();
    return {module, [=](const Tensors& in) {
              const Tensor query = in.at("query");
              const Tensor key = in.count("key") > 0 ? in.at("key") : query;
              const Tensor value = in.count("value") > 0 ? in.at("value") : key;
              return module->forward(query, key, value, find(in, "key_padding_mask"),
                                     flags.flag("need_weights", true), find(in, "attn_mask"),
                                     flags.flag("average_attn_weights", true),
                                     flags.flag("is_causal", false));
            }};
  }
  if (kind == "encoder") {
    const auto module = TransformerEncoderLayer(layer_options(options, policy)).ptr();
    return {module, [=](const Tensors& in) {
              return std::make_tuple(
                  module->forward(in.at("src"), find(in, "src_mask"), find(in, "src_key_padding_mask"),
                                  flags.flag("is_causal", false)),
                  Tensor());
            }};
  }
  const auto module = TransformerDecoderLayer(layer_options(options, policy)).ptr();
  return {module, [=](const Tensors& in) {
            return std::make_tuple(
                module->forward(in.at("tgt"), in.at("memory"), find(in, "tgt_mask"), find(in, "memory_mask"),
                                find(in, "tgt_key_padding_mask"), find(in, "memory_key_padding_mask"),
                                flags.flag("tgt_is_causal", false), flags.flag("memory_is_causal", false)),
                Tensor());
          }};
}

void load(torch::nn::Module& module, const Tensors& parameters) {
  std::set<std::string> names;
  for (const auto& [name, tensor] : parameters) names.insert(name);
  ASSERT_EQ(parameter_names(module), names);
  const torch::NoGradGuard no_grad;
  for (auto& item : module.named_parameters()) {
    ASSERT_EQ(item->sizes(), parameters.at(item.key()).sizes()) << item.key();
    item->copy_(parameters.at(item.key()));
  }
}

void check_initial(const torch::nn::Module& module, const Tensors& expected) {
  for (const auto& item : module.named_parameters()) {
    const Tensor tensor = find(expected, item.key().c_str());
    ASSERT_TRUE(tensor.defined()) << item.key();
    EXPECT_TRUE(item->equal(tensor)) << "initial " << item.key();
  }
}

void check_case(const Dict& test_case, const Policy& policy) {
  torch::manual_seed(test_case.at("seed").toInt());
  const Subject subject = make_subject(test_case, policy);
  check_initial(*subject.module, test_case.tensors("initial"));
  subject.module->to(at::kDouble);
  ASSERT_NO_FATAL_FAILURE(load(*subject.module, test_case.tensors("parameters")));
  subject.module->train(test_case.at("train").toBool());

  const Tensors gradients = test_case.tensors("gradients");
  Tensors inputs = test_case.tensors("inputs");
  for (auto& [name, tensor] : inputs) {
    tensor = tensor.clone().requires_grad_(gradients.count(name) > 0);
  }
  const auto [output, weights] = subject.forward(inputs);
  const Tensors expected = test_case.tensors("outputs");
  expect_close(output, find(expected, "output"), "output");
  expect_close(weights, find(expected, "weights"), "weights");
  if (gradients.empty() || testing::Test::HasFatalFailure()) return;

  (output * test_case.at("direction").toTensor()).sum().backward();
  for (const auto& item : subject.module->named_parameters()) inputs[item.key()] = *item;
  for (const auto& [name, gradient] : gradients) {
    expect_close(inputs.at(name).grad(), gradient, "gradient of " + name, 1e-9);
  }
}

TEST(StateDict, AgreesWithPyTorch) {
  const char* path = std::getenv("REMNANT_STATE_DICT_CASES");
  if (path == nullptr)
    GTEST_SKIP() << "REMNANT_STATE_DICT_CASES names no file: run by test_nn_against_torch.py";
  std::ifstream file(path, std::ios::binary);
  ASSERT_TRUE(file) << path;
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const c10::IValue cases = torch::jit::pickle_load(bytes);
  ASSERT_FALSE(cases.toListRef().empty());
  for (const c10::IValue& value : cases.toListRef()) {
    const Dict test_case(value);
    for (const char* policy : {"exact", "recompute"}) {
      SCOPED_TRACE(test_case.at("name").toStringRef() + " " + policy);
      check_case(test_case, Policy::parse(policy));
    }
  }
  RecordProperty("cases", static_cast<int>(cases.toListRef().size()));
}

}  // namespace
