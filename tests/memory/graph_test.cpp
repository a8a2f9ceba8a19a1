#include <remnant/checkpoint.h>
#include <remnant/memory.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/functional/loss.h>
#include <torch/nn/functional/normalization.h>
#include <torch/nn/modules/linear.h>

#include <chrono>
#include <numeric>
#include <thread>

namespace {

using remnant::memory::kept_bytes;
using remnant::memory::LayerScope;
using remnant::memory::Recorder;
using remnant::memory::Report;
using remnant::memory::SavedRow;

constexpr int64_t f = sizeof(float);
constexpr int64_t l = sizeof(int64_t);

at::Tensor parameter(at::IntArrayRef sizes) { return at::randn(sizes).requires_grad_(); }

std::vector<std::string> ops(const Report& report) {
  std::vector<std::string> names;
  for (const SavedRow& row : report.rows) names.push_back(row.op);
  return names;
}

TEST(KeptBytes, NothingWithoutAGraph) {
  EXPECT_EQ(kept_bytes({at::randn({3, 4})}), 0);
  EXPECT_EQ(kept_bytes({}), 0);
  EXPECT_EQ(kept_bytes({at::Tensor()}), 0);
  const at::Tensor w = parameter({4, 4});
  const at::NoGradGuard no_grad;
  EXPECT_EQ(kept_bytes({at::mm(w, w).relu()}), 0);
}

TEST(KeptBytes, LinearKeepsItsInput) {
  const at::Tensor x = at::randn({5, 7});
  const at::Tensor y = at::linear(x, parameter({3, 7}), parameter({3}));
  EXPECT_EQ(kept_bytes({y}), 5 * 7 * f);
  EXPECT_EQ(kept_bytes({y}, {x}), 0) << "the step's input is left out";
}

TEST(KeptBytes, ParametersAreLeftOutAlsoThroughViews) {
  const at::Tensor w = parameter({6, 6});
  EXPECT_EQ(kept_bytes({at::mm(w.t(), w)}), 0);
}

TEST(KeptBytes, ReluKeepsItsOutput) {
  const at::Tensor y = (parameter({5, 7}) + 1).relu();
  EXPECT_EQ(kept_bytes({y}), 5 * 7 * f);
}

TEST(KeptBytes, LayerNormKeepsInputAndTwoStatisticsARow) {
  const at::Tensor x = parameter({4, 8}) + 1;
  EXPECT_EQ(kept_bytes({at::layer_norm(x, {8}, parameter({8}), parameter({8}))}), (4 * 8 + 4 + 4) * f);
}

TEST(KeptBytes, DropoutKeepsItsMask) {
  // On the CPU: the input times a float mask.
  const at::Tensor x = parameter({10, 10}) + 1;
  EXPECT_EQ(kept_bytes({at::dropout(x, 0.5, /*train=*/true)}), 100 * f);
  EXPECT_EQ(kept_bytes({at::dropout(x, 0.5, /*train=*/false)}), 0);
}

TEST(KeptBytes, SoftmaxKeepsItsOutput) {
  EXPECT_EQ(kept_bytes({at::softmax(parameter({3, 9}), -1)}), 3 * 9 * f);
}

TEST(KeptBytes, MatmulKeepsBothFactors) {
  const at::Tensor a = parameter({2, 3, 4}) + 1;
  const at::Tensor b = parameter({2, 4, 5}) + 1;
  EXPECT_EQ(kept_bytes({at::bmm(a, b)}), (2 * 3 * 4 + 2 * 4 * 5) * f);
}

TEST(KeptBytes, AFactorThatNeedsNoGradientSparesTheOther) {
  const at::Tensor a = parameter({3, 4}) + 1;
  const at::Tensor b = at::randn({4, 5});
  EXPECT_EQ(kept_bytes({at::mm(a, b)}), 4 * 5 * f);
}

TEST(KeptBytes, EmbeddingKeepsItsIndices) {
  const at::Tensor indices = at::randint(10, {6, 2}, at::kLong);
  const at::Tensor y = at::embedding(parameter({10, 3}), indices);
  EXPECT_EQ(kept_bytes({y}), 6 * 2 * l);
  EXPECT_EQ(kept_bytes({y}, {indices}), 0);
}

TEST(KeptBytes, CrossEntropyKeepsLogProbabilitiesTargetsAndTheirWeight) {
  const at::Tensor target = at::randint(9, {5}, at::kLong);
  const at::Tensor loss = torch::nn::functional::cross_entropy(parameter({5, 9}) + 1, target);
  EXPECT_EQ(kept_bytes({loss}), 5 * 9 * f + 5 * l + f);
  EXPECT_EQ(kept_bytes({loss}, {target}), 5 * 9 * f + f);
}

TEST(KeptBytes, AStorageCountsOnceHoweverManyKeepIt) {
  const at::Tensor h = (parameter({4, 4}) + 1).relu();  // kept by relu and by both products
  const at::Tensor y = at::mm(h, parameter({4, 4})) + at::mm(h, parameter({4, 4}));
  EXPECT_EQ(kept_bytes({y}), 16 * f);
  EXPECT_EQ(kept_bytes({y, y.sum()}), 16 * f);
}

TEST(KeptBytes, AViewKeepsItsWholeStorage) {
  const at::Tensor x = at::randn({8, 8});
  const at::Tensor y =
      at::mm(x.narrow(0, 0, 2), parameter({8, 3})) + at::mm(x.narrow(0, 2, 2), parameter({8, 3}));
  EXPECT_EQ(kept_bytes({y}), 64 * f);
  EXPECT_EQ(kept_bytes({y}, {x.narrow(0, 7, 1)}), 0) << "any view of an input names its storage";
}

TEST(KeptBytes, InPlaceWritesToViewsAreFollowed) {
  const at::Tensor base = parameter({4, 4}) + 1;
  const at::Tensor factor = at::randn({4});
  base.select(0, 0).mul_(factor);  // keeps factor, inside a CopySlices node
  EXPECT_EQ(kept_bytes({base}), 4 * f);
}

TEST(KeptBytes, ASavedTensorThatWasOverwrittenIsNotCountedSilently) {
  at::Tensor h = (parameter({4, 4}) + 1).sigmoid();
  const at::Tensor y = h * 2;
  h.add_(1);  // backward could not run any more
  EXPECT_THROW(kept_bytes({y, h}), c10::Error);
  const Recorder recorder;
  EXPECT_EQ(recorder.report({h}).unreadable, 1);
}

TEST(KeptBytes, AfterBackwardIsAClearError) {
  const at::Tensor loss = (parameter({4, 4}) + 1).relu().sum();
  loss.backward({}, /*retain_graph=*/true);
  EXPECT_EQ(kept_bytes({loss}), 16 * f);
  loss.backward();
  try {
    kept_bytes({loss});
    FAIL() << "a released graph was measured";
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find("already released"), std::string::npos) << error.what();
  }
}

// Keeps its input, its output and half of a byte a value: a custom op that never opted in to anything.
struct ScaleFunction : torch::autograd::Function<ScaleFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, double factor) {
    const at::Tensor y = x * factor;
    ctx->saved_data["factor"] = factor;
    ctx->save_for_backward({x, y, at::zeros({(x.numel() + 1) / 2}, at::kByte)});
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    return {grads[0] * ctx->saved_data["factor"].toDouble(), at::Tensor()};
  }
};

TEST(KeptBytes, CustomFunctionsAreRead) {
  const at::Tensor y = ScaleFunction::apply(parameter({3, 5}) + 1, 2.0);
  EXPECT_EQ(kept_bytes({y}), 15 * f + 15 * f + 8);
}

struct MarkingFunction : torch::autograd::Function<MarkingFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x) {
    const at::Tensor order = x.argsort(/*stable=*/true, -1);
    ctx->mark_non_differentiable({order});
    ctx->save_for_backward({order});
    ctx->saved_data["policy"] = "curve:m=4";
    return {x.sin(), order};
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    marks_in_backward = ctx->get_non_differentiable().size();
    return {grads[0]};
  }
  static inline size_t marks_in_backward = 0;
};

TEST(KeptBytes, FunctionsWithMarkedOutputsAreReadAndStayMarked) {
  const auto y = MarkingFunction::apply(parameter({3, 5}) + 1);
  EXPECT_FALSE(y[1].requires_grad());
  EXPECT_EQ(kept_bytes({y[0]}), 15 * l);
  const Recorder recorder;
  EXPECT_EQ(recorder.report({y[0]}).rows.at(0).policy, "curve:m=4");
  y[0].sum().backward();
  EXPECT_EQ(MarkingFunction::marks_in_backward, 1);
}

TEST(KeptBytes, AFunctionThatDroppedItsTensorsIsAClearErrorToo) {
  const auto y = MarkingFunction::apply(parameter({3, 5}) + 1);
  y[0].sum().backward();
  EXPECT_THROW(kept_bytes({y[0]}), c10::Error);
}

// Of its own making: it does not offer its members.
struct OpaqueNode : torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    return std::move(grads);
  }
};

// Nodes are held by shared_ptr or by intrusive_ptr, by the version of PyTorch.
template <typename Pointer, typename NodeType>
Pointer make_node() {
  if constexpr (std::is_constructible_v<Pointer, NodeType*>) {
    return Pointer(new NodeType);
  } else {
    return c10::make_intrusive<NodeType>();
  }
}

TEST(Recorder, CountsNodesThatWillNotBeRead) {
  const at::Tensor x = (parameter({4}) + 1).relu();
  at::Tensor y = at::randn({4});
  const auto node = make_node<decltype(torch::autograd::Edge::function), OpaqueNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(x));
  torch::autograd::create_gradient_edge(y, node);
  const Recorder recorder;
  const Report report = recorder.report({y});
  EXPECT_EQ(report.unreadable, 1);
  EXPECT_EQ(report.kept_bytes, 4 * f);
  EXPECT_NE(report.table().find("not counted: what 1 node keeps"), std::string::npos) << report.table();
  EXPECT_THROW(kept_bytes({y}), c10::Error);
}

TEST(Recorder, DescribedOpsSayWhatTheyKeep) {
  Recorder recorder;
  EXPECT_TRUE(remnant::memory::recording());
  const at::Tensor y = ScaleFunction::apply(parameter({3, 5}) + 1, 2.0);
  remnant::memory::describe(y, "quantized:bits=4", 128, 120);
  const Report report = recorder.report({y.relu()});
  ASSERT_EQ(ops(report),
            (std::vector<std::string>{"ScaleBackward", "ScaleBackward", "ScaleBackward", "ReluBackward0"}));
  EXPECT_EQ(report.rows[0].policy, "quantized:bits=4");
  EXPECT_EQ(report.rows[2].policy, "quantized:bits=4");
  EXPECT_EQ(report.rows[3].policy, "");
  EXPECT_EQ(report.rows[3].predicted_bytes, -1);
  EXPECT_EQ(report.rows[2].dtype, "Byte");
  int64_t kept = 0, predicted = 0, eager = 0;
  for (int i = 0; i < 3; ++i) {
    kept += report.rows[i].kept_bytes;
    predicted += report.rows[i].predicted_bytes;
    eager += report.rows[i].eager_bytes;
  }
  EXPECT_EQ(kept, 128);
  EXPECT_EQ(predicted, 128);
  EXPECT_EQ(eager, 120);
}

struct BlockImpl : torch::nn::Module {
  BlockImpl() { register_module("inner", inner); }
  at::Tensor forward(const at::Tensor& x) {
    const LayerScope scope(this);
    at::Tensor h = x.sigmoid();
    {
      const LayerScope inner_scope(inner.get());
      h = inner->forward(h + 1);
    }
    return h.tanh();
  }
  torch::nn::Linear inner{4, 4};
};

struct ModelImpl : torch::nn::Module {
  ModelImpl() {
    for (const char* name : {"a", "b"})
      blocks.push_back(register_module(name, std::make_shared<BlockImpl>()));
    scale = register_buffer("scale", at::ones({4}));
  }
  at::Tensor forward(const at::Tensor& x) {
    const LayerScope scope(this);
    return blocks[1]->forward(blocks[0]->forward(x * scale)).exp();
  }
  std::vector<std::shared_ptr<BlockImpl>> blocks;
  at::Tensor scale;
};

std::string layer_of(const Report& report, const std::string& op, int nth = 0) {
  for (const SavedRow& row : report.rows) {
    if (row.op == op && nth-- == 0) return row.layer;
  }
  return "no such row";
}

TEST(Recorder, LayersAreThePlacesOfTheModules) {
  ModelImpl model;  // on the stack: a root need not be shared
  Recorder recorder(&model);
  const at::Tensor x = parameter({3, 4});
  const at::Tensor y = model.forward(x);
  const LayerScope loss_scope("loss");
  const at::Tensor loss = (y * at::randn({3, 4})).sum();
  const Report report = recorder.report({loss});
  EXPECT_EQ(layer_of(report, "SigmoidBackward0", 0), "a");
  EXPECT_EQ(layer_of(report, "AddmmBackward0", 0), "a.inner");
  EXPECT_EQ(layer_of(report, "TanhBackward0", 0), "a");
  EXPECT_EQ(layer_of(report, "SigmoidBackward0", 1), "b");
  EXPECT_EQ(layer_of(report, "AddmmBackward0", 1), "b.inner");
  EXPECT_EQ(layer_of(report, "ExpBackward0"), "");
  EXPECT_EQ(layer_of(report, "MulBackward0"), "loss")
      << "the buffer that the first product keeps is left out";
  EXPECT_EQ(report.kept_bytes, 8 * 12 * f);
  EXPECT_EQ(report.kept_bytes, kept_bytes({loss}, {model.scale}));
  EXPECT_EQ(std::accumulate(report.rows.begin(), report.rows.end(), int64_t{0},
                            [](int64_t sum, const SavedRow& row) { return sum + row.kept_bytes; }),
            report.kept_bytes);
}

TEST(Recorder, FrozenParametersAreLeftOut) {
  torch::nn::Linear linear(4, 4);
  linear->weight.requires_grad_(false);
  Recorder recorder(linear.get());
  const at::Tensor x = parameter({3, 4});
  EXPECT_EQ(recorder.report({linear->forward(x)}).kept_bytes, 0);
  EXPECT_EQ(kept_bytes({linear->forward(x)}), 16 * f);
}

TEST(Recorder, ModulesUnknownToTheRootTakeTheirTypesName) {
  Recorder recorder;
  const LayerScope outer("outer");
  torch::nn::Linear linear(4, 4);
  at::Tensor y;
  {
    const LayerScope scope(linear.get());
    y = linear->forward(at::ones({2, 4}));
  }
  const Report report = recorder.report({y.exp()});
  EXPECT_EQ(layer_of(report, "AddmmBackward0"), "outer.Linear");
  EXPECT_EQ(layer_of(report, "ExpBackward0"), "outer");
}

TEST(Recorder, TheInnermostRecorderRemembers) {
  const at::Tensor w = parameter({4});
  Recorder outer;
  at::Tensor first, second;
  auto inner = std::make_unique<Recorder>();
  auto dangling = std::make_unique<LayerScope>("inner");
  first = w.exp();
  EXPECT_EQ(inner->report({first}).rows.at(0).layer, "inner");
  EXPECT_EQ(outer.report({first}).rows.at(0).layer, "");
  inner.reset();
  dangling.reset();  // outlives its recorder
  {
    const LayerScope scope("outer");
    second = w.exp();
  }
  EXPECT_EQ(outer.report({second}).rows.at(0).layer, "outer");
}

TEST(Recorder, IsOfOneThread) {
  Recorder recorder;
  const at::Tensor w = parameter({4});
  at::Tensor y;
  const LayerScope here("here");
  std::thread([&] {
    EXPECT_FALSE(remnant::memory::recording());
    const LayerScope there("there");
    // Numbers of nodes begin anew on this thread: run into those of the other one.
    for (int i = 0; i < 100; ++i) y = w.exp();
  }).join();
  for (int i = 0; i < 3; ++i) EXPECT_EQ(recorder.report({w.exp()}).rows.at(0).layer, "here");
  EXPECT_EQ(recorder.report({y}).rows.at(0).layer, "");
}

TEST(LayerScope, DoesNothingWithoutARecorder) {
  EXPECT_FALSE(remnant::memory::recording());
  const LayerScope scope("nobody listens");
  const at::Tensor y = parameter({2}).exp();
  remnant::memory::describe(y, "exact", 8, 8);
  Recorder late;
  EXPECT_EQ(late.report({y}).rows.at(0).layer, "");
  EXPECT_EQ(late.report({y}).rows.at(0).policy, "");
}

TEST(Recorder, ManyEmptyRegionsLeaveNoTrace) {
  Recorder recorder;
  const LayerScope around("around");
  for (int i = 0; i < 1000; ++i) const LayerScope empty("empty");
  EXPECT_EQ(recorder.report({parameter({2}).exp()}).rows.at(0).layer, "around");
}

double forward_of(const std::vector<remnant::memory::LayerTime>& times, const std::string& layer) {
  for (const auto& time : times) {
    if (time.layer == layer) return time.forward_seconds;
  }
  return -1;
}

/// Waits in its backward, for as long as its forward was told.
struct Wait : torch::autograd::Function<Wait> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            int64_t milliseconds) {
    ctx->saved_data["milliseconds"] = milliseconds;
    return x.clone();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    std::this_thread::sleep_for(std::chrono::milliseconds(ctx->saved_data["milliseconds"].toInt()));
    return {grads[0], at::Tensor()};
  }
};

TEST(Recorder, TimesLayersWithoutThoseInside) {
  const auto wait = [](int milliseconds) {
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
  };
  const at::Tensor w = parameter({4});
  at::Tensor y;
  const auto begin = std::chrono::steady_clock::now();
  Recorder recorder;
  {
    const LayerScope outer("outer");
    wait(4);
    y = Wait::apply(w, 30);
    {
      const LayerScope inner("inner");
      wait(20);
      y = Wait::apply(y, 8);
    }
  }
  const auto before = recorder.times();
  EXPECT_GE(forward_of(before, "outer"), 0.004);
  EXPECT_GE(forward_of(before, "outer.inner"), 0.020);
  recorder.backward(y.sum());
  const double wall = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const auto times = recorder.times();
  ASSERT_EQ(times.size(), 3u);
  EXPECT_EQ(times[0].layer, "");
  EXPECT_EQ(times[1].layer, "outer");
  EXPECT_EQ(times[2].layer, "outer.inner");
  EXPECT_EQ(times[1].forward_seconds, before[1].forward_seconds);
  EXPECT_GE(times[1].backward_seconds, 0.030);
  EXPECT_GE(times[2].backward_seconds, 0.008);
  // Nothing is counted twice, as "inner" would be in "outer".
  double sum = 0;
  for (const auto& time : times) sum += time.forward_seconds + time.backward_seconds;
  EXPECT_LE(sum, wall);
  EXPECT_GE(sum, 0.062);
  EXPECT_TRUE(at::equal(w.grad(), at::ones({4})));
}

TEST(Recorder, ItsBackwardChangesNeitherGradientsNorPeak) {
  const at::Tensor w = parameter({64, 64}), x = at::randn({32, 64});
  const auto step = [&](bool timed) {
    w.mutable_grad().reset();
    remnant::memory::PeakMeter meter;
    Recorder recorder;
    at::Tensor y = x;
    for (int i = 0; i < 4; ++i) {
      const LayerScope scope("layer");
      y = at::mm(y, w).tanh();
    }
    const at::Tensor loss = y.sum();
    if (timed) {
      recorder.backward(loss);
    } else {
      loss.backward();
    }
    return std::pair<at::Tensor, int64_t>(w.grad().clone(), meter.peak_bytes());
  };
  const auto [plain, plain_peak] = step(false);
  const auto [timed, timed_peak] = step(true);
  EXPECT_TRUE(at::equal(plain, timed));
  EXPECT_EQ(plain_peak, timed_peak);
}

TEST(Recorder, WhatBackwardRunsAgainIsNoForward) {
  const at::Tensor w = parameter({4});
  Recorder recorder;
  const at::Tensor y = remnant::checkpoint(
      [&](const at::Tensor& x) {
        const LayerScope scope("inside");
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        return (x * w).tanh();
      },
      at::ones({4}));
  const double forward = forward_of(recorder.times(), "inside");
  EXPECT_GE(forward, 0.005);
  recorder.backward(y.sum());
  EXPECT_EQ(forward_of(recorder.times(), "inside"), forward);
}

}  // namespace
