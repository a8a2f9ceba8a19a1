#include "ops/derived.h"

#include "ops/step_common.h"

#include <mutex>
#include <unordered_map>
#include <vector>

namespace remnant::ops {

namespace {

using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

// A tensor, or none, that others keep alive.
struct Reference {
  explicit Reference(const at::Tensor& x) : defined(x.defined()), weak(x.getIntrusivePtr()) {}
  bool expired() const { return defined && weak.expired(); }
  // Whether `out` is what it was.
  bool lock(at::Tensor& out) const {
    if (!defined) return true;
    auto impl = weak.lock();
    if (!impl) return false;
    out = at::Tensor(std::move(impl));
    return true;
  }

  bool defined;
  Weak weak;
};

// The storage is held weakly, so that its address cannot come to mean another one while an entry lives.
struct Entry {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  int64_t offset;
  std::vector<int64_t> sizes, strides;
  at::ScalarType type;
  uint32_t version;
  Reference value, codes, table, factor, offsets;
  Derived settings;

  bool expired() const {
    return storage.expired() || value.expired() || codes.expired() || table.expired() || factor.expired() ||
           offsets.expired();
  }
};

struct Registry {
  std::mutex mutex;
  std::unordered_multimap<const c10::StorageImpl*, Entry> entries;
};

Registry& registry() {
  static Registry all;
  return all;
}

bool has_place(const at::Tensor& x) { return !is_traced(x) && !x.is_inference() && x.has_storage(); }

}  // namespace

void note_derived(const at::Tensor& y, const Derived& from) {
  if (!has_place(y)) return;
  Derived settings;
  settings.bits = from.bits;
  settings.kinked = from.kinked;
  settings.slope = from.slope;
  settings.silu = from.silu;
  Entry entry{y.storage().getWeakStorageImpl(),
              y.storage_offset(),
              y.sizes().vec(),
              y.strides().vec(),
              y.scalar_type(),
              static_cast<uint32_t>(y._version()),
              Reference(from.value),
              Reference(from.codes.codes),
              Reference(from.codes.table),
              Reference(from.factor),
              Reference(from.offset),
              settings};
  const std::lock_guard<std::mutex> lock(registry().mutex);
  std::erase_if(registry().entries, [](const auto& item) { return item.second.expired(); });
  registry().entries.emplace(y.storage().unsafeGetStorageImpl(), std::move(entry));
}

std::optional<Derived> find_derived(const at::Tensor& x) {
  if (!has_place(x)) return std::nullopt;
  const std::lock_guard<std::mutex> lock(registry().mutex);
  const auto [begin, end] = registry().entries.equal_range(x.storage().unsafeGetStorageImpl());
  for (auto it = begin; it != end; ++it) {
    const Entry& e = it->second;
    if (e.offset != x.storage_offset() || e.version != x._version() || e.type != x.scalar_type() ||
        x.sizes() != e.sizes || x.strides() != e.strides || e.storage.expired()) {
      continue;
    }
    Derived found = e.settings;
    if (e.value.lock(found.value) && e.codes.lock(found.codes.codes) && e.table.lock(found.codes.table) &&
        e.factor.lock(found.factor) && e.offsets.lock(found.offset)) {
      return found;
    }
  }
  return std::nullopt;
}

}  // namespace remnant::ops
