"""A ResNet of torch.nn's layers for CIFAR-10, converted by one line: a tensor a convolution, or its 4-bit code.

    python examples/resnet_cifar10.py                              # drawn images: runs anywhere
    REMNANT_DATA=DIR python examples/resnet_cifar10.py --memory unbiased:bits=4 --epochs 10

DIR/cifar10 holds train.bin and test.bin, or data_batch_1.bin to data_batch_5.bin and test_batch.bin, in CIFAR-10's
binary format, gzip or not (a record is a byte with the label and 3 x 32 x 32 bytes of pixels). The last line has
accuracy and what a step kept beside eager's.
"""

import argparse
import copy
import gzip
import json
import os
import time
import zlib
from pathlib import Path

import torch
from torch import nn

import remnant


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.short = nn.Identity()
        if inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.short(x)).relu()


class ResNet(nn.Module):
    """He et al., "Deep Residual Learning for Image Recognition" (2015), section 4.2: 6 n + 2 layers."""

    def __init__(self, n, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage in range(3):
            for i in range(n):
                outputs = width * 2**stage
                blocks.append(Block(inputs, outputs, 2 if stage > 0 and i == 0 else 1))
                inputs = outputs
        self.blocks, self.out = nn.Sequential(*blocks), nn.Linear(inputs, 10)

    def forward(self, x):
        return self.out(self.blocks(self.norm(self.conv(x)).relu()).mean((2, 3)))


def read(folder, name):
    batches = [f"data_batch_{i}.bin" for i in range(1, 6)] if name == "train" else ["test_batch.bin"]
    for files in ([f"{name}.bin"], batches):
        paths = [next((p for p in (folder / file, folder / f"{file}.gz") if p.is_file()), None) for file in files]
        if all(paths):
            break
    else:
        raise SystemExit(f"resnet_cifar10: no {name}.bin and no {', '.join(batches)} (gzip or not) in {folder}")
    raw = torch.cat([records(path) for path in paths])
    return (raw[:, 1:].reshape(-1, 3, 32, 32).float() / 255 - 0.47) / 0.25, raw[:, 0].long()


def records(path):
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise SystemExit(f"resnet_cifar10: {path} cannot be read: {error}") from error
    if not data or len(data) % 3073:
        raise SystemExit(f"resnet_cifar10: {path} should hold records of 3,073 bytes, got {len(data)} bytes")
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, 3073)
    if raw[:, 0].max() > 9:
        raise SystemExit(f"resnet_cifar10: {path} should hold labels 0 to 9, got {int(raw[:, 0].max())}")
    return raw


def drawn(count, seed):
    """Stripes of ten directions under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    angle = labels * torch.pi / 10 + 0.1 * torch.randn(count, generator=generator)
    phase = 6.3 * torch.rand(count, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    wave = torch.sin(0.8 * (x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None]) + phase)
    return wave[:, None] + torch.randn(count, 3, 32, 32, generator=generator), labels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="exact", help="eager, exact or unbiased:bits=8, 4 or 2")
    parser.add_argument("--blocks", type=int, default=3, help="n of the 6 n + 2 layers: 3 is ResNet-20")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=2000, help="how many are drawn")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.batch < 1 or options.epochs < 1:
        parser.error(f"--batch and --epochs should be at least 1, got {options.batch} and {options.epochs}")
    if os.environ.get("REMNANT_DATA"):
        folder = Path(os.environ["REMNANT_DATA"]) / "cifar10"
        train, test = read(folder, "train"), read(folder, "test")
    else:
        train, test = drawn(options.images, 0), drawn(max(options.images // 5, 50), 1)
    torch.manual_seed(options.seed)
    model = ResNet(options.blocks, options.width).to(memory_format=torch.channels_last).train()
    eager_model = copy.deepcopy(model)
    remnant.convert(model, options.memory)  # the one line
    first = train[0][: options.batch].contiguous(memory_format=torch.channels_last)
    report = remnant.memory_report(model, first, eager_model=eager_model)
    del eager_model
    kept, eager = report.kept_bytes, report.eager.kept_bytes
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, weight_decay=1e-4)
    steps = max(1, len(train[1]) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.epochs * steps)
    start = time.perf_counter()
    for _ in range(options.epochs):
        order = torch.randperm(len(train[1]))
        for rows in order[: steps * options.batch].chunk(steps):
            images = train[0][rows].contiguous(memory_format=torch.channels_last)
            flip = torch.rand(len(rows), 1, 1, 1) < (0.5 if os.environ.get("REMNANT_DATA") else 0.0)
            images = torch.where(flip, images.flip(3), images)
            loss = nn.functional.cross_entropy(model(images), train[1][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(test[0].split(250), test[1].split(250), strict=True))
    print(json.dumps({"memory": options.memory, "test_accuracy": right / len(test[1]), "loss": loss.item(),
                      "kept_bytes": kept, "eager_kept_bytes": eager,
                      "step_ms": 1e3 * seconds / (options.epochs * steps)}))


if __name__ == "__main__":
    main()
