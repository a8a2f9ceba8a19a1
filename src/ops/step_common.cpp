#include "ops/step_common.h"

#include "ops/product.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/mm.h>

#include <string>
#include <utility>

namespace remnant::ops {

void check_floating(const char* op, const char* name, const at::Tensor& x) {
  const auto type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, op,
              ": ", name, " must be float32, float64, bfloat16 or float16, got ", toString(type));
}

int64_t parse_bits(const char* op, c10::string_view policy, std::string_view name, at::IntArrayRef allowed) {
  if (policy == "exact") return 0;
  const std::string start = std::string(name) + ":bits=";
  std::string forms = "'exact'";
  for (int64_t bits : allowed) {
    if (policy == start + std::to_string(bits)) return bits;
    forms += ", '" + start + std::to_string(bits) + "'";
  }
  TORCH_CHECK(false, op, ": unknown policy '", policy, "'; expected one of ", forms);
}

at::Tensor as_rows(const at::Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return x.reshape({rows, x.size(-1)});
}

void add_product(at::Tensor sum, const at::Tensor& a, const at::Tensor& b) {
  if (sum.scalar_type() == a.scalar_type()) {
    product_add(std::move(sum), a.t(), b);
  } else {
    sum.add_(a.t().mm(b));
  }
}

kernels::Element element_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return kernels::Element::f64;
    case at::kBFloat16:
      return kernels::Element::bf16;
    case at::kHalf:
      return kernels::Element::f16;
    default:
      return kernels::Element::f32;
  }
}

bool is_traced(const at::Tensor& x) { return at::isTensorSubclassLike(x); }

}  // namespace remnant::ops
