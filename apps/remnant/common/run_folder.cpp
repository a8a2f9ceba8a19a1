#include "common/run_folder.h"

#include <sys/file.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <optional>
#include <system_error>

#include "common/error.h"
#include "common/file.h"

namespace remnant::app {
namespace {

namespace fs = std::filesystem;

/// What only a run has that did a step, and what a run writes before; of those a new one might take an old
/// one for its own.
constexpr std::array kTrained{"checkpoint", "checkpoint.old", "best", "metrics.jsonl", "summary.json"};
constexpr std::array kBeforeTraining{"memory.json", "plan.json", "layers.json", "timeline.json"};

fs::path parent_of(const fs::path& path) {
  const fs::path parent = path.parent_path();
  return parent.empty() ? fs::path(".") : parent;
}

fs::path without_trailing_slash(const fs::path& path) {
  return path.has_filename() ? path : path.parent_path();
}

fs::path with_suffix(fs::path path, const char* suffix) { return path += suffix; }

void sync_directory(const fs::path& directory) { File(directory, O_RDONLY | O_DIRECTORY).sync(); }

void sync_tree(const fs::path& directory) {
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(directory)) {
    if (entry.is_symlink()) continue;
    if (entry.is_directory()) sync_directory(entry.path());
    if (entry.is_regular_file()) File(entry.path(), O_RDONLY).sync();
  }
  sync_directory(directory);
}

void rename_or_throw(const fs::path& from, const fs::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) throw_system_error("write", to, errno);
}

// Held around the two renames of a swap, so that a reader does not take the moment between them for
// an interrupted save. Advisory: where a file system knows no locks, the swap goes on without.
class SwapLock {
 public:
  explicit SwapLock(const fs::path& parent) : directory_(parent, O_RDONLY | O_DIRECTORY) {
    while (::flock(directory_.descriptor(), LOCK_EX) != 0 && errno == EINTR) {
    }
  }

 private:
  File directory_;  // closing it releases the lock
};

// Held by a training over its run's folder, and gone with its process. Advisory: where a file system knows no
// locks, nothing is kept out.
class TrainingLock {
 public:
  explicit TrainingLock(const fs::path& run) : path_(run / ".lock") {
    do {
      file_.emplace(path_, O_RDWR | O_CREAT);
      if (::flock(file_->descriptor(), LOCK_EX | LOCK_NB) != 0) {
        if (errno != EWOULDBLOCK) return;
        throw Error("another training is writing to " + run.string() +
                    ": wait until it has ended, or choose another --out");
      }
    } while (!is_in_place());  // its last holder may have removed it since it was opened
  }
  TrainingLock(const TrainingLock&) = delete;
  TrainingLock& operator=(const TrainingLock&) = delete;
  ~TrainingLock() {
    std::error_code ignored;
    fs::remove(path_, ignored);
  }

 private:
  bool is_in_place() const {
    struct stat found;
    return ::stat(path_.c_str(), &found) == 0 && found.st_ino == file_->status().st_ino;
  }

  fs::path path_;
  std::optional<File> file_;
};

std::string dump(const nlohmann::ordered_json& value, int indent, const fs::path& path) {
  try {
    return value.dump(indent) + "\n";
  } catch (const nlohmann::json::exception&) {
    throw Error("cannot write " + path.string() + ": it would hold text that is not valid UTF-8");
  }
}

}  // namespace

std::string read_file(const fs::path& path) {
  const File file(path, O_RDONLY);
  const struct stat status = file.status();
  if (!S_ISREG(status.st_mode)) throw Error(path.string() + " is not a regular file");
  std::string content(static_cast<size_t>(status.st_size), '\0');
  content.resize(file.read_at(0, content.data(), content.size()));
  return content;
}

void write_file_atomically(const fs::path& file, const std::function<void(const ByteSink&)>& write) {
  // Unique in the process too: two threads may write the same file.
  static std::atomic<uint64_t> counter{0};
  const fs::path temporary = with_suffix(
      file, (".tmp." + std::to_string(::getpid()) + "." + std::to_string(counter.fetch_add(1))).c_str());
  try {
    {
      File out(temporary, O_WRONLY | O_CREAT | O_TRUNC, file);
      write([&out](const void* data, size_t size) { out.write(data, size); });
      out.sync();
    }
    rename_or_throw(temporary, file);
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  sync_directory(parent_of(file));
}

void write_file_atomically(const fs::path& file, const std::string& content) {
  write_file_atomically(file, [&](const ByteSink& sink) { sink(content.data(), content.size()); });
}

bool recover_directory(const fs::path& path) {
  const fs::path directory = without_trailing_slash(path);
  const fs::path old = with_suffix(directory, ".old");
  std::error_code ignored;
  if (fs::exists(directory, ignored) || !fs::exists(old, ignored)) return false;
  const SwapLock lock(parent_of(directory));
  if (fs::exists(directory, ignored) || !fs::exists(old, ignored)) return false;
  rename_or_throw(old, directory);
  sync_directory(parent_of(directory));
  return true;
}

void replace_directory_atomically(const fs::path& path, const std::function<void(const fs::path&)>& write) {
  const fs::path directory = without_trailing_slash(path);
  const fs::path temporary = with_suffix(directory, ".tmp");
  const fs::path old = with_suffix(directory, ".old");
  recover_directory(directory);
  try {
    fs::remove_all(temporary);  // left by a save that was interrupted while writing
    fs::create_directories(temporary);
    write(temporary);
    sync_tree(temporary);
    const SwapLock lock(parent_of(directory));
    const bool replaces = fs::exists(directory);
    if (replaces) {
      fs::remove_all(old);  // left by a save that was interrupted after its renames
      rename_or_throw(directory, old);
    }
    try {
      rename_or_throw(temporary, directory);
    } catch (const Error&) {
      if (replaces) rename_or_throw(old, directory);
      throw;
    }
    sync_directory(parent_of(directory));
  } catch (const fs::filesystem_error& error) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    throw_system_error("write", directory, error.code().value());
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    throw;
  }
  std::error_code ignored;  // the new directory is in place; the next save removes what is left
  fs::remove_all(old, ignored);
}

bool RunFolder::is_taken(const fs::path& path) {
  std::error_code ignored;
  if (!fs::exists(path / "config.json", ignored)) return false;
  return std::any_of(kTrained.begin(), kTrained.end(),
                     [&](const char* name) { return fs::exists(path / name, ignored); });
}

RunFolder RunFolder::create(const fs::path& path, bool resume) {
  std::error_code code;
  if (fs::exists(path, code) && !fs::is_directory(path, code)) {
    throw Error(path.string() + " is a file, not a folder: choose another --out");
  }
  fs::create_directories(path, code);
  if (code) throw_system_error("make the folder", path, code.value());
  RunFolder folder;
  folder.path_ = path;
  if (!resume && is_taken(path)) {
    throw Error(path.string() + " already holds a run: choose another --out or pass --resume");
  }
  folder.lock_ = std::make_shared<const TrainingLock>(path);
  if (!resume && fs::exists(path / "config.json", code)) {
    for (const char* name : kBeforeTraining) fs::remove(path / name, code);
  }
  recover_directory(path / "checkpoint");
  return folder;
}

RunFolder RunFolder::open(const fs::path& path) {
  std::error_code code;
  const fs::file_status status = fs::status(path, code);
  if (!fs::exists(status)) {
    throw_system_error("open the run folder", path, code ? code.value() : ENOENT);
  }
  if (!fs::is_directory(status)) throw Error(path.string() + " is a file, not a run folder");
  if (!fs::exists(path / "config.json", code)) {
    throw Error(path.string() + " is not a run folder: it holds no config.json");
  }
  RunFolder folder;
  folder.path_ = path;
  recover_directory(path / "checkpoint");
  return folder;
}

void RunFolder::write_json(const std::string& name, const nlohmann::ordered_json& value) const {
  write_file_atomically(path_ / name, dump(value, 2, path_ / name));
}

nlohmann::ordered_json RunFolder::read_json(const std::string& name) const {
  const fs::path file = path_ / name;
  std::error_code ignored;
  if (!fs::exists(file, ignored)) throw Error("the run folder " + path_.string() + " holds no " + name);
  return read_json_file(file);
}

nlohmann::ordered_json read_json_file(const fs::path& file) {
  auto value = nlohmann::ordered_json::parse(read_file(file), nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) throw Error(file.string() + " is damaged: it is not valid JSON");
  return value;
}

void RunFolder::append_metrics(const nlohmann::ordered_json& line) const {
  const fs::path path = path_ / "metrics.jsonl";
  const std::string text = dump(line, -1, path);
  File file(path, O_WRONLY | O_CREAT | O_APPEND);
  const int64_t size = file.status().st_size;
  try {
    file.write(text.data(), text.size());
  } catch (const Error&) {
    file.truncate(size);  // the next line must not be glued to a part of this one
    throw;
  }
}

void RunFolder::drop_metrics_after(int64_t step) const {
  const fs::path path = path_ / "metrics.jsonl";
  std::error_code ignored;
  if (!fs::exists(path, ignored)) return;
  const std::string content = read_file(path);
  std::string kept;
  int64_t number = 0;
  for (size_t begin = 0; begin < content.size();) {
    const size_t newline = content.find('\n', begin);
    if (newline == std::string::npos) break;  // torn by a crash
    const std::string line = content.substr(begin, newline - begin);
    begin = newline + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const auto value = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!value.is_object()) {
      if (begin == content.size()) break;
      throw Error(path.string() + ", line " + std::to_string(number) +
                  ", is not a JSON object: remove that line, or start anew with another --out");
    }
    const auto found = value.find("step");
    const bool drop = found != value.end() && found->is_number() && found->get<double>() > double(step);
    if (!drop) kept += line + "\n";
  }
  if (kept != content) write_file_atomically(path, kept);
}

}  // namespace remnant::app
