#pragma once

#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace remnant::app {

/// Writes a file so that a reader sees the old content or the new, never a part: temporary file in
/// the same folder, fsync, rename. Throws Error (disk full, no permission); the old file is intact.
void write_file_atomically(const std::filesystem::path& file, const std::string& content);
/// The same for content that comes in pieces: `write` is handed a function to call with each piece.
using ByteSink = std::function<void(const void* data, size_t size)>;
void write_file_atomically(const std::filesystem::path& file,
                           const std::function<void(const ByteSink&)>& write);

/// The bytes of a regular file. Throws Error.
std::string read_file(const std::filesystem::path& file);

/// Tensors in the safetensors layout (8-byte little-endian header length, JSON header, data), written
/// atomically. Header by name; data by element size, then name, so that every tensor is aligned.
/// `metadata` goes to "__metadata__". Dtypes: F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL.
void save_tensors(const std::filesystem::path& file, const std::map<std::string, at::Tensor>& tensors,
                  const std::map<std::string, std::string>& metadata = {});
struct LoadedTensors {
  std::map<std::string, at::Tensor> tensors;
  std::map<std::string, std::string> metadata;
};
/// Throws Error with one sentence on a truncated, malformed or foreign file.
LoadedTensors load_tensors(const std::filesystem::path& file);

/// A file of JSON. Throws Error when it is missing or is none.
nlohmann::ordered_json read_json_file(const std::filesystem::path& file);

/// A run's folder: config.json, metrics.jsonl, memory.json, timeline.json, summary.json, checkpoint/,
/// vocabularies, TensorBoard events.
class RunFolder {
 public:
  /// Whether `path` holds something that was trained. What a run leaves that ended before its first step does
  /// not count.
  static bool is_taken(const std::filesystem::path& path);
  /// Makes the folder; without `resume` removes what such a run has left. Throws Error when it already holds
  /// a run (unless `resume`), or while another object of this function, or a copy of it, lives in any
  /// process.
  static RunFolder create(const std::filesystem::path& path, bool resume);
  /// Opens an existing run for reading. Throws Error naming what is missing.
  static RunFolder open(const std::filesystem::path& path);
  const std::filesystem::path& path() const { return path_; }
  void write_json(const std::string& name, const nlohmann::ordered_json& value) const;
  nlohmann::ordered_json read_json(const std::string& name) const;
  /// One object a line. `step` decides what is dropped on resume: drop_metrics_after(step).
  void append_metrics(const nlohmann::ordered_json& line) const;
  void drop_metrics_after(int64_t step) const;

 private:
  std::filesystem::path path_;
  std::shared_ptr<const void> lock_;  // null in readers
};

/// A checkpoint is a directory swapped in whole: the files are written beside it, synced, renamed.
/// `write` receives the temporary directory. An interrupted save leaves the previous one in place, or
/// beside it for recover_directory.
void replace_directory_atomically(const std::filesystem::path& directory,
                                  const std::function<void(const std::filesystem::path&)>& write);
/// Puts back the directory that a save, interrupted between its two renames, had set aside; returns
/// whether it did. For readers to call first; waits for a swap that is under way in another process.
bool recover_directory(const std::filesystem::path& directory);

/// TensorBoard event file (TFRecord with masked CRC-32C, hand-encoded protobuf): scalars only.
class EventWriter {
 public:
  explicit EventWriter(const std::filesystem::path& directory);
  ~EventWriter();
  void scalar(const std::string& tag, double value, int64_t step);
  void flush();  ///< scalar() also does every few seconds; throws Error

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Set by SIGINT or SIGTERM; a second signal ends the process at once. A signal that the process was
/// started with as ignored (a background job of a script) stays ignored.
class Interrupt {
 public:
  Interrupt();   ///< installs the handlers
  ~Interrupt();  ///< restores the previous ones
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;
  static bool requested();
  static int exit_code();  ///< 130 or 143; 0 when nothing was requested
};

/// Thrown between batches once a signal asked the program to stop.
struct Interrupted {};
void stop_if_interrupted();

/// A line that is redrawn on a terminal and a plain line now and then elsewhere (or with NO_COLOR /
/// TERM=dumb: no colour, no redraw). Writes to standard error.
class Progress {
 public:
  Progress(std::string label, int64_t total_steps, bool quiet = false);
  ~Progress();  ///< clears the redrawn line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  /// `fields` such as {"loss 3.21", "12.3k tokens/s", "kept 45.1 MB"}; time left is added.
  void update(int64_t step, const std::vector<std::string>& fields);
  /// Clears the redrawn line, so that other output can be printed.
  void clear();

 private:
  std::string label_;
  int64_t total_, first_step_ = -1, last_drawn_step_ = -1;
  bool quiet_, terminal_, line_shown_ = false;
  std::chrono::steady_clock::time_point start_, last_draw_;
};

/// What Progress writes: fitted to `width` columns, or plain, without a bar, where `width` is 0. No
/// share or bar where `total` < 1, no time left where `seconds_left` < 0.
std::string progress_line(const std::string& label, int64_t step, int64_t total,
                          const std::vector<std::string>& fields, double seconds_left, int64_t width);

std::string format_bytes(int64_t bytes);             ///< "45.1 MB" (powers of 1000)
std::string format_duration(double seconds);         ///< "3 min 20 s"
std::string format_fixed(double value, int digits);  ///< that many digits after the point

}  // namespace remnant::app
