#pragma once

#include <remnant/export.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace torch::nn {
class Module;
}

/// Bytes: what a step keeps for its backward pass, and how high its allocations climb.
namespace remnant::memory {

/// One kept storage (or several equal ones, folded) of the autograd graph.
struct REMNANT_API SavedRow {
  std::string layer;   ///< dotted module path of the innermost LayerScope, or "" outside of any
  std::string op;      ///< the autograd node that holds it, e.g. "AttentionBackward", "AddmmBackward0"
  std::string policy;  ///< what the op was asked to keep, "" for stock ops
  std::vector<int64_t> shape;
  std::string dtype;
  int64_t count = 1;        ///< how many equal tensors this row stands for
  int64_t kept_bytes = 0;   ///< unique storage bytes, all `count` together
  int64_t predicted_bytes = -1;  ///< closed form, -1 where there is none
  int64_t eager_bytes = -1;      ///< what eager PyTorch would keep for the same op, -1 if unknown
};

struct REMNANT_API Report {
  std::vector<SavedRow> rows;
  int64_t kept_bytes = 0;  ///< sum over unique storages
  std::string table() const;
  std::string json() const;
  std::string csv() const;
  void write(const std::string& path) const;  ///< .json, .csv or plain table by the file's ending
};

/// Opens a named region while a model runs: nodes made inside belong to `name`. Cheap when no
/// recorder is active. Remnant's nn modules open one themselves, named by their place in the model.
class REMNANT_API LayerScope {
 public:
  explicit LayerScope(const torch::nn::Module* module);
  explicit LayerScope(std::string name);
  ~LayerScope();
  LayerScope(const LayerScope&) = delete;
  LayerScope& operator=(const LayerScope&) = delete;

 private:
  bool active_ = false;
};

/// While alive on this thread, remembers which layer made which autograd node.
class REMNANT_API Recorder {
 public:
  explicit Recorder(const torch::nn::Module* root = nullptr);
  ~Recorder();
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;
  /// Walks the graph from `outputs` (normally the loss): every storage once; parameters and buffers
  /// of `root`, and `exclude` (the step's inputs), left out.
  Report report(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& exclude = {}) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Kept bytes of a graph without layers: unique storages reachable from `outputs`, minus leaves that
/// require a gradient and `exclude`.
REMNANT_API int64_t kept_bytes(const std::vector<at::Tensor>& outputs,
                               const std::vector<at::Tensor>& exclude = {});

/// Counts what the allocators report (all devices' allocations, forward and backward) while alive.
class REMNANT_API PeakMeter {
 public:
  PeakMeter();
  ~PeakMeter();
  PeakMeter(const PeakMeter&) = delete;
  PeakMeter& operator=(const PeakMeter&) = delete;
  int64_t live_bytes() const;  ///< allocated minus freed since construction or reset()
  int64_t peak_bytes() const;  ///< highest live_bytes() since construction or reset()
  void reset();

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace remnant::memory
