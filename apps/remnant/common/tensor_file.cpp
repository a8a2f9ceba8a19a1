#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>
#include <utility>

#include "common/error.h"
#include "common/file.h"
#include "common/run_folder.h"

namespace remnant::app {
namespace {

static_assert(std::endian::native == std::endian::little, "the layout is little-endian");

constexpr const char* metadata_key = "__metadata__";
constexpr int64_t length_bytes = 8;
// The layout's own limit: a length above it is damage, and must not become an allocation.
constexpr int64_t max_header_bytes = 100'000'000;
constexpr size_t max_dimensions = 64;  // as many as torch's own operations take

constexpr std::pair<const char*, at::ScalarType> dtypes[] = {
    {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf},  {"BF16", at::kBFloat16},
    {"I64", at::kLong},   {"I32", at::kInt},   {"I16", at::kShort}, {"I8", at::kChar},
    {"U8", at::kByte},    {"BOOL", at::kBool}};

const char* dtype_name(at::ScalarType type) {
  for (const auto& [name, candidate] : dtypes) {
    if (candidate == type) return name;
  }
  return nullptr;
}

// Names come from the file: a damaged one must not send control characters or pages to a terminal.
std::string printable(const nlohmann::json& value) {
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true);
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return text;
}

struct Entry {
  std::string name;
  at::ScalarType type;
  std::vector<int64_t> shape;
  int64_t begin, end;
};

// Every check of one file speaks of that file.
class Reader {
 public:
  explicit Reader(const std::filesystem::path& path) : path_(path), file_(path, O_RDONLY | O_NONBLOCK) {}

  LoadedTensors load() {
    const struct stat status = file_.status();
    if (!S_ISREG(status.st_mode))
      throw Error(path_.string() + " is not a tensor file: it is no regular file");
    const int64_t size = status.st_size;
    if (size < length_bytes) fail("it has " + std::to_string(size) + " bytes, fewer than any tensor file");
    uint64_t declared = 0;
    read(0, &declared, sizeof declared);
    if (declared > static_cast<uint64_t>(max_header_bytes)) {
      fail("its header claims " + std::to_string(declared) + " bytes, more than a tensor file may have");
    }
    const auto header_bytes = static_cast<int64_t>(declared);
    if (header_bytes > size - length_bytes) {
      fail("its header claims " + std::to_string(header_bytes) + " bytes but only " +
           std::to_string(size - length_bytes) + " follow");
    }
    std::string header(declared, '\0');
    read(length_bytes, header.data(), declared);

    LoadedTensors loaded;
    const int64_t data_begin = length_bytes + header_bytes;
    for (const Entry& entry : entries(parse(header), size - data_begin, loaded.metadata)) {
      at::Tensor tensor = at::empty(entry.shape, at::TensorOptions().dtype(entry.type));
      const auto bytes = static_cast<size_t>(entry.end - entry.begin);
      if (bytes > 0) read(data_begin + entry.begin, tensor.data_ptr(), bytes);
      // Any other value in a bool is undefined behaviour for whoever reads it.
      const auto* values = static_cast<const uint8_t*>(tensor.const_data_ptr());
      if (entry.type == at::kBool && std::any_of(values, values + bytes, [](uint8_t v) { return v > 1; })) {
        fail("its tensor " + printable(entry.name) + " is BOOL but holds bytes other than 0 and 1");
      }
      loaded.tensors.emplace(entry.name, std::move(tensor));
    }
    return loaded;
  }

 private:
  [[noreturn]] void fail(const std::string& why) const {
    throw Error(path_.string() + " is damaged or not a tensor file: " + why);
  }

  void read(int64_t offset, void* data, size_t size) const {
    if (file_.read_at(offset, data, size) < size) fail("it ends early");
  }

  nlohmann::json parse(const std::string& header) const {
    if (header.empty() || header[0] != '{') fail("its header is no JSON object");
    std::set<std::string> names;
    const auto check = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
      if (event == nlohmann::json::parse_event_t::key && depth == 1 &&
          !names.insert(value.get<std::string>()).second) {
        fail("its header names " + printable(value) + " twice");
      }
      return true;
    };
    nlohmann::json value = nlohmann::json::parse(header, check, /*allow_exceptions=*/false);
    if (!value.is_object()) fail("its header is no valid JSON");
    return value;
  }

  // In the order of their data, which must cover the rest of the file without gap or overlap.
  std::vector<Entry> entries(const nlohmann::json& header, int64_t data_bytes,
                             std::map<std::string, std::string>& metadata) const {
    std::vector<Entry> entries;
    for (const auto& [name, value] : header.items()) {
      if (name == metadata_key) {
        read_metadata(value, metadata);
      } else {
        entries.push_back(entry(name, value));
      }
    }
    std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
      return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
    });
    int64_t end = 0;
    for (const Entry& entry : entries) {
      if (entry.begin != end)
        fail("the data of its tensor " + printable(entry.name) + " overlaps or leaves a gap");
      end = entry.end;
    }
    if (end != data_bytes) {
      fail("its tensors take " + std::to_string(end) + " bytes but " + std::to_string(data_bytes) +
           " follow its header");
    }
    return entries;
  }

  void read_metadata(const nlohmann::json& value, std::map<std::string, std::string>& metadata) const {
    if (!value.is_object()) fail("its metadata are no object");
    for (const auto& [key, text] : value.items()) {
      if (!text.is_string()) fail("its metadata " + printable(key) + " are no string");
      metadata[key] = text.get<std::string>();
    }
  }

  Entry entry(const std::string& name, const nlohmann::json& value) const {
    const std::string its = "its tensor " + printable(name) + " ";
    if (!value.is_object() || !value.contains("dtype") || !value.contains("shape") ||
        !value.contains("data_offsets")) {
      fail(its + "lacks dtype, shape or data_offsets");
    }
    Entry entry{name, at::kFloat, {}, 0, 0};
    const nlohmann::json& dtype = value["dtype"];
    const auto* known = std::find_if(std::begin(dtypes), std::end(dtypes),
                                     [&](const auto& candidate) { return dtype == candidate.first; });
    if (known == std::end(dtypes)) {
      fail(its + "has the dtype " + printable(dtype) +
           ", expected one of F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL");
    }
    entry.type = known->second;
    const nlohmann::json& shape = value["shape"];
    if (!shape.is_array() || shape.size() > max_dimensions)
      fail(its + "has a shape that is no list of sizes");
    // Zeros count as one here: the other sizes must not overflow strides either.
    int64_t bytes = static_cast<int64_t>(at::elementSize(entry.type));
    bool empty = false;
    for (const nlohmann::json& item : shape) {
      const int64_t size = number(item, its + "has a shape that is no list of sizes");
      entry.shape.push_back(size);
      empty = empty || size == 0;
      if (__builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes)) {
        fail(its + "has a shape too large for any memory");
      }
    }
    if (empty) bytes = 0;
    const nlohmann::json& offsets = value["data_offsets"];
    const std::string no_range = its + "has data_offsets that are no range";
    if (!offsets.is_array() || offsets.size() != 2) fail(no_range);
    entry.begin = number(offsets[0], no_range);
    entry.end = number(offsets[1], no_range);
    if (entry.end < entry.begin) fail(no_range);
    if (entry.end - entry.begin != bytes) {
      fail(its + "needs " + std::to_string(bytes) + " bytes for its shape but has " +
           std::to_string(entry.end - entry.begin));
    }
    return entry;
  }

  int64_t number(const nlohmann::json& value, const std::string& otherwise) const {
    if (!value.is_number_unsigned()) fail(otherwise);
    const auto number = value.get<uint64_t>();
    if (number > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) fail(otherwise);
    return static_cast<int64_t>(number);
  }

  std::filesystem::path path_;
  File file_;
};

void check_can_save(const std::filesystem::path& file, const std::string& name, const at::Tensor& tensor) {
  const std::string start = "cannot write " + file.string() + ": the tensor '" + name + "' ";
  if (name == metadata_key) throw Error(start + "has a name that the layout keeps for itself");
  if (!tensor.defined()) throw Error(start + "is undefined");
  if (tensor.layout() != at::kStrided || dtype_name(tensor.scalar_type()) == nullptr) {
    throw Error(start + "is " + toString(tensor.scalar_type()) +
                ", expected a dense tensor of F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL");
  }
}

}  // namespace

void save_tensors(const std::filesystem::path& file, const std::map<std::string, at::Tensor>& tensors,
                  const std::map<std::string, std::string>& metadata) {
  std::vector<std::pair<std::string, at::Tensor>> by_data;
  for (const auto& [name, tensor] : tensors) {
    check_can_save(file, name, tensor);
    by_data.emplace_back(name, tensor.detach());
  }
  // Readers that map the file need every tensor aligned.
  std::stable_sort(by_data.begin(), by_data.end(), [](const auto& a, const auto& b) {
    return a.second.element_size() > b.second.element_size();
  });
  std::map<std::string, std::pair<int64_t, int64_t>> offsets;
  int64_t end = 0;
  for (const auto& [name, tensor] : by_data) {
    const int64_t begin = end;
    end += tensor.numel() * static_cast<int64_t>(tensor.element_size());
    offsets[name] = {begin, end};
  }

  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata.empty()) json[metadata_key] = metadata;
  for (const auto& [name, tensor] : tensors) {
    json[name] = {{"dtype", dtype_name(tensor.scalar_type())},
                  {"shape", tensor.sizes().vec()},
                  {"data_offsets", {offsets[name].first, offsets[name].second}}};
  }
  std::string header;
  try {
    header = json.dump();
  } catch (const nlohmann::json::exception&) {
    throw Error("cannot write " + file.string() + ": a name or the metadata are not valid UTF-8");
  }
  header.resize((header.size() + 7) / 8 * 8, ' ');
  if (static_cast<int64_t>(header.size()) > max_header_bytes) {
    throw Error("cannot write " + file.string() + ": its header would exceed " +
                std::to_string(max_header_bytes) + " bytes");
  }

  write_file_atomically(file, [&](const ByteSink& sink) {
    const uint64_t length = header.size();
    sink(&length, sizeof length);
    sink(header.data(), header.size());
    for (const auto& [name, tensor] : by_data) {
      const at::Tensor dense = tensor.cpu().resolve_neg().contiguous();
      if (dense.numel() > 0) sink(dense.const_data_ptr(), dense.nbytes());
    }
  });
}

LoadedTensors load_tensors(const std::filesystem::path& file) { return Reader(file).load(); }

}  // namespace remnant::app
