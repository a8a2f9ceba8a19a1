#include "vision/data.h"
#include "vision/drawings.h"
#include "vision/model.h"
#include "vision/train.h"

#include "common/error.h"
#include "common/optimizer.h"
#include "common/trainer.h"
#include "files.h"

#include <remnant/memory.h>
#include <remnant/setting.h>

#include <gtest/gtest.h>
#include <torch/utils.h>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <numeric>
#include <set>
#include <string>
#include <vector>

namespace remnant::app::vision {
namespace {

using at::Tensor;
namespace fs = std::filesystem;

constexpr int64_t kRecord = 1 + kPixels;

/// Images whose labels go round and whose pixels are all their number's.
std::string records(int64_t count) {
  std::string content;
  for (int64_t i = 0; i < count; ++i) {
    content += static_cast<char>(i % 10);
    content.append(kPixels, static_cast<char>(i));
  }
  return content;
}

LabelledImages drawn(int64_t count) {
  LabelledImages images;
  images.pixels = draw_images(count, 3);
  for (int64_t i = 0; i < count; ++i) images.labels.push_back(i % 10);
  return images;
}

std::vector<int64_t> first_rows(int64_t count) {
  std::vector<int64_t> rows(count);
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

int64_t parameters_of(const std::string& model) {
  int64_t count = 0;
  for (const Tensor& each : Classifier(ModelOptions{.model = model})->parameters()) count += each.numel();
  return count;
}

class VisionFiles : public Files {};

TEST(Drawings, AreAFunctionOfTheSeed) {
  const std::vector<uint8_t> images = draw_images(30);
  ASSERT_EQ(images.size(), static_cast<size_t>(30 * kPixels));
  EXPECT_EQ(images, draw_images(30));
  EXPECT_NE(images, draw_images(30, 2));
  // More of them begin as fewer do.
  const std::vector<uint8_t> more = draw_images(40);
  EXPECT_TRUE(std::equal(images.begin(), images.end(), more.begin()));
  std::set<std::string> different;
  for (int64_t i = 0; i < 30; ++i) {
    different.emplace(images.begin() + i * kPixels, images.begin() + (i + 1) * kPixels);
  }
  EXPECT_EQ(different.size(), 30u);
}

TEST(Drawings, ColourTellsNothing) {
  // The mean of a class's brightness is within a few standard errors of every other's.
  const LabelledImages images = drawn(2000);
  const auto brightness = [&](int64_t label) {
    double sum = 0;
    for (int64_t i = label; i < images.size(); i += 10) {
      const auto first = images.pixels.begin() + i * kPixels;
      sum += std::accumulate(first, first + kPixels, 0.0) / kPixels;
    }
    return sum / 200;
  };
  for (int64_t label = 0; label < 10; ++label) EXPECT_NEAR(brightness(label), 127.5, 12) << label;
}

TEST_F(VisionFiles, RecordsAreLabelsAndPixels) {
  const LabelledImages images = read_images(write("a.bin", records(12)));
  EXPECT_EQ(images.labels, (std::vector<int64_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1}));
  EXPECT_EQ(images.pixels[0], 0);
  EXPECT_EQ(images.pixels[11 * kPixels], 11);
  EXPECT_EQ(images.pixels.back(), 11);
  EXPECT_EQ(images.pixels.size(), static_cast<size_t>(12 * kPixels));
}

TEST_F(VisionFiles, MistakesAreNamed) {
  const auto said = [&](const std::string& content) {
    return message([&] { read_images(write("a.bin", content)); });
  };
  EXPECT_NE(said("").find("holds no image"), std::string::npos);
  EXPECT_NE(said(records(3).substr(1)).find("no whole number"), std::string::npos);
  std::string wrong = records(3);
  wrong[kRecord] = '\x0a';
  EXPECT_NE(said(wrong).find("image 2 of"), std::string::npos);
  EXPECT_NE(said(wrong).find("the label 10, expected 0 to 9"), std::string::npos);
  EXPECT_NE(message([&] { read_images(dir_ / "none.bin"); }).find("none.bin"), std::string::npos);
  EXPECT_NE(message([&] { load_dataset({write("a.bin", records(80)).string()}); }).find("at least 20"),
            std::string::npos);
}

TEST_F(VisionFiles, WhatIsMissingIsHeldOutOfEveryClass) {
  const Dataset data = load_dataset({write("a.bin", records(200)).string()});
  EXPECT_TRUE(data.held_out_test && data.held_out_validation);
  // Of 20 images a class 2 are the test's, and of the 18 left one is the validation's.
  EXPECT_EQ(data.train.size(), 170);
  for (const LabelledImages* part : {&data.validation, &data.test}) {
    std::vector<int64_t> labels = part->labels;
    std::sort(labels.begin(), labels.end());
    const int64_t each = part == &data.test ? 2 : 1;
    ASSERT_EQ(part->size(), 10 * each);
    for (int64_t i = 0; i < part->size(); ++i) EXPECT_EQ(labels[i], i / each);
  }
  std::multiset<int> seen;
  for (const LabelledImages* part : {&data.train, &data.validation, &data.test}) {
    for (int64_t i = 0; i < part->size(); ++i) {
      const int number = part->pixels[i * kPixels];
      EXPECT_EQ(number % 10, part->labels[i]);
      seen.insert(number);
    }
  }
  EXPECT_EQ(seen.size(), 200u);
  EXPECT_EQ(*seen.rbegin(), 199);
}

TEST(VisionData, BatchesHaveMeanZeroAndDeviationOne) {
  const LabelledImages images = drawn(50);
  const Batch batch = make_batch(images, first_rows(50), normalisation_of(images), {}, true);
  EXPECT_TRUE(batch.images.is_contiguous(at::MemoryFormat::ChannelsLast));
  EXPECT_TRUE(at::allclose(batch.images.mean({0, 2, 3}), at::zeros({3}), 0, 1e-5));
  EXPECT_TRUE(at::allclose(batch.images.square().mean({0, 2, 3}), at::ones({3}), 1e-4, 0));
  const Batch plain = make_batch(images, first_rows(50), normalisation_of(images), {}, false);
  EXPECT_TRUE(plain.images.is_contiguous());
  EXPECT_TRUE(at::equal(plain.images, batch.images));
  EXPECT_EQ(batch.labels[13].item<int64_t>(), 3);
}

TEST(VisionData, MovesShiftAndFlip) {
  const LabelledImages images = drawn(3);
  const Normalisation normalisation = normalisation_of(images);
  const std::vector<Move> moves{{.x = 3, .y = -2}, {.flip = true}, {.x = -4, .y = 4, .flip = true}};
  const Tensor still = make_batch(images, {0, 1, 2}, normalisation, {}, true).images;
  const Tensor moved = make_batch(images, {0, 1, 2}, normalisation, moves, true).images;
  for (int64_t i = 0; i < 3; ++i) {
    for (int64_t y = 0; y < kSide; ++y) {
      for (int64_t x = 0; x < kSide; ++x) {
        const int64_t from_y = y + moves[i].y, from_x = (moves[i].flip ? kSide - 1 - x : x) + moves[i].x;
        const bool inside = from_y >= 0 && from_y < kSide && from_x >= 0 && from_x < kSide;
        const float expected = inside ? still[i][1][from_y][from_x].item<float>() : 0;
        ASSERT_EQ(moved[i][1][y][x].item<float>(), expected) << i << " " << y << " " << x;
      }
    }
  }
}

TEST(VisionModel, HasThePapersParameters) {
  // 0.27, 0.46 and 1.7 million in He et al.'s table 6, whose shortcuts have none.
  EXPECT_EQ(parameters_of("resnet20"), 269722);
  EXPECT_EQ(parameters_of("resnet32"), 464154);
  EXPECT_EQ(parameters_of("resnet110"), 1727962);
  EXPECT_FALSE(is_resnet("resnet21"));
  EXPECT_FALSE(is_resnet("resnet2"));
  EXPECT_FALSE(is_resnet("resnet20x"));
}

TEST(VisionModel, ABlockAddsEveryOtherPixelOfItsInput) {
  torch::manual_seed(3);
  ResidualBlock block(4, 8, 2);
  const at::NoGradGuard no_grad;
  for (auto& item : block->named_parameters()) {
    if (item.key() == "second.conv.weight") item.value().zero_();
  }
  const Tensor x = at::randn({2, 4, 6, 6}), y = block->forward(x);
  ASSERT_EQ(y.sizes(), (std::vector<int64_t>{2, 8, 3, 3}));
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t column = 0; column < 3; ++column) {
      const Tensor from = x.select(3, 2 * column).select(2, 2 * row).relu();
      const Tensor to = y.select(3, column).select(2, row);
      EXPECT_TRUE(at::equal(to.slice(1, 0, 4), from));
      EXPECT_EQ(to.slice(1, 4).abs().max().item<float>(), 0);
    }
  }
}

TEST(VisionModel, ExactKeepsLessThanHalfOfEager) {
  Classifier model(ModelOptions{.model = "resnet20"});
  const Tensor images = at::randn({8, 3, kSide, kSide}), labels = at::randint(0, 10, {8});
  const auto kept = [&](const Memory& memory) {
    set_memory(*model, memory);
    const memory::Recorder recorder(model.get());
    return recorder.report({model->loss(images, labels)}, {images, labels}).kept_bytes;
  };
  const int64_t eager = kept(Memory::eager());
  EXPECT_LT(kept(Memory::exact()), 0.46 * static_cast<double>(eager));
  EXPECT_LT(kept(Memory::unbiased(4)), 0.11 * static_cast<double>(eager));
}

TEST(VisionModel, LossIsTheLogitsCrossEntropy) {
  torch::manual_seed(3);
  Classifier model(ModelOptions{.model = "resnet8", .width = 4});
  model->eval();
  const LabelledImages images = drawn(7);
  const Batch batch = make_batch(images, first_rows(7), normalisation_of(images), {}, true);
  const at::NoGradGuard no_grad;
  const Tensor log_p = at::log_softmax(model->forward(batch.images).to(at::kDouble), 1);
  const double expected = -log_p.gather(1, batch.labels.unsqueeze(1)).sum().item<double>();
  EXPECT_NEAR(model->loss(batch.images, batch.labels).item<double>(), expected, 1e-4);
}

TEST(VisionTraining, LookingDoesNotChangeRunningStatistics) {
  Classifier model(ModelOptions{.model = "resnet8", .width = 4});
  const auto statistics = [&] {
    std::vector<Tensor> found;
    for (const Tensor& buffer : model->buffers()) found.push_back(buffer.clone());
    return found;
  };
  const std::vector<Tensor> before = statistics();
  const Tensor images = at::randn({4, 3, kSide, kSide});
  {
    const KeepBuffers keep(*model);
    model->forward(images);
    EXPECT_FALSE(at::equal(statistics()[0], before[0]));
  }
  const std::vector<Tensor> after = statistics();
  for (size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(at::equal(after[i], before[i])) << i;
}

TEST(VisionTraining, SgdHasMomentumAndLetsWeightsDecay) {
  Classifier model(ModelOptions{.model = "resnet8", .width = 4});
  constexpr double rate = 0.1, momentum = 0.9, decay = 0.01;
  Sgd sgd(*model, momentum, decay);
  std::vector<Tensor> expected, velocity;
  for (const Tensor& each : model->parameters()) {
    expected.push_back(each.detach().to(at::kDouble));
    velocity.push_back(at::zeros_like(expected.back()));
  }
  for (int step = 0; step < 3; ++step) {
    const auto parameters = model->parameters();
    for (size_t i = 0; i < parameters.size(); ++i) {
      const Tensor gradient = at::randn(parameters[i].sizes());
      parameters[i].grad().copy_(gradient);
      velocity[i] = momentum * velocity[i] + gradient + (parameters[i].dim() > 1 ? decay : 0.0) * expected[i];
      expected[i] = expected[i] - rate * velocity[i];
    }
    sgd.step(rate);
  }
  const auto parameters = model->parameters();
  for (size_t i = 0; i < parameters.size(); ++i) {
    EXPECT_TRUE(at::allclose(parameters[i].detach().to(at::kDouble), expected[i], 1e-5, 1e-6)) << i;
  }
  EXPECT_EQ(sgd.state().size(), parameters.size());
}

TEST(VisionTraining, TheRateWarmsUpAndFalls) {
  TrainOptions options;
  options.epochs = 10;
  options.warm_up = 2;
  EXPECT_DOUBLE_EQ(rate_factor(options, 0), 0.1);
  EXPECT_DOUBLE_EQ(rate_factor(options, 1), 0.55);
  EXPECT_NEAR(rate_factor(options, 5), 0.5, 1e-12);
  EXPECT_NEAR(rate_factor(options, 10), 0, 1e-12);
  options.schedule = "step";
  EXPECT_EQ(rate_factor(options, 4.9), 1);
  EXPECT_EQ(rate_factor(options, 5), 0.1);
  EXPECT_EQ(rate_factor(options, 7.5), 0.01);
  options.schedule = "constant";
  EXPECT_EQ(rate_factor(options, 9), 1);
}

TEST(VisionOptions, MistakesAreUsageErrors) {
  TrainOptions good;
  good.data = "generated";
  EXPECT_NO_THROW(checked(good));
  EXPECT_EQ(checked(good).memory, "exact");
  const auto refused = [&](const auto& change) {
    TrainOptions bad = good;
    change(bad);
    EXPECT_THROW(checked(bad), UsageError);
  };
  refused([](TrainOptions& o) { o.model = "resnet19"; });
  refused([](TrainOptions& o) { o.width = -1; });
  refused([](TrainOptions& o) { o.images = 3; });
  refused([](TrainOptions& o) { o.schedule = "linear"; });
  refused([](TrainOptions& o) { o.layout = "nhwc"; });
  refused([](TrainOptions& o) { o.memory = "attention"; });
  refused([](TrainOptions& o) { o.memory = "unbiased:bits=3"; });
  refused([](TrainOptions& o) { o.depth = 9; });
  refused([](TrainOptions& o) { o.model = "chain", o.width = 15; });
  refused([](TrainOptions& o) { o.model = "chain", o.memory = "unbiased:bits=4"; });
  refused([](TrainOptions& o) { o.model = "reversible", o.depth = 2; });
  refused([](TrainOptions& o) { o.clip = -1; });
}

}  // namespace
}  // namespace remnant::app::vision
