"""Data-parallel training of a converted model, with DistributedDataParallel or FSDP2.

    torchrun --nproc-per-node=2 examples/train_distributed.py
    torchrun --nproc-per-node=2 examples/train_distributed.py --fsdp --memory unbiased:bits=4

Convert first, then wrap: the wrappers see the same parameters under the same names. Every rank draws dropout and codes
of its own; parameters stay equal. The last line of rank 0 says what a step kept beside eager's.
"""

import argparse
import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn

import remnant

WORDS, CLASSES = 200, 4


class Classifier(nn.Module):
    """Which of four words stands in a sentence most often."""

    def __init__(self, width, layers):
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, CLASSES)

    def forward(self, ids):
        return self.out(self.encoder(self.words(ids)).mean(1))


def batch(size, generator):
    labels = torch.randint(CLASSES, (size,), generator=generator)
    ids = torch.randint(CLASSES, WORDS, (size, 48), generator=generator)
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.2, labels[:, None], ids), labels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="exact", help="eager, exact or unbiased:bits=4")
    parser.add_argument("--fsdp", action="store_true", help="shard parameters (FSDP2) in the place of copies of them")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32, help="sentences a rank and step")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node=2 " + sys.argv[0])
    if options.steps < 1 or options.batch < 1:
        parser.error(f"--steps and --batch should be at least 1, got {options.steps} and {options.batch}")
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(options.seed)  # the same weights everywhere
    model = Classifier(options.width, options.layers)
    if options.memory != "eager":
        remnant.convert(model, options.memory)
    torch.manual_seed(options.seed + 1000 * (rank + 1))  # from here on each rank draws for itself
    data = torch.Generator().manual_seed(options.seed + rank)
    with torch.random.fork_rng():
        eager = Classifier(options.width, options.layers)
    report = remnant.memory_report(model.train(), batch(options.batch, data)[0], eager_model=eager)
    if options.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model.encoder.layers:
            fully_shard(layer, mesh=mesh)
        trained = fully_shard(model, mesh=mesh)
    else:
        trained = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-3)
    start = time.perf_counter()
    for _ in range(options.steps):
        ids, labels = batch(options.batch, data)
        loss = nn.functional.cross_entropy(trained(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    trained.eval()
    ids, labels = batch(512, torch.Generator().manual_seed(options.seed - 1))
    with torch.no_grad():
        accuracy = (trained(ids).argmax(1) == labels).float().mean()
    means = torch.stack([accuracy, loss.detach()])
    dist.all_reduce(means)
    if rank == 0:
        print(json.dumps({"ranks": ranks, "wrapper": "FSDP2" if options.fsdp else "DDP", "memory": options.memory,
                          "accuracy": float(means[0]) / ranks, "loss": float(means[1]) / ranks,
                          "kept_bytes": report.kept_bytes, "eager_kept_bytes": report.eager.kept_bytes,
                          "step_ms": 1e3 * seconds / options.steps}), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # without PyTorch's own clean-up, in which a thread of Gloo's may still run


if __name__ == "__main__":
    main()
