#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace remnant::ops {

/// A tensor, or an undefined one, that others keep alive, as it is now. It lives as long as its storage does:
/// saved-tensor hooks may put another tensor over the same memory in its place.
class WeakTensor {
 public:
  explicit WeakTensor(const at::Tensor& x);
  bool expired() const { return defined_ && storage_.expired(); }
  /// nullopt when it is gone, or was changed in place.
  std::optional<at::Tensor> lock() const;

 private:
  bool defined_;
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> weak_;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  at::TensorOptions options_;
  int64_t offset_ = 0;
  std::vector<int64_t> sizes_, strides_;
  c10::VariableVersion counter_;
  uint32_t version_ = 0;
};

}  // namespace remnant::ops
