#include <remnant/ops/linear_cross_entropy.h>

#include "kernels/cpu/attention_kernels.h"
#include "ops/attention_common.h"
#include "ops/product.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

namespace remnant {

namespace ops {

namespace {

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

void check(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
           const at::Tensor& target, double label_smoothing, int64_t reduction) {
  TORCH_CHECK(input.dim() == 2 && weight.dim() == 2,
              "linear_cross_entropy: input must be [N, K] and weight [V, K], "
              "got ",
              input.dim(), " and ", weight.dim(), " dimensions; flatten the leading ones");
  TORCH_CHECK(at::isFloatingType(input.scalar_type()),
              "linear_cross_entropy: input must be floating point, got ", toString(input.scalar_type()));
  TORCH_CHECK(weight.sym_size(1) == input.sym_size(1), "linear_cross_entropy: input has ", input.sym_size(1),
              " features, weight ", weight.sym_size(1), "; expected the same");
  TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0)),
              "linear_cross_entropy: bias must be [", weight.sym_size(0), "], one a class");
  TORCH_CHECK(target.scalar_type() == at::kLong, "linear_cross_entropy: target must be int64, got ",
              toString(target.scalar_type()));
  TORCH_CHECK(target.dim() == 1 && target.sym_size(0) == input.sym_size(0),
              "linear_cross_entropy: target must be [", input.sym_size(0), "], one a row of input, got ",
              target.sym_sizes());
  TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1,
              "linear_cross_entropy: label_smoothing must be in "
              "[0, 1], got ",
              label_smoothing);
  TORCH_CHECK(
      reduction == at::Reduction::None || reduction == at::Reduction::Mean || reduction == at::Reduction::Sum,
      "linear_cross_entropy: reduction must be none (0), mean (1) or sum (2), got ", reduction);
}

// Rows whose logits make about 8 MB: every chunk reads and writes the weight's whole gradient once.
int64_t chunk_rows(int64_t classes) {
  return std::clamp<int64_t>((int64_t{1} << 21) / std::max<int64_t>(classes, 1), 64, 4096);
}

// Turns a chunk of logits into its gradient; returns the losses of its rows.
at::Tensor loss_rows(at::Tensor& logits, const at::Tensor& target, int64_t ignore_index,
                     double label_smoothing, double scale, bool gradient) {
  if (logits.device().is_cpu()) {
    at::Tensor losses = at::empty({logits.size(0)}, logits.options());
    const auto run = [&]<typename T>(T,
                                     void (*kernel)(const kernels::CrossEntropyRows<T>&, int64_t, int64_t)) {
      kernels::CrossEntropyRows<T> rows;
      rows.classes = logits.size(1);
      rows.stride = logits.stride(0);
      rows.logits = logits.mutable_data_ptr<T>();
      rows.targets = target.const_data_ptr<int64_t>();
      rows.ignore_index = ignore_index;
      rows.label_smoothing = static_cast<T>(label_smoothing);
      rows.scale = static_cast<T>(scale);
      rows.gradient = gradient;
      rows.losses = losses.mutable_data_ptr<T>();
      at::parallel_for(0, logits.size(0), 8, [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
    };
    if (logits.scalar_type() == at::kDouble) {
      run(double{}, kernels::cpu_kernels().cross_entropy_double);
    } else {
      run(float{}, kernels::cpu_kernels().cross_entropy_float);
    }
    return losses;
  }
  const at::Tensor ignored = target.eq(ignore_index);
  const at::Tensor index = target.masked_fill(ignored, 0).unsqueeze(1);
  const at::Tensor lse = logits.logsumexp({1});
  at::Tensor losses = lse.sub(logits.gather(1, index).squeeze(1)).mul_(1 - label_smoothing);
  if (label_smoothing > 0) losses.add_(lse.sub(logits.mean(1)), label_smoothing);
  losses.masked_fill_(ignored, 0);
  if (gradient) {
    logits.sub_(lse.unsqueeze(1)).exp_().sub_(label_smoothing / static_cast<double>(logits.size(1)));
    logits.scatter_add_(1, index, at::zeros_like(index, logits.options()).fill_(label_smoothing - 1));
    logits.mul_(scale).masked_fill_(ignored.unsqueeze(1), 0);
  }
  return losses;
}

// Logits in chunks of rows: use(first row, logits, rows of input) may change the logits.
template <typename Use>
void each_chunk(const at::Tensor& x, const at::Tensor& w, const at::Tensor& b, Use&& use) {
  const int64_t tokens = x.size(0), classes = w.size(0);
  const int64_t rows = std::min(chunk_rows(classes), std::max<int64_t>(tokens, 1));
  // Rows a multiple of a cache line apart: an odd number of classes would slow the products down.
  const at::Tensor buffer = at::empty({rows, (classes + 15) / 16 * 16}, x.options());
  for (int64_t first = 0; first < tokens; first += rows) {
    const int64_t n = std::min(rows, tokens - first);
    const at::Tensor part = x.narrow(0, first, n);
    at::Tensor logits = buffer.narrow(0, 0, n).narrow(1, 0, classes);
    product_into(logits, part, w.t(), b.defined() ? std::optional<at::Tensor>(b) : std::nullopt);
    use(first, logits, part);
  }
}

// Of what is held until backward, which brings the scale of a loss: float16 has no room for a token's share.
at::ScalarType held_type(at::ScalarType type) { return type == at::kHalf ? at::kFloat : type; }

// Where there are fewer classes than features the logits' gradient is the smaller one to hold until backward,
// which then makes input's of it.
bool keeps_logits(const at::Tensor& x, const at::Tensor& w) { return w.sym_size(0) < x.sym_size(1); }

// Gradients of input, weight and bias, added up chunk by chunk from the logits' gradient.
struct Gradients {
  std::array<bool, 3> needs;
  bool of_logits;
  at::Tensor input, weight, bias;  // of_logits: the logits' gradient stands in input's place

  Gradients(const at::Tensor& x, const at::Tensor& w, std::array<bool, 3> wanted, bool logits)
      : needs(wanted), of_logits(logits) {
    const auto options = x.options();
    input =
        needs[0] ? at::empty({x.size(0), logits ? w.size(0) : x.size(1)}, options) : at::empty({0}, options);
    weight = needs[1] ? at::zeros({w.size(0), x.size(1)}, options) : at::empty({0}, options);
    bias = needs[2] ? at::zeros({w.size(0)}, options) : at::empty({0}, options);
  }
  bool any() const { return needs[0] || needs[1] || needs[2]; }
  void add(int64_t first, const at::Tensor& grad_logits, const at::Tensor& part, const at::Tensor& w) {
    const at::Tensor rows = needs[0] ? input.narrow(0, first, part.size(0)) : input;
    if (needs[0] && of_logits) rows.copy_(grad_logits);
    if (needs[0] && !of_logits) product_into(rows, grad_logits, w);
    if (needs[1]) product_add(weight, grad_logits.t(), part);
    if (needs[2]) bias.add_(grad_logits.sum(0));
  }
};

Result forward(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
               const at::Tensor& target, int64_t ignore_index, double label_smoothing, int64_t reduction,
               std::array<bool, 3> needs) {
  check(input, weight, bias, target, label_smoothing, reduction);
  const auto type = accumulation_type(input.scalar_type());
  const at::Tensor x = input.to(type);
  const at::Tensor w = weight.to(type);
  const at::Tensor b = bias.has_value() ? bias->to(type) : at::Tensor();
  const at::Tensor t = target.contiguous();
  const int64_t tokens = x.size(0);
  const at::Tensor valid = t.ne(ignore_index);
  if (t.device().is_cpu() && tokens > 0) {
    const at::Tensor wrong = t.lt(0).logical_or_(t.ge(w.size(0))).logical_and_(valid);
    TORCH_CHECK(!wrong.any().item<bool>(), "linear_cross_entropy: target ",
                t.masked_select(wrong)[0].item<int64_t>(), " is out of bounds, expected 0 to ", w.size(0) - 1,
                " or ignore_index ", ignore_index);
  }
  const bool each = reduction == at::Reduction::None;
  // Rows' gradients are not known yet: backward makes its chunks again.
  if (each) needs = {};
  Gradients grads(x, w, needs, keeps_logits(x, w));
  at::Tensor loss = each ? at::empty({tokens}, x.options()) : at::zeros({}, x.options());
  each_chunk(x, w, b, [&](int64_t first, at::Tensor& logits, const at::Tensor& part) {
    const at::Tensor losses =
        loss_rows(logits, t.narrow(0, first, part.size(0)), ignore_index, label_smoothing, 1.0, grads.any());
    if (each) {
      loss.narrow(0, first, part.size(0)).copy_(losses);
    } else {
      loss.add_(losses.sum());
    }
    grads.add(first, logits, part, w);
  });
  if (reduction == at::Reduction::Mean) {
    const at::Tensor count = valid.sum();
    loss.div_(count);  // no target at all: NaN, and gradients of 0, as in torch
    const at::Tensor share = count.clamp_min(1);
    for (at::Tensor* grad : {&grads.input, &grads.weight, &grads.bias}) {
      if (grad->numel() > 0) grad->div_(share);
    }
  }
  return {loss, grads.input.to(held_type(input.scalar_type())),
          grads.weight.to(held_type(weight.scalar_type())), grads.bias.to(held_type(weight.scalar_type()))};
}

using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Reduction none: grad_loss is [N].
Backward backward(const at::Tensor& grad_loss, const at::Tensor& input, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, const at::Tensor& target, int64_t ignore_index,
                  double label_smoothing, std::array<bool, 3> needs) {
  check(input, weight, bias, target, label_smoothing, at::Reduction::None);
  TORCH_CHECK(grad_loss.sizes() == target.sizes(), "linear_cross_entropy: grad_loss must be ", target.sizes(),
              ", one a row of input, got ", grad_loss.sizes());
  const auto type = accumulation_type(input.scalar_type());
  const at::Tensor x = input.to(type);
  const at::Tensor w = weight.to(type);
  const at::Tensor b = bias.has_value() ? bias->to(type) : at::Tensor();
  const at::Tensor t = target.contiguous();
  // An ignored row's gradient is 0, whatever came in.
  const at::Tensor g = grad_loss.to(type).masked_fill(t.eq(ignore_index), 0).unsqueeze(1);
  Gradients grads(x, w, needs, false);
  each_chunk(x, w, b, [&](int64_t first, at::Tensor& logits, const at::Tensor& part) {
    loss_rows(logits, t.narrow(0, first, part.size(0)), ignore_index, label_smoothing, 1.0, true);
    logits.mul_(g.narrow(0, first, part.size(0)));
    grads.add(first, logits, part, w);
  });
  return {grads.input.to(input.scalar_type()), grads.weight.to(weight.scalar_type()),
          grads.bias.to(weight.scalar_type())};
}

Backward backward_meta(const at::Tensor& grad_loss, const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, const at::Tensor& target, int64_t ignore_index,
                       double label_smoothing, std::array<bool, 3> needs) {
  const auto made = [](bool wanted, const at::Tensor& like, c10::SymIntArrayRef size) {
    return wanted ? at::empty_symint(size, like.options()) : at::empty({0}, like.options());
  };
  return {made(needs[0], input, input.sym_sizes()), made(needs[1], weight, weight.sym_sizes()),
          made(needs[2], weight, {weight.sym_size(0)})};
}

Result forward_meta(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    const at::Tensor& target, int64_t ignore_index, double label_smoothing, int64_t reduction,
                    std::array<bool, 3> needs) {
  check(input, weight, bias, target, label_smoothing, reduction);
  const bool each = reduction == at::Reduction::None;
  if (each) needs = {};
  const auto wide = input.options().dtype(accumulation_type(input.scalar_type()));
  const auto of_input = input.options().dtype(held_type(input.scalar_type()));
  const auto of_weight = weight.options().dtype(held_type(weight.scalar_type()));
  const auto made = [](bool wanted, c10::SymIntArrayRef size, const at::TensorOptions& options) {
    return wanted ? at::empty_symint(size, options) : at::empty({0}, options);
  };
  const c10::SymInt columns = keeps_logits(input, weight) ? weight.sym_size(0) : input.sym_size(1);
  return {each ? at::empty_symint({input.sym_size(0)}, wide) : at::empty({}, wide),
          made(needs[0], {input.sym_size(0), columns}, of_input),
          made(needs[1], weight.sym_sizes(), of_weight), made(needs[2], {weight.sym_size(0)}, of_weight)};
}

at::Tensor linear_cross_entropy_op(const at::Tensor& input, const at::Tensor& weight,
                                   const std::optional<at::Tensor>& bias, const at::Tensor& target,
                                   int64_t ignore_index, double label_smoothing, int64_t reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::linear_cross_entropy_forward", "")
                             .typed<decltype(forward)>();
  return std::get<0>(
      op.call(input, weight, bias, target, ignore_index, label_smoothing, reduction, {false, false, false}));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("linear_cross_entropy", c10::DispatchKey::CompositeImplicitAutograd,
         TORCH_FN(linear_cross_entropy_op));
  m.impl("linear_cross_entropy_forward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(forward));
  m.impl("linear_cross_entropy_forward", c10::DispatchKey::Meta, TORCH_FN(forward_meta));
  m.impl("linear_cross_entropy_backward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(backward));
  m.impl("linear_cross_entropy_backward", c10::DispatchKey::Meta, TORCH_FN(backward_meta));
}

}  // namespace ops

at::Tensor linear_cross_entropy(const at::Tensor& input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, const at::Tensor& target,
                                int64_t ignore_index, double label_smoothing, int64_t reduction) {
  // Through the dispatcher, where autocast sees it.
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::linear_cross_entropy", "")
                             .typed<decltype(ops::linear_cross_entropy_op)>();
  return op.call(input, weight, bias, target, ignore_index, label_smoothing, reduction);
}

}  // namespace remnant
