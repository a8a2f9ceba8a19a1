// bench_conv DEPTH THREADS: one line of JSON on what a chain of DEPTH additive coupling blocks keeps and how
// high a step's allocations climb. bench/conv.py starts it.

#include <remnant/memory.h>
#include <remnant/nn/reversible.h>

#include <torch/torch.h>

#include <cstdlib>
#include <iostream>

namespace {

constexpr int64_t kBatch = 64, kChannels = 32, kSize = 32;

struct BranchImpl : torch::nn::Module {
  BranchImpl()
      : conv(torch::nn::Conv2dOptions(kChannels / 2, kChannels / 2, 3).padding(1).bias(false)),
        norm(kChannels / 2) {
    register_module("conv", conv);
    register_module("norm", norm);
  }
  torch::Tensor forward(const torch::Tensor& x) { return torch::relu(norm(conv(x))); }
  torch::nn::Conv2d conv;
  torch::nn::BatchNorm2d norm;
};
TORCH_MODULE(Branch);

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: bench_conv DEPTH THREADS\n";
    return 2;
  }
  torch::set_num_threads(std::atoi(argv[2]));
  torch::manual_seed(0);
  remnant::memory::PeakMeter meter;
  std::vector<remnant::nn::Coupling> blocks;
  for (int i = 0; i < std::atoi(argv[1]); ++i) {
    blocks.push_back(
        remnant::nn::additive_coupling(torch::nn::AnyModule(Branch()), torch::nn::AnyModule(Branch())));
  }
  remnant::nn::ReversibleSequence chain(blocks);
  const torch::Tensor x = torch::randn({kBatch, kChannels, kSize, kSize}).set_requires_grad(true);
  int64_t kept = 0;
  const auto step = [&] {
    const remnant::memory::Recorder recorder(chain.ptr().get());
    const torch::Tensor loss = chain(x).square().mean();
    kept = recorder.report({loss}, {x}).kept_bytes;
    loss.backward();
  };
  step();  // makes the gradients
  meter.reset();
  step();
  std::cout << "{\"kept_bytes\": " << kept << ", \"peak_bytes\": " << meter.peak_bytes() << "}\n";
  return 0;
}
