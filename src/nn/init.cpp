#include <remnant/nn/init.h>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/randn.h>

#include <algorithm>
#include <optional>

namespace remnant::nn::init {

at::Tensor dirac_orthogonal_(at::Tensor weight, double noise, int64_t groups) {
  TORCH_CHECK(weight.dim() >= 3,
              "dirac_orthogonal_: weight must be a convolution's, [O, C / groups, ...], got ",
              weight.sizes());
  TORCH_CHECK(groups >= 1 && weight.size(0) % groups == 0, "dirac_orthogonal_: groups must divide weight's ",
              weight.size(0), " outputs, got ", groups);
  TORCH_CHECK(noise >= 0, "dirac_orthogonal_: noise must be at least 0, got ", noise);
  const at::NoGradGuard no_grad;
  const int64_t out = weight.size(0) / groups, in = weight.size(1);
  weight.normal_(0, noise);
  at::Tensor centre = weight;
  for (int64_t i = 2; i < weight.dim(); ++i) centre = centre.select(2, centre.size(2) / 2);
  for (int64_t g = 0; g < groups; ++g) {
    const at::Tensor gaussian =
        at::randn({std::max(out, in), std::min(out, in)}, weight.options().dtype(at::kDouble));
    const at::Tensor q = std::get<0>(at::linalg_qr(gaussian));
    centre.narrow(0, g * out, out).add_(out >= in ? q : q.t());
  }
  return weight;
}

at::Tensor spectrum_penalty(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 4, "spectrum_penalty: weight must be [O, C, kh, kw], got ", weight.sizes());
  // A^H A at every frequency is the kernel's correlation with itself, and its mean square, by Parseval, that
  // of taps.
  const at::Tensor w = weight.size(0) < weight.size(1) ? weight : weight.transpose(0, 1);
  const int64_t rows = weight.size(2), columns = weight.size(3), count = w.size(0);
  const at::Tensor products = at::conv2d(w, w, std::optional<at::Tensor>(), at::IntArrayRef{1, 1},
                                         at::IntArrayRef{rows - 1, columns - 1});
  const at::Tensor mean = weight.square().sum() / static_cast<double>(count);
  const at::Tensor centre = products.select(3, columns - 1).select(2, rows - 1);
  const at::Tensor off = products.square().sum() - centre.square().sum() +
                         (centre - mean * at::eye(count, weight.options())).square().sum();
  return off / (mean.square() * static_cast<double>(count));
}

}  // namespace remnant::nn::init
