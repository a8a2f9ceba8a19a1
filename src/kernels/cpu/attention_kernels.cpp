// Attention in tiles of query rows and keys. Forward: scores, mask, online softmax, dropout, product with
// the values, then a second look at the tiles where the policy keeps something of P. Backward: a tile's P
// again, from q, k and lse or from the kept codes, turned in place into D P and dz for the products that
// make the gradients. Scratch is a few tiles, whatever the number of keys.

#include "kernels/cpu/ahead.h"
#include "kernels/cpu/bfloat16.h"
#include "kernels/cpu/curve_tiles.h"
#include "kernels/cpu/products.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/sample.h"
#include "kernels/cpu/tiles.h"
#include "kernels/cpu/variants.h"

#include <algorithm>

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// A runner's scratch; every array begins on a whole vector.
template <typename T>
struct Scratch {
  T *query, *grad;       // [head_dim][rows], [value_dim][rows]: transposed and scaled, or bfloat16 pairs
  T *scores, *products;  // [keys][rows]
  T* output;             // [rows][value_dim]
  T *maximum, *sum, *correction, *lse, *delta, *step;
  T* row;                                 // one row of keys
  uint16_t* staged;                       // bfloat16 rows
  T *wide_keys, *wide_query, *wide_grad;  // the same as T, [keys or rows][dimension]
  uint8_t* allowed;
  void* rest;  // curve: what sorting needs; sampled: weights, or the drawn keys' rows
  int64_t output_stride;

  Scratch(void* memory, const AttentionProblem<T>& problem) {
    const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory) % 64);
    auto* at = reinterpret_cast<T*>(static_cast<char*>(memory) + (64 - misaligned) % 64);
    const auto take = [&](int64_t count) {
      T* const begin = at;
      at += count;
      return begin;
    };
    const int64_t rows = problem.block_rows;
    output_stride = round_up(problem.value_dim, kTileUnit);
    query = take(round_up(problem.head_dim, kTileUnit) * rows);
    grad = take(output_stride * rows);
    output = take(output_stride * rows);
    scores = take(problem.tile_keys * rows);
    products = take(problem.tile_keys * rows);
    maximum = take(rows);
    sum = take(rows);
    correction = take(rows);
    lse = take(rows);
    delta = take(rows);
    step = take(rows);
    row = take(problem.tile_keys);
    staged = reinterpret_cast<uint16_t*>(at);
    at = reinterpret_cast<T*>(staged + bfloat16_staging(problem));
    wide_query = at;
    wide_grad = wide_query + rows * round_up(problem.head_dim, kTileUnit);
    wide_keys = wide_grad + rows * output_stride;
    at += bfloat16_widening(problem);
    allowed = reinterpret_cast<uint8_t*>(at);
    rest = allowed + round_up(problem.tile_keys * rows, 64);
  }
};

template <typename T>
TileDropout<T> tile_dropout(const AttentionProblem<T>& problem, const Block& block, const Tile& tile) {
  return {&problem.seed,
          problem.drop_threshold,
          static_cast<T>(dropout_keep_scale(problem.drop_threshold)),
          static_cast<uint32_t>(tile.begin / kDropoutColumns),
          static_cast<uint32_t>(block.first),
          block.head};
}

template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
};

// Rows of an input as T, widened into `room` where it is bfloat16.
template <typename T>
Rows<T> rows_of(const HeadView<const T>& view, const HeadView<const uint16_t>& narrow, int64_t b, int64_t h,
                int64_t first, int64_t rows, int64_t dims, T* room) {
  if (narrow.data == nullptr) return {view.at(b, h, first), view.row};
  const int64_t stride = round_up(dims, kTileUnit);
  widen_rows(narrow.at(b, h, first), narrow.row, rows, dims, room, stride);
  return {room, stride};
}

// A block's rows as the right factor of bfloat16 products.
template <typename T>
void pair_rows(const HeadView<const uint16_t>& view, const Block& block, int64_t dims, Scratch<T>& scratch,
               T* to) {
  stage_rows(view.at(block.b, block.h, block.query_row + block.first), view.row, block.rows, dims,
             block.padded, scratch.staged);
  transpose_pairs(scratch.staged, block.padded, bfloat16_dims(dims), reinterpret_cast<uint32_t*>(to));
}

// scale * the tile's keys or values times such a factor.
template <typename T>
void multiply_narrow(const AttentionProblem<T>& problem, const HeadView<const uint16_t>& view,
                     const Block& block, const Tile& tile, int64_t dims, const T* factor, Scratch<T>& scratch,
                     T* out) {
  if constexpr (std::is_same_v<T, float>) {
    const int64_t count = tile.end - tile.begin, padded = round_up(count, kTileUnit);
    stage_rows(view.at(block.b, block.kv_head, block.key_row + tile.begin), view.row, count, dims, padded,
               scratch.staged);
    multiply_pairs(scratch.staged, padded, bfloat16_dims(dims), reinterpret_cast<const uint32_t*>(factor),
                   block.padded, problem.scale, out);
  }
}

template <typename T>
void transpose_query(const AttentionProblem<T>& problem, const Block& block, Scratch<T>& scratch) {
  if (problem.bfloat16) {
    pair_rows(problem.narrow_query, block, problem.head_dim, scratch, scratch.query);
    return;
  }
  transpose<true>(problem.query.at(block.b, block.h, block.query_row + block.first), problem.query.row,
                  block.rows, problem.head_dim, problem.scale, scratch.query, block.padded);
  for (int64_t d = 0; d < problem.head_dim; ++d) {
    for (int64_t r = round_up(block.rows, kWidth<T>); r < block.padded; ++r)
      scratch.query[d * block.padded + r] = 0;
  }
}

// A tile's masked logits.
template <typename T>
void score_tile(const AttentionProblem<T>& problem, const Block& block, const Tile& tile, Scratch<T>& scratch,
                Ahead& ahead) {
  if (problem.bfloat16) {
    multiply_narrow(problem, problem.narrow_key, block, tile, problem.head_dim, scratch.query, scratch,
                    scratch.scores);
    mask_tile(problem, block, tile, scratch.allowed, scratch.scores);
    return;
  }
  multiply<false, false>(tile.end - tile.begin, block.padded, problem.head_dim,
                         problem.key.at(block.b, block.kv_head, block.key_row + tile.begin), problem.key.row,
                         scratch.query, block.padded, scratch.scores, block.padded, ahead);
  mask_tile(problem, block, tile, scratch.allowed, scratch.scores);
}

// lse of each row, -inf where it attends nothing, NaN where only Inf in the inputs leaves it without weight.
template <typename T>
void finish_lse(const AttentionProblem<T>& problem, const Block& block, Scratch<T>& scratch) {
  for (int64_t r = 0; r < block.rows; ++r) {
    const T sum = scratch.sum[r];
    if (sum == 0) {
      scratch.lse[r] =
          attends(problem, block, block.first + r) ? std::numeric_limits<T>::quiet_NaN() : kNothing<T>;
    } else {
      const T highest = scratch.maximum[r] == kNothing<T> ? T(0) : scratch.maximum[r];
      scratch.lse[r] = highest + std::log(sum);
    }
  }
}

// In backward and when packing, exp(z - lse) of a row that attends nothing must be 0.
template <typename T>
void lse_for_probabilities(const T* lse, const Block& block, T* out) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  for (int64_t r = 0; r < block.rows; ++r) out[r] = lse[r] == kNothing<T> ? infinity : lse[r];
  for (int64_t r = block.rows; r < block.padded; ++r) out[r] = infinity;
}

// Slots 0..m-1 of a row's table are h_1..h_m, slots m..2m-1 are l_m..l_1, then beta and the number of valid
// keys. Rows with no more than 2m valid keys keep all of them, by rank. `sorted` are the row's logits.
template <typename T>
void keep_curve_table(const T* sorted, int64_t keys, int64_t valid, int64_t m, T lse, T* table) {
  const int64_t slots = curve_width(keys, m) - 2;
  const auto p = [&](int64_t rank) { return exponential(sorted[rank] - lse); };
  T beta = 0;
  if (valid <= 2 * m) {
    for (int64_t r = 0; r < slots; ++r) table[r] = r < valid ? p(r) : T(0);
  } else {
    for (int64_t r = 0; r < m; ++r) {
      table[r] = p(r);
      table[m + r] = p(valid - m + r);
    }
    const T rest = T(1) - table[m - 1];
    const T floor = T(1.0 / 16777216.0);
    const auto count = static_cast<T>(valid - 2 * m + 2);
    // ln(h_m / l_m) from the logits: l_m itself may have underflowed.
    const T fall = sorted[m - 1] - sorted[valid - m];
    beta = (fall + T(2) * (table[m - 1] - p(m))) / (count * (rest < floor ? floor : rest));
    beta = beta > T(1e30) ? T(1e30) : beta;  // finite, so that beta * 0 is 0
  }
  table[slots] = beta;
  table[slots + 1] = static_cast<T>(valid);
}

// The curve's rows: ranks and table from whole rows of logits. Needs lse; scores hold the logits.
template <typename T>
void keep_curve(const AttentionProblem<T>& problem, const Block& block, Scratch<T>& scratch) {
  constexpr int width = kWidth<T>;
  const int64_t keys = block.keys, stride = block.padded, bits = rank_bits(keys);
  T* const z = scratch.scores;
  auto* const ranks = reinterpret_cast<Lane<T>*>(scratch.products);
  for (int64_t r = 0; r < block.rows; ++r) {
    if (scratch.lse[r] == scratch.lse[r]) continue;
    for (int64_t j = 0; j < keys; ++j)
      z[j * stride + r] = scratch.lse[r];  // a NaN anywhere is one everywhere
  }
  for (int64_t r = 0; r < block.rows; r += width) {
    const int64_t height = block.rows - r < width ? block.rows - r : width;
    const int64_t row = block.residual_row + r;
    const auto keep_row = [&](int64_t l, int64_t valid) {
      keep_curve_table(scratch.row, keys, valid, problem.m, scratch.lse[r + l],
                       problem.table + (row + l) * problem.table_width);
    };
    const auto valid_keys = [&](int64_t l) {
      int64_t valid = 0;
      for (int64_t j = 0; j < keys; ++j) valid += z[j * stride + r + l] != kNothing<T> ? 1 : 0;
      return valid;
    };
    if (keys <= kCountingTileKeys) {
      rank_lanes<T>(z + r, stride, keys, ranks + r);
      for (int64_t l = 0; l < height; ++l) {
        for (int64_t j = 0; j < keys; ++j) {
          scratch.row[ranks[j * stride + r + l]] = z[j * stride + r + l];
        }
        keep_row(l, valid_keys(l));
      }
    } else if constexpr (std::is_same_v<T, float>) {
      constexpr int lanes = kWidth<uint64_t>;
      auto* const words = static_cast<Words*>(scratch.rest);
      for (int64_t part = 0; part < height; part += lanes) {
        const int64_t rows = height - part < lanes ? height - part : lanes;
        rank_by_network(z + r + part, stride, keys, rows, words, ranks + r + part);
        for (int64_t l = 0; l < rows; ++l) {
          // Masked keys are last, and a word says which they are.
          int64_t valid = keys;
          while (valid > 0 && logit_of_word(words[valid - 1][l]) == kNothing<T>) --valid;
          const int64_t few = problem.m + 1;
          const auto take = [&](int64_t from, int64_t to) {
            for (int64_t k = from; k < to; ++k) scratch.row[k] = logit_of_word(words[k][l]);
          };
          take(0, std::min(few, keys));
          take(std::max<int64_t>(0, valid - few), valid);
          if (valid <= 2 * problem.m) take(0, valid);
          keep_row(part + l, valid);
        }
      }
    } else {
      CurveScratch<T> sort(scratch.rest, keys);
      for (int64_t l = 0; l < height; ++l) {
        for (int64_t j = 0; j < keys; ++j) sort.by_rank[j] = z[j * stride + r + l];
        rank_by_radix(sort.by_rank, keys, sort.ranks, sort.key, sort.key2, sort.order, sort.order2);
        for (int64_t j = 0; j < keys; ++j) {
          ranks[j * stride + r + l] = sort.ranks[j];
          scratch.row[sort.ranks[j]] = sort.by_rank[j];
        }
        keep_row(l, valid_keys(l));
      }
    }
    pack_lanes<T>(ranks + r, stride, keys, bits, height, problem.codes + row * problem.code_bytes,
                  problem.code_bytes);
  }
}

// Keeps a tile of P: scores hold its logits, lse is known.
template <typename T>
void keep_tile(const AttentionProblem<T>& problem, const Block& block, const Tile& tile,
               Scratch<T>& scratch) {
  const int64_t count = tile.end - tile.begin;
  probabilities_tile(scratch.scores, block.padded, count, scratch.correction);
  if (problem.keep == Keep::probabilities) {
    transpose<false>(scratch.scores, block.padded, count, block.rows, T(1),
                     problem.probabilities + block.residual_row * problem.keys + tile.begin, problem.keys);
  } else {
    quantize_tile(scratch.scores, block, tile, problem.bits, scratch.step, problem.seed,
                  problem.codes + block.residual_row * problem.code_bytes, problem.code_bytes);
  }
}

// What the forward of policy sampled collects on its way through the keys.
template <typename T>
struct SampleWeights {
  T *weights, *mass;  // [keys]; [tiles][2][rows]: a tile's sums and the maxima they are relative to

  SampleWeights(const AttentionProblem<T>& problem, const Scratch<T>& scratch)
      : weights(static_cast<T*>(scratch.rest)), mass(weights + round_up(problem.keys, kTileUnit)) {}
  T* tile_mass(const AttentionProblem<T>& problem, int64_t begin) const {
    return mass + begin / problem.tile_keys * 2 * problem.block_rows;
  }
};

template <typename T>
void keep_sample(const AttentionProblem<T>& problem, const Block& block, const SampleWeights<T>& sample,
                 Scratch<T>& scratch) {
  for (int64_t begin = 0; begin < block.keys; begin += problem.tile_keys) {
    const T* const mass = sample.tile_mass(problem, begin);
    settle_weights(mass, mass + problem.block_rows, scratch.lse, block.rows, sample.weights + begin,
                   std::min(problem.tile_keys, block.keys - begin));
  }
  const int64_t tiles = (problem.queries + kSampleRows - 1) / kSampleRows;
  const int64_t tile = block.first / kSampleRows;
  const int64_t at = (static_cast<int64_t>(block.head) * tiles + tile) * problem.slots;
  draw_keys(sample.weights, block.keys, problem.slots,
            tile_uniform(problem.seed, block.head, static_cast<uint32_t>(tile)), problem.drawn + at,
            problem.inverse + at);
}

template <typename T>
void forward_block(const AttentionForward<T>& problem, const Block& block, Scratch<T>& scratch,
                   Ahead& ahead) {
  const bool curve = problem.keep == Keep::curve;
  const bool samples = problem.keep == Keep::sample;
  const bool drops = problem.drop_threshold > 0;
  const SampleWeights<T> sample(problem, scratch);
  const bool keeps_tiles = problem.keep == Keep::probabilities || problem.keep == Keep::codes;
  for (int64_t r = 0; r < block.padded; ++r) {
    scratch.maximum[r] = kNothing<T>;
    scratch.sum[r] = 0;
  }
  transpose_query(problem, block, scratch);
  bool first = true;
  for (int64_t begin = 0; begin < block.keys; begin += problem.tile_keys) {
    const Tile tile = make_tile(problem, block, begin, begin + problem.tile_keys, curve, scratch.allowed);
    const int64_t count = tile.end - tile.begin;
    if (samples) {
      for (int64_t j = begin; j < std::min(begin + problem.tile_keys, block.keys); ++j) sample.weights[j] = 0;
      T* const mass = sample.tile_mass(problem, begin);
      for (int64_t r = 0; r < 2 * problem.block_rows; ++r) mass[r] = 0;
    }
    if (count <= 0) continue;
    score_tile(problem, block, tile, scratch, ahead);
    if (curve) {
      // Whole rows: their logits are sorted before they turn into P.
      std::memcpy(scratch.products, scratch.scores, static_cast<size_t>(count * block.padded) * sizeof(T));
    }
    const TileDropout<T> drop = tile_dropout(problem, block, tile);
    const bool corrects =
        (drops && !samples ? softmax_tile<true, T>
                           : softmax_tile<false, T>)(scratch.scores, block.padded, count, scratch.maximum,
                                                     scratch.sum, scratch.correction, drop);
    if (samples) {
      T* const mass = sample.tile_mass(problem, begin);
      weigh_tile(scratch.scores, block.padded, count, block.rows, scratch.maximum, scratch.sum, scratch.delta,
                 sample.weights + tile.begin, mass, mass + problem.block_rows);
      if (drops) drop_tile(scratch.scores, block.padded, count, drop);
    }
    const Rows<T> value = rows_of(problem.value, problem.narrow_value, block.b, block.kv_head,
                                  block.key_row + tile.begin, count, problem.value_dim, scratch.wide_keys);
    if (first) {
      multiply<true, false>(block.rows, problem.value_dim, count, scratch.scores, block.padded, value.data,
                            value.stride, scratch.output, scratch.output_stride, ahead);
    } else {
      if (corrects) {
        for (int64_t r = 0; r < block.rows; ++r) {
          T* const out = scratch.output + r * scratch.output_stride;
          const T factor = scratch.correction[r];
#pragma omp simd
          for (int64_t d = 0; d < problem.value_dim; ++d) out[d] *= factor;
        }
      }
      multiply<true, true>(block.rows, problem.value_dim, count, scratch.scores, block.padded, value.data,
                           value.stride, scratch.output, scratch.output_stride, ahead);
    }
    first = false;
  }
  finish_lse(problem, block, scratch);
  for (int64_t r = 0; r < block.rows; ++r) {
    T* const out = problem.output.at(block.b, block.h, block.query_row + block.first + r);
    const T* const from = scratch.output + r * scratch.output_stride;
    if (scratch.sum[r] == 0) {
      const T empty = scratch.lse[r] == kNothing<T> ? T(0) : scratch.lse[r];
      for (int64_t d = 0; d < problem.value_dim; ++d) out[d] = empty;
    } else {
      const T inverse = T(1) / scratch.sum[r];
#pragma omp simd
      for (int64_t d = 0; d < problem.value_dim; ++d) out[d] = from[d] * inverse;
    }
  }
  if (problem.keep == Keep::lse || samples) {
    for (int64_t r = 0; r < block.rows; ++r) problem.lse[block.residual_row + r] = scratch.lse[r];
    if (samples) keep_sample(problem, block, sample, scratch);
  } else if (curve) {
    if (block.keys > 0) {
      std::swap(scratch.scores, scratch.products);
      keep_curve(problem, block, scratch);
    }
  } else if (keeps_tiles) {
    lse_for_probabilities(scratch.lse, block, scratch.correction);
    if (problem.keep == Keep::probabilities) {
      std::memset(problem.probabilities + block.residual_row * problem.keys, 0,
                  static_cast<size_t>(block.rows * problem.keys) * sizeof(T));
    } else {
      std::memset(problem.codes + block.residual_row * problem.code_bytes, 0,
                  static_cast<size_t>(block.rows * problem.code_bytes));
      for (int64_t r = 0; r < block.padded; ++r) {
        // The row's largest p by the operations that its codes are made from.
        const T lse = scratch.correction[r];
        scratch.step[r] = lse != lse ? lse : exponential(scratch.maximum[r] - lse);
        if (r < block.rows) problem.table[block.residual_row + r] = scratch.step[r];
      }
    }
    for (int64_t begin = 0; begin < block.keys; begin += problem.tile_keys) {
      const Tile tile = make_tile(problem, block, begin, begin + problem.tile_keys, false, scratch.allowed);
      if (tile.begin >= tile.end) continue;
      score_tile(problem, block, tile, scratch, ahead);
      keep_tile(problem, block, tile, scratch);
    }
  }
}

// One or two query rows (decoding): vectors run along keys and dimensions instead of rows.
constexpr int64_t kFewRows = 2;

template <typename T>
bool has_few_rows(const AttentionForward<T>& problem, const Block& block) {
  return block.rows <= kFewRows && !problem.bfloat16 && problem.drop_threshold == 0 &&
         problem.mask.kind != MaskKind::additive &&
         (problem.keep == Keep::nothing || problem.keep == Keep::lse);
}

// Products of a and b in lanes, to be added up.
template <typename T>
REMNANT_ALWAYS_INLINE Vector<T> dot_lanes(const T* a, const T* b, int64_t count) {
  constexpr int width = kWidth<T>;
  Vector<T> sum[2] = {};
  int64_t d = 0;
  for (; d + 2 * width <= count; d += 2 * width) {
    sum[0] += load(a + d) * load(b + d);
    sum[1] += load(a + d + width) * load(b + d + width);
  }
  for (; d < count; d += width) {
    const int64_t left = count - d < width ? count - d : width;
    sum[0] += load_part(a + d, left) * load_part(b + d, left);
  }
  return sum[0] + sum[1];
}

template <typename T>
T dot(const T* a, const T* b, int64_t count) {
  return add_lanes<T>(dot_lanes(a, b, count));
}

// a's products with `count` rows of b. A vector's worth of rows is added up at once, across a transposition.
template <typename T>
void dot_rows(const T* a, const T* b, int64_t stride, int64_t dims, int64_t count, T* out) {
  constexpr int width = kWidth<T>;
  int64_t j = 0;
  for (; j + width <= count; j += width) {
    Vector<T> square[width];
#pragma GCC unroll 16
    for (int e = 0; e < width; ++e) square[e] = dot_lanes(a, b + (j + e) * stride, dims);
    transpose_square<T>(square);
#pragma GCC unroll 16
    for (int e = 1; e < width; ++e) square[0] += square[e];
    store(out + j, square[0]);
  }
  for (; j < count; ++j) out[j] = dot(a, b + j * stride, dims);
}

template <typename T>
void forward_few_rows(const AttentionForward<T>& problem, const Block& block, Scratch<T>& scratch) {
  constexpr int width = kWidth<T>;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t i = block.first + r;
    const T* const query = problem.query.at(block.b, block.h, block.query_row + i);
    T* const sums = scratch.output;
    T* const scaled = scratch.query;
    for (int64_t d = 0; d < problem.head_dim; ++d) scaled[d] = query[d] * problem.scale;
    for (int64_t d = 0; d < problem.value_dim; ++d) sums[d] = 0;
    const Range range = row_range(problem, block.keys, i);
    const auto* may = problem.mask.kind == MaskKind::boolean
                          ? static_cast<const uint8_t*>(problem.mask.data) + block.b * problem.mask.batch +
                                block.h * problem.mask.head + i * problem.mask.row
                          : nullptr;
    T highest = kNothing<T>, sum = 0;
    T* const z = scratch.row;
    for (int64_t begin = range.begin; begin < range.end; begin += problem.tile_keys) {
      const int64_t count = std::min(problem.tile_keys, range.end - begin);
      T now = highest;
      dot_rows(scaled, problem.key.at(block.b, block.kv_head, block.key_row + begin), problem.key.row,
               problem.head_dim, count, z);
      for (int64_t j = 0; may != nullptr && j < count; ++j) {
        if (may[(begin + j) * problem.mask.column] == 0) z[j] = kNothing<T>;
      }
#pragma omp simd reduction(max : now)
      for (int64_t j = 0; j < count; ++j) now = z[j] > now ? z[j] : now;
      const T base = now == kNothing<T> ? T(0) : now;
      const T factor = exponential(highest - base);
      sum *= factor;
      T part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t j = 0; j < count; ++j) {
        z[j] = exponential(z[j] - base);
        part += z[j];
      }
      sum += part;
      highest = now;
      const T* const values = problem.value.at(block.b, block.kv_head, block.key_row + begin);
      for (int64_t d = 0; d < problem.value_dim; d += 4 * width) {
        const int64_t left = problem.value_dim - d;
        const auto lanes = [&](int v) { return std::clamp<int64_t>(left - v * width, 0, width); };
        Vector<T> total[4];
        const bool whole = left >= 4 * width;
        for (int v = 0; v < 4; ++v) total[v] = load_part(sums + d + v * width, lanes(v)) * factor;
        for (int64_t j = 0; j < count; ++j) {
          const T* const value = values + j * problem.value.row + d;
          for (int v = 0; v < 4; ++v) {
            total[v] +=
                z[j] * (whole ? load(value + v * width)
                              : (lanes(v) > 0 ? load_part(value + v * width, lanes(v)) : Vector<T>{}));
          }
        }
        for (int v = 0; v < 4; ++v) {
          if (lanes(v) > 0) store_part(sums + d + v * width, total[v], lanes(v));
        }
      }
    }
    T lse = highest + std::log(sum);
    T* const out = problem.output.at(block.b, block.h, block.query_row + i);
    if (sum == 0) {
      const bool empty = !attends(problem, block, i);
      lse = empty ? kNothing<T> : std::numeric_limits<T>::quiet_NaN();
      for (int64_t d = 0; d < problem.value_dim; ++d) out[d] = empty ? T(0) : lse;
    } else {
      for (int64_t d = 0; d < problem.value_dim; ++d) out[d] = sums[d] / sum;
      if (sum != sum) lse = sum;  // NaN scores do not reach the maximum
    }
    if (problem.keep == Keep::lse) problem.lse[block.residual_row + r] = lse;
  }
}

template <typename T>
Block forward_task(const AttentionForward<T>& problem, int64_t task) {
  int64_t b = 0, queries = problem.queries, first_task = 0;
  if (problem.sequences != nullptr) {
    // The last sequence that begins no later.
    const Sequence* const after =
        std::upper_bound(problem.sequences, problem.sequences + problem.batch, task,
                         [](int64_t t, const Sequence& s) { return t < s.first_task; });
    b = after - problem.sequences - 1;
    queries = problem.sequences[b].queries;
    first_task = problem.sequences[b].first_task;
  } else {
    const int64_t each = problem.heads * ((queries + problem.block_rows - 1) / problem.block_rows);
    b = task / each;
    first_task = b * each;
  }
  const int64_t blocks = (queries + problem.block_rows - 1) / problem.block_rows;
  return make_block(problem, b, (task - first_task) / blocks,
                    (task - first_task) % blocks * problem.block_rows);
}

template <typename T>
void zero_rows(const HeadView<T>& view, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t dims) {
  if (view.data == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    std::memset(view.at(b, h, first + r), 0, static_cast<size_t>(dims) * sizeof(T));
  }
}

// Which of `lanes` an item belongs to: there and back again, so that triangles share out evenly.
int64_t lane_of(int64_t item, int64_t lanes) {
  const int64_t at = item % (2 * lanes);
  return at < lanes ? at : 2 * lanes - 1 - at;
}

// A tile of P from what the policy kept, into scores; logits instead where lse will make P of them.
template <typename T>
void rebuild_tile(const AttentionBackward<T>& problem, const Block& block, const Tile& tile,
                  Scratch<T>& scratch, Ahead& ahead) {
  const int64_t count = tile.end - tile.begin;
  switch (problem.keep) {
    case Keep::probabilities:
      transpose<true>(problem.probabilities + block.residual_row * problem.keys + tile.begin, problem.keys,
                      block.rows, count, T(1), scratch.scores, block.padded);
      break;
    case Keep::codes:
      dequantize_tile(problem.codes + block.residual_row * problem.code_bytes, problem.code_bytes, block,
                      tile, problem.bits, scratch.step, scratch.scores);
      break;
    case Keep::curve:
      decode_curve_tile(problem.codes + block.residual_row * problem.code_bytes, problem.code_bytes,
                        problem.table + block.residual_row * problem.table_width, problem.table_width, block,
                        problem.m, problem.paper_text, scratch.scores);
      break;
    default:
      score_tile(problem, block, tile, scratch, ahead);
      return;
  }
  // Padding that the transposition does not reach, and keys up to a whole block of columns.
  const int64_t written = round_up(block.rows, kWidth<T>);
  for (int64_t j = 0; j < count && written < block.padded; ++j) {
    for (int64_t r = written; r < block.padded; ++r) scratch.scores[j * block.padded + r] = 0;
  }
  const int64_t end = round_up(count, kDropoutColumns);
  std::memset(scratch.scores + count * block.padded, 0,
              static_cast<size_t>((end - count) * block.padded) * sizeof(T));
}

// Whether delta is g . o; else it is taken from the decoded row.
template <typename T>
bool has_output(const AttentionBackward<T>& problem) {
  return problem.output.data != nullptr || problem.narrow_output.data != nullptr;
}

// What a block's tiles share in backward: q and g transposed and scaled, lse, delta.
template <typename T>
void prepare_rows(const AttentionBackward<T>& problem, const Block& block, const Rows<T>& g, bool needs_dz,
                  Scratch<T>& scratch) {
  if (problem.keep == Keep::lse || problem.keep == Keep::sample) {
    transpose_query(problem, block, scratch);
    lse_for_probabilities(problem.lse + block.residual_row, block, scratch.lse);
  } else if (problem.keep == Keep::codes) {
    const auto levels = static_cast<T>((1 << problem.bits) - 1);
    for (int64_t r = 0; r < block.padded; ++r) {
      scratch.step[r] = r < block.rows ? problem.table[block.residual_row + r] / levels : T(0);
    }
  }
  for (int64_t r = 0; r < block.padded; ++r) scratch.delta[r] = 0;
  if (needs_dz) {
    if (problem.bfloat16) {
      pair_rows(problem.narrow_grad_output, block, problem.value_dim, scratch, scratch.grad);
    } else {
      // The scale of dq and dk is in g here, so that no tile has to be scaled.
      transpose<true>(g.data, g.stride, block.rows, problem.value_dim, problem.scale, scratch.grad,
                      block.padded);
      for (int64_t d = 0; d < problem.value_dim; ++d) {
        for (int64_t r = round_up(block.rows, kWidth<T>); r < block.padded; ++r)
          scratch.grad[d * block.padded + r] = 0;
      }
    }
    if (has_output(problem)) {
      const Rows<T> output =
          rows_of(problem.output, problem.narrow_output, block.b, block.h, block.query_row + block.first,
                  block.rows, problem.value_dim, scratch.output);
      for (int64_t r = 0; r < block.rows; ++r) {
        scratch.delta[r] =
            problem.scale * dot(g.data + r * g.stride, output.data + r * output.stride, problem.value_dim);
      }
    }
  }
}

// `opens`: the lane's first block of queries, which writes dK and dV where later ones add.
template <typename T>
void backward_block(const AttentionBackward<T>& problem, const Block& block, int64_t segment, bool opens,
                    Scratch<T>& scratch, Ahead& ahead) {
  const bool needs_dz = problem.grad_query.data != nullptr || problem.grad_key.data != nullptr;
  const bool drops = problem.drop_threshold > 0;
  const bool curve = problem.keep == Keep::curve;
  const int64_t query_row = block.query_row + block.first;
  const Rows<T> g = rows_of(problem.grad_output, problem.narrow_grad_output, block.b, block.h, query_row,
                            block.rows, problem.value_dim, scratch.wide_grad);
  Rows<T> query{};
  if (problem.grad_key.data != nullptr) {
    query = rows_of(problem.query, problem.narrow_query, block.b, block.h, query_row, block.rows,
                    problem.head_dim, scratch.wide_query);
  }
  prepare_rows(problem, block, g, needs_dz, scratch);
  bool adds_query = problem.phase > 0;
  for (int64_t index = 0, begin = 0; begin < block.keys; ++index, begin += problem.tile_keys) {
    if (problem.lanes > 1 && lane_of(index, problem.lanes) != segment) continue;
    const Tile tile = make_tile(problem, block, begin, begin + problem.tile_keys, curve, scratch.allowed);
    const int64_t count = tile.end - tile.begin;
    const int64_t whole = std::min(problem.tile_keys, block.keys - begin);
    const bool writes = opens && count == whole;
    if (opens && !writes) {
      zero_rows(problem.grad_key, block.b, block.kv_head, block.key_row + begin, whole, problem.head_dim);
      zero_rows(problem.grad_value, block.b, block.kv_head, block.key_row + begin, whole, problem.value_dim);
    }
    if (count <= 0) continue;
    rebuild_tile(problem, block, tile, scratch, ahead);
    T* const products = needs_dz ? scratch.products : nullptr;
    if (needs_dz) {
      if (problem.bfloat16) {
        multiply_narrow(problem, problem.narrow_value, block, tile, problem.value_dim, scratch.grad, scratch,
                        products);
      } else {
        multiply<false, false>(count, block.padded, problem.value_dim,
                               problem.value.at(block.b, block.kv_head, block.key_row + tile.begin),
                               problem.value.row, scratch.grad, block.padded, products, block.padded, ahead);
      }
      const int64_t end = round_up(count, kDropoutColumns);
      std::memset(products + count * block.padded, 0,
                  static_cast<size_t>((end - count) * block.padded) * sizeof(T));
    }
    const TileDropout<T> drop = tile_dropout(problem, block, tile);
    if (needs_dz && !has_output(problem)) {
      (drops ? delta_tile<true, T> : delta_tile<false, T>)(scratch.scores, products, block.padded, count,
                                                           scratch.delta, drop);
    }
    const bool logits = problem.keep == Keep::lse;
    const auto pass = drops ? (logits ? gradient_tile<true, true, T> : gradient_tile<true, false, T>)
                            : (logits ? gradient_tile<false, true, T> : gradient_tile<false, false, T>);
    pass(scratch.scores, products, block.padded, count, scratch.lse, scratch.delta, drop);
    const int64_t key_row = block.key_row + tile.begin;
    if (problem.grad_value.data != nullptr) {
      (writes ? multiply<false, false, T, Ahead>
              : multiply<false, true, T, Ahead>)(count, problem.value_dim, block.rows, scratch.scores,
                                                 block.padded, g.data, g.stride,
                                                 problem.grad_value.at(block.b, block.kv_head, key_row),
                                                 problem.grad_value.row, ahead);
    }
    if (problem.grad_key.data != nullptr) {
      (writes ? multiply<false, false, T, Ahead>
              : multiply<false, true, T, Ahead>)(count, problem.head_dim, block.rows, products, block.padded,
                                                 query.data, query.stride,
                                                 problem.grad_key.at(block.b, block.kv_head, key_row),
                                                 problem.grad_key.row, ahead);
    }
    if (problem.grad_query.data != nullptr) {
      const Rows<T> key = rows_of(problem.key, problem.narrow_key, block.b, block.kv_head, key_row, count,
                                  problem.head_dim, scratch.wide_keys);
      (adds_query ? multiply<true, true, T, Ahead>
                  : multiply<true, false, T, Ahead>)(block.rows, problem.head_dim, count, products,
                                                     block.padded, key.data, key.stride,
                                                     problem.grad_query.at(block.b, block.h, query_row),
                                                     problem.grad_query.row, ahead);
      adds_query = true;
    }
  }
  if (!adds_query) {
    zero_rows(problem.grad_query, block.b, block.h, query_row, block.rows, problem.head_dim);
  }
}

// Policy sampled: the block's drawn keys, gathered so that their products are as dense as a tile's, and the
// gradients of their rows scattered back.
template <typename T>
void backward_sampled(const AttentionBackward<T>& problem, const Block& block, int64_t segment, bool opens,
                      Scratch<T>& scratch) {
  const bool needs_dz = problem.grad_query.data != nullptr || problem.grad_key.data != nullptr;
  const int64_t query_row = block.query_row + block.first;
  const T* const g = problem.grad_output.at(block.b, block.h, query_row);
  const int64_t key_dim = problem.head_dim, value_dim = problem.value_dim;
  const int64_t key_stride = round_up(key_dim, kTileUnit), value_stride = round_up(value_dim, kTileUnit);
  prepare_rows(problem, block, {g, problem.grad_output.row}, needs_dz, scratch);
  if (opens) {
    for (int64_t index = 0, begin = 0; begin < block.keys; ++index, begin += problem.tile_keys) {
      if (problem.lanes > 1 && lane_of(index, problem.lanes) != segment) continue;
      const int64_t count = std::min(problem.tile_keys, block.keys - begin);
      zero_rows(problem.grad_key, block.b, block.kv_head, block.key_row + begin, count, key_dim);
      zero_rows(problem.grad_value, block.b, block.kv_head, block.key_row + begin, count, value_dim);
    }
  }
  auto* const keys = static_cast<T*>(scratch.rest);
  T* const values = keys + problem.tile_keys * key_stride;
  T* const sums = values + problem.tile_keys * value_stride;
  auto* const chosen =
      reinterpret_cast<int32_t*>(sums + problem.tile_keys * std::max(key_stride, value_stride));
  T* const inverse = scratch.row;
  const int64_t tiles = (problem.queries + kSampleRows - 1) / kSampleRows;
  const int64_t at = (static_cast<int64_t>(block.head) * tiles + block.first / kSampleRows) * problem.slots;
  bool adds_query = problem.phase > 0;
  for (int64_t slot = 0; slot < problem.slots;) {
    int64_t count = 0;
    for (; slot < problem.slots && count < problem.tile_keys; ++slot) {
      const int32_t key = problem.drawn[at + slot];
      if (key < 0) continue;
      if (problem.lanes > 1 && lane_of(key / problem.tile_keys, problem.lanes) != segment) continue;
      chosen[count] = key;
      inverse[count] = problem.inverse[at + slot];
      std::memcpy(keys + count * key_stride, problem.key.at(block.b, block.kv_head, block.key_row + key),
                  static_cast<size_t>(key_dim) * sizeof(T));
      if (needs_dz) {
        std::memcpy(values + count * value_stride,
                    problem.value.at(block.b, block.kv_head, block.key_row + key),
                    static_cast<size_t>(value_dim) * sizeof(T));
      }
      ++count;
    }
    if (count == 0) break;
    multiply<false, false>(count, block.padded, key_dim, keys, key_stride, scratch.query, block.padded,
                           scratch.scores, block.padded);
    mask_drawn(problem, block, chosen, count, scratch.scores);
    T* const products = needs_dz ? scratch.products : nullptr;
    if (needs_dz) {
      multiply<false, false>(count, block.padded, value_dim, values, value_stride, scratch.grad, block.padded,
                             products, block.padded);
    }
    (problem.drop_threshold > 0 ? gradient_drawn<true, T>
                                : gradient_drawn<false, T>)(problem, block, chosen, inverse, count,
                                                            scratch.lse, scratch.delta, scratch.scores,
                                                            products);
    const auto scatter = [&](const HeadView<T>& grad, const T* factors, const T* rows, int64_t row_stride,
                             int64_t dims, int64_t stride) {
      multiply<false, false>(count, dims, block.rows, factors, block.padded, rows, row_stride, sums, stride);
      for (int64_t s = 0; s < count; ++s) {
        T* const to = grad.at(block.b, block.kv_head, block.key_row + chosen[s]);
        const T* const from = sums + s * stride;
#pragma omp simd
        for (int64_t d = 0; d < dims; ++d) to[d] += from[d];
      }
    };
    if (problem.grad_value.data != nullptr) {
      scatter(problem.grad_value, scratch.scores, g, problem.grad_output.row, value_dim, value_stride);
    }
    if (problem.grad_key.data != nullptr) {
      scatter(problem.grad_key, products, problem.query.at(block.b, block.h, query_row), problem.query.row,
              key_dim, key_stride);
    }
    if (problem.grad_query.data != nullptr) {
      (adds_query ? multiply<true, true, T>
                  : multiply<true, false, T>)(block.rows, key_dim, count, products, block.padded, keys,
                                              key_stride, problem.grad_query.at(block.b, block.h, query_row),
                                              problem.grad_query.row);
      adds_query = true;
    }
  }
  if (!adds_query) {
    zero_rows(problem.grad_query, block.b, block.h, query_row, block.rows, key_dim);
  }
}

// The first tile of keys and values of another head's block; returns how many, 0 for the same head.
template <typename Problem>
int64_t look_ahead_at_keys(const Problem& problem, const Block& block, const Block& next, Ahead& ahead) {
  if (next.kv_head == block.kv_head && next.b == block.b) return 0;
  const int64_t keys = std::min(next.keys, problem.tile_keys);
  ahead.add(problem.key, next.b, next.kv_head, next.key_row, keys, problem.head_dim);
  ahead.add(problem.narrow_key, next.b, next.kv_head, next.key_row, keys, problem.head_dim);
  ahead.add(problem.value, next.b, next.kv_head, next.key_row, keys, problem.value_dim);
  ahead.add(problem.narrow_value, next.b, next.kv_head, next.key_row, keys, problem.value_dim);
  return keys;
}

// What a block reads and writes, and where its head is another one, the first tile of keys: with short rows
// that is all of them. What is written is asked for too, as a store has to have its line first.
template <typename T>
void look_ahead(const AttentionForward<T>& problem, const Block& block, const Block& next, Ahead& ahead) {
  const int64_t first = next.query_row + next.first;
  ahead.add(problem.query, next.b, next.h, first, next.rows, problem.head_dim);
  ahead.add(problem.narrow_query, next.b, next.h, first, next.rows, problem.head_dim);
  look_ahead_at_keys(problem, block, next, ahead);
  ahead.add(problem.output, next.b, next.h, first, next.rows, problem.value_dim);
}

template <typename T>
void look_ahead(const AttentionBackward<T>& problem, const Block& block, const Block& next, Ahead& ahead) {
  const int64_t first = next.query_row + next.first;
  ahead.add(problem.query, next.b, next.h, first, next.rows, problem.head_dim);
  ahead.add(problem.narrow_query, next.b, next.h, first, next.rows, problem.head_dim);
  ahead.add(problem.grad_output, next.b, next.h, first, next.rows, problem.value_dim);
  ahead.add(problem.narrow_grad_output, next.b, next.h, first, next.rows, problem.value_dim);
  ahead.add(problem.output, next.b, next.h, first, next.rows, problem.value_dim);
  ahead.add(problem.narrow_output, next.b, next.h, first, next.rows, problem.value_dim);
  if (const int64_t keys = look_ahead_at_keys(problem, block, next, ahead); keys > 0) {
    ahead.add(problem.grad_value, next.b, next.kv_head, next.key_row, keys, problem.value_dim);
    ahead.add(problem.grad_key, next.b, next.kv_head, next.key_row, keys, problem.head_dim);
  }
  ahead.add(problem.grad_query, next.b, next.h, first, next.rows, problem.head_dim);
}

}  // namespace

template <typename T>
void attention_forward(const AttentionForward<T>& problem, int64_t begin, int64_t end, void* memory) {
  const TileRegisters registers(problem.bfloat16);
  for (int64_t task = begin; task < end; ++task) {
    Scratch<T> scratch(memory, problem);
    const Block block = forward_task(problem, task);
    if (has_few_rows(problem, block)) {
      forward_few_rows(problem, block, scratch);
    } else {
      Ahead ahead;
      if (task + 1 < end) look_ahead(problem, block, forward_task(problem, task + 1), ahead);
      forward_block(problem, block, scratch, ahead);
    }
  }
}

template <typename T>
void attention_backward(const AttentionBackward<T>& problem, int64_t begin, int64_t end, void* memory) {
  const TileRegisters registers(problem.bfloat16);
  Scratch<T> scratch(memory, problem);
  const int64_t group = problem.heads / problem.kv_heads;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t lane = task % problem.lanes;
    const int64_t b = task / problem.lanes / problem.kv_heads;
    const int64_t kv_head = task / problem.lanes % problem.kv_heads;
    const int64_t segment = (lane + problem.phase) % problem.lanes;
    Sequence sequence{0, problem.queries, 0, problem.keys, 0};
    if (problem.sequences != nullptr) sequence = problem.sequences[b];
    bool opens = problem.phase == 0;
    int64_t item = 0;
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      for (int64_t first = 0; first < sequence.queries; first += problem.block_rows, ++item) {
        if (lane_of(item, problem.lanes) != lane) continue;
        const Block block = make_block(problem, b, h, first);
        if (problem.keep == Keep::sample) {
          backward_sampled(problem, block, segment, opens, scratch);
        } else {
          Ahead ahead;
          if (first + problem.block_rows < sequence.queries) {
            look_ahead(problem, block, make_block(problem, b, h, first + problem.block_rows), ahead);
          } else if (h + 1 < (kv_head + 1) * group) {
            look_ahead(problem, block, make_block(problem, b, h + 1, 0), ahead);
          } else if (problem.lanes == 1 && task + 1 < end) {
            const int64_t next = task + 1;
            look_ahead(problem, block,
                       make_block(problem, next / problem.kv_heads, next % problem.kv_heads * group, 0),
                       ahead);
          }
          backward_block(problem, block, segment, opens, scratch, ahead);
        }
        opens = false;
      }
    }
    if (!opens) continue;
    // No queries in this lane: nothing has written its segment.
    for (int64_t index = 0, at = 0; at < sequence.keys; ++index, at += problem.tile_keys) {
      if (lane_of(index, problem.lanes) != segment) continue;
      const int64_t count = std::min(problem.tile_keys, sequence.keys - at);
      zero_rows(problem.grad_key, b, kv_head, sequence.first_key + at, count, problem.head_dim);
      zero_rows(problem.grad_value, b, kv_head, sequence.first_key + at, count, problem.value_dim);
    }
  }
}

template void attention_forward(const AttentionForward<float>&, int64_t, int64_t, void*);
template void attention_forward(const AttentionForward<double>&, int64_t, int64_t, void*);
template void attention_backward(const AttentionBackward<float>&, int64_t, int64_t, void*);
template void attention_backward(const AttentionBackward<double>&, int64_t, int64_t, void*);

}  // namespace remnant::kernels::REMNANT_VARIANT
