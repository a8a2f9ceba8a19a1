// Attention in blocks of query rows. A block's scores stay in cache: product with the keys, scale and
// mask, softmax, what the policy keeps, dropout, product with the values. The backward rebuilds the
// block's P (from q, k and lse, or from the kept codes) and turns it in place into D P and dz, so that
// two buffers of one block are all it needs.

#include "kernels/cpu/rows.h"
#include "kernels/cpu/variants.h"

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

struct Range {
  int64_t begin, end;
};

template <typename T>
Range row_range(const AttentionProblem<T>& problem, int64_t i) {
  int64_t begin = problem.left < 0 || i < problem.left ? 0 : i - problem.left;
  int64_t end = problem.right < 0 || i + problem.right >= problem.keys ? problem.keys : i + problem.right + 1;
  begin = begin < problem.keys ? begin : problem.keys;
  return {begin, end < begin ? begin : end};
}

// What all rows of a block may attend: tiles outside of it are never computed.
template <typename T>
Range block_range(const AttentionProblem<T>& problem, int64_t first, int64_t last) {
  return {row_range(problem, first).begin, row_range(problem, last).end};
}

// A runner's scratch: two blocks of rows x keys, the random numbers of a block, a sorted row.
template <typename T>
struct BlockScratch {
  T *scores, *products;
  uint32_t* random;
  CurveScratch<T> curve;

  BlockScratch(void* memory, const AttentionProblem<T>& problem, int64_t block_rows)
      : scores(static_cast<T*>(memory)),
        products(scores + block_rows * problem.keys),
        random(reinterpret_cast<uint32_t*>(products + block_rows * problem.keys)),
        // Rounded up to an even count of words: the sorted row may hold doubles.
        curve(random + (block_rows * (problem.keys + 16) + 1) / 2 * 2, problem.keys) {}
};

// z = scale * score + mask for one row of a block whose first column is key `from`; -inf outside.
template <typename T>
void mask_row(const AttentionProblem<T>& problem, int64_t b, int64_t h, int64_t i, Range block, T* row) {
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  const Range range = row_range(problem, i);
  for (int64_t j = block.begin; j < range.begin; ++j) row[j - block.begin] = nothing;
  for (int64_t j = range.end > block.begin ? range.end : block.begin; j < block.end; ++j) {
    row[j - block.begin] = nothing;
  }
  const MaskView<T>& mask = problem.mask;
  const int64_t offset = b * mask.batch + h * mask.head + i * mask.row;
  if (mask.kind == MaskKind::boolean) {
    const auto* allowed = static_cast<const uint8_t*>(mask.data) + offset;
    if (mask.column == 1) {
#pragma omp simd
      for (int64_t j = range.begin; j < range.end; ++j) {
        row[j - block.begin] = allowed[j] != 0 ? row[j - block.begin] : nothing;
      }
    } else {
      for (int64_t j = range.begin; j < range.end; ++j) {
        if (allowed[j * mask.column] == 0) row[j - block.begin] = nothing;
      }
    }
  } else if (mask.kind == MaskKind::additive) {
    const auto* bias = static_cast<const T*>(mask.data) + offset;
    for (int64_t j = range.begin; j < range.end; ++j) row[j - block.begin] += bias[j * mask.column];
  }
}

// Whether the masks leave row i any key: scores of -Inf throughout then come from Inf in the inputs.
template <typename T>
bool attends(const AttentionProblem<T>& problem, int64_t b, int64_t h, int64_t i) {
  const Range range = row_range(problem, i);
  const MaskView<T>& mask = problem.mask;
  const int64_t offset = b * mask.batch + h * mask.head + i * mask.row;
  for (int64_t j = range.begin; j < range.end; ++j) {
    if (mask.kind == MaskKind::none) return true;
    const int64_t at = offset + j * mask.column;
    if (mask.kind == MaskKind::boolean
            ? static_cast<const uint8_t*>(mask.data)[at] != 0
            : static_cast<const T*>(mask.data)[at] != -std::numeric_limits<T>::infinity()) {
      return true;
    }
  }
  return false;
}

// In place z -> p; returns lse, -inf for a row that attends nothing (its p is 0).
template <typename T>
T softmax_row(T* row, int64_t keys) {
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  T highest = nothing;
#pragma omp simd reduction(max : highest)
  for (int64_t j = 0; j < keys; ++j) highest = row[j] > highest ? row[j] : highest;
  // Nothing valid, or only NaN, which the sum below brings back.
  if (highest == nothing) highest = 0;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < keys; ++j) {
    row[j] = exponential(row[j] - highest);
    sum += row[j];
  }
  if (sum == 0) return nothing;
  const T inverse = T(1) / sum;
#pragma omp simd
  for (int64_t j = 0; j < keys; ++j) row[j] *= inverse;
  return highest + std::log(sum);
}

// In place z -> p from the kept lse.
template <typename T>
void softmax_row_from_lse(T* row, int64_t keys, T lse) {
  if (lse == -std::numeric_limits<T>::infinity()) {
    for (int64_t j = 0; j < keys; ++j) row[j] = 0;
    return;
  }
#pragma omp simd
  for (int64_t j = 0; j < keys; ++j) row[j] = exponential(row[j] - lse);
}

// A row's logits into its kept place, where they become p from lse: the same operations that policy
// recompute repeats in its backward, so that both policies give the same bits. 0 outside of the range.
template <typename T>
void keep_logits(const AttentionProblem<T>& problem, int64_t row, Range range, const T* logits) {
  T* kept = problem.probabilities + row * problem.keys;
  for (int64_t j = 0; j < range.begin; ++j) kept[j] = 0;
  for (int64_t j = range.begin; j < range.end; ++j) kept[j] = logits[j - range.begin];
  for (int64_t j = range.end; j < problem.keys; ++j) kept[j] = 0;
}

// The scores of rows [first, first + rows) against keys in `range`, scaled.
template <typename T>
void score_block(const AttentionProblem<T>& problem, int64_t b, int64_t h, int64_t first, int64_t rows,
                 Range range, T* scores) {
  const int64_t kv_head = h / (problem.heads / problem.kv_heads);
  problem.gemm(false, true, rows, range.end - range.begin, problem.head_dim, problem.scale,
               problem.query.at(b, h, first), problem.query.row, problem.key.at(b, kv_head, range.begin),
               problem.key.row, T(0), scores, range.end - range.begin);
}

// Random bits that decide dropout for a block; column `range.begin` of row r is at
// bits[r * stride + skip].
struct DropoutBlock {
  const uint16_t* bits;
  int64_t stride, skip;
};

template <typename T>
DropoutBlock dropout_block(const AttentionProblem<T>& problem, int64_t head, int64_t first, int64_t rows,
                           Range range, uint32_t* random) {
  const int64_t block = range.begin / kDropoutColumns;
  const int64_t blocks = (range.end + kDropoutColumns - 1) / kDropoutColumns - block;
  auto* bits = reinterpret_cast<uint16_t*>(random);
  dropout_bits(problem.seed, static_cast<uint32_t>(head), first, rows, block, blocks, bits);
  return {bits, blocks * kDropoutColumns, range.begin - block * kDropoutColumns};
}

}  // namespace

template <typename T>
void attention_forward(const AttentionForward<T>& problem, int64_t begin, int64_t end, void* memory) {
  BlockScratch<T> scratch(memory, problem, problem.block_rows);
  const int64_t blocks = problem.row_blocks();
  const T keep_scale = static_cast<T>(dropout_keep_scale(problem.drop_threshold));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / blocks;
    const int64_t b = head / problem.heads;
    const int64_t h = head % problem.heads;
    const int64_t first = (task % blocks) * problem.block_rows;
    const int64_t rows =
        first + problem.block_rows < problem.queries ? problem.block_rows : problem.queries - first;
    // Packed rows are as long as the keys whatever the mask, so they are made from whole rows.
    const bool packs = problem.keep == Keep::curve || problem.keep == Keep::codes;
    const Range range = packs ? Range{0, problem.keys} : block_range(problem, first, first + rows - 1);
    const int64_t width = range.end - range.begin;
    const int64_t row0 = head * problem.queries + first;
    if (width == 0) {
      for (int64_t r = 0; r < rows; ++r) {
        T* out = problem.output.at(b, h, first + r);
        for (int64_t d = 0; d < problem.value_dim; ++d) out[d] = 0;
        if (problem.keep == Keep::lse) problem.lse[row0 + r] = -std::numeric_limits<T>::infinity();
        if (problem.keep == Keep::probabilities)
          keep_logits(problem, row0 + r, range, static_cast<const T*>(nullptr));
      }
      continue;
    }
    T* scores = scratch.scores;
    score_block(problem, b, h, first, rows, range, scores);
    if (problem.keep == Keep::codes) {
      const int64_t random_blocks = (problem.keys + kRoundingColumns - 1) / kRoundingColumns;
      random_words(problem.seed, Stream::rounding, static_cast<uint32_t>(head), first, rows, 0, random_blocks,
                   scratch.random);
    }
    for (int64_t r = 0; r < rows; ++r) {
      T* row = scores + r * width;
      mask_row(problem, b, h, first + r, range, row);
      T* logits = scratch.products;
      if (problem.keep == Keep::curve) std::memcpy(logits, row, static_cast<size_t>(width) * sizeof(T));
      if (problem.keep == Keep::probabilities) keep_logits(problem, row0 + r, range, row);
      T lse = softmax_row(row, width);
      if (lse == -std::numeric_limits<T>::infinity() && attends(problem, b, h, first + r)) {
        lse = std::numeric_limits<T>::quiet_NaN();
        for (int64_t j = 0; j < width; ++j) logits[j] = row[j] = lse;
      }
      if (problem.keep == Keep::curve) {
        curve_encode_row(logits, row, width, problem.m, problem.codes + (row0 + r) * problem.code_bytes,
                         problem.table + (row0 + r) * problem.table_width, scratch.curve);
        continue;
      }
      if (problem.keep == Keep::lse) {
        problem.lse[row0 + r] = lse;
      } else if (problem.keep == Keep::probabilities) {
        softmax_row_from_lse(problem.probabilities + (row0 + r) * problem.keys + range.begin, width, lse);
      } else if (problem.keep == Keep::codes) {
        const int64_t stride = (problem.keys + kRoundingColumns - 1) / kRoundingColumns * kRoundingColumns;
        problem.table[row0 + r] = quantize_row(row, width, problem.bits, scratch.random + r * stride,
                                               problem.codes + (row0 + r) * problem.code_bytes);
      }
    }
    if (problem.drop_threshold > 0) {
      const DropoutBlock drop = dropout_block(problem, head, first, rows, range, scratch.random);
      for (int64_t r = 0; r < rows; ++r) {
        T* row = scores + r * width;
        const uint16_t* bits = drop.bits + r * drop.stride + drop.skip;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) {
          // Multiplied, not selected: a NaN must survive being dropped, as in torch.
          row[j] *= bits[j] >= problem.drop_threshold ? keep_scale : T(0);
        }
      }
    }
    const int64_t kv_head = h / (problem.heads / problem.kv_heads);
    problem.gemm(false, false, rows, problem.value_dim, width, T(1), scores, width,
                 problem.value.at(b, kv_head, range.begin), problem.value.row, T(0),
                 problem.output.at(b, h, first), problem.output.row);
  }
}

template <typename T>
void attention_backward(const AttentionBackward<T>& problem, int64_t begin, int64_t end, void* memory) {
  BlockScratch<T> scratch(memory, problem, problem.block_rows);
  const int64_t group = problem.heads / problem.kv_heads;
  const int64_t blocks = (problem.queries + problem.block_rows - 1) / problem.block_rows;
  const T keep_scale = static_cast<T>(dropout_keep_scale(problem.drop_threshold));
  const bool needs_dz = problem.grad_query.data != nullptr || problem.grad_key.data != nullptr;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t split = task % problem.splits;
    const int64_t kv = task / problem.splits;
    const int64_t b = kv / problem.kv_heads;
    const int64_t kv_head = kv % problem.kv_heads;
    T* const grad_key = problem.grad_key.data == nullptr
                            ? nullptr
                            : problem.grad_key.at(b, kv_head, 0) + split * problem.split_stride_key;
    T* const grad_value = problem.grad_value.data == nullptr
                              ? nullptr
                              : problem.grad_value.at(b, kv_head, 0) + split * problem.split_stride_value;
    const int64_t work = group * blocks;
    for (int64_t item = work * split / problem.splits; item < work * (split + 1) / problem.splits; ++item) {
      const int64_t h = kv_head * group + item / blocks;
      const int64_t head = b * problem.heads + h;
      const int64_t first = (item % blocks) * problem.block_rows;
      const int64_t rows =
          first + problem.block_rows < problem.queries ? problem.block_rows : problem.queries - first;
      const bool packed = problem.keep == Keep::curve || problem.keep == Keep::codes;
      const Range range = packed ? Range{0, problem.keys} : block_range(problem, first, first + rows - 1);
      const int64_t width = range.end - range.begin;
      const int64_t row0 = head * problem.queries + first;
      if (width == 0) continue;  // the gradients are zero already
      T* p = scratch.scores;
      T* dz = scratch.products;
      if (problem.keep == Keep::lse) {
        score_block(problem, b, h, first, rows, range, p);
        for (int64_t r = 0; r < rows; ++r) {
          mask_row(problem, b, h, first + r, range, p + r * width);
          softmax_row_from_lse(p + r * width, width, problem.lse[row0 + r]);
        }
      } else if (problem.keep == Keep::probabilities) {
        for (int64_t r = 0; r < rows; ++r) {
          std::memcpy(p + r * width, problem.probabilities + (row0 + r) * problem.keys + range.begin,
                      static_cast<size_t>(width) * sizeof(T));
        }
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          const uint8_t* codes = problem.codes + (row0 + r) * problem.code_bytes;
          const T* table = problem.table + (row0 + r) * problem.table_width;
          if (problem.keep == Keep::curve) {
            curve_decode_row(codes, table, width, problem.m, problem.paper_text, p + r * width,
                             scratch.curve);
          } else {
            dequantize_row(codes, table[0], width, problem.bits, p + r * width);
          }
        }
      }
      DropoutBlock drop{};
      if (problem.drop_threshold > 0) {
        drop = dropout_block(problem, head, first, rows, range, scratch.random);
      }
      const T* g = problem.grad_output.at(b, h, first);
      if (needs_dz) {
        problem.gemm(false, true, rows, width, problem.value_dim, T(1), g, problem.grad_output.row,
                     problem.value.at(b, kv_head, range.begin), problem.value.row, T(0), dz, width);
      }
      for (int64_t r = 0; r < rows; ++r) {
        T* p_row = p + r * width;
        T* a = dz + r * width;
        const uint16_t* bits = problem.drop_threshold > 0 ? drop.bits + r * drop.stride + drop.skip : nullptr;
        if (needs_dz) {
          if (bits != nullptr) {
#pragma omp simd
            for (int64_t j = 0; j < width; ++j) {
              a[j] *= bits[j] >= problem.drop_threshold ? keep_scale : T(0);
            }
          }
          T delta = 0;
          if (problem.output.data != nullptr) {
            const T* o = problem.output.at(b, h, first + r);
            const T* g_row = g + r * problem.grad_output.row;
#pragma omp simd reduction(+ : delta)
            for (int64_t d = 0; d < problem.value_dim; ++d) delta += g_row[d] * o[d];
          } else {
#pragma omp simd reduction(+ : delta)
            for (int64_t j = 0; j < width; ++j) delta += p_row[j] * a[j];
          }
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) a[j] = p_row[j] * (a[j] - delta) * problem.scale;
        }
        if (grad_value != nullptr && bits != nullptr) {
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) {
            p_row[j] *= bits[j] >= problem.drop_threshold ? keep_scale : T(0);
          }
        }
      }
      if (grad_value != nullptr) {
        problem.gemm(true, false, width, problem.value_dim, rows, T(1), p, width, g, problem.grad_output.row,
                     T(1), grad_value + range.begin * problem.grad_value.row, problem.grad_value.row);
      }
      if (grad_key != nullptr) {
        problem.gemm(true, false, width, problem.head_dim, rows, T(1), dz, width,
                     problem.query.at(b, h, first), problem.query.row, T(1),
                     grad_key + range.begin * problem.grad_key.row, problem.grad_key.row);
      }
      if (problem.grad_query.data != nullptr) {
        problem.gemm(false, false, rows, problem.head_dim, width, T(1), dz, width,
                     problem.key.at(b, kv_head, range.begin), problem.key.row, T(0),
                     problem.grad_query.at(b, h, first), problem.grad_query.row);
      }
    }
  }
}

template void attention_forward(const AttentionForward<float>&, int64_t, int64_t, void*);
template void attention_forward(const AttentionForward<double>&, int64_t, int64_t, void*);
template void attention_backward(const AttentionBackward<float>&, int64_t, int64_t, void*);
template void attention_backward(const AttentionBackward<double>&, int64_t, int64_t, void*);

}  // namespace remnant::kernels::REMNANT_VARIANT
