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

struct Recording;  // regions and descriptions gathered by a Recorder

/// One kept storage (or several equal ones, folded) of the autograd graph.
struct REMNANT_API SavedRow {
  std::string layer;  ///< dotted module path of the innermost LayerScope, or "" outside of any
  std::string op;     ///< the autograd node that holds it, e.g. "AttentionBackward", "AddmmBackward0"
  std::string
      policy;  ///< what the op was asked to keep: saved_data["policy"] or describe(); "" for stock ops
  std::vector<int64_t> shape;
  std::string dtype;
  int64_t count = 1;       ///< how many equal tensors this row stands for
  int64_t kept_bytes = 0;  ///< unique storage bytes, all `count` together
  /// Closed form of the whole op on its first row, 0 on its others; -1 where there is none.
  int64_t predicted_bytes = -1;
  /// What eager PyTorch would keep for the same op, laid out likewise; -1 if unknown.
  int64_t eager_bytes = -1;
};

struct REMNANT_API Report {
  std::vector<SavedRow> rows;  ///< in the order of the forward, one for each storage
  int64_t kept_bytes = 0;      ///< sum over unique storages
  int64_t unreadable = 0;      ///< nodes that would not show what they keep (Python's own): not in kept_bytes
  /// For people: layers that differ only in their numbers are folded, `count` says how many rows.
  std::string table() const;
  /// {"kept_bytes", "unreadable", "rows": [...]}; a byte count that is not known is null.
  std::string json() const;
  /// The same rows; a byte count that is not known is empty.
  std::string csv() const;
  /// .json, .csv or plain table by the file's ending. The file appears whole or not at all.
  void write(const std::string& path) const;
};

/// Opens a named region while a model runs: nodes made inside belong to it, or to a region nested in
/// it. Cheap when no recorder is active. Remnant's nn modules open one themselves. A module is called
/// by its place in the recorder's root; a module that root does not hold by its type's name, and a
/// string by itself, both behind the name of the region around them ("decoder" + "." + "loss").
class REMNANT_API LayerScope {
 public:
  explicit LayerScope(const torch::nn::Module* module);
  explicit LayerScope(std::string name);
  ~LayerScope();
  LayerScope(const LayerScope&) = delete;
  LayerScope& operator=(const LayerScope&) = delete;

 private:
  struct Handle;
  std::unique_ptr<Handle> handle_;
};

/// True when a Recorder is alive on this thread: what describe() needs is only then worth computing.
REMNANT_API bool recording();

/// Tells this thread's recorder, if there is one, what the op that made `output` was asked to keep ("": see
/// SavedRow::policy), what that should come to in bytes, and what eager PyTorch would keep for it (-1:
/// unknown). For ops: call it on an output of Function::apply.
REMNANT_API void describe(const at::Tensor& output, std::string policy, int64_t predicted_bytes = -1,
                          int64_t eager_bytes = -1);

/// How long a layer took by the clock on the wall, without the layers inside it.
struct REMNANT_API LayerTime {
  std::string layer;  ///< as SavedRow::layer; "" for what is outside of any
  double forward_seconds = 0;
  /// From the start of each autograd node of the layer to that of the next node, whose it may be: what the
  /// engine does in between, such as adding to parameters' gradients, is in it.
  double backward_seconds = 0;
};

/// While alive on this thread, remembers which layer made which autograd node. `root` must outlive it.
/// The innermost of nested recorders does the remembering.
class REMNANT_API Recorder {
 public:
  explicit Recorder(const torch::nn::Module* root = nullptr);
  ~Recorder();
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;
  /// Walks the graph from `outputs` (normally the loss): every storage once; parameters and buffers
  /// of `root`, leaves that require a gradient, and `exclude` (the step's inputs), left out. Call it
  /// before backward(), which releases what is counted here; throws c10::Error afterwards.
  Report report(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& exclude = {}) const;
  /// loss.backward(), timed by layer. The forward, timed from the recorder's construction, ends here: what a
  /// checkpoint runs again is the backward's. Changes neither gradients nor how high allocations climb.
  void backward(const at::Tensor& loss);
  /// By layer, in the order of the forward, all of what was timed: the forward so far, and backward(). Waits
  /// for no other device: on a GPU it is the time to launch.
  std::vector<LayerTime> times() const;

 private:
  const torch::nn::Module* root_;
  std::shared_ptr<Recording> recording_;
};

/// Kept bytes of a graph without layers: unique storages reachable from `outputs`, minus leaves that
/// require a gradient and `exclude`. Throws c10::Error after backward(), and when a node of the graph
/// would not show what it keeps (Recorder::report counts such nodes instead).
REMNANT_API int64_t kept_bytes(const std::vector<at::Tensor>& outputs,
                               const std::vector<at::Tensor>& exclude = {});

/// Live bytes at a moment of a PeakMeter's recording.
struct REMNANT_API Sample {
  double seconds = 0;  ///< since record()
  int64_t live_bytes = 0;
};

/// Counts what the allocators report (all devices' allocations, forward and backward) while alive, on
/// this thread and on the threads that autograd runs its backward on. Meters nest. Throws c10::Error when a
/// profiler records on this thread, which needs the same place in the allocators.
///
/// A block of CPU memory that is older than the meter counts neither now nor when it is freed; the frees
/// of older blocks on other devices, and after reset() those of blocks allocated before it, count down.
/// To see every free of a training loop, open one meter before the model is built and reset() it each step.
class REMNANT_API PeakMeter {
 public:
  PeakMeter();
  ~PeakMeter();
  PeakMeter(const PeakMeter&) = delete;
  PeakMeter& operator=(const PeakMeter&) = delete;
  int64_t live_bytes() const;  ///< allocated minus freed since construction or reset()
  int64_t peak_bytes() const;  ///< highest live_bytes() since construction or reset()
  void reset();
  /// Notes live bytes over time from now on, at most `most_samples` (at least 2) of them: where there are
  /// more allocations and frees, the low and the high of equal spans of time. The highest is always there.
  void record(int64_t most_samples = 1000);
  /// In the order of time, since record(); reset() does not end the recording. Empty without one.
  std::vector<Sample> samples() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace remnant::memory
