#include "ops/weak_tensor.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <utility>

namespace remnant::ops {

WeakTensor::WeakTensor(const at::Tensor& x)
    : defined_(x.defined()),
      weak_(x.getIntrusivePtr()),
      storage_(x.defined()
                   ? x.storage().getWeakStorageImpl()
                   : c10::weak_intrusive_ptr<c10::StorageImpl>(c10::intrusive_ptr<c10::StorageImpl>())) {
  if (!defined_) return;
  options_ = x.options();
  offset_ = x.storage_offset();
  sizes_ = x.sizes().vec();
  strides_ = x.strides().vec();
  counter_ = x.unsafeGetTensorImpl()->version_counter();
  version_ = counter_.current_version();
}

std::optional<at::Tensor> WeakTensor::lock() const {
  if (!defined_) return at::Tensor();
  if (counter_.current_version() != version_) return std::nullopt;
  if (auto impl = weak_.lock()) return at::Tensor(std::move(impl));
  auto storage = storage_.lock();
  if (!storage) return std::nullopt;
  const at::AutoDispatchBelowADInplaceOrView below;
  at::Tensor x = at::empty({0}, options_);
  x.set_(c10::Storage(std::move(storage)), offset_, sizes_, strides_);
  x.unsafeGetTensorImpl()->set_version_counter(counter_);
  return x;
}

}  // namespace remnant::ops
