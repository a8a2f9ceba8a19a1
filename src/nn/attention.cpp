#include <remnant/memory.h>
#include <remnant/nn/attention.h>
#include <remnant/ops/attention.h>
#include <remnant/ops/linear.h>
#include <remnant/ops/multihead_attention.h>
#include <torch/nn/init.h>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/logical_or.h>
#include <ATen/ops/masked_fill.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <ostream>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace remnant::nn {
namespace {

using at::Tensor;

constexpr const char* kName = "remnant::nn::MultiheadAttention: ";

int64_t key_dim(const MultiheadAttentionOptions& options) {
  return options.kdim() > 0 ? options.kdim() : options.embed_dim();
}

int64_t value_dim(const MultiheadAttentionOptions& options) {
  return options.vdim() > 0 ? options.vdim() : options.embed_dim();
}

bool is_packed(const MultiheadAttentionOptions& options) {
  return key_dim(options) == options.embed_dim() && value_dim(options) == options.embed_dim();
}

void check_options(const MultiheadAttentionOptions& options) {
  TORCH_CHECK(options.embed_dim() > 0 && options.num_heads() > 0, kName,
              "embed_dim and num_heads should be positive, got embed_dim = ", options.embed_dim(),
              " and num_heads = ", options.num_heads());
  TORCH_CHECK(options.embed_dim() % options.num_heads() == 0, kName,
              "embed_dim should be a multiple of num_heads, got embed_dim = ", options.embed_dim(),
              " and num_heads = ", options.num_heads());
  TORCH_CHECK(options.kdim() >= 0 && options.vdim() >= 0, kName,
              "kdim and vdim should be positive, or 0 for embed_dim, got kdim = ", options.kdim(),
              " and vdim = ", options.vdim());
  TORCH_CHECK(options.dropout() >= 0.0 && options.dropout() < 1.0, kName, "dropout should be in [0, 1), got ",
              options.dropout());
}

void check_last_dim(const Tensor& x, const char* argument, const char* dim, int64_t expected) {
  TORCH_CHECK(x.size(-1) == expected, kName, argument, "'s last dimension should be ", dim, " = ", expected,
              ", got shape ", x.sizes());
}

void check_inputs(const MultiheadAttentionOptions& options, const Tensor& query, const Tensor& key,
                  const Tensor& value) {
  const char* layout = options.batch_first() ? "[B, N, E]" : "[N, B, E]";
  TORCH_CHECK(query.dim() == 2 || query.dim() == 3, kName, "query should be ", layout,
              " or, unbatched, [N, E], got shape ", query.sizes());
  TORCH_CHECK(key.dim() == query.dim() && value.dim() == query.dim(), kName,
              "key and value should have as many dimensions as query, ", query.dim(), ", got shapes ",
              key.sizes(), " and ", value.sizes());
  check_last_dim(query, "query", "embed_dim", options.embed_dim());
  check_last_dim(key, "key", "kdim", key_dim(options));
  check_last_dim(value, "value", "vdim", value_dim(options));
  TORCH_CHECK(key.sizes().slice(0, key.dim() - 1) == value.sizes().slice(0, value.dim() - 1), kName,
              "key and value should agree in batch and length, got shapes ", key.sizes(), " and ",
              value.sizes());
  if (query.dim() == 3) {
    const int64_t batch = options.batch_first() ? 0 : 1;
    TORCH_CHECK(query.size(batch) == key.size(batch), kName,
                "query and key should have the same batch size in the layout ", layout, ", got shapes ",
                query.sizes(), " and ", key.sizes(),
                "; set batch_first to match how the tensors are laid out");
  }
}

void check_mask_dtype(const Tensor& mask, const char* argument) {
  TORCH_CHECK(mask.scalar_type() == at::kBool || at::isFloatingType(mask.scalar_type()), kName, argument,
              " should be boolean (true = not attended) or floating point (added to the scores), got ",
              mask.scalar_type(), "; convert it with .to(at::kBool)");
}

/// [B, N, E] or [N, B, E] to [B, H, N, D], a view.
Tensor split_heads(const Tensor& x, int64_t num_heads, bool batch_first) {
  const Tensor heads = x.unflatten(-1, {num_heads, -1});
  return batch_first ? heads.transpose(1, 2) : heads.permute({1, 2, 0, 3});
}

struct Heads {
  Tensor query, key, value;
};

Tensor bias_part(const Tensor& in_proj_bias, int64_t first, int64_t count) {
  if (!in_proj_bias.defined()) return {};
  const int64_t embed_dim = in_proj_bias.size(0) / 3;
  return in_proj_bias.narrow(0, first * embed_dim, count * embed_dim);
}

/// The bits that a module's products keep their input at, 0 for all of it.
int64_t kept_bits(const MultiheadAttentionImpl& module) {
  return module.is_training() && module.options.policy().kind == PolicyKind::recompute ? module.options.bits()
                                                                                       : 0;
}

Tensor project(const MultiheadAttentionImpl& module, const Tensor& x, const Tensor& weight,
               const Tensor& bias) {
  const int64_t bits = kept_bits(module);
  const auto given = bias.defined() ? std::make_optional(bias) : std::nullopt;
  return bits == 0 ? at::linear(x, weight, given)
                   : remnant::linear(x, weight, given, "quantized:bits=" + std::to_string(bits));
}

/// Rows `first` to `first + count` of the three stacked projections, applied in one product.
std::vector<Tensor> project_packed(const MultiheadAttentionImpl& module, const Tensor& x, int64_t first,
                                   int64_t count) {
  if (count == 3) return project(module, x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1);
  const int64_t embed_dim = module.options.embed_dim();
  const Tensor weight = module.in_proj_weight.narrow(0, first * embed_dim, count * embed_dim);
  return project(module, x, weight, bias_part(module.in_proj_bias, first, count)).chunk(count, -1);
}

/// Inputs that are one tensor go through one product, as in PyTorch.
Heads project(const MultiheadAttentionImpl& module, const Tensor& query, const Tensor& key,
              const Tensor& value, bool batch_first) {
  const bool shared_memory = key.is_same(value);
  std::vector<Tensor> parts;
  if (!module.in_proj_weight.defined()) {
    parts = {project(module, query, module.q_proj_weight, bias_part(module.in_proj_bias, 0, 1)),
             project(module, key, module.k_proj_weight, bias_part(module.in_proj_bias, 1, 1)),
             project(module, value, module.v_proj_weight, bias_part(module.in_proj_bias, 2, 1))};
  } else if (shared_memory && query.is_same(key)) {
    parts = project_packed(module, query, 0, 3);
  } else if (shared_memory) {
    parts = project_packed(module, query, 0, 1);
    for (Tensor& part : project_packed(module, key, 1, 2)) parts.push_back(std::move(part));
  } else {
    parts = {project_packed(module, query, 0, 1)[0], project_packed(module, key, 1, 1)[0],
             project_packed(module, value, 2, 1)[0]};
  }
  const int64_t num_heads = module.options.num_heads();
  return {split_heads(parts[0], num_heads, batch_first), split_heads(parts[1], num_heads, batch_first),
          split_heads(parts[2], num_heads, batch_first)};
}

/// `keys` followed by the learned key (or value) and the zero one, where the module has them.
Tensor append_extra_keys(const MultiheadAttentionImpl& module, const Tensor& keys, const Tensor& bias) {
  std::vector<Tensor> parts = {keys};
  const std::vector<int64_t> shape = {keys.size(0), keys.size(1), 1, keys.size(3)};
  if (bias.defined()) {
    parts.push_back(split_heads(bias.to(keys.scalar_type()), module.options.num_heads(), true).expand(shape));
  }
  if (module.options.add_zero_attn()) parts.push_back(at::zeros(shape, keys.options()));
  return parts.size() == 1 ? keys : at::cat(parts, 2);
}

/// Two masks in PyTorch's convention (true = not attended, or added) as one; undefined: no mask.
Tensor combine(const Tensor& a, const Tensor& b) {
  if (!a.defined()) return b;
  if (!b.defined()) return a;
  const bool a_is_bool = a.scalar_type() == at::kBool;
  const bool b_is_bool = b.scalar_type() == at::kBool;
  if (a_is_bool && b_is_bool) return at::logical_or(a, b);
  const double infinity = std::numeric_limits<double>::infinity();
  if (a_is_bool) return at::masked_fill(b, a, -infinity);
  if (b_is_bool) return at::masked_fill(a, b, -infinity);
  return a + b;
}

/// Masks for keys [B, H, Nk, D] and how they are to be read.
struct Masks {
  Tensor attn_mask = {};         ///< [Nq, Nk] or [B * H, Nq, Nk], or undefined
  Tensor key_padding_mask = {};  ///< [B, Nk], or undefined
  bool causal = false;           ///< query i attends keys up to past + i
  int64_t past = 0;
};

/// Tells a recorder what the op should have kept: what the policy says, the storages of q, k, v and the
/// mask, and the output where the policy's delta needs it. Eager keeps p, and with dropout its noise and
/// D p beside it.
void describe(const Tensor& output, const Tensor& query, const Tensor& key, const Tensor& value,
              const AttentionOptions& options) {
  std::unordered_map<const void*, int64_t> storages;
  const auto add = [&](const Tensor& x) {
    storages[x.storage().unsafeGetStorageImpl()] = static_cast<int64_t>(x.storage().nbytes());
  };
  const auto total = [&] {
    int64_t sum = 0;
    for (const auto& [storage, bytes] : storages) sum += bytes;
    return sum;
  };
  for (const Tensor& x : {query, key, value}) add(x);
  const int64_t heads = output.size(0) * output.size(1), queries = output.size(2), keys = key.size(2);
  const auto element = static_cast<int64_t>(output.element_size());
  const bool dropout = options.dropout > 0;
  const PolicyKind kind = options.policy.kind;
  const int64_t eager = total() + heads * queries * keys * element * (dropout ? 3 : 1);
  if (options.bits > 0) {
    const int64_t score_bits = std::max<int64_t>(options.bits, 8);
    memory::describe(
        output, options.policy.str() + ",bits=" + std::to_string(options.bits),
        linear_code_bytes(query.numel(), score_bits) + linear_code_bytes(key.numel(), score_bits) +
            linear_code_bytes(value.numel(), options.bits) + linear_code_bytes(output.numel(), options.bits) +
            attention_residual_bytes(options.policy, heads, queries, keys, element, dropout) +
            (options.mask.has_value() ? static_cast<int64_t>(options.mask->storage().nbytes()) : 0),
        eager);
    return;
  }
  const bool codes = kind == PolicyKind::curve || kind == PolicyKind::quantized;
  const bool biased = kind == PolicyKind::curve || kind == PolicyKind::top;
  if (options.mask.has_value() && !codes) add(*options.mask);
  if (!biased && (kind != PolicyKind::exact || dropout)) add(output);
  memory::describe(output, options.policy.str(),
                   total() + attention_residual_bytes(options.policy, heads, queries, keys, element, dropout),
                   eager);
}

/// The op's options for a module's own and a call's masks; `extra` keys stand behind the `keys` given.
AttentionOptions attention_options(const MultiheadAttentionImpl& module, const Masks& masks, int64_t batch,
                                   int64_t queries, int64_t keys, int64_t extra, const Tensor& like) {
  const int64_t num_heads = module.options.num_heads();
  Tensor attn_mask = masks.attn_mask;
  if (attn_mask.defined()) {
    check_mask_dtype(attn_mask, "attn_mask");
    const std::vector<int64_t> shared = {queries, keys}, per_head = {batch * num_heads, queries, keys};
    TORCH_CHECK(attn_mask.sizes() == shared || attn_mask.sizes() == per_head, kName,
                "attn_mask should be [Nq, Nk] = ", at::IntArrayRef(shared),
                " or [B * num_heads, Nq, Nk] = ", at::IntArrayRef(per_head), ", got shape ",
                attn_mask.sizes());
    if (attn_mask.dim() == 3) attn_mask = attn_mask.unflatten(0, {batch, num_heads});
  }
  Tensor padding = masks.key_padding_mask;
  if (padding.defined()) {
    check_mask_dtype(padding, "key_padding_mask");
    const std::vector<int64_t> expected = {batch, keys};
    TORCH_CHECK(padding.sizes() == expected, kName,
                "key_padding_mask should be [B, Nk] = ", at::IntArrayRef(expected), " (unbatched: [Nk] = [",
                keys, "]), got shape ", padding.sizes());
    padding = padding.unsqueeze(1).unsqueeze(1);
  }

  AttentionOptions result;
  result.dropout = module.is_training() ? module.options.dropout() : 0.0;
  result.policy = module.options.policy();
  if (masks.causal && !(queries == 1 && masks.past == keys - 1)) {
    if (extra > 0) {
      // The op's own causal mask would hide the extra keys, which every query attends.
      const Tensor future = at::ones({queries, keys}, like.options().dtype(at::kBool)).triu(masks.past + 1);
      attn_mask = combine(attn_mask, future);
    } else if (masks.past > 0) {
      result.window = std::make_pair(int64_t{-1}, masks.past);
    } else {
      result.causal = true;
    }
  }
  if (extra > 0) {
    if (attn_mask.defined()) attn_mask = at::constant_pad_nd(attn_mask, {0, extra}, 0);
    if (padding.defined()) padding = at::constant_pad_nd(padding, {0, extra}, 0);
  }
  if (const Tensor mask = combine(attn_mask, padding); mask.defined()) {
    result.mask = mask.scalar_type() == at::kBool ? at::logical_not(mask) : mask.to(like.scalar_type());
  }
  return result;
}

/// Attention in PyTorch's operations, which keep the softmax output, and with dropout its noise and result.
Tensor eager_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                       const AttentionOptions& options) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(query.size(3)));
  Tensor scores = at::matmul(query * scale, key.transpose(-2, -1));
  Tensor allowed;
  if (options.causal || options.window.has_value()) {
    const int64_t past = options.causal ? 0 : options.window->second;
    allowed = at::ones({query.size(2), key.size(2)}, query.options().dtype(at::kBool)).tril(past);
  }
  if (options.mask.has_value()) {
    if (options.mask->scalar_type() == at::kBool) {
      allowed = allowed.defined() ? at::logical_and(allowed, *options.mask) : *options.mask;
    } else {
      scores = scores + *options.mask;
    }
  }
  if (allowed.defined()) {
    scores = at::masked_fill(scores, at::logical_not(allowed), -std::numeric_limits<double>::infinity());
  }
  const Tensor weights = at::dropout(at::softmax(scores, -1), options.dropout, options.dropout > 0);
  return at::matmul(weights, value);
}

/// Runs the op on projected heads. Returns [B, H, Nq, D] and the weights, if wanted.
std::tuple<Tensor, Tensor> attend(const MultiheadAttentionImpl& module, const Heads& heads,
                                  const Masks& masks, bool need_weights) {
  const int64_t keys = heads.key.size(2);
  const Tensor key = append_extra_keys(module, heads.key, module.bias_k);
  const Tensor value = append_extra_keys(module, heads.value, module.bias_v);
  AttentionOptions options = attention_options(module, masks, heads.query.size(0), heads.query.size(2), keys,
                                               key.size(2) - keys, heads.query);
  if (module.options.keep() == AttentionKeep::eager && !need_weights) {
    return {eager_attention(heads.query, key, value, options), Tensor()};
  }

  if (!need_weights) options.bits = kept_bits(module);
  std::tuple<Tensor, Tensor> result;
  if (need_weights) {
    result = attention_with_weights(heads.query, key, value, options);
  } else {
    result = {attention(heads.query, key, value, options), Tensor()};
  }
  if (memory::recording()) describe(std::get<0>(result), heads.query, key, value, options);
  return result;
}

/// Whether the block op can stand for projections, attention and output projection.
bool runs_as_block(const MultiheadAttentionImpl& module, const Tensor& key, const Tensor& value,
                   const Tensor& attn_mask, bool need_weights) {
  const MultiheadAttentionOptions& options = module.options;
  const bool wanted = options.keep() == AttentionKeep::input || options.keep() == AttentionKeep::output ||
                      options.keep() == AttentionKeep::automatic;
  const bool mask_gradient = attn_mask.defined() && attn_mask.requires_grad() && at::GradMode::is_enabled();
  return wanted && !need_weights && module.is_training() && key.is_same(value) &&
         options.policy().kind == PolicyKind::recompute && module.in_proj_weight.defined() &&
         !options.add_bias_kv() && !options.add_zero_attn() && !mask_gradient;
}

/// [B, N, E] -> [B, N, E] by the block op.
Tensor run_block(const MultiheadAttentionImpl& module, const Tensor& query, const Tensor& memory, bool self,
                 const Masks& masks) {
  const int64_t keys = self ? query.size(1) : memory.size(1);
  const AttentionOptions options =
      attention_options(module, masks, query.size(0), query.size(1), keys, 0, query);
  MultiheadAttentionCall call;
  call.heads = module.options.num_heads();
  call.mask = options.mask;
  call.causal = options.causal;
  call.dropout = options.dropout;
  const AttentionKeep keep = module.options.keep();
  call.keep_output = keep == AttentionKeep::output ||
                     (keep == AttentionKeep::automatic && keeps_attention_output(keys, query.size(2)));
  const auto optional = [](const Tensor& x) { return x.defined() ? std::make_optional(x) : std::nullopt; };
  return multihead_attention(query, self ? std::nullopt : std::make_optional(memory), module.in_proj_weight,
                             optional(module.in_proj_bias), module.out_proj->weight,
                             optional(module.out_proj->bias), call);
}

/// [B, H, N, D] to [B, N, E] or [N, B, E].
Tensor merge_heads(const Tensor& heads, bool batch_first) {
  return (batch_first ? heads.transpose(1, 2) : heads.permute({2, 0, 1, 3})).flatten(2);
}

void check_cached_query(const MultiheadAttentionOptions& options, const Tensor& query,
                        const KeyValueCache& cache) {
  TORCH_CHECK(query.dim() == 3, kName, "a cached forward expects query [B, N, E], batch first, got shape ",
              query.sizes());
  check_last_dim(query, "query", "embed_dim", options.embed_dim());
  TORCH_CHECK(cache.key.defined() == cache.value.defined(), kName,
              "the cache should hold both key and value or neither; start from an empty KeyValueCache");
  if (!cache.key.defined()) return;
  TORCH_CHECK(cache.key.dim() == 4 && cache.key.size(0) == query.size(0), kName,
              "the cache should be [B, H, n, D] with query's batch size ", query.size(0), ", got shape ",
              cache.key.sizes(), "; select the cache's rows along with the query's");
}

}  // namespace

MultiheadAttentionImpl::MultiheadAttentionImpl(const MultiheadAttentionOptions& options_in)
    : options(options_in) {
  check_options(options);
  MultiheadAttentionImpl::reset();
}

void MultiheadAttentionImpl::reset() {
  const int64_t embed_dim = options.embed_dim();
  in_proj_weight = in_proj_bias = q_proj_weight = k_proj_weight = v_proj_weight = bias_k = bias_v = Tensor();

  if (is_packed(options)) {
    in_proj_weight = register_parameter("in_proj_weight", at::empty({3 * embed_dim, embed_dim}));
  } else {
    q_proj_weight = register_parameter("q_proj_weight", at::empty({embed_dim, embed_dim}));
    k_proj_weight = register_parameter("k_proj_weight", at::empty({embed_dim, key_dim(options)}));
    v_proj_weight = register_parameter("v_proj_weight", at::empty({embed_dim, value_dim(options)}));
  }
  if (options.bias()) in_proj_bias = register_parameter("in_proj_bias", at::zeros({3 * embed_dim}));
  out_proj = register_module(
      "out_proj", torch::nn::Linear(torch::nn::LinearOptions(embed_dim, embed_dim).bias(options.bias())));
  if (options.add_bias_kv()) {
    bias_k = register_parameter("bias_k", at::empty({1, 1, embed_dim}));
    bias_v = register_parameter("bias_v", at::empty({1, 1, embed_dim}));
  }

  // In PyTorch's order, so that one seed gives the same weights.
  for (const Tensor& weight : {in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight}) {
    if (weight.defined()) torch::nn::init::xavier_uniform_(weight);
  }
  if (options.bias()) torch::nn::init::zeros_(out_proj->bias);
  for (const Tensor& bias : {bias_k, bias_v}) {
    if (bias.defined()) torch::nn::init::xavier_normal_(bias);
  }
}

void MultiheadAttentionImpl::pretty_print(std::ostream& stream) const {
  stream << "remnant::nn::MultiheadAttention(embed_dim=" << options.embed_dim()
         << ", num_heads=" << options.num_heads() << ", policy=" << options.policy().str();
  if (options.keep() != AttentionKeep::projections) {
    stream << ", attention=" << remnant::name(options.keep());
  }
  if (options.bits() > 0) stream << ", bits=" << options.bits();
  stream << ")";
}

std::tuple<Tensor, Tensor> MultiheadAttentionImpl::forward(const Tensor& query, const Tensor& key,
                                                           const Tensor& value,
                                                           const Tensor& key_padding_mask, bool need_weights,
                                                           const Tensor& attn_mask, bool average_attn_weights,
                                                           bool is_causal) {
  const memory::LayerScope scope(this);
  check_inputs(options, query, key, value);
  const bool batched = query.dim() == 3;
  const bool batch_first = batched && options.batch_first();
  if (batched && runs_as_block(*this, key, value, attn_mask, need_weights)) {
    const auto sequences_first = [&](const Tensor& x) { return batch_first ? x : x.transpose(0, 1); };
    const Tensor output = run_block(*this, sequences_first(query), sequences_first(key), query.is_same(key),
                                    {attn_mask, key_padding_mask, is_causal});
    return {sequences_first(output), Tensor()};
  }

  Heads heads;
  Masks masks{.attn_mask = attn_mask, .key_padding_mask = key_padding_mask, .causal = is_causal};
  if (batched) {
    heads = project(*this, query, key, value, batch_first);
  } else {
    // unsqueeze makes new tensors: keep "the same tensor" visible to project.
    const Tensor q = query.unsqueeze(1);
    const Tensor k = key.is_same(query) ? q : key.unsqueeze(1);
    heads = project(*this, q, k, value.is_same(key) ? k : value.unsqueeze(1), batch_first);
    if (key_padding_mask.defined()) masks.key_padding_mask = key_padding_mask.unsqueeze(0);
  }
  auto [attended, weights] = attend(*this, heads, masks, need_weights);
  const Tensor merged = merge_heads(attended, batch_first);
  Tensor output = need_weights ? out_proj(merged) : project(*this, merged, out_proj->weight, out_proj->bias);
  if (!batched) output = output.squeeze(1);
  if (!need_weights) return {output, Tensor()};
  if (average_attn_weights) weights = weights.mean(1);
  return {output, batched ? weights : weights.squeeze(0)};
}

Tensor MultiheadAttentionImpl::forward_self_cached(const Tensor& query, KeyValueCache& cache) {
  const memory::LayerScope scope(this);
  check_cached_query(options, query, cache);
  check_last_dim(query, "query (as key)", "kdim", key_dim(options));
  check_last_dim(query, "query (as value)", "vdim", value_dim(options));
  Heads heads = project(*this, query, query, query, true);
  const int64_t past = cache.key.defined() ? cache.key.size(2) : 0;
  cache.key = past > 0 ? at::cat({cache.key, heads.key}, 2) : heads.key;
  cache.value = past > 0 ? at::cat({cache.value, heads.value}, 2) : heads.value;
  heads.key = cache.key;
  heads.value = cache.value;
  const auto [attended, weights] = attend(*this, heads, {.causal = true, .past = past}, false);
  return out_proj(merge_heads(attended, true));
}

Tensor MultiheadAttentionImpl::forward_cross_cached(const Tensor& query, const Tensor& memory,
                                                    const Tensor& key_padding_mask, KeyValueCache& cache) {
  const memory::LayerScope scope(this);
  check_cached_query(options, query, cache);
  Heads heads;
  if (cache.key.defined()) {
    const int64_t num_heads = options.num_heads();
    const Tensor projected = in_proj_weight.defined()
                                 ? project_packed(*this, query, 0, 1)[0]
                                 : project(*this, query, q_proj_weight, bias_part(in_proj_bias, 0, 1));
    heads = {split_heads(projected, num_heads, true), cache.key, cache.value};
  } else {
    TORCH_CHECK(memory.dim() == 3 && memory.size(0) == query.size(0), kName,
                "memory should be [B, Nk, E] with query's batch size ", query.size(0), ", got shape ",
                memory.sizes());
    check_last_dim(memory, "memory", "kdim", key_dim(options));
    check_last_dim(memory, "memory", "vdim", value_dim(options));
    heads = project(*this, query, memory, memory, true);
    cache = {heads.key, heads.value};
  }
  const auto [attended, weights] = attend(*this, heads, {.key_padding_mask = key_padding_mask}, false);
  return out_proj(merge_heads(attended, true));
}

}  // namespace remnant::nn
