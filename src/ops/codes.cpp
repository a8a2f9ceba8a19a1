#include "ops/codes.h"

#include "kernels/cpu/step_kernels.h"
#include "ops/attention_common.h"
#include "ops/seed.h"
#include "ops/step_common.h"
#include "ops/weak_tensor.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nextafter.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <limits>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace remnant::ops {

at::Tensor narrow_to_bfloat16(const at::Tensor& x, bool up) {
  const double limit =
      up ? std::numeric_limits<double>::infinity() : -std::numeric_limits<double>::infinity();
  at::Tensor f = x.to(at::kFloat);
  const at::Tensor inside = up ? f.to(x.scalar_type()).lt(x) : f.to(x.scalar_type()).gt(x);
  f = at::where(inside, at::nextafter(f, f.new_full({}, limit)), f);
  const at::Tensor bits = f.view(at::kInt);
  const at::Tensor cut = bits.bitwise_and(static_cast<int64_t>(0xffff)).ne(0);
  const at::Tensor away = (up ? f.gt(0) : f.lt(0)).logical_and_(cut);
  const at::Tensor kept = bits.bitwise_right_shift(16).add(away.to(at::kInt)).bitwise_left_shift(16);
  return at::where(f.isnan(), f, kept.view(at::kFloat)).to(at::kBFloat16);
}

at::Tensor pack_groups(const at::Tensor& codes, int64_t bits) {
  const int64_t size = codes.size(1), parts = 8 / bits, stride = (size * bits + 7) / 8;
  const at::Tensor shifts = at::arange(0, 8, bits, codes.options()).view({1, parts, 1});
  return at::constant_pad_nd(codes, {0, stride * parts - size})
      .view({-1, parts, stride})
      .bitwise_left_shift(shifts)
      .sum(1)
      .to(at::kByte)
      .flatten();
}
at::Tensor unpack_groups(const at::Tensor& bytes, int64_t groups, int64_t size, int64_t bits) {
  const int64_t parts = 8 / bits;
  const at::Tensor shifts = at::arange(0, 8, bits, bytes.options().dtype(at::kLong)).view({1, parts, 1});
  return bytes.to(at::kLong)
      .view({groups, 1, -1})
      .bitwise_right_shift(shifts)
      .bitwise_and((int64_t{1} << bits) - 1)
      .flatten(1)
      .narrow(1, 0, size);
}

namespace {

using Pair = std::tuple<at::Tensor, at::Tensor>;

constexpr int64_t kGroup = kernels::kCodeGroup;

void check(const at::Tensor& x, int64_t bits) {
  check_floating("encode", "input", x);
  TORCH_CHECK(bits == 8 || bits == 4 || bits == 2, "encode: bits must be 8, 4 or 2, got ", bits);
}

c10::SymInt sym_code_bytes(const c10::SymInt& size, int64_t bits) { return (size * bits + 7) / 8; }
c10::SymInt sym_groups(const c10::SymInt& size) { return (size + (kGroup - 1)) / kGroup; }

kernels::LowBits make_problem(at::ScalarType type, int64_t size, int64_t bits, const at::Tensor& codes,
                              const at::Tensor& table) {
  kernels::LowBits problem;
  problem.element = element_of(type);
  problem.size = size;
  problem.bits = bits;
  problem.codes = static_cast<uint8_t*>(codes.data_ptr());
  problem.table = static_cast<uint16_t*>(table.data_ptr());
  return problem;
}

Pair encode_composite(const at::Tensor& input, const at::Tensor& seed, int64_t bits) {
  check(input, bits);
  const auto wide = accumulation_type(input.scalar_type());
  const int64_t size = input.numel(), whole = size / kGroup, rest = size % kGroup;
  const auto options = input.options();
  if (size == 0) {
    return {at::empty({0}, options.dtype(at::kByte)), at::empty({0, 2}, options.dtype(at::kBFloat16))};
  }
  const at::Tensor flat = input.flatten().to(wide);
  const int64_t chunks = (size + kernels::kFlatChunk - 1) / kernels::kFlatChunk;
  const at::Tensor words = random_words(seed, static_cast<uint32_t>(kernels::Stream::rounding), 1, 0, chunks,
                                        kernels::kFlatChunk / kernels::kDropoutColumns);
  const at::Tensor u = at::stack({words.bitwise_and(0xFFFF), words.bitwise_right_shift(16)}, -1)
                           .flatten()
                           .narrow(0, 0, size)
                           .to(wide)
                           .add_(0.5)
                           .mul_(1.0 / 65536);
  const auto levels = static_cast<double>((1 << bits) - 1);
  std::vector<at::Tensor> codes, table;
  const auto add = [&](int64_t first, int64_t groups, int64_t width) {
    if (groups == 0) return;
    const at::Tensor x = flat.narrow(0, first, groups * width).view({groups, width});
    const at::Tensor finite = x.isfinite().all(1, true);
    const at::Tensor low = narrow_to_bfloat16(at::where(finite, x.amin({1}, true), x.new_zeros({})), false);
    const at::Tensor range = x.amax({1}, true).sub(low.to(wide));
    const at::Tensor good = finite.logical_and(range.le(std::numeric_limits<float>::max()));
    const at::Tensor exact = range.div(levels);
    const at::Tensor least =
        at::where(exact.gt(0).logical_and(exact.lt(0x1p-120)), exact.new_full({}, 0x1p-120), exact);
    const at::Tensor step = narrow_to_bfloat16(
        at::where(good, least, x.new_full({}, std::numeric_limits<double>::quiet_NaN())), true);
    const at::Tensor inverse = at::where(step.gt(0), step.to(wide).reciprocal(), x.new_zeros({}));
    const at::Tensor noise = u.narrow(0, first, groups * width).view({groups, width});
    const at::Tensor level = x.sub(low.to(wide)).mul(inverse).add(noise).clamp_max_(levels).floor();
    codes.push_back(pack_groups(at::where(inverse.gt(0), level, x.new_zeros({})).to(at::kLong), bits));
    table.push_back(at::cat({at::where(good, low, low.new_zeros({})), step}, 1));
  };
  add(0, whole, kGroup);
  add(whole * kGroup, rest > 0 ? 1 : 0, rest);
  return {at::cat(codes), at::cat(table)};
}

Pair encode_cpu(const at::Tensor& input, const at::Tensor& seed, int64_t bits) {
  if (!fused_on_cpu()) return encode_composite(input, seed, bits);
  check(input, bits);
  const at::Tensor x = input.contiguous();
  const int64_t size = x.numel();
  at::Tensor codes = at::empty({kernels::code_bytes(size, bits)}, x.options().dtype(at::kByte));
  at::Tensor table = at::empty({kernels::code_groups(size), 2}, x.options().dtype(at::kBFloat16));
  kernels::LowBits problem = make_problem(x.scalar_type(), size, bits, codes, table);
  problem.x = x.const_data_ptr();
  problem.seed = seed_of(seed);
  at::parallel_for(0, kernels::code_groups(size), 256, [&](int64_t begin, int64_t end) {
    kernels::step_kernels().encode(problem, begin * kGroup, std::min(end * kGroup, size));
  });
  return {codes, table};
}

Pair encode_meta(const at::Tensor& input, const at::Tensor& seed, int64_t bits) {
  check(input, bits);
  return {at::empty_symint({sym_code_bytes(input.sym_numel(), bits)}, input.options().dtype(at::kByte)),
          at::empty_symint({sym_groups(input.sym_numel()), 2}, input.options().dtype(at::kBFloat16))};
}

// --- sharing ---------------------------------------------------------------------------------------

// What a tensor's values depend on. The storage is held weakly, so that its address cannot come to mean
// another one while an entry lives.
struct Entry {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  int64_t offset;
  std::vector<int64_t> sizes, strides;
  at::ScalarType type;
  uint32_t version;
  int64_t bits;
  WeakTensor codes, table;

  bool expired() const { return storage.expired() || codes.expired() || table.expired(); }
};

// A dense tensor's leading dimensions do not matter.
void describe_place(const at::Tensor& x, std::vector<int64_t>& sizes, std::vector<int64_t>& strides) {
  if (x.is_contiguous()) {
    sizes = {x.numel()};
  } else {
    sizes = x.sizes().vec();
    strides = x.strides().vec();
  }
}

struct Sharing {
  std::mutex mutex;
  std::unordered_multimap<const c10::StorageImpl*, Entry> entries;

  std::optional<Codes> find(const at::Tensor& x, int64_t bits) {
    std::vector<int64_t> sizes, strides;
    describe_place(x, sizes, strides);
    const auto [begin, end] = entries.equal_range(x.storage().unsafeGetStorageImpl());
    for (auto it = begin; it != end; ++it) {
      const Entry& e = it->second;
      if (e.offset != x.storage_offset() || e.sizes != sizes || e.strides != strides ||
          e.type != x.scalar_type() || e.version != x._version() || e.bits != bits || e.storage.expired()) {
        continue;
      }
      auto codes = e.codes.lock();
      auto table = e.table.lock();
      if (codes && table) return Codes{*codes, *table};
    }
    return std::nullopt;
  }

  void add(const at::Tensor& x, int64_t bits, const Codes& kept) {
    std::erase_if(entries, [](const auto& item) { return item.second.expired(); });
    Entry e{x.storage().getWeakStorageImpl(),
            x.storage_offset(),
            {},
            {},
            x.scalar_type(),
            static_cast<uint32_t>(x._version()),
            bits,
            WeakTensor(kept.codes),
            WeakTensor(kept.table)};
    describe_place(x, e.sizes, e.strides);
    entries.emplace(x.storage().unsafeGetStorageImpl(), std::move(e));
  }
};

Sharing& sharing() {
  static Sharing shared;
  return shared;
}

}  // namespace

namespace {

at::Tensor draw(const at::Tensor& like, const std::optional<at::Generator>& generator) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::draw_seed", "")
                             .typed<at::Tensor(const at::Tensor&, const std::optional<at::Generator>&)>();
  return op.call(like.detach(), generator);
}

Codes encode_with(const at::Tensor& x, const at::Tensor& seed, int64_t bits) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::encode", "").typed<decltype(encode_cpu)>();
  auto [codes, table] = op.call(x.detach(), seed, bits);
  return {codes, table};
}

}  // namespace

Codes encode(const at::Tensor& x, int64_t bits, const std::optional<at::Generator>& generator) {
  return encode_with(x, draw(x, generator), bits);
}

void skip_seeds(const at::Tensor& like, int64_t count, const std::optional<at::Generator>& generator) {
  for (int64_t i = 0; i < count; ++i) draw(like, generator);
}

Codes shared_codes(const at::Tensor& x, int64_t bits, const std::optional<at::Generator>& generator) {
  const at::Tensor seed = draw(x, generator);
  if (is_traced(x) || x.is_inference() || !x.has_storage()) return encode_with(x, seed, bits);
  {
    const std::lock_guard<std::mutex> lock(sharing().mutex);
    if (auto found = sharing().find(x, bits)) return *found;
  }
  // Not under the lock: encoding runs in parallel, and may run Python code (a mode's).
  const Codes made = encode_with(x, seed, bits);
  const std::lock_guard<std::mutex> lock(sharing().mutex);
  if (auto found = sharing().find(x, bits)) return *found;  // another thread was quicker
  sharing().add(x, bits, made);
  return made;
}

void decode_into(const Codes& kept, int64_t bits, int64_t size, int64_t first, at::Tensor& out) {
  const int64_t count = out.numel();
  if (count == 0) return;
  if (out.device().is_cpu() && fused_on_cpu()) {
    kernels::LowBits problem = make_problem(out.scalar_type(), size, bits, kept.codes, kept.table);
    problem.y = out.mutable_data_ptr();
    problem.first = first;
    at::parallel_for(0, (count + kGroup - 1) / kGroup, 256, [&](int64_t begin, int64_t end) {
      kernels::step_kernels().decode(problem, first + begin * kGroup, first + std::min(end * kGroup, count));
    });
    return;
  }
  const auto wide = accumulation_type(out.scalar_type());
  const at::Tensor flat = out.view({-1});
  const auto fill = [&](int64_t from, int64_t groups, int64_t width) {
    if (groups == 0) return;
    const at::Tensor bytes = kept.codes.narrow(0, from * bits / 8, groups * kernels::code_bytes(width, bits));
    const at::Tensor table = kept.table.narrow(0, from / kGroup, groups).to(wide);
    flat.narrow(0, from - first, groups * width)
        .copy_(unpack_groups(bytes, groups, width, bits)
                   .to(wide)
                   .mul(table.select(1, 1).unsqueeze(1))
                   .add(table.select(1, 0).unsqueeze(1))
                   .flatten());
  };
  const int64_t last = first + count;
  // A part of a whole group needs the whole of it; only the tensor's end is short.
  TORCH_INTERNAL_ASSERT(last == size || count % kGroup == 0);
  fill(first, count / kGroup, kGroup);
  if (count % kGroup > 0) fill(last / kGroup * kGroup, 1, count % kGroup);
}

at::Tensor decode(const Codes& kept, int64_t bits, c10::SymIntArrayRef shape, at::ScalarType dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::decode", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t,
                                               c10::SymIntArrayRef, at::ScalarType)>();
  return op.call(kept.codes, kept.table, bits, shape, dtype);
}

namespace {

at::Tensor decode_op(const at::Tensor& codes, const at::Tensor& table, int64_t bits, at::IntArrayRef size,
                     at::ScalarType dtype) {
  at::Tensor out = at::empty(size, codes.options().dtype(dtype));
  check(out, bits);
  TORCH_CHECK(codes.numel() == kernels::code_bytes(out.numel(), bits) &&
                  table.numel() == 2 * kernels::code_groups(out.numel()),
              "decode: a tensor of shape ", size, " at ", bits, " bits has ",
              kernels::code_bytes(out.numel(), bits), " bytes of codes and ",
              kernels::code_groups(out.numel()), " groups, got ", codes.numel(), " and ", table.numel() / 2);
  decode_into({codes.contiguous(), table.contiguous()}, bits, out.numel(), 0, out);
  return out;
}

at::Tensor decode_meta(const at::Tensor& codes, const at::Tensor& table, int64_t bits,
                       c10::SymIntArrayRef size, at::ScalarType dtype) {
  return at::empty_symint(size, codes.options().dtype(dtype));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("encode", c10::DispatchKey::CPU, TORCH_FN(encode_cpu));
  m.impl("encode", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(encode_composite));
  m.impl("encode", c10::DispatchKey::Meta, TORCH_FN(encode_meta));
  m.impl("decode", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(decode_op));
  m.impl("decode", c10::DispatchKey::Meta, TORCH_FN(decode_meta));
}

}  // namespace remnant::ops
