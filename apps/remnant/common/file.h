#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>

#include "common/error.h"

namespace remnant::app {

[[noreturn]] inline void throw_system_error(const std::string& action, const std::filesystem::path& path,
                                            int reason) {
  throw Error("cannot " + action + " " + path.string() + ": " + std::generic_category().message(reason));
}

/// A POSIX file that closes itself and turns every failure into an Error with the system's reason.
/// Streams would lose that reason, and have no fsync.
class File {
 public:
  /// `shown` is the path that messages name, where a temporary file stands in for another.
  File(const std::filesystem::path& path, int flags, std::filesystem::path shown)
      : shown_(std::move(shown)), descriptor_(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {
    if (descriptor_ < 0)
      throw_system_error((flags & O_ACCMODE) == O_RDONLY ? "read" : "write", shown_, errno);
  }
  File(const std::filesystem::path& path, int flags) : File(path, flags, path) {}
  ~File() { ::close(descriptor_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  struct stat status() const {
    struct stat status;
    if (::fstat(descriptor_, &status) != 0) throw_system_error("read", shown_, errno);
    return status;
  }

  /// Returns how much was written and, where that is less than `size`, sets `reason`.
  size_t write_some(const void* data, size_t size, int& reason) {
    size_t done = 0;
    while (done < size) {
      const ssize_t count = ::write(descriptor_, static_cast<const char*>(data) + done, size - done);
      if (count > 0) {
        done += static_cast<size_t>(count);
      } else if (count == 0 || errno != EINTR) {
        reason = count == 0 ? ENOSPC : errno;
        break;
      }
    }
    return done;
  }

  void write(const void* data, size_t size) {
    int reason = 0;
    if (write_some(data, size, reason) < size) throw_system_error("write", shown_, reason);
  }

  /// Returns less than `size` only at the end of the file.
  size_t read_at(int64_t offset, void* data, size_t size) const {
    size_t done = 0;
    while (done < size) {
      const ssize_t count = ::pread(descriptor_, static_cast<char*>(data) + done, size - done,
                                    static_cast<off_t>(offset) + static_cast<off_t>(done));
      if (count == 0) break;
      if (count > 0) {
        done += static_cast<size_t>(count);
      } else if (errno != EINTR) {
        throw_system_error("read", shown_, errno);
      }
    }
    return done;
  }

  void truncate(int64_t size) {
    if (::ftruncate(descriptor_, static_cast<off_t>(size)) != 0) throw_system_error("write", shown_, errno);
  }

  void sync() {
    // Some file systems know no fsync for some files, most often for directories.
    if (::fsync(descriptor_) != 0 && errno != EINVAL && errno != ENOTSUP) {
      throw_system_error("write", shown_, errno);
    }
  }

  int descriptor() const { return descriptor_; }

 private:
  std::filesystem::path shown_;
  int descriptor_;
};

}  // namespace remnant::app
