#include <remnant/convert.h>
#include <remnant/nn/attention.h>
#include <remnant/nn/layers.h>
#include <remnant/nn/transformer.h>
#include <remnant/nn/transformer_stack.h>
#include <remnant/plan.h>

#include "nn/conv_run.h"

#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/modules/transformer.h>
#include <torch/nn/modules/transformercoder.h>
#include <torch/nn/modules/transformerlayer.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <stdexcept>
#include <typeinfo>
#include <utility>
#include <variant>

namespace remnant {
namespace {

using at::Tensor;
using torch::nn::AnyModule;
using torch::nn::Module;

/// Why a module has no equal on the other side.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Puts the random state back, from which new modules draw the weights that they then lose.
class SameRandomState {
 public:
  SameRandomState()
      : generator_(at::globalContext().defaultGenerator(at::kCPU)), state_(generator_.get_state()) {}
  ~SameRandomState() { generator_.set_state(state_); }
  SameRandomState(const SameRandomState&) = delete;
  SameRandomState& operator=(const SameRandomState&) = delete;

 private:
  at::Generator generator_;
  Tensor state_;
};

/// register_parameter only adds, and makes an undefined tensor's entry anew.
struct Parameters : Module {
  static torch::OrderedDict<std::string, Tensor>& of(Module& module) {
    return module.*(&Parameters::parameters_);
  }
};

std::set<std::string> own_names(const Module& module) {
  std::set<std::string> names;
  for (const auto& item : module.named_parameters(/*recurse=*/false)) names.insert(item.key());
  for (const auto& item : module.named_buffers(/*recurse=*/false)) names.insert(item.key());
  for (const auto& item : module.named_children()) names.insert(item.key());
  return names;
}

/// Gives `twin`, which is new, the parameters, submodules and mode of `source`, in its order. Members that
/// point to them are the caller's.
void adopt(Module& twin, Module& source) {
  if (own_names(twin) != own_names(source)) {
    throw Refusal("it does not have just the parameters and submodules that its type brings along");
  }
  twin.train(source.is_training());  // before it shares submodules, which have a mode of their own
  // An absent bias is an entry too, in torch::nn's modules and not in remnant::nn's; clone() counts them.
  torch::OrderedDict<std::string, Tensor> parameters;
  for (const auto& item : Parameters::of(source)) {
    if (item->defined()) parameters.insert(item.key(), item.value());
  }
  for (const auto& item : Parameters::of(twin)) {
    if (!item->defined()) parameters.insert(item.key(), item.value());
  }
  Parameters::of(twin) = std::move(parameters);
  for (const auto& child : twin.named_children()) twin.unregister_module(child.key());
  for (const auto& child : source.named_children()) twin.register_module(child.key(), child.value());
}

template <typename To, typename From>
void share_attention(To& twin, From& source) {
  adopt(twin, source);
  twin.in_proj_weight = source.in_proj_weight;
  twin.in_proj_bias = source.in_proj_bias;
  twin.q_proj_weight = source.q_proj_weight;
  twin.k_proj_weight = source.k_proj_weight;
  twin.v_proj_weight = source.v_proj_weight;
  twin.bias_k = source.bias_k;
  twin.bias_v = source.bias_v;
  twin.out_proj = source.out_proj;
}

/// All of a layer but its attentions, which the caller has made.
template <typename To, typename From, typename Attention>
void share_layer(To& twin, From& source, const Attention& self_attn) {
  adopt(twin, source);
  twin.self_attn = twin.replace_module("self_attn", self_attn);
  twin.linear1 = source.linear1;
  twin.linear2 = source.linear2;
  twin.norm1 = source.norm1;
  twin.norm2 = source.norm2;
  twin.dropout = source.dropout;
  twin.dropout1 = source.dropout1;
  twin.dropout2 = source.dropout2;
}

template <typename To, typename From, typename Attention>
void share_decoder_layer(To& twin, From& source, const Attention& self_attn, const Attention& cross) {
  share_layer(twin, source, self_attn);
  twin.multihead_attn = twin.replace_module("multihead_attn", cross);
  twin.norm3 = source.norm3;
  twin.dropout3 = source.dropout3;
}

/// The AnyModules through which `module` calls its parts.
std::vector<AnyModule*> slots_of(Module& module) {
  std::vector<AnyModule*> slots;
  if (auto* sequential = dynamic_cast<torch::nn::SequentialImpl*>(&module)) {
    for (AnyModule& part : *sequential) slots.push_back(&part);
  } else if (auto* transformer = dynamic_cast<torch::nn::TransformerImpl*>(&module)) {
    slots = {&transformer->encoder, &transformer->decoder};
  } else if (auto* encoder = dynamic_cast<nn::TransformerEncoderImpl*>(&module)) {
    slots = {&encoder->norm};
  } else if (auto* decoder = dynamic_cast<nn::TransformerDecoderImpl*>(&module)) {
    slots = {&decoder->norm};
  } else if (auto* torch_encoder = dynamic_cast<torch::nn::TransformerEncoderImpl*>(&module)) {
    slots = {&torch_encoder->norm};
  } else if (auto* torch_decoder = dynamic_cast<torch::nn::TransformerDecoderImpl*>(&module)) {
    slots = {&torch_decoder->norm};
  }
  if (auto* parts = dynamic_cast<nn::ConvertibleParts*>(&module)) {
    for (AnyModule* part : parts->convertible_parts()) slots.push_back(part);
  }
  return slots;
}

bool is_stack(const Module& module) {
  return dynamic_cast<const torch::nn::TransformerEncoderImpl*>(&module) != nullptr ||
         dynamic_cast<const torch::nn::TransformerDecoderImpl*>(&module) != nullptr ||
         dynamic_cast<const nn::TransformerEncoderImpl*>(&module) != nullptr ||
         dynamic_cast<const nn::TransformerDecoderImpl*>(&module) != nullptr;
}

/// Whether a module is converted, or left, with all that it is made of.
bool is_whole(const Module& module) {
  return dynamic_cast<const torch::nn::TransformerEncoderLayerImpl*>(&module) != nullptr ||
         dynamic_cast<const torch::nn::TransformerDecoderLayerImpl*>(&module) != nullptr ||
         dynamic_cast<const torch::nn::MultiheadAttentionImpl*>(&module) != nullptr ||
         dynamic_cast<const nn::MultiheadAttentionImpl*>(&module) != nullptr ||
         dynamic_cast<const nn::KeepsByChoice*>(&module) != nullptr;
}

std::string joined(const std::string& path, const std::string& name) {
  return path.empty() ? name : path + "." + name;
}

/// Walks a model, notes what takes whose place, and exchanges it all at the end.
class Walk {
 public:
  virtual ~Walk() = default;

  /// Looks at the parts of `module`.
  void visit(Module& module, const std::string& path) {
    meet(module);
    if (!visited_.insert(&module).second || is_whole(module)) return;
    const std::vector<AnyModule*> slots = slots_of(module);
    const std::map<Module*, AnyModule> runs = find_runs(module, path);
    for (const auto& child : module.named_children()) {
      // A stack's layers go with it.
      if (is_stack(module) && child.key() == "layers") continue;
      const std::string name = joined(path, child.key());
      std::vector<AnyModule*> its_slots;
      for (AnyModule* slot : slots) {
        if (!slot->is_empty() && slot->ptr() == child.value()) its_slots.push_back(slot);
      }
      const auto part = runs.find(child.value().get());
      if (part != runs.end()) {
        replace(its_slots, &module, child.key(), name, part->second);
      } else if (its_slots.empty()) {
        visit_typed(module, *child.value(), name);
      } else {
        visit_slots(its_slots, &module, child.key(), name);
      }
    }
  }

  /// One module, called through `slots`; `parent`, where there is one, has it registered as `key`.
  void visit_slots(const std::vector<AnyModule*>& slots, Module* parent, const std::string& key,
                   const std::string& name) {
    const std::shared_ptr<Module> module = slots.front()->ptr();
    if (kind(*module) == nullptr) {
      visit(*module, name);
      return;
    }
    AnyModule twin;
    try {
      twin = make(module);
    } catch (const Refusal& refusal) {
      left(name, refusal.what());
      return visit(*module, name);
    } catch (const c10::Error& error) {  // of the other side's checks
      left(name, error.what_without_backtrace());
      return visit(*module, name);
    }
    replace(slots, parent, key, name, twin);
    visit(*twin.ptr(), name);
  }

  /// Notes how often `model` and what it holds have each module.
  void count(const Module& model) {
    if (!counted_.insert(&model).second) return;
    for (const auto& child : model.named_children()) {
      ++uses_[child.value().get()];
      count(*child.value());
    }
  }

  /// The model where nobody's member or slot is known that holds it.
  void visit_root(Module& model) {
    if (const char* replacement = kind(model)) {
      left("",
           std::string("only its parts can be replaced: hand it over in a torch::nn::AnyModule to get a ") +
               replacement);
    }
    visit(model, "");
  }

  Conversion finish() {
    for (const Exchange& exchange : exchanges_) {
      if (exchange.parent != nullptr) exchange.parent->replace_module(exchange.key, exchange.twin.ptr());
      for (AnyModule* slot : exchange.slots) *slot = exchange.twin;
    }
    return std::move(result_);
  }

 protected:
  /// The name of the type that replaces `module`'s; null where none does.
  virtual const char* kind(const Module& module) const = 0;
  /// The replacement of a module of such a kind. Throws Refusal.
  virtual AnyModule make(const std::shared_ptr<Module>& module) = 0;
  /// Told of every module that stays.
  virtual void meet(Module& module) {}
  /// Parts of `module` that are replaced together, and what takes the place of each.
  virtual std::map<Module*, AnyModule> find_runs(Module& module, const std::string& path) { return {}; }
  /// The reason why a part that is not called through an AnyModule stays.
  virtual std::string typed_reason(const Module& parent, const char* replacement) const = 0;

  void left(const std::string& name, const std::string& reason) { result_.left.push_back({name, reason}); }
  bool used_elsewhere(const Module& module) const {
    const auto found = uses_.find(&module);
    return found != uses_.end() && found->second > 1;
  }

  /// The twin of `source`, made once, so that what was shared stays shared.
  template <typename To, typename From, typename Make>
  std::shared_ptr<To> once(const std::shared_ptr<From>& source, const Make& make_twin) {
    std::shared_ptr<Module>& twin = twins_[source];
    if (!twin) twin = make_twin();
    return std::dynamic_pointer_cast<To>(twin);
  }

  /// The twin of a module without parameters.
  template <typename To, typename From, typename... Options>
  std::shared_ptr<To> alike(const std::shared_ptr<From>& source, const Options&... options) {
    return once<To>(source, [&] {
      auto twin = std::make_shared<To>(options...);
      adopt(*twin, *source);
      return twin;
    });
  }

  template <typename To, typename From>
  std::shared_ptr<To> linear(const std::shared_ptr<From>& source) {
    return once<To>(source, [&] {
      auto twin = std::make_shared<To>(source->options);
      adopt(*twin, *source);
      twin->weight = source->weight;
      twin->bias = source->bias;
      return twin;
    });
  }

 private:
  struct Exchange {
    std::vector<AnyModule*> slots;
    Module* parent;
    std::string key;
    AnyModule twin;
  };

  void visit_typed(Module& parent, Module& module, const std::string& name) {
    if (const char* replacement = kind(module)) left(name, typed_reason(parent, replacement));
    visit(module, name);
  }

  void replace(const std::vector<AnyModule*>& slots, Module* parent, const std::string& key,
               const std::string& name, const AnyModule& twin) {
    result_.converted.push_back(name);
    exchanges_.push_back({slots, parent, key, twin});
  }

  std::set<const Module*> counted_;
  std::map<const Module*, int> uses_;
  std::set<Module*> visited_;
  std::map<std::shared_ptr<Module>, std::shared_ptr<Module>> twins_;
  std::vector<Exchange> exchanges_;
  Conversion result_;
};

/// `module` as a T, which a class derived from T is not: its forward may be its own.
template <typename T>
std::shared_ptr<T> exactly(const std::shared_ptr<Module>& module, const char* type) {
  auto found = std::dynamic_pointer_cast<T>(module);
  if (found && typeid(*found) != typeid(T)) {
    throw Refusal(std::string("it is of a class derived from ") + type + ", whose forward may be its own");
  }
  return found;
}

template <typename FromLayer, typename From, typename MakeLayer>
auto make_stack_layer(From& source, size_t i, const char* layer_type, const MakeLayer& make_layer) {
  try {
    return make_layer(exactly<FromLayer>(source.layers->ptr(i), layer_type));
  } catch (const Refusal& refusal) {
    throw Refusal("of its layers." + std::to_string(i) + ": " + refusal.what());
  }
}

/// `twin`, a stack without layers, with those that make_layer makes of `source`'s.
template <typename FromLayer, typename To, typename From, typename MakeLayer>
void share_stack(To& twin, From& source, const char* layer_type, const MakeLayer& make_layer) {
  twin.train(source.is_training());  // before there are layers, which have a mode of their own
  twin.layers->train(source.layers->is_training());
  for (size_t i = 0; i < source.layers->size(); ++i) {
    twin.layers->push_back(make_stack_layer<FromLayer>(source, i, layer_type, make_layer));
  }
  twin.norm = source.norm;
  if (!twin.norm.is_empty()) twin.register_module("norm", twin.norm.ptr());
  if (own_names(twin) != own_names(source)) {
    throw Refusal("it has parameters or submodules beside those that its type brings along");
  }
}

/// An activation as conv_norm_act takes it; empty for others.
std::string unit_activation(const Module& module, const char*& type) {
  if (typeid(module) == typeid(torch::nn::ReLUImpl)) {
    type = "torch::nn::ReLU";
    return "relu";
  }
  if (typeid(module) == typeid(torch::nn::SiLUImpl)) {
    type = "torch::nn::SiLU";
    return "silu";
  }
  if (typeid(module) != typeid(torch::nn::LeakyReLUImpl)) return "";
  type = "torch::nn::LeakyReLU";
  const double slope = dynamic_cast<const torch::nn::LeakyReLUImpl&>(module).options.negative_slope();
  char digits[32] = {};
  std::to_chars(digits, digits + sizeof(digits), slope);
  return slope >= 0 ? std::string("leaky:slope=") + digits : "";
}

template <size_t kSpatial>
std::vector<int64_t> padding_of(const torch::nn::detail::ConvNdOptions<kSpatial>& options) {
  if (!std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode())) {
    throw Refusal("its convolution pads with other numbers than zeros");
  }
  if (std::holds_alternative<torch::enumtype::kValid>(options.padding())) {
    return std::vector<int64_t>(kSpatial, 0);
  }
  if (const auto* numbers = std::get_if<torch::ExpandingArray<kSpatial>>(&options.padding())) {
    return at::IntArrayRef(*numbers).vec();
  }
  std::vector<int64_t> padding;
  for (size_t i = 0; i < kSpatial; ++i) {
    const int64_t both = (*options.dilation())[i] * ((*options.kernel_size())[i] - 1);
    if (both % 2 != 0) throw Refusal("its convolution pads one side more than the other");
    padding.push_back(both / 2);
  }
  return padding;
}

/// A convolution and its norm, the next in the order of registration.
template <size_t kSpatial>
bool follows(const Module& norm, const Module& conv) {
  using Types = nn::detail::TorchTypes<kSpatial>;
  const auto* first = dynamic_cast<const typename Types::Conv*>(&conv);
  if (first == nullptr) return false;
  if (const auto* groups = dynamic_cast<const torch::nn::GroupNormImpl*>(&norm)) {
    return first->options.out_channels() == groups->options.num_channels();
  }
  const auto* second = dynamic_cast<const typename Types::Norm*>(&norm);
  return second != nullptr && first->options.out_channels() == second->options.num_features();
}

constexpr const char* kGroupNorm = "torch::nn::GroupNorm";

class ToRemnant final : public Walk {
 public:
  explicit ToRemnant(const LayerMemory& memory) : memory_(memory) {}

 protected:
  const char* kind(const Module& module) const override {
    if (dynamic_cast<const torch::nn::MultiheadAttentionImpl*>(&module)) {
      return "remnant::nn::MultiheadAttention";
    }
    if (dynamic_cast<const torch::nn::TransformerEncoderLayerImpl*>(&module)) {
      return "remnant::nn::TransformerEncoderLayer";
    }
    if (dynamic_cast<const torch::nn::TransformerDecoderLayerImpl*>(&module)) {
      return "remnant::nn::TransformerDecoderLayer";
    }
    if (dynamic_cast<const torch::nn::TransformerEncoderImpl*>(&module)) {
      return "remnant::nn::TransformerEncoder";
    }
    if (dynamic_cast<const torch::nn::TransformerDecoderImpl*>(&module)) {
      return "remnant::nn::TransformerDecoder";
    }
    if (dynamic_cast<const torch::nn::LayerNormImpl*>(&module)) return "remnant::nn::LayerNorm";
    if (dynamic_cast<const torch::nn::DropoutImpl*>(&module)) return "remnant::nn::Dropout";
    if (memory_.bits == 0) return nullptr;  // without codes these keep what PyTorch's keep
    if (dynamic_cast<const torch::nn::LinearImpl*>(&module)) return "remnant::nn::Linear";
    if (dynamic_cast<const torch::nn::GELUImpl*>(&module)) return "remnant::nn::GELU";
    if (dynamic_cast<const torch::nn::SiLUImpl*>(&module)) return "remnant::nn::SiLU";
    return nullptr;
  }

  void meet(Module& module) override {
    // Outside of layers nobody else passes a setting on to attention.
    if (auto* attention = dynamic_cast<nn::MultiheadAttentionImpl*>(&module)) {
      attention->options.keep(memory_.attention);
    }
  }

  std::map<Module*, AnyModule> find_runs(Module& module, const std::string& path) override {
    std::map<Module*, AnyModule> parts;
    const auto children = module.named_children().items();
    for (size_t i = 0; i + 1 < children.size(); ++i) {
      const std::shared_ptr<Module>&conv = children[i].value(), &norm = children[i + 1].value();
      const std::shared_ptr<Module> after = i + 2 < children.size() ? children[i + 2].value() : nullptr;
      try {
        if (follows<1>(*norm, *conv)) add_run<1>(module, conv, norm, after, parts);
        if (follows<2>(*norm, *conv)) add_run<2>(module, conv, norm, after, parts);
        if (follows<3>(*norm, *conv)) add_run<3>(module, conv, norm, after, parts);
      } catch (const Refusal& refusal) {
        left(joined(path, children[i].key()), refusal.what());
      }
    }
    return parts;
  }

  std::string typed_reason(const Module& parent, const char* replacement) const override {
    const std::string in_list = "it is in a torch::nn::ModuleList, whose reader casts it to its type";
    const std::string member = "its owner calls it by its type";
    const bool list = dynamic_cast<const torch::nn::ModuleListImpl*>(&parent) != nullptr;
    return (list ? in_list : member) + ": hold it in a torch::nn::AnyModule that " +
           "remnant::nn::ConvertibleParts names, or declare it as " + replacement;
  }

  AnyModule make(const std::shared_ptr<Module>& module) override {
    if (auto found = exactly<torch::nn::MultiheadAttentionImpl>(module, "torch::nn::MultiheadAttention")) {
      return AnyModule(attention(found));
    }
    if (auto found =
            exactly<torch::nn::TransformerEncoderLayerImpl>(module, "torch::nn::TransformerEncoderLayer")) {
      return AnyModule(encoder_layer(found));
    }
    if (auto found =
            exactly<torch::nn::TransformerDecoderLayerImpl>(module, "torch::nn::TransformerDecoderLayer")) {
      return AnyModule(decoder_layer(found));
    }
    if (auto found = exactly<torch::nn::TransformerEncoderImpl>(module, "torch::nn::TransformerEncoder")) {
      return AnyModule(once<nn::TransformerEncoderImpl>(found, [&] {
        auto twin = std::make_shared<nn::TransformerEncoderImpl>(std::vector<nn::TransformerEncoderLayer>());
        share_stack<torch::nn::TransformerEncoderLayerImpl>(
            *twin, *found, "torch::nn::TransformerEncoderLayer",
            [&](const auto& layer) { return encoder_layer(layer); });
        return twin;
      }));
    }
    if (auto found = exactly<torch::nn::TransformerDecoderImpl>(module, "torch::nn::TransformerDecoder")) {
      return AnyModule(once<nn::TransformerDecoderImpl>(found, [&] {
        auto twin = std::make_shared<nn::TransformerDecoderImpl>(std::vector<nn::TransformerDecoderLayer>());
        share_stack<torch::nn::TransformerDecoderLayerImpl>(
            *twin, *found, "torch::nn::TransformerDecoderLayer",
            [&](const auto& layer) { return decoder_layer(layer); });
        return twin;
      }));
    }
    if (auto found = exactly<torch::nn::LayerNormImpl>(module, "torch::nn::LayerNorm")) {
      return AnyModule(once<nn::LayerNormImpl>(found, [&] {
        auto twin = std::make_shared<nn::LayerNormImpl>(found->options);
        adopt(*twin, *found);
        twin->weight = found->weight;
        twin->bias = found->bias;
        return twin;
      }));
    }
    if (auto found = exactly<torch::nn::LinearImpl>(module, "torch::nn::Linear")) {
      return AnyModule(linear<nn::LinearImpl>(found));
    }
    if (auto found = exactly<torch::nn::GELUImpl>(module, "torch::nn::GELU")) {
      return AnyModule(alike<nn::GELUImpl>(found, found->options));
    }
    if (auto found = exactly<torch::nn::SiLUImpl>(module, "torch::nn::SiLU")) {
      return AnyModule(alike<nn::SiLUImpl>(found));
    }
    const auto found = exactly<torch::nn::DropoutImpl>(module, "torch::nn::Dropout");
    return AnyModule(alike<nn::DropoutImpl>(found, found->options));
  }

 private:
  /// Puts what replaces a convolution, its norm and, if there is one, its activation into `parts`.
  template <size_t kSpatial>
  void add_run(const Module& parent, const std::shared_ptr<Module>& conv, const std::shared_ptr<Module>& norm,
               const std::shared_ptr<Module>& after, std::map<Module*, AnyModule>& parts) {
    using Types = nn::detail::TorchTypes<kSpatial>;
    if (dynamic_cast<const torch::nn::SequentialImpl*>(&parent) == nullptr) {
      throw Refusal(
          "its owner calls it and its norm one by one: put both and the activation into a "
          "torch::nn::Sequential, or declare a remnant::nn::ConvNormAct" +
          std::to_string(kSpatial) + "d in their place");
    }
    if (typeid(parent) != typeid(torch::nn::SequentialImpl)) {
      throw Refusal("it is in a class derived from torch::nn::Sequential, whose forward may be its own");
    }
    const auto first = exactly<typename Types::Conv>(conv, Types::kConv);
    const auto batch_norm = exactly<typename Types::Norm>(norm, Types::kNorm);
    const auto group_norm = exactly<torch::nn::GroupNormImpl>(norm, kGroupNorm);
    const char* type = nullptr;
    const std::string activation = after ? unit_activation(*after, type) : "";
    if (used_elsewhere(*conv) || used_elsewhere(*norm) || (!activation.empty() && used_elsewhere(*after))) {
      throw Refusal("it, its norm or its activation is in the model at another place too");
    }
    const auto& options = first->options;
    bool cheap = activation.empty();
    bool strided = false;
    for (size_t i = 0; i < kSpatial; ++i) {
      cheap = cheap && (*options.kernel_size())[i] == 1;
      strided = strided || (*options.stride())[i] > 1;
    }
    only_its_own(*first);
    only_its_own(*norm);
    std::vector<int64_t> padding = padding_of<kSpatial>(options);
    const auto add_norm = [&](const auto& source, const char* source_type) {
      using Norm = typename std::remove_reference_t<decltype(source)>::element_type;
      if (activation.empty()) {
        parts.insert_or_assign(norm.get(),
                               AnyModule(nn::detail::NormPart<Norm, Tensor>(source, source_type)));
      } else {
        parts.insert_or_assign(
            norm.get(), AnyModule(nn::detail::NormPart<Norm, nn::detail::UnitCall>(source, source_type)));
      }
    };
    if (group_norm) {
      add_norm(group_norm, kGroupNorm);
    } else {
      add_norm(batch_norm, Types::kNorm);
    }
    if (!activation.empty()) {
      parts.insert_or_assign(after.get(),
                             AnyModule(nn::detail::ActivationPart(held(after), type, activation)));
    }
    // A shortcut: its output is for a sum, which keeps nothing.
    parts.insert_or_assign(
        conv.get(), AnyModule(nn::detail::ConvPart<kSpatial>(first, std::move(padding), cheap && strided)));
  }

  static void only_its_own(const Module& module) {
    static const std::set<std::string> known = {"weight", "bias", "running_mean", "running_var",
                                                "num_batches_tracked"};
    for (const std::string& name : own_names(module)) {
      if (known.count(name) == 0) {
        throw Refusal(
            "it or its norm has a parameter or submodule beside those that its type brings along, " + name);
      }
    }
  }

  /// `module`, one that unit_activation knows.
  static AnyModule held(const std::shared_ptr<Module>& module) {
    if (auto relu = std::dynamic_pointer_cast<torch::nn::ReLUImpl>(module)) return AnyModule(relu);
    if (auto silu = std::dynamic_pointer_cast<torch::nn::SiLUImpl>(module)) return AnyModule(silu);
    return AnyModule(std::dynamic_pointer_cast<torch::nn::LeakyReLUImpl>(module));
  }

  std::shared_ptr<nn::MultiheadAttentionImpl> attention(
      const std::shared_ptr<torch::nn::MultiheadAttentionImpl>& source) {
    return once<nn::MultiheadAttentionImpl>(source, [&] {
      const auto& of = source->options;
      auto twin = std::make_shared<nn::MultiheadAttentionImpl>(
          nn::MultiheadAttentionOptions(of.embed_dim(), of.num_heads())
              .dropout(of.dropout())
              .bias(of.bias())
              .add_bias_kv(of.add_bias_kv())
              .add_zero_attn(of.add_zero_attn())
              .kdim(of.kdim())
              .vdim(of.vdim())
              .keep(memory_.attention));
      share_attention(*twin, *source);
      return twin;
    });
  }

  template <typename Options>
  nn::TransformerLayerOptions layer_options(const Options& of) const {
    if (std::holds_alternative<std::function<Tensor(const Tensor&)>>(of.activation())) {
      throw Refusal("its activation is a function; remnant::nn's layers know torch::kReLU and torch::kGELU");
    }
    const bool gelu = std::holds_alternative<torch::enumtype::kGELU>(of.activation());
    return nn::TransformerLayerOptions(of.d_model(), of.nhead())
        .dim_feedforward(of.dim_feedforward())
        .dropout(of.dropout())
        .activation(gelu ? nn::Activation::gelu : nn::Activation::relu)
        .memory(memory_);
  }

  std::shared_ptr<nn::TransformerEncoderLayerImpl> encoder_layer(
      const std::shared_ptr<torch::nn::TransformerEncoderLayerImpl>& source) {
    return once<nn::TransformerEncoderLayerImpl>(source, [&] {
      auto twin = std::make_shared<nn::TransformerEncoderLayerImpl>(layer_options(source->options));
      share_layer(*twin, *source, attention(source->self_attn.ptr()));
      return twin;
    });
  }

  std::shared_ptr<nn::TransformerDecoderLayerImpl> decoder_layer(
      const std::shared_ptr<torch::nn::TransformerDecoderLayerImpl>& source) {
    return once<nn::TransformerDecoderLayerImpl>(source, [&] {
      auto twin = std::make_shared<nn::TransformerDecoderLayerImpl>(layer_options(source->options));
      share_decoder_layer(*twin, *source, attention(source->self_attn.ptr()),
                          attention(source->multihead_attn.ptr()));
      return twin;
    });
  }

  LayerMemory memory_;
};

class ToTorch final : public Walk {
 protected:
  const char* kind(const Module& module) const override {
    if (dynamic_cast<const nn::MultiheadAttentionImpl*>(&module)) return "torch::nn::MultiheadAttention";
    if (dynamic_cast<const nn::TransformerEncoderLayerImpl*>(&module)) {
      return "torch::nn::TransformerEncoderLayer";
    }
    if (dynamic_cast<const nn::TransformerDecoderLayerImpl*>(&module)) {
      return "torch::nn::TransformerDecoderLayer";
    }
    if (dynamic_cast<const nn::TransformerEncoderImpl*>(&module)) return "torch::nn::TransformerEncoder";
    if (dynamic_cast<const nn::TransformerDecoderImpl*>(&module)) return "torch::nn::TransformerDecoder";
    if (dynamic_cast<const nn::LayerNormImpl*>(&module)) return "torch::nn::LayerNorm";
    if (dynamic_cast<const nn::DropoutImpl*>(&module)) return "torch::nn::Dropout";
    if (dynamic_cast<const nn::LinearImpl*>(&module)) return "torch::nn::Linear";
    if (dynamic_cast<const nn::GELUImpl*>(&module)) return "torch::nn::GELU";
    if (dynamic_cast<const nn::SiLUImpl*>(&module)) return "torch::nn::SiLU";
    if (const auto* part = dynamic_cast<const nn::detail::RunPart*>(&module)) return part->original_type();
    return nullptr;
  }

  std::string typed_reason(const Module& parent, const char* replacement) const override {
    return std::string("its owner calls it by its type: declare it as ") + replacement +
           ", or give it Memory::eager(), under which it keeps what PyTorch keeps";
  }

  AnyModule make(const std::shared_ptr<Module>& module) override {
    if (auto part = std::dynamic_pointer_cast<nn::detail::RunPart>(module)) return part->original();
    if (auto found = exactly<nn::MultiheadAttentionImpl>(module, "remnant::nn::MultiheadAttention")) {
      return AnyModule(attention(found));
    }
    if (auto found =
            exactly<nn::TransformerEncoderLayerImpl>(module, "remnant::nn::TransformerEncoderLayer")) {
      return AnyModule(encoder_layer(found));
    }
    if (auto found =
            exactly<nn::TransformerDecoderLayerImpl>(module, "remnant::nn::TransformerDecoderLayer")) {
      return AnyModule(decoder_layer(found));
    }
    if (auto found = exactly<nn::TransformerEncoderImpl>(module, "remnant::nn::TransformerEncoder")) {
      return AnyModule(once<torch::nn::TransformerEncoderImpl>(found, [&] {
        return stack<torch::nn::TransformerEncoderImpl, torch::nn::TransformerEncoderOptions,
                     torch::nn::TransformerEncoderLayer, nn::TransformerEncoderLayerImpl>(
            *found, "remnant::nn::TransformerEncoderLayer",
            [&](const auto& layer) { return encoder_layer(layer); });
      }));
    }
    if (auto found = exactly<nn::TransformerDecoderImpl>(module, "remnant::nn::TransformerDecoder")) {
      return AnyModule(once<torch::nn::TransformerDecoderImpl>(found, [&] {
        return stack<torch::nn::TransformerDecoderImpl, torch::nn::TransformerDecoderOptions,
                     torch::nn::TransformerDecoderLayer, nn::TransformerDecoderLayerImpl>(
            *found, "remnant::nn::TransformerDecoderLayer",
            [&](const auto& layer) { return decoder_layer(layer); });
      }));
    }
    if (auto found = exactly<nn::LayerNormImpl>(module, "remnant::nn::LayerNorm")) {
      return AnyModule(once<torch::nn::LayerNormImpl>(found, [&] {
        auto twin = std::make_shared<torch::nn::LayerNormImpl>(found->options);
        adopt(*twin, *found);
        twin->weight = found->weight;
        twin->bias = found->bias;
        return twin;
      }));
    }
    if (auto found = exactly<nn::LinearImpl>(module, "remnant::nn::Linear")) {
      return AnyModule(linear<torch::nn::LinearImpl>(found));
    }
    if (auto found = exactly<nn::GELUImpl>(module, "remnant::nn::GELU")) {
      return AnyModule(alike<torch::nn::GELUImpl>(found, found->options));
    }
    if (auto found = exactly<nn::SiLUImpl>(module, "remnant::nn::SiLU")) {
      return AnyModule(alike<torch::nn::SiLUImpl>(found));
    }
    const auto found = exactly<nn::DropoutImpl>(module, "remnant::nn::Dropout");
    return AnyModule(alike<torch::nn::DropoutImpl>(found, found->options));
  }

 private:
  std::shared_ptr<torch::nn::MultiheadAttentionImpl> attention(
      const std::shared_ptr<nn::MultiheadAttentionImpl>& source) {
    return once<torch::nn::MultiheadAttentionImpl>(source, [&] {
      const auto& of = source->options;
      if (of.batch_first()) throw Refusal("it is batch_first, which torch::nn's is not in C++");
      auto options = torch::nn::MultiheadAttentionOptions(of.embed_dim(), of.num_heads())
                         .dropout(of.dropout())
                         .bias(of.bias())
                         .add_bias_kv(of.add_bias_kv())
                         .add_zero_attn(of.add_zero_attn());
      if (of.kdim() > 0) options.kdim(of.kdim());
      if (of.vdim() > 0) options.vdim(of.vdim());
      auto twin = std::make_shared<torch::nn::MultiheadAttentionImpl>(options);
      share_attention(*twin, *source);
      return twin;
    });
  }

  template <typename Options>
  static Options layer_options(const nn::TransformerLayerOptions& of) {
    if (of.norm_first() || of.batch_first() || !of.bias()) {
      throw Refusal("it is norm_first, batch_first or without bias, which torch::nn's layers are not in C++");
    }
    auto options =
        Options(of.d_model(), of.nhead()).dim_feedforward(of.dim_feedforward()).dropout(of.dropout());
    if (of.activation() == nn::Activation::gelu) return options.activation(torch::kGELU);
    return options.activation(torch::kReLU);
  }

  std::shared_ptr<torch::nn::TransformerEncoderLayerImpl> encoder_layer(
      const std::shared_ptr<nn::TransformerEncoderLayerImpl>& source) {
    return once<torch::nn::TransformerEncoderLayerImpl>(source, [&] {
      auto twin = std::make_shared<torch::nn::TransformerEncoderLayerImpl>(
          layer_options<torch::nn::TransformerEncoderLayerOptions>(source->options));
      share_layer(*twin, *source, attention(source->self_attn.ptr()));
      return twin;
    });
  }

  std::shared_ptr<torch::nn::TransformerDecoderLayerImpl> decoder_layer(
      const std::shared_ptr<nn::TransformerDecoderLayerImpl>& source) {
    return once<torch::nn::TransformerDecoderLayerImpl>(source, [&] {
      auto twin = std::make_shared<torch::nn::TransformerDecoderLayerImpl>(
          layer_options<torch::nn::TransformerDecoderLayerOptions>(source->options));
      share_decoder_layer(*twin, *source, attention(source->self_attn.ptr()),
                          attention(source->multihead_attn.ptr()));
      return twin;
    });
  }

  template <typename To, typename Options, typename Layer, typename FromLayer, typename From,
            typename MakeLayer>
  static std::shared_ptr<To> stack(From& source, const char* layer_type, const MakeLayer& make_layer) {
    if (source.layers->is_empty())
      throw Refusal("it has no layers, without which torch::nn's cannot be made");
    const Layer first(make_stack_layer<FromLayer>(source, 0, layer_type, make_layer));
    auto twin = std::make_shared<To>(Options(first, 0));
    share_stack<FromLayer>(*twin, source, layer_type, make_layer);
    twin->options.num_layers(static_cast<int64_t>(twin->layers->size())).norm(twin->norm);
    return twin;
  }
};

Conversion run(Walk& walk, Module& model) {
  const SameRandomState same_random_state;
  walk.count(model);
  walk.visit_root(model);
  return walk.finish();
}

Conversion run(Walk& walk, AnyModule& model, const char* name) {
  TORCH_CHECK(!model.is_empty(), name, ": the AnyModule is empty; give it the model first");
  const SameRandomState same_random_state;
  walk.count(*model.ptr());
  walk.visit_slots({&model}, nullptr, "", "");
  return walk.finish();
}

}  // namespace

std::string Conversion::table() const {
  std::ostringstream text;
  const auto shown = [](const std::string& name) { return name.empty() ? "(the model itself)" : name; };
  for (const std::string& name : converted) text << shown(name) << "  converted\n";
  for (const Left& each : left) text << shown(each.name) << "  left: " << each.reason << "\n";
  return text.str();
}

Conversion convert(Module& model, const LayerMemory& memory) {
  ToRemnant walk(memory);
  Conversion result = run(walk, model);
  set_memory(model, memory);
  return result;
}

Conversion convert(AnyModule& model, const LayerMemory& memory) {
  ToRemnant walk(memory);
  Conversion result = run(walk, model, "convert");
  set_memory(*model.ptr(), memory);
  return result;
}

Conversion convert_back(Module& model) {
  ToTorch walk;
  return run(walk, model);
}

Conversion convert_back(AnyModule& model) {
  ToTorch walk;
  return run(walk, model, "convert_back");
}

}  // namespace remnant
