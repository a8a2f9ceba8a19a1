#include <array>
#include <bit>
#include <chrono>
#include <climits>
#include <cstring>
#include <string_view>

#include "common/error.h"
#include "common/file.h"
#include "common/run_folder.h"

namespace remnant::app {
namespace {

constexpr size_t flush_bytes = 1 << 16;
constexpr std::chrono::seconds flush_interval{5};

// CRC-32C (Castagnoli), reflected, a byte at a time.
constexpr std::array<uint32_t, 256> crc_table = [] {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82F63B78u : 0);
    table[byte] = crc;
  }
  return table;
}();

// Masked, because a checksum of data that holds checksums is weak.
uint32_t masked_crc(std::string_view data) {
  uint32_t crc = ~0u;
  for (const char c : data) crc = (crc >> 8) ^ crc_table[(crc ^ static_cast<uint8_t>(c)) & 0xff];
  return std::rotr(~crc, 15) + 0xa282ead8u;
}

template <typename Number>
void append_fixed(std::string& out, Number number) {
  static_assert(std::endian::native == std::endian::little, "the format is little-endian");
  char bytes[sizeof number];
  std::memcpy(bytes, &number, sizeof number);
  out.append(bytes, sizeof number);
}

void append_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  out += static_cast<char>(value);
}

// Protobuf: the wire types used here, and the fields of tensorflow.Event and tensorflow.Summary.
enum Wire : uint32_t { varint = 0, fixed64 = 1, length_delimited = 2, fixed32 = 5 };

void append_key(std::string& out, uint32_t field, Wire wire) { append_varint(out, field << 3 | wire); }

void append_bytes(std::string& out, uint32_t field, std::string_view bytes) {
  append_key(out, field, length_delimited);
  append_varint(out, bytes.size());
  out += bytes;
}

std::string event_at_now() {
  std::string event;
  append_key(event, 1, fixed64);  // wall_time
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  append_fixed(event, std::chrono::duration<double>(now).count());
  return event;
}

void append_record(std::string& out, std::string_view data) {
  std::string length;
  append_fixed(length, static_cast<uint64_t>(data.size()));
  out += length;
  append_fixed(out, masked_crc(length));
  out += data;
  append_fixed(out, masked_crc(data));
}

std::filesystem::path unused_name(const std::filesystem::path& directory) {
  char host[HOST_NAME_MAX + 1] = "localhost";
  if (::gethostname(host, sizeof host) != 0) std::strcpy(host, "localhost");
  host[HOST_NAME_MAX] = '\0';
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const std::string name = "events.out.tfevents." +
                           std::to_string(std::chrono::duration_cast<std::chrono::seconds>(now).count()) +
                           "." + host + "." + std::to_string(::getpid());
  std::filesystem::path path = directory / name;
  std::error_code ignored;
  // A second writer in the same second gets a file of its own.
  for (int i = 1; std::filesystem::exists(path, ignored); ++i)
    path = directory / (name + "." + std::to_string(i));
  return path;
}

}  // namespace

struct EventWriter::State {
  explicit State(const std::filesystem::path& path) : path(path), file(path, O_WRONLY | O_CREAT | O_EXCL) {}
  std::filesystem::path path;
  File file;
  std::string pending;
  std::chrono::steady_clock::time_point last_flush;
};

EventWriter::EventWriter(const std::filesystem::path& directory) {
  std::error_code code;
  std::filesystem::create_directories(directory, code);
  if (code) throw_system_error("make the folder", directory, code.value());
  state_ = std::make_unique<State>(unused_name(directory));
  std::string event = event_at_now();
  append_bytes(event, 3, "brain.Event:2");  // file_version
  append_record(state_->pending, event);
  flush();
}

EventWriter::~EventWriter() {
  try {
    flush();
  } catch (const Error&) {
    // Nobody is left to hear of it, and a graph's last points are not worth ending the process.
    state_->pending.clear();
  }
}

void EventWriter::scalar(const std::string& tag, double value, int64_t step) {
  std::string point;
  append_bytes(point, 1, tag);
  append_key(point, 2, fixed32);  // simple_value
  append_fixed(point, static_cast<float>(value));
  std::string summary;
  append_bytes(summary, 1, point);
  std::string event = event_at_now();
  append_key(event, 2, varint);  // step; a negative one is its two's complement
  append_varint(event, static_cast<uint64_t>(step));
  append_bytes(event, 5, summary);
  append_record(state_->pending, event);
  if (state_->pending.size() >= flush_bytes ||
      std::chrono::steady_clock::now() - state_->last_flush >= flush_interval) {
    flush();
  }
}

void EventWriter::flush() {
  std::string& pending = state_->pending;
  state_->last_flush = std::chrono::steady_clock::now();
  int reason = 0;
  const size_t written = state_->file.write_some(pending.data(), pending.size(), reason);
  const bool complete = written == pending.size();
  pending.erase(0, written);  // a later flush goes on where this one stopped, within a record
  if (!complete) throw_system_error("write", state_->path, reason);
}

}  // namespace remnant::app
