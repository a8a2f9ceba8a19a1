#include "kernels/cpu/attention_kernels.h"
#include "kernels/philox.h"
#include "ops/attention_common.h"
#include "ops/seed.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/bitwise_or.h>
#include <ATen/ops/bitwise_xor.h>
#include <ATen/ops/broadcast_tensors.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>

namespace remnant::ops {

namespace {

constexpr int64_t kWord = 0xFFFFFFFF;

at::Tensor high_word(const at::Tensor& x) { return x.bitwise_right_shift(32).bitwise_and_(kWord); }

// An element's 16 bits decide; see kernels/philox.h for the counter.
template <typename T>
void apply_dropout_cpu(at::Tensor& block, const kernels::Seed& seed, int64_t threshold, int64_t first) {
  const int64_t heads = block.size(0) * block.size(1);
  const int64_t rows = block.size(2);
  const int64_t keys = block.size(3);
  const int64_t blocks = (keys + kernels::kDropoutColumns - 1) / kernels::kDropoutColumns;
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const auto keep_scale = static_cast<Wide>(kernels::dropout_keep_scale(threshold));
  const int64_t stride = blocks * kernels::kDropoutColumns;
  const int64_t per_task = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, stride));
  const int64_t tasks_per_head = (rows + per_task - 1) / per_task;
  const at::Tensor bits = at::empty({at::get_num_threads(), per_task * stride}, at::kShort);
  T* const data = block.mutable_data_ptr<T>();
  at::parallel_for(0, heads * tasks_per_head, 1, [&](int64_t begin, int64_t end) {
    auto* random =
        reinterpret_cast<uint16_t*>(bits.data_ptr<int16_t>()) + at::get_thread_num() * per_task * stride;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / tasks_per_head;
      const int64_t row = task % tasks_per_head * per_task;
      const int64_t count = std::min(per_task, rows - row);
      kernels::cpu_kernels().dropout_bits(seed, static_cast<uint32_t>(head), first + row, count, 0, blocks,
                                          random);
      for (int64_t r = 0; r < count; ++r) {
        T* x = data + (head * rows + row + r) * keys;
        for (int64_t j = 0; j < keys; ++j) {
          x[j] = static_cast<T>(x[j] *
                                static_cast<T>(random[r * stride + j] >= threshold ? keep_scale : Wide(0)));
        }
      }
    }
  });
}

// Four words for each counter (block, row, head), stacked last; the counters broadcast.
at::Tensor philox(const at::Tensor& seed, uint32_t stream, const at::Tensor& block, const at::Tensor& row,
                  const at::Tensor& head) {
  const at::Tensor key = seed.select(0, 0);
  at::Tensor key0 = key.bitwise_and(kWord);
  at::Tensor key1 = high_word(key);
  const at::Tensor last = seed.select(0, 1).bitwise_left_shift(1).bitwise_and(kWord).bitwise_or(
      at::Scalar(static_cast<int64_t>(stream)));
  const auto counters = at::broadcast_tensors({block, row, head, last});
  at::Tensor c0 = counters[0], c1 = counters[1], c2 = counters[2], c3 = counters[3];
  for (int round = 0; round < kernels::kPhiloxRounds; ++round) {
    // A product of two 32-bit words wraps to the right 64 bits in int64.
    const at::Tensor product0 = c0.mul(static_cast<int64_t>(kernels::kPhiloxM0));
    const at::Tensor product1 = c2.mul(static_cast<int64_t>(kernels::kPhiloxM1));
    c0 = high_word(product1).bitwise_xor_(c1).bitwise_xor_(key0);
    c2 = high_word(product0).bitwise_xor_(c3).bitwise_xor_(key1);
    c1 = product1.bitwise_and(kWord);
    c3 = product0.bitwise_and(kWord);
    key0 = key0.add(static_cast<int64_t>(kernels::kPhiloxW0)).bitwise_and_(kWord);
    key1 = key1.add(static_cast<int64_t>(kernels::kPhiloxW1)).bitwise_and_(kWord);
  }
  return at::stack({c0, c1, c2, c3}, -1);
}

}  // namespace

at::Tensor random_words(const at::Tensor& seed, uint32_t stream, int64_t heads, int64_t first, int64_t rows,
                        int64_t blocks) {
  const auto options = at::TensorOptions(seed.device()).dtype(at::kLong);
  return philox(seed, stream, at::arange(blocks, options).view({1, 1, blocks}),
                at::arange(first, first + rows, options).view({1, rows, 1}),
                at::arange(heads, options).view({heads, 1, 1}))
      .flatten(-2);
}

at::Tensor dropout_mask_at(const at::Tensor& seed, double dropout, const at::Tensor& head,
                           const at::Tensor& row, const at::Tensor& column,
                           const at::TensorOptions& options) {
  const int64_t threshold = kernels::dropout_threshold(dropout);
  const at::Tensor words = philox(seed, static_cast<uint32_t>(kernels::Stream::dropout),
                                  column.div(kernels::kDropoutColumns, "floor"), row, head);
  // Two decisions a word, the first in its low half.
  const at::Tensor place = column.bitwise_and(kernels::kDropoutColumns - 1);
  const at::Tensor word = place.bitwise_right_shift(1).unsqueeze(-1);
  const at::Tensor shift = place.bitwise_and(1).bitwise_left_shift(4);
  std::vector<int64_t> shape = words.sizes().vec();
  shape.back() = 1;
  return words.gather(-1, word.expand(shape))
      .squeeze(-1)
      .bitwise_right_shift_(shift)
      .bitwise_and_(0xFFFF)
      .ge(threshold)
      .to(options.dtype())
      .mul_(kernels::dropout_keep_scale(threshold));
}

at::Tensor dropout_mask(const at::Tensor& seed, double dropout, int64_t batch, int64_t heads, int64_t first,
                        int64_t rows, int64_t keys, const at::TensorOptions& options) {
  if (options.device().is_cpu()) {
    at::Tensor mask = at::ones({batch, heads, rows, keys}, options);
    apply_dropout_(mask, seed, dropout, first);
    return mask;
  }
  const int64_t threshold = kernels::dropout_threshold(dropout);
  const int64_t blocks = (keys + kernels::kDropoutColumns - 1) / kernels::kDropoutColumns;
  const at::Tensor words =
      random_words(seed, static_cast<uint32_t>(kernels::Stream::dropout), batch * heads, first, rows, blocks);
  const at::Tensor halves =
      at::stack({words.bitwise_and(0xFFFF), words.bitwise_right_shift(16)}, -1).flatten(-2);
  return halves.narrow(-1, 0, keys)
      .ge(threshold)
      .to(options.dtype())
      .mul_(kernels::dropout_keep_scale(threshold))
      .view({batch, heads, rows, keys});
}

void apply_dropout_(at::Tensor block, const at::Tensor& seed, double dropout, int64_t first) {
  if (block.device().is_cpu() && block.is_contiguous()) {
    const auto parts = seed_of(seed);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, block.scalar_type(), "dropout", [&] {
      apply_dropout_cpu<scalar_t>(block, parts, kernels::dropout_threshold(dropout), first);
    });
    return;
  }
  block.mul_(dropout_mask(seed, dropout, block.size(0), block.size(1), first, block.size(2), block.size(3),
                          block.options()));
}

}  // namespace remnant::ops
