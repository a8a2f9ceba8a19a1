#pragma once

#include "kernels/hidden_codes.h"
#include "kernels/philox.h"

#include <cstdint>

/// Torch-free CPU kernels. They run serially over a range of tasks and neither throw nor print.
namespace remnant::kernels {

/// A [B, H, N, D] tensor whose last stride is 1.
template <typename T>
struct HeadView {
  T* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;  // strides
  REMNANT_ALWAYS_INLINE T* at(int64_t b, int64_t h, int64_t i) const {
    return data + b * batch + h * head + i * row;
  }
};

enum class MaskKind { none, boolean, additive };

template <typename T>
struct MaskView {
  MaskKind kind = MaskKind::none;
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;  // strides in elements, 0 where broadcast
};

/// What backward is fed with, one of the policies that keep less than P.
enum class Keep { nothing, probabilities, lse, curve, codes, sample };

/// One sequence of a packed batch: where its rows begin in the packed tensors, how many there are, and how
/// many of the forward's tasks come before it.
struct Sequence {
  int64_t first_query = 0, queries = 0, first_key = 0, keys = 0, first_task = 0;
};

template <typename T>
struct AttentionProblem {
  int64_t batch = 0, heads = 0, kv_heads = 0, queries = 0, keys = 0, head_dim = 0, value_dim = 0;
  const Sequence* sequences = nullptr;  // [batch] when packed; queries and keys are then the longest ones
  HeadView<const T> query, key, value;
  /// Inputs are bfloat16, which CpuKernels::bfloat16 allows: their views are these and not the ones above.
  bool bfloat16 = false;
  HeadView<const uint16_t> narrow_query, narrow_key, narrow_value;
  MaskView<T> mask;
  int64_t left = -1, right = -1;  // query i attends [i - left, i + right]; -1: no bound
  T scale = 1;
  int64_t drop_threshold = 0;  // of 65536; 0: no dropout
  Seed seed;
  Keep keep = Keep::nothing;
  int64_t m = 0;               // curve
  bool paper_text = false;     // curve
  int64_t bits = 0;            // codes
  T* probabilities = nullptr;  // [B, H, Nq, Nk]; keep probabilities
  T* lse = nullptr;            // [B, H, Nq]; keep lse, sample
  uint8_t* codes = nullptr;    // [B, H, Nq, code_bytes]: packed ranks or codes
  int64_t code_bytes = 0;
  T* table = nullptr;  // [B, H, Nq, table_width]: the curve's numbers, or the codes' row maximum
  int64_t table_width = 0;
  int32_t* drawn = nullptr;  // [B, H, tiles of kSampleRows, slots]; keep sample
  T* inverse = nullptr;      // [B, H, tiles of kSampleRows, slots]: 1 / probability; keep sample
  int64_t slots = 0;
  int64_t row_batch = 0, row_head = 0;  // residuals of query i of (b, h): b row_batch + h row_head + i
  // A tile of scores: rows of queries, at most block_rows, times keys; both multiples of kTileUnit.
  int64_t block_rows = 0, tile_keys = 0;
};

constexpr int64_t kTileUnit = 16;

template <typename T>
struct AttentionForward : AttentionProblem<T> {
  HeadView<T> output;
};

/// dK and dV belong to one key-value head, dQ to one query head, and nothing is shared by atomics: a task
/// is a key-value head and one of `lanes` shares of its query blocks. With several lanes the keys are cut
/// into as many segments, and in phase s lane t works on segment (t + s) mod lanes alone: call once a phase
/// and wait in between. Sums run in an order that depends on `lanes` only.
template <typename T>
struct AttentionBackward : AttentionProblem<T> {
  HeadView<const T> grad_output;
  HeadView<const T> output;  // for delta = g . o; null data: delta from the decoded row (biased policies)
  HeadView<const uint16_t> narrow_grad_output, narrow_output;  // instead where bfloat16
  HeadView<T> grad_query, grad_key, grad_value;  // null data where not needed; written, not read
  int64_t lanes = 1, phase = 0;

  REMNANT_ALWAYS_INLINE int64_t tasks() const { return this->batch * this->kv_heads * lanes; }
};

/// Sets block_rows and tile_keys for the problem's sizes and policy.
template <typename T>
void choose_tiles(AttentionProblem<T>& problem);
/// Tasks of the forward; fills sequences' first_task where packed.
template <typename T>
int64_t forward_tasks(const AttentionProblem<T>& problem, Sequence* sequences);
/// Elements of scratch for bfloat16 rows on their way into a product: of a tile or a block as they are, and
/// widened. 0 where no input is bfloat16.
template <typename T>
int64_t bfloat16_staging(const AttentionProblem<T>& problem);
template <typename T>
int64_t bfloat16_widening(const AttentionProblem<T>& problem);
/// Bytes of scratch one task runner needs. Independent of the number of keys, but for policies curve, which
/// sorts whole rows, and sampled, which weighs every key.
template <typename T>
int64_t attention_scratch_bytes(const AttentionProblem<T>& problem);

int64_t rank_bits(int64_t keys);
int64_t rank_bytes(int64_t keys);
/// 2m values (no more than keys), the decay and the number of valid keys.
int64_t curve_width(int64_t keys, int64_t m);

/// Rows of a softmax on their own, for softmax_approximation and tests. Row-major [rows, keys].
template <typename T>
struct CurveRows {
  int64_t rows = 0, keys = 0, m = 0;
  bool paper_text = false;
  const T* input = nullptr;  // encode: z, -inf where masked
  T* output = nullptr;       // encode: p; decode: p^
  uint8_t* codes = nullptr;
  T* table = nullptr;
};
template <typename T>
int64_t curve_scratch_bytes(int64_t keys);

/// Rows of logits to rows of their cross-entropy's gradient, in place.
template <typename T>
struct CrossEntropyRows {
  int64_t classes = 0, stride = 0;
  T* logits = nullptr;
  const int64_t* targets = nullptr;
  int64_t ignore_index = -100;
  T label_smoothing = 0;
  T scale = 1;            // of the gradient
  bool gradient = false;  // else logits are left as they are
  T* losses = nullptr;    // one a row, 0 where ignored
};

/// Rows of a feed-forward block's hidden layer, contiguous. Element (i, j) is dropped by column j of row
/// first_row + i of head 0, as an attention matrix's would be.
template <typename T>
struct HiddenRows {
  int64_t columns = 0, first_row = 0;
  HiddenActivation activation = HiddenActivation::relu;
  const T* bias = nullptr;  // null: none
  Seed seed;
  int64_t threshold = 0;  // of dropout; 0: none
  T keep_scale = 1;
  /// Products with the first weight. Both passes turn them into dropout(activation(product + bias)).
  T* hidden = nullptr;
  /// Backward: gradient of those, turned into the products'.
  T* grad = nullptr;
  /// What stands for the products in a backward from codes (kernels/hidden_codes.h); row i's begin at
  /// (first_row + i) * code_row_bytes. `bits` are hidden_code_bits(); grid null for relu.
  uint8_t* codes = nullptr;
  int64_t code_row_bytes = 0, bits = 0;
  const HiddenGrid<T>* grid = nullptr;
};

struct CpuKernels {
  const char* name;
  bool bfloat16;  // multiplies bfloat16 inputs as they are
  void (*forward_float)(const AttentionForward<float>&, int64_t begin, int64_t end, void* scratch);
  void (*forward_double)(const AttentionForward<double>&, int64_t begin, int64_t end, void* scratch);
  void (*backward_float)(const AttentionBackward<float>&, int64_t begin, int64_t end, void* scratch);
  void (*backward_double)(const AttentionBackward<double>&, int64_t begin, int64_t end, void* scratch);
  void (*curve_encode_float)(const CurveRows<float>&, int64_t begin, int64_t end, void* scratch);
  void (*curve_encode_double)(const CurveRows<double>&, int64_t begin, int64_t end, void* scratch);
  void (*curve_decode_float)(const CurveRows<float>&, int64_t begin, int64_t end, void* scratch);
  void (*curve_decode_double)(const CurveRows<double>&, int64_t begin, int64_t end, void* scratch);
  /// 16 random bits for `blocks` blocks of 8 columns in each of `rows` rows, row-major.
  void (*dropout_bits)(const Seed& seed, uint32_t head, int64_t row, int64_t rows, int64_t block,
                       int64_t blocks, uint16_t* out);
  void (*cross_entropy_float)(const CrossEntropyRows<float>&, int64_t begin, int64_t end);
  void (*cross_entropy_double)(const CrossEntropyRows<double>&, int64_t begin, int64_t end);
  void (*hidden_forward_float)(const HiddenRows<float>&, int64_t begin, int64_t end);
  void (*hidden_forward_double)(const HiddenRows<double>&, int64_t begin, int64_t end);
  void (*hidden_backward_float)(const HiddenRows<float>&, int64_t begin, int64_t end);
  void (*hidden_backward_double)(const HiddenRows<double>&, int64_t begin, int64_t end);
  /// hidden_forward that writes codes, and hidden_backward from codes: `hidden` is written alone.
  void (*hidden_encode_float)(const HiddenRows<float>&, int64_t begin, int64_t end);
  void (*hidden_encode_double)(const HiddenRows<double>&, int64_t begin, int64_t end);
  void (*hidden_decode_float)(const HiddenRows<float>&, int64_t begin, int64_t end);
  void (*hidden_decode_double)(const HiddenRows<double>&, int64_t begin, int64_t end);
};

/// The best this machine runs, or the one that the environment variable REMNANT_CPU names
/// (`portable`, `avx2`, `avx512`, `amx`); null when it names one that this machine or build lacks.
const CpuKernels* find_cpu_kernels(const char* name);
const CpuKernels& cpu_kernels();

}  // namespace remnant::kernels
