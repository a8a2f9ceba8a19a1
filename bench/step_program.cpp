// Training steps of the two models of bench/step.py, made of Remnant's layers. Reads commands, a line each,
// and answers each with one line of JSON, so that the benchmark can let it take turns with its peers:
//   step                one training step: {"fwd_ms", "bwd_ms", "step_ms"}
//   bytes               {"kept_bytes", "peak_bytes"} of a step
//   products            {"step"}: multiply-adds of a forward and backward, as far as ATen makes the products:
//                       all of them under REMNANT_CPU=composite
//   shape BATCH LENGTH  from now on steps of this shape, at most the program's: what a budget's plan predicts
//                       for them, {"kept_bytes", "peak_bytes"}
//   quit
// bench_step MODEL SETTING BATCH LENGTH THREADS

#include <remnant/memory.h>
#include <remnant/nn/transformer.h>
#include <remnant/ops/dropout.h>
#include <remnant/ops/linear_cross_entropy.h>
#include <remnant/ops/norm.h>
#include <remnant/plan.h>

#include <torch/nn/module.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>
#include <torch/utils.h>

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <ATen/record_function.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace {

using at::Tensor;
using remnant::LayerMemory;
using remnant::nn::TransformerLayerOptions;

constexpr int64_t kDim = 256;
constexpr double kDropout = 0.1;

class Model : public torch::nn::Module {
 public:
  virtual Tensor loss() = 0;
  /// Draws new inputs.
  virtual void draw(int64_t batch, int64_t length) = 0;

 protected:
  torch::nn::Embedding embedding(const std::string& name, int64_t rows) {
    return register_module(name, torch::nn::Embedding(rows, kDim));
  }

  static Tensor embed(torch::nn::Embedding& tokens, torch::nn::Embedding& positions, const Tensor& ids,
                      double scale) {
    return remnant::dropout(tokens(ids) * scale + positions(at::arange(ids.size(1))), kDropout);
  }
};

/// The paper's translation Transformer on pairs of LENGTH tokens.
class Translation final : public Model {
 public:
  Translation(const LayerMemory& memory, int64_t batch, int64_t length) {
    draw(batch, length);
    const auto options =
        TransformerLayerOptions(kDim, 8).dim_feedforward(512).dropout(kDropout).batch_first(true).memory(
            memory);
    encoder_ = register_module("encoder", torch::nn::ModuleList());
    decoder_ = register_module("decoder", torch::nn::ModuleList());
    for (int i = 0; i < 3; ++i) {
      encoder_->push_back(remnant::nn::TransformerEncoderLayer(options));
      decoder_->push_back(remnant::nn::TransformerDecoderLayer(options));
    }
    output_ = register_module("output", torch::nn::Linear(kDim, 5893));
  }

  void draw(int64_t batch, int64_t length) override {
    source_ = at::randint(1, 5000, {batch, length});
    target_ = at::randint(1, 5000, {batch, length});
    next_ = at::randint(1, 5000, {batch * length});
  }

  Tensor loss() override {
    Tensor x = embed(source_embedding_, source_position_, source_, std::sqrt(kDim));
    for (const auto& layer : *encoder_) x = layer->as<remnant::nn::TransformerEncoderLayer>()->forward(x);
    Tensor y = embed(target_embedding_, target_position_, target_, std::sqrt(kDim));
    for (const auto& layer : *decoder_) {
      y = layer->as<remnant::nn::TransformerDecoderLayer>()->forward(y, x, {}, {}, {}, {}, true);
    }
    return remnant::linear_cross_entropy(y.flatten(0, 1), output_->weight, output_->bias, next_, 0);
  }

 private:
  Tensor source_, target_, next_;
  torch::nn::Embedding source_embedding_ = embedding("source_embedding", 7853),
                       source_position_ = embedding("source_position", 100),
                       target_embedding_ = embedding("target_embedding", 5893),
                       target_position_ = embedding("target_position", 100);
  torch::nn::ModuleList encoder_ = nullptr, decoder_ = nullptr;
  torch::nn::Linear output_ = nullptr;
};

/// A pre-norm character language model.
class Language final : public Model {
 public:
  static constexpr int64_t kCharacters = 65;

  Language(const LayerMemory& memory, int64_t batch, int64_t length)
      : position_(embedding("position", length)), lean_(!memory.norm_input), bits_(memory.bits) {
    draw(batch, length);
    const auto options = TransformerLayerOptions(kDim, 4)
                             .dim_feedforward(1024)
                             .dropout(kDropout)
                             .activation(remnant::nn::Activation::gelu)
                             .norm_first(true)
                             .batch_first(true)
                             .memory(memory);
    layers_ = register_module("layers", torch::nn::ModuleList());
    for (int i = 0; i < 4; ++i) layers_->push_back(remnant::nn::TransformerEncoderLayer(options));
    norm_ = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({kDim})));
    output_ = register_module("output", torch::nn::Linear(kDim, kCharacters));
  }

  void draw(int64_t batch, int64_t length) override {
    tokens_ = at::randint(0, kCharacters, {batch, length});
    next_ = at::randint(0, kCharacters, {batch * length});
  }

  Tensor loss() override {
    Tensor x = embed(embedding_, position_, tokens_, 1.0);
    for (const auto& layer : *layers_) {
      x = layer->as<remnant::nn::TransformerEncoderLayer>()->forward(x, {}, {}, /*is_causal=*/true);
    }
    x = lean_ ? remnant::layer_norm(x, norm_->weight, norm_->bias, norm_->options.eps(),
                                    bits_ > 0 ? "quantized:bits=" + std::to_string(bits_) : "exact")
              : norm_(x);
    return remnant::linear_cross_entropy(x.flatten(0, 1), output_->weight, output_->bias, next_);
  }

 private:
  Tensor tokens_, next_;
  torch::nn::Embedding embedding_ = embedding("embedding", kCharacters), position_ = nullptr;
  torch::nn::ModuleList layers_ = nullptr;
  torch::nn::LayerNorm norm_ = nullptr;
  torch::nn::Linear output_ = nullptr;
  bool lean_;
  int64_t bits_;
};

/// Counts the multiply-adds of ATen's matrix products while it lives; one at a time.
class ProductCounter {
 public:
  ProductCounter() {
    count_ = 0;
    handle_ = at::addGlobalCallback(
        at::RecordFunctionCallback(&seen).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
  }
  ~ProductCounter() { at::removeCallback(handle_); }
  ProductCounter(const ProductCounter&) = delete;
  ProductCounter& operator=(const ProductCounter&) = delete;
  static int64_t count() { return count_; }

 private:
  static std::unique_ptr<at::ObserverContext> seen(const at::RecordFunction& call) {
    const std::string_view name = call.name();
    const bool plain = name == "aten::mm" || name == "aten::bmm";
    const bool added = name == "aten::addmm" || name == "aten::addmm_" || name == "aten::baddbmm";
    if (plain || added) {
      const size_t first = added ? 1 : 0;  // behind what is added to
      count_ += call.inputs()[first].toTensor().numel() * call.inputs()[first + 1].toTensor().size(-1);
    }
    return nullptr;
  }

  inline static std::atomic<int64_t> count_ = 0;
  at::CallbackHandle handle_ = 0;
};

class Trainer {
 public:
  explicit Trainer(std::unique_ptr<Model> model) : model_(std::move(model)) {
    for (Tensor& parameter : model_->parameters()) {
      parameter.mutable_grad() = at::zeros_like(parameter).detach();
      parameters_.push_back(parameter);
      gradients_.push_back(parameter.grad());
      mean_.push_back(at::zeros_like(parameter).detach());
      square_.push_back(at::zeros_like(parameter).detach());
      steps_.push_back(at::full({}, 0.0, at::kFloat));
    }
  }

  void step(std::ostream& out) {
    const auto now = [] { return std::chrono::steady_clock::now(); };
    const auto start = now();
    const Tensor loss = model_->loss();
    const auto middle = now();
    loss.backward();
    const auto end = now();
    update();
    const auto done = now();
    const auto ms = [](auto a, auto b) { return std::chrono::duration<double, std::milli>(b - a).count(); };
    out << "{\"fwd_ms\": " << ms(start, middle) << ", \"bwd_ms\": " << ms(middle, end)
        << ", \"step_ms\": " << ms(start, done) << ", \"loss\": " << loss.item<double>() << "}";
  }

  void bytes(remnant::memory::PeakMeter& meter, std::ostream& out) {
    // A second step frees what the first allocated under the meter.
    for (int i = 0; i < 2; ++i) {
      meter.reset();
      model_->loss().backward();
      update();
    }
    const int64_t peak = meter.peak_bytes();
    const Tensor loss = model_->loss();
    out << "{\"kept_bytes\": " << remnant::memory::kept_bytes({loss}, {loss}) << ", \"peak_bytes\": " << peak
        << "}";
  }

  void products(std::ostream& out) {
    const ProductCounter counter;
    model_->loss().backward();
    out << "{\"step\": " << ProductCounter::count() << "}";
    at::_foreach_zero_(gradients_);
  }

  void update() {
    const at::NoGradGuard no_grad;
    const double norm = at::stack(at::_foreach_norm(gradients_)).norm().item<double>();
    if (norm > 1.0) at::_foreach_mul_(gradients_, 1.0 / (norm + 1e-6));
    at::_foreach_add_(steps_, 1);
    at::_fused_adam_(parameters_, gradients_, mean_, square_, {}, steps_, 5e-4, 0.9, 0.999, 0, 1e-8, false,
                     false);
    at::_foreach_zero_(gradients_);
  }

  void fit(const remnant::Memory& budget, int64_t batch, int64_t length) {
    const auto loss = [this](int64_t b, int64_t l) {
      model_->draw(b, l);
      return model_->loss();
    };
    plan_ = remnant::plan(*model_, loss, batch, length, budget.bytes, budget.bits);
    std::cerr << plan_.table();
    model_->draw(batch, length);
  }

  void shape(int64_t batch, int64_t length, std::ostream& out) {
    model_->draw(batch, length);
    const remnant::StepBytes predicted = plan_.predict(batch, length);
    out << "{\"kept_bytes\": " << predicted.kept_bytes << ", \"peak_bytes\": " << predicted.peak_bytes << "}";
  }

 private:
  std::unique_ptr<Model> model_;
  std::vector<Tensor> parameters_, gradients_, mean_, square_, steps_;
  remnant::Plan plan_;
};

std::unique_ptr<Model> make_model(const std::string& name, const LayerMemory& memory, int64_t batch,
                                  int64_t length) {
  if (name == "mt") return std::make_unique<Translation>(memory, batch, length);
  return std::make_unique<Language>(memory, batch, length);
}

}  // namespace

int main(int count, char** words) {
  if (count != 6) {
    std::cerr << "usage: bench_step mt|lm SETTING BATCH LENGTH THREADS\n";
    return 2;
  }
  try {
    at::set_num_threads(std::stoi(words[5]));
    torch::manual_seed(0);
    remnant::memory::PeakMeter meter;
    const auto setting = remnant::Memory::parse(words[2]);
    const bool budget = setting.kind == remnant::Memory::Kind::budget;
    const int64_t batch = std::stoll(words[3]), length = std::stoll(words[4]);
    Trainer trainer(make_model(words[1], budget ? remnant::Memory::exact() : setting, batch, length));
    if (budget) trainer.fit(setting, batch, length);
    for (std::string line; std::getline(std::cin, line) && line != "quit";) {
      std::istringstream rest(line);
      std::string command;
      int64_t b = 0, l = 0;
      rest >> command >> b >> l;
      if (command == "step") trainer.step(std::cout);
      if (command == "bytes") trainer.bytes(meter, std::cout);
      if (command == "products") trainer.products(std::cout);
      if (command == "shape") trainer.shape(b, l, std::cout);
      std::cout << std::endl;
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
