// What a layer's attention was predicted to keep is what the graph holds.

#include <remnant/memory.h>
#include <remnant/nn/transformer.h>

#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <map>

namespace remnant {
namespace {

TEST(LayerMemory, PredictedEqualsMeasured) {
  for (const char* policy :
       {"exact", "recompute", "curve:m=3", "quantized:bits=4", "sampled:m=5", "top:m=5"}) {
    for (double dropout : {0.0, 0.1}) {
      for (bool padded : {false, true}) {
        nn::TransformerDecoderLayer layer(
            nn::TransformerLayerOptions(32, 4).dropout(dropout).dim_feedforward(64).batch_first(true).policy(
                Policy::parse(policy)));
        const at::Tensor target = at::randn({2, 11, 32}), source = at::randn({2, 23, 32});
        at::Tensor padding;
        if (padded) {
          padding = at::zeros({2, 23}, at::kBool);
          padding.narrow(1, 20, 3).fill_(true);
        }
        const memory::Recorder recorder(layer.get());
        const at::Tensor output = layer->forward(target, source, {}, {}, {}, padding, /*tgt_is_causal=*/true);
        const memory::Report report = recorder.report({output.sum()}, {target, source});
        std::map<std::string, std::pair<int64_t, int64_t>> sums;  // layer: measured, predicted
        std::map<std::string, int64_t> eager;
        for (const memory::SavedRow& row : report.rows) {
          if (row.policy != policy) continue;
          sums[row.layer].first += row.kept_bytes;
          sums[row.layer].second += std::max<int64_t>(row.predicted_bytes, 0);
          eager[row.layer] += std::max<int64_t>(row.eager_bytes, 0);
        }
        ASSERT_EQ(sums.size(), 2u) << policy;
        for (const auto& [name, bytes] : sums) {
          EXPECT_EQ(bytes.first, bytes.second)
              << policy << " " << name << " dropout " << dropout << " " << padded;
        }
        // 8 rows of heads; eager keeps p, with dropout three such tensors, and q, k, v in one projection.
        const int64_t self = 2 * 4 * 11 * 11 * 4 * (dropout > 0 ? 3 : 1) + 2 * 11 * 96 * 4;
        EXPECT_EQ(eager["self_attn"], self);
      }
    }
  }
}

}  // namespace
}  // namespace remnant
