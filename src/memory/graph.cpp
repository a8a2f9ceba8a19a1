#include <remnant/memory.h>

#include <ATen/SequenceNumber.h>
#include <ATen/record_function.h>
#include <c10/util/Exception.h>
#include <c10/util/Type.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/tensor.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>
#include <torch/nn/module.h>

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <mutex>
#include <typeinfo>
#include <unordered_map>
#include <unordered_set>
#include <utility>

namespace remnant::memory {
namespace {

using torch::autograd::Node;
// A shared_ptr or an intrusive_ptr, by the version of PyTorch.
using NodePtr = decltype(torch::autograd::Edge::function);

// Hooks that Python set on saved tensors count references without taking the interpreter's lock, which
// torch.ops lets go of. Found at run time: the library does not link to Python.
class PythonLock {
 public:
  PythonLock() {
    static const auto is_initialized = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "Py_IsInitialized"));
    static const auto ensure = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Ensure"));
    held_ = is_initialized != nullptr && ensure != nullptr && is_initialized() != 0;
    if (held_) state_ = ensure();
  }
  ~PythonLock() {
    static const auto release = reinterpret_cast<void (*)(int)>(dlsym(RTLD_DEFAULT, "PyGILState_Release"));
    if (held_ && release != nullptr) release(state_);
  }
  PythonLock(const PythonLock&) = delete;
  PythonLock& operator=(const PythonLock&) = delete;

 private:
  bool held_ = false;
  int state_ = 0;
};

struct Saved {
  std::vector<at::Tensor> tensors;
  bool readable = true;
};

// Stands for every C++ Function, whose types are not known here.
struct AnyFunction : torch::autograd::Function<AnyFunction> {};

// The context of a C++ Function's node, else null. The members of CppNode<T> do not depend on T.
torch::autograd::AutogradContext* function_context(Node& node) {
  if (!c10::demangle(typeid(node).name()).starts_with("torch::autograd::CppNode<")) return nullptr;
  return &static_cast<torch::autograd::CppNode<AnyFunction>&>(node).ctx_;
}

// Compiled autograd refuses a Function that marked outputs as not differentiable, a limit of compiling and
// not of reading: lifts the marks for a while.
class UnmarkedOutputs {
 public:
  explicit UnmarkedOutputs(torch::autograd::AutogradContext* context) {
    if (context == nullptr) return;
    // The context gives read access only; the set itself is no constant.
    place_ = const_cast<Marks*>(&context->get_non_differentiable());
    place_->swap(marks_);
  }
  ~UnmarkedOutputs() {
    if (place_ != nullptr) place_->swap(marks_);
  }
  UnmarkedOutputs(const UnmarkedOutputs&) = delete;
  UnmarkedOutputs& operator=(const UnmarkedOutputs&) = delete;

 private:
  using Marks = std::unordered_set<at::TensorImpl*>;
  Marks* place_ = nullptr;
  Marks marks_;
};

// What `node` keeps. There is no public way to ask; but every node can hand all of its members to
// compiled autograd's collector, which unpacks the saved tensors and lists them. The only place that
// uses that interface.
Saved saved_tensors(const NodePtr& node) {
  namespace compiled = torch::dynamo::autograd;
  Saved saved;
  // A node of Python's own runs Python code when asked.
  if (std::string(typeid(*node).name()).find("PyNode") != std::string::npos) {
    saved.readable = false;
    return saved;
  }
  torch::autograd::AutogradContext* const context = function_context(*node);
  compiled::AutogradCompilerCall call(compiled::SizeInput::STATIC);
  compiled::NodeCall node_call(0, node);
  compiled::CompiledNodeArgs arguments(call, node_call);
  try {
    const UnmarkedOutputs unmarked(context);
    node->compiled_args(arguments);
    saved.readable = call.sv_to_hooks.empty();
    // A Function that dropped its tensors lists none; only the context tells that from having had none.
    if (context != nullptr && saved.readable && call.tensor_args.inputs.empty())
      context->get_saved_variables();
  } catch (const c10::Error& error) {
    const std::string reason = error.what_without_backtrace();
    TORCH_CHECK(reason.find(torch::autograd::ERR_BACKWARD_TWICE) == std::string::npos,
                "remnant::memory: the graph's saved tensors were already released (", node->name(),
                "); expected a graph whose backward has not run: measure between the forward and "
                "backward(), or call backward with retain_graph");
    saved.readable = false;
  } catch (const std::exception&) {
    saved.readable = false;
  }
  saved.tensors = std::move(call.tensor_args.inputs);
  return saved;
}

// What a C++ Function of ours says of itself in its saved_data.
std::string saved_policy(Node& node) {
  const auto* const context = function_context(node);
  if (context == nullptr) return "";
  const auto policy = context->saved_data.find("policy");
  return policy != context->saved_data.end() && policy->second.isString() ? policy->second.toStringRef() : "";
}

// Nodes reachable from `outputs`, in the order of the forward.
std::vector<NodePtr> reachable_nodes(const std::vector<at::Tensor>& outputs) {
  std::vector<NodePtr> nodes;
  std::unordered_set<Node*> seen;
  const auto visit = [&](const NodePtr& node) {
    if (node && seen.insert(node.get()).second) nodes.push_back(node);
  };
  for (const at::Tensor& output : outputs) {
    if (output.defined()) visit(output.grad_fn());
  }
  for (size_t i = 0; i < nodes.size(); ++i) {
    // An in-place write to a view wraps the node of the write itself, which no edge leads to.
    if (const auto* wrapper = dynamic_cast<torch::autograd::CopySlices*>(nodes[i].get())) visit(wrapper->fn);
    for (size_t edge = 0; edge < nodes[i]->num_outputs(); ++edge) visit(nodes[i]->next_edge(edge).function);
  }
  std::stable_sort(nodes.begin(), nodes.end(),
                   [](const NodePtr& a, const NodePtr& b) { return a->sequence_nr() < b->sequence_nr(); });
  return nodes;
}

using StorageSet = std::unordered_set<const c10::StorageImpl*>;

void add_storage(StorageSet& set, const at::Tensor& tensor) {
  if (tensor.defined() && tensor.has_storage()) set.insert(tensor.storage().unsafeGetStorageImpl());
}

struct Kept {
  NodePtr node;
  at::Tensor tensor;
  int64_t bytes;
  bool first_of_node;
};

struct Walk {
  std::vector<Kept> kept;
  int64_t bytes = 0;
  int64_t unreadable = 0;
};

// `counted` starts as what is left out and grows by what is counted: each storage once, for the first
// op of the forward that keeps it.
Walk walk(const std::vector<at::Tensor>& outputs, StorageSet counted) {
  Walk result;
  const PythonLock lock;
  const std::vector<NodePtr> nodes = reachable_nodes(outputs);
  std::unordered_map<Node*, const torch::autograd::AccumulateGrad*> leaves;
  for (const NodePtr& node : nodes) {
    const auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(node.get());
    if (leaf == nullptr) continue;
    leaves.emplace(node.get(), leaf);
    add_storage(counted, leaf->variable);
  }
  for (const NodePtr& node : nodes) {
    // A wrapper's saved tensors are those of the node it wraps, which is walked by itself.
    if (leaves.count(node.get()) != 0 || dynamic_cast<torch::autograd::CopySlices*>(node.get()) != nullptr) {
      continue;
    }
    Saved saved = saved_tensors(node);
    bool first = true;
    for (at::Tensor& tensor : saved.tensors) {
      if (!tensor.has_storage()) {
        saved.readable = false;
        continue;
      }
      const c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
      const auto bytes = static_cast<int64_t>(storage->nbytes());
      if (bytes == 0 || !counted.insert(storage).second) continue;
      // Detached: a row must not keep the graph itself alive through its saved outputs.
      result.kept.push_back({node, tensor.detach(), bytes, first});
      result.bytes += bytes;
      first = false;
    }
    if (!saved.readable) ++result.unreadable;
  }
  return result;
}

// "torch::autograd::CppNode<a::b::AttentionFunction>" -> "AttentionBackward", as PyTorch calls its own.
std::string op_name(const Node& node) {
  std::string name = node.name();
  const size_t open = name.find("CppNode<");
  if (open == std::string::npos) {
    const size_t scope = name.rfind("::");
    return scope == std::string::npos ? name : name.substr(scope + 2);
  }
  name = name.substr(open + 8, name.rfind('>') - open - 8);
  const std::string arguments = name.substr(std::min(name.find('<'), name.size()));
  name.resize(name.size() - arguments.size());
  if (const size_t scope = name.rfind("::"); scope != std::string::npos) name.erase(0, scope + 2);
  if (name.size() > 8 && name.ends_with("Function")) name.resize(name.size() - 8);
  if (name.find("Backward") == std::string::npos) name += "Backward";
  return name;
}

// "torch::nn::LinearImpl" -> "Linear"
std::string type_name(const torch::nn::Module& module) {
  std::string name = module.name();
  if (const size_t scope = name.rfind("::"); scope != std::string::npos) name.erase(0, scope + 2);
  if (name.size() > 4 && name.ends_with("Impl")) name.resize(name.size() - 4);
  return name;
}

constexpr uint64_t open_end = std::numeric_limits<uint64_t>::max();

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double>(end - begin).count();
}

// Gives the time since the last tick to whoever ticked then. Nodes of a device run on a thread of its own.
class BackwardClock {
 public:
  explicit BackwardClock(size_t layers) : seconds_(layers, 0.0) {}

  void tick(size_t layer) {
    const Clock::time_point now = Clock::now();
    const std::lock_guard guard(mutex_);
    seconds_[layer_] += seconds_between(last_, now);
    layer_ = layer;
    last_ = now;
  }

  std::vector<double> seconds() const {
    const std::lock_guard guard(mutex_);
    return seconds_;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<double> seconds_;
  size_t layer_ = 0;
  Clock::time_point last_ = Clock::now();
};

// Before a node, and not after it as well: a hook there would keep gradients alive for longer.
class Tick final : public torch::autograd::FunctionPreHook {
 public:
  Tick(std::shared_ptr<BackwardClock> clock, size_t layer) : clock_(std::move(clock)), layer_(layer) {}
  torch::autograd::variable_list operator()(const torch::autograd::variable_list& gradients) override {
    clock_->tick(layer_);
    return gradients;
  }

 private:
  std::shared_ptr<BackwardClock> clock_;
  size_t layer_;
};

}  // namespace

struct Recording {
  struct Region {
    std::string name;
    uint64_t begin;  // sequence numbers of the nodes made inside: [begin, end)
    uint64_t end = open_end;
  };
  struct Description {
    uint64_t sequence_nr;  // a later node may be given the address of one that is gone
    std::string policy;
    int64_t predicted_bytes;
    int64_t eager_bytes;
  };

  const uint64_t thread_id = at::RecordFunction::currentThreadId();
  std::unordered_map<const torch::nn::Module*, std::string> module_names;
  std::vector<Region> regions;  // in the order of their beginnings
  std::vector<size_t> open;     // of the regions, from the outermost in
  std::unordered_map<const Node*, Description> descriptions;

  struct Running {
    size_t region, layer;  // layer: its place in `times`
    Clock::time_point begin;
    double inside = 0;  // of the regions inside it
  };
  std::vector<LayerTime> times{LayerTime{}};  // the first is that of no layer
  std::unordered_map<std::string, size_t> places{{"", 0}};
  std::vector<Running> running;  // regions of the forward, from the outermost in
  bool in_forward = true;
  Clock::time_point forward_begin = Clock::now();
  double forward_inside = 0;  // of all regions

  size_t place_of(const std::string& layer) {
    const auto [place, is_new] = places.try_emplace(layer, times.size());
    if (is_new) times.push_back({layer, 0, 0});
    return place->second;
  }

  void stop(size_t region) {
    while (!running.empty() && running.back().region >= region) {
      const Running& last = running.back();
      const double seconds = seconds_between(last.begin, Clock::now());
      times[last.layer].forward_seconds += seconds - last.inside;
      running.pop_back();
      (running.empty() ? forward_inside : running.back().inside) += seconds;
    }
  }

  void end_forward() {
    if (!in_forward) return;
    stop(0);
    in_forward = false;
    times.front().forward_seconds += seconds_between(forward_begin, Clock::now()) - forward_inside;
  }

  size_t enter(std::string name, bool absolute) {
    if (!absolute && !open.empty()) {
      const std::string& around = regions[open.back()].name;
      if (!around.empty()) name = around + "." + name;
    }
    regions.push_back({std::move(name), at::sequence_number::peek()});
    open.push_back(regions.size() - 1);
    if (in_forward) running.push_back({regions.size() - 1, place_of(regions.back().name), Clock::now()});
    return regions.size() - 1;
  }

  void leave(size_t region) {
    stop(region);
    regions[region].end = at::sequence_number::peek();
    std::erase(open, region);
    // Steps without a graph must not make a long recording grow.
    if (region + 1 == regions.size() && regions[region].end == regions[region].begin) regions.pop_back();
  }

  // The regions nest, so the innermost around a node is the last one that began before it and is not over.
  std::string layer_of(const Node& node) const {
    const uint64_t sequence_nr = node.sequence_nr();
    if (node.thread_id() != thread_id) return "";  // each thread has numbers of its own
    auto region = std::upper_bound(regions.begin(), regions.end(), sequence_nr,
                                   [](uint64_t number, const Region& r) { return number < r.begin; });
    while (region != regions.begin()) {
      --region;
      if (sequence_nr < region->end) return region->name;
    }
    return "";
  }
};

namespace {

// Of this thread, the innermost last. Weak: a recorder may go on another thread or out of order.
thread_local std::vector<std::weak_ptr<Recording>> active_recordings;

std::shared_ptr<Recording> active_recording() {
  while (!active_recordings.empty()) {
    if (auto recording = active_recordings.back().lock()) return recording;
    active_recordings.pop_back();
  }
  return nullptr;
}

}  // namespace

struct LayerScope::Handle {
  std::weak_ptr<Recording> recording;
  size_t region;
};

LayerScope::LayerScope(const torch::nn::Module* module) {
  if (active_recordings.empty()) return;
  const auto recording = active_recording();
  if (!recording || module == nullptr) return;
  const auto known = recording->module_names.find(module);
  const bool in_root = known != recording->module_names.end();
  const size_t region = recording->enter(in_root ? known->second : type_name(*module), in_root);
  handle_ = std::make_unique<Handle>(Handle{recording, region});
}

LayerScope::LayerScope(std::string name) {
  if (active_recordings.empty()) return;
  const auto recording = active_recording();
  if (!recording) return;
  const size_t region = recording->enter(std::move(name), false);
  handle_ = std::make_unique<Handle>(Handle{recording, region});
}

LayerScope::~LayerScope() {
  if (!handle_) return;
  if (const auto recording = handle_->recording.lock()) recording->leave(handle_->region);
}

bool recording() { return !active_recordings.empty() && active_recording() != nullptr; }

void describe(const at::Tensor& output, std::string policy, int64_t predicted_bytes, int64_t eager_bytes) {
  if (active_recordings.empty() || !output.defined()) return;
  const auto recording = active_recording();
  if (!recording) return;
  const NodePtr& node = output.grad_fn();
  if (!node) return;
  recording->descriptions[node.get()] = {node->sequence_nr(), std::move(policy), predicted_bytes,
                                         eager_bytes};
}

Recorder::Recorder(const torch::nn::Module* root) : root_(root), recording_(std::make_shared<Recording>()) {
  if (root != nullptr) {
    // Without itself, which would ask for a root that is owned by a shared_ptr.
    for (const auto& item : root->named_modules(/*name_prefix=*/"", /*include_self=*/false)) {
      recording_->module_names.emplace(item.value().get(), item.key());
    }
    recording_->module_names.emplace(root, "");
  }
  active_recording();  // drops those that are gone
  active_recordings.push_back(recording_);
}

Recorder::~Recorder() {
  recording_.reset();
  active_recording();
}

Report Recorder::report(const std::vector<at::Tensor>& outputs,
                        const std::vector<at::Tensor>& exclude) const {
  StorageSet left_out;
  for (const at::Tensor& tensor : exclude) add_storage(left_out, tensor);
  if (root_ != nullptr) {
    for (const at::Tensor& parameter : root_->parameters()) add_storage(left_out, parameter);
    for (const at::Tensor& buffer : root_->buffers()) add_storage(left_out, buffer);
  }
  const Walk found = walk(outputs, std::move(left_out));

  Report report;
  report.kept_bytes = found.bytes;
  report.unreadable = found.unreadable;
  for (const Kept& kept : found.kept) {
    SavedRow row;
    row.layer = recording_->layer_of(*kept.node);
    row.op = op_name(*kept.node);
    row.shape = kept.tensor.sizes().vec();
    row.dtype = c10::toString(kept.tensor.scalar_type());
    row.kept_bytes = kept.bytes;
    row.policy = saved_policy(*kept.node);
    const auto description = recording_->descriptions.find(kept.node.get());
    if (description != recording_->descriptions.end() &&
        description->second.sequence_nr == kept.node->sequence_nr()) {
      const auto& told = description->second;
      if (!told.policy.empty()) row.policy = told.policy;
      row.predicted_bytes =
          kept.first_of_node ? told.predicted_bytes : std::min<int64_t>(told.predicted_bytes, 0);
      row.eager_bytes = kept.first_of_node ? told.eager_bytes : std::min<int64_t>(told.eager_bytes, 0);
    }
    report.rows.push_back(std::move(row));
  }
  return report;
}

void Recorder::backward(const at::Tensor& loss) {
  recording_->end_forward();
  std::vector<std::pair<NodePtr, size_t>> nodes;
  for (const NodePtr& node : reachable_nodes({loss})) {
    // The engine runs it right behind the node whose gradient it adds up.
    if (dynamic_cast<torch::autograd::AccumulateGrad*>(node.get()) != nullptr) continue;
    nodes.emplace_back(node, recording_->place_of(recording_->layer_of(*node)));
  }
  const auto clock = std::make_shared<BackwardClock>(recording_->times.size());
  for (const auto& [node, layer] : nodes) node->add_pre_hook(std::make_unique<Tick>(clock, layer));
  nodes.clear();
  clock->tick(0);
  loss.backward();
  clock->tick(0);
  const std::vector<double> seconds = clock->seconds();
  for (size_t i = 0; i < seconds.size(); ++i) recording_->times[i].backward_seconds += seconds[i];
}

std::vector<LayerTime> Recorder::times() const {
  std::vector<LayerTime> times = recording_->times;
  if (recording_->in_forward) {
    times.front().forward_seconds =
        seconds_between(recording_->forward_begin, Clock::now()) - recording_->forward_inside;
  }
  return times;
}

int64_t kept_bytes(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& exclude) {
  StorageSet left_out;
  for (const at::Tensor& tensor : exclude) add_storage(left_out, tensor);
  const Walk found = walk(outputs, std::move(left_out));
  TORCH_CHECK(found.unreadable == 0, "remnant::memory::kept_bytes: ", found.unreadable,
              " nodes of the graph would not show what they keep (autograd functions written in Python, or "
              "saved-tensor hooks); Recorder::report counts the others");
  return found.bytes;
}

}  // namespace remnant::memory

// One implementation for all keys: it must see the tensors with their grad_fn.
TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.def("_kept_bytes(Tensor[] outputs, Tensor[] exclude) -> int",
        torch::dispatch(c10::DispatchKey::CompositeImplicitAutograd,
                        [](at::TensorList outputs, at::TensorList exclude) -> int64_t {
                          return remnant::memory::kept_bytes(outputs.vec(), exclude.vec());
                        }));
}
