#include "ops/derived.h"

#include "ops/step_common.h"
#include "ops/weak_tensor.h"

#include <torch/library.h>

#include <bit>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace remnant::ops {

namespace {

// The storage is held weakly, so that its address cannot come to mean another one while an entry lives.
struct Entry {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  int64_t offset;
  std::vector<int64_t> sizes, strides;
  at::ScalarType type;
  uint32_t version;
  std::vector<WeakTensor> tensors;
  std::vector<int64_t> settings;

  bool expired() const {
    if (storage.expired()) return true;
    for (const WeakTensor& tensor : tensors) {
      if (tensor.expired()) return true;
    }
    return false;
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

thread_local bool looking = true;

bool has_place(const at::Tensor& x) { return !is_traced(x) && !x.is_inference() && x.has_storage(); }

// Writes a Derived into a recipe, or reads it: `visit` goes through its members in one order for both.
struct Writer {
  Recipe recipe;
  void operator()(const at::Tensor& x) { recipe.tensors.push_back(x); }
  void operator()(int64_t x) { recipe.settings.push_back(x); }
  void operator()(bool x) { (*this)(static_cast<int64_t>(x)); }
  void operator()(double x) { (*this)(std::bit_cast<int64_t>(x)); }
  void operator()(const std::vector<int64_t>& list) {
    (*this)(static_cast<int64_t>(list.size()));
    for (const int64_t x : list) (*this)(x);
  }
  template <typename Enum>
    requires std::is_enum_v<Enum>
  void operator()(Enum x) {
    (*this)(static_cast<int64_t>(x));
  }
  void operator()(const Derived::Other& other);
};

struct Reader {
  const Recipe& recipe;
  size_t tensor = 0, setting = 0;
  void operator()(at::Tensor& x) { x = recipe.tensors.at(tensor++); }
  void operator()(int64_t& x) { x = recipe.settings.at(setting++); }
  void operator()(bool& x) { x = recipe.settings.at(setting++) != 0; }
  void operator()(double& x) { x = std::bit_cast<double>(recipe.settings.at(setting++)); }
  void operator()(std::vector<int64_t>& list) {
    list.resize(static_cast<size_t>(recipe.settings.at(setting++)));
    for (int64_t& x : list) (*this)(x);
  }
  template <typename Enum>
    requires std::is_enum_v<Enum>
  void operator()(Enum& x) {
    x = static_cast<Enum>(recipe.settings.at(setting++));
  }
  void operator()(Derived::Other& other);
};

template <typename Visitor, typename From>
void visit(Visitor& v, From& from) {
  v(from.sizes);
  v(from.format);
  v(from.type);
  v(from.base);
  v(from.value);
  v(from.codes.codes);
  v(from.codes.table);
  v(from.bits);
  v(from.kinked);
  v(from.source);
  v(from.weight);
  v(from.bias);
  v(from.stride);
  v(from.padding);
  v(from.dilation);
  v(from.groups);
  v(from.average);
  v(from.scale);
  v(from.shift);
  v(from.factor);
  v(from.offset);
  v(from.residual);
  v(from.slope);
  v(from.silu);
}

void Writer::operator()(const Derived::Other& other) {
  (*this)(other != nullptr);
  if (other) visit(*this, *other);
}

void Reader::operator()(Derived::Other& other) {
  bool there = false;
  (*this)(there);
  if (!there) return;
  Derived from;
  visit(*this, from);
  other = std::make_shared<const Derived>(std::move(from));
}

}  // namespace

bool Derived::exact() const {
  return base != Base::codes && (!source || source->exact()) && (!residual || residual->exact());
}

Recipe pack(const Derived& from) {
  Writer writer;
  visit(writer, from);
  return std::move(writer.recipe);
}

Derived unpack(const Recipe& recipe) {
  Derived from;
  Reader reader{recipe};
  visit(reader, from);
  return from;
}

at::MemoryFormat format_of(const at::Tensor& x) {
  if (x.is_contiguous() || x.dim() < 4) return at::MemoryFormat::Contiguous;
  return x.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}

void note_derived(const at::Tensor& y, Derived from) {
  if (!has_place(y)) return;
  from.sizes = y.sizes().vec();
  from.format = format_of(y);
  from.type = y.scalar_type();
  Recipe recipe = pack(from);
  for (const at::Tensor& tensor : recipe.tensors) {
    if (tensor.defined() && !has_place(tensor)) return;
  }
  Entry entry{y.storage().getWeakStorageImpl(),
              y.storage_offset(),
              y.sizes().vec(),
              y.strides().vec(),
              y.scalar_type(),
              static_cast<uint32_t>(y._version()),
              {recipe.tensors.begin(), recipe.tensors.end()},
              std::move(recipe.settings)};
  const std::lock_guard<std::mutex> lock(registry().mutex);
  std::erase_if(registry().entries, [](const auto& item) { return item.second.expired(); });
  registry().entries.emplace(y.storage().unsafeGetStorageImpl(), std::move(entry));
}

bool look_for_derived(bool look) { return std::exchange(looking, look); }

std::optional<Derived> find_derived(const at::Tensor& x) {
  if (!looking || !has_place(x)) return std::nullopt;
  const std::lock_guard<std::mutex> lock(registry().mutex);
  const auto [begin, end] = registry().entries.equal_range(x.storage().unsafeGetStorageImpl());
  for (auto it = begin; it != end; ++it) {
    const Entry& e = it->second;
    if (e.offset != x.storage_offset() || e.version != x._version() || e.type != x.scalar_type() ||
        x.sizes() != e.sizes || x.strides() != e.strides || e.storage.expired()) {
      continue;
    }
    Recipe recipe{std::vector<at::Tensor>(e.tensors.size()), e.settings};
    bool whole = true;
    for (size_t i = 0; whole && i < e.tensors.size(); ++i) {
      auto tensor = e.tensors[i].lock();
      whole = tensor.has_value();
      if (whole) recipe.tensors[i] = *std::move(tensor);
    }
    if (whole) return unpack(recipe);
  }
  return std::nullopt;
}

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("look_for_derived", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(look_for_derived));
}

}  // namespace remnant::ops
