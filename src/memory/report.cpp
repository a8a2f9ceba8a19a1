#include <remnant/memory.h>

#include <c10/util/Exception.h>

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <tuple>

namespace remnant::memory {
namespace {

std::string shape_text(const std::vector<int64_t>& shape, const char* separator) {
  std::string text;
  for (const int64_t size : shape) {
    if (!text.empty()) text += separator;
    text += std::to_string(size);
  }
  return text;
}

std::string json_string(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      std::array<char, 8> code{};
      std::snprintf(code.data(), code.size(), "\\u%04x", static_cast<unsigned>(c));
      quoted += code.data();
    } else {
      quoted += c;
    }
  }
  return quoted + "\"";
}

std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"') quoted += '"';
    quoted += c;
  }
  return quoted + "\"";
}

std::string bytes_or(int64_t bytes, const char* unknown) {
  return bytes < 0 ? unknown : std::to_string(bytes);
}

// 1234567 -> "1,234,567"
std::string grouped(int64_t bytes) {
  if (bytes < 0) return "";
  const std::string digits = std::to_string(bytes);
  std::string result;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) result += ',';
    result += digits[i];
  }
  return result;
}

// "encoder.layers.3.linear1" -> "encoder.layers.*.linear1"
std::string without_numbers(const std::string& layer) {
  std::string result;
  std::istringstream parts(layer);
  for (std::string part; std::getline(parts, part, '.');) {
    const bool number = !part.empty() && part.find_first_not_of("0123456789") == std::string::npos;
    if (!result.empty()) result += '.';
    result += number ? "*" : part;
  }
  return result;
}

std::vector<SavedRow> folded(const std::vector<SavedRow>& rows) {
  using Key = std::tuple<std::string, std::string, std::string, std::vector<int64_t>, std::string>;
  std::vector<SavedRow> result;
  std::map<Key, size_t> places;
  for (const SavedRow& row : rows) {
    const std::string layer = without_numbers(row.layer);
    const auto [place, is_new] =
        places.try_emplace({layer, row.op, row.policy, row.shape, row.dtype}, result.size());
    if (is_new) {
      result.push_back(row);
      continue;
    }
    SavedRow& sum = result[place->second];
    if (sum.layer != row.layer) sum.layer = layer;
    sum.count += row.count;
    sum.kept_bytes += row.kept_bytes;
    const auto add = [](int64_t& to, int64_t bytes) {
      if (bytes >= 0) to = std::max<int64_t>(to, 0) + bytes;
    };
    add(sum.predicted_bytes, row.predicted_bytes);
    add(sum.eager_bytes, row.eager_bytes);
  }
  return result;
}

}  // namespace

std::string Report::table() const {
  constexpr size_t columns = 9;
  constexpr size_t first_right = 5;  // counts and bytes stand at the right of their columns
  using Line = std::array<std::string, columns>;
  std::vector<Line> lines{
      {"layer", "op", "policy", "shape", "dtype", "count", "kept bytes", "predicted bytes", "eager bytes"}};
  for (const SavedRow& row : folded(rows)) {
    lines.push_back({row.layer, row.op, row.policy, shape_text(row.shape, "x"), row.dtype,
                     std::to_string(row.count), grouped(row.kept_bytes), grouped(row.predicted_bytes),
                     grouped(row.eager_bytes)});
  }
  int64_t count = 0;
  for (const SavedRow& row : rows) count += row.count;
  lines.push_back({"total", "", "", "", "", std::to_string(count), grouped(kept_bytes), "", ""});

  std::array<size_t, columns> widths{};
  for (const Line& line : lines) {
    for (size_t i = 0; i < columns; ++i) widths[i] = std::max(widths[i], line[i].size());
  }
  std::string text;
  for (const Line& line : lines) {
    std::string out;
    for (size_t i = 0; i < columns; ++i) {
      const std::string pad(widths[i] - line[i].size(), ' ');
      if (i > 0) out += "  ";
      out += i < first_right ? line[i] + pad : pad + line[i];
    }
    out.erase(out.find_last_not_of(' ') + 1);
    text += out + "\n";
  }
  if (unreadable > 0) {
    text += "not counted: what " + std::to_string(unreadable) +
            (unreadable == 1 ? " node keeps that" : " nodes keep that") + " would not show it\n";
  }
  return text;
}

std::string Report::json() const {
  std::string text = "{\n  \"kept_bytes\": " + std::to_string(kept_bytes) +
                     ",\n  \"unreadable\": " + std::to_string(unreadable) + ",\n  \"rows\": [";
  const char* separator = "\n";
  for (const SavedRow& row : rows) {
    text += separator;
    text += "    {\"layer\": " + json_string(row.layer) + ", \"op\": " + json_string(row.op) +
            ", \"policy\": " + json_string(row.policy) + ", \"shape\": [" + shape_text(row.shape, ", ") +
            "], \"dtype\": " + json_string(row.dtype) + ", \"count\": " + std::to_string(row.count) +
            ", \"kept_bytes\": " + std::to_string(row.kept_bytes) +
            ", \"predicted_bytes\": " + bytes_or(row.predicted_bytes, "null") +
            ", \"eager_bytes\": " + bytes_or(row.eager_bytes, "null") + "}";
    separator = ",\n";
  }
  return text + (rows.empty() ? "]\n}\n" : "\n  ]\n}\n");
}

std::string Report::csv() const {
  std::string text = "layer,op,policy,shape,dtype,count,kept_bytes,predicted_bytes,eager_bytes\n";
  for (const SavedRow& row : rows) {
    text += csv_field(row.layer) + "," + csv_field(row.op) + "," + csv_field(row.policy) + "," +
            shape_text(row.shape, "x") + "," + csv_field(row.dtype) + "," + std::to_string(row.count) + "," +
            std::to_string(row.kept_bytes) + "," + bytes_or(row.predicted_bytes, "") + "," +
            bytes_or(row.eager_bytes, "") + "\n";
  }
  return text;
}

void Report::write(const std::string& path) const {
  const std::string ending = std::filesystem::path(path).extension().string();
  const std::string text = ending == ".json" ? json() : ending == ".csv" ? csv() : table();
  // A reader, or a full disk, must never leave half a file under the name that was asked for.
  const std::string partial = path + "." + std::to_string(getpid()) + ".partial";
  std::error_code failure;
  bool written = false;
  {
    errno = 0;
    std::ofstream file(partial, std::ios::binary | std::ios::trunc);
    file << text;
    file.close();
    written = file.good();
    if (!written) failure = std::error_code(errno != 0 ? errno : EIO, std::generic_category());
  }
  if (written) std::filesystem::rename(partial, path, failure);
  if (failure) {
    std::error_code ignored;
    std::filesystem::remove(partial, ignored);
    TORCH_CHECK(false, "remnant::memory::Report::write: cannot write ", path, ": ", failure.message(),
                "; choose a path in a folder that exists, can be written to and has space");
  }
}

}  // namespace remnant::memory
