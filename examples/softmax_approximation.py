"""A Transformer written out by hand, as the paper's release has it: only the softmax's import differs.

    python examples/softmax_approximation.py                # trains with torch's softmax, then with the curve
    python examples/softmax_approximation.py --m 1 --steps 400

The task: write a row of symbols backwards. A model with `from remnant import softmax_approximation` in the place of
torch.softmax keeps 2 m + 2 numbers and the ranks of each row of attention beside the weights that the next product
keeps; remnant.attention, which owns that product, lets the weights go as well (--attention).
"""

import argparse
import json
import math
import time

import torch
from torch import nn

from remnant import attention, memory_report
from remnant import softmax_approximation  # the one changed import

SYMBOLS, LENGTH, WIDTH, HEADS = 12, 24, 64, 4


class Attention(nn.Module):
    def __init__(self, way, m):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.way, self.m = way, m

    def forward(self, x, mask):
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        if self.way == "attention":
            y = attention(q, k, v, mask=mask, policy=f"curve:m={self.m}")
        else:
            energy = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
            if self.way == "curve":
                weights = softmax_approximation(energy, mask, self.m)
            else:
                weights = energy.masked_fill(~mask, -1e9).softmax(-1)
            y = weights @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, way, m):
        super().__init__()
        self.symbols, self.places = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.attentions = nn.ModuleList(Attention(way, m) for _ in range(2))
        self.hidden = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, WIDTH))
                                    for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.out = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, x):
        mask = (x != 0)[:, None, None]  # symbol 0 pads
        y = self.symbols(x) + self.places.weight
        for i in range(2):
            y = self.norms[2 * i](y + self.attentions[i](y, mask))
            y = self.norms[2 * i + 1](y + self.hidden[i](y))
        return self.out(y)


def batch(size, generator):
    x = torch.randint(1, SYMBOLS, (size, LENGTH), generator=generator)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (size, 1), generator=generator)
    places = torch.arange(LENGTH).expand(size, -1)
    x = x.masked_fill(places >= lengths, 0)
    backwards = x.gather(1, (lengths - 1 - places).clamp_min(0)).masked_fill(places >= lengths, 0)
    return x, backwards


def train(way, options):
    torch.manual_seed(options.seed)
    model, data = Model(way, options.m), torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    kept, start = memory_report(model, batch(options.batch, data)[0]).kept_bytes, time.perf_counter()
    for _ in range(options.steps):
        x, wanted = batch(options.batch, data)
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), wanted.flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    milliseconds = 1e3 * (time.perf_counter() - start) / options.steps
    x, wanted = batch(512, torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = (model.eval()(x).argmax(-1) == wanted)[wanted != 0].float().mean()
    return {"softmax": way, "accuracy": float(right), "loss": loss.item(), "kept_bytes": kept, "step_ms": milliseconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, default=4, help="highest and lowest elements of a row that are kept")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--attention", action="store_true", help="also the op that owns the next product")
    options = parser.parse_args()
    if min(options.m, options.steps, options.batch) < 1:
        parser.error("--m, --steps and --batch should be at least 1")
    for way in ["torch", "curve", *(["attention"] if options.attention else [])]:
        print(json.dumps(train(way, options)), flush=True)


if __name__ == "__main__":
    main()
