"""Trains a byte-level language model on long contexts, and says what a step keeps, beside eager PyTorch.

    python examples/long_context_lm.py --context 4096 --memory exact
    python examples/long_context_lm.py --data TEXT --context 2048 --memory unbiased:bits=4 --steps 500

Without --data the text is generated: facts, and questions about them far below, which a short context cannot answer.
Eager PyTorch keeps several tensors of context x context a layer. Its bytes are a polynomial of second degree in the
context, so they are measured at three shorter ones and computed for this one.
"""

import argparse
import gzip
import json
import math
import random
import statistics
import time
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

import remnant


class Language(nn.Module):
    """Gives the mean loss of predicting each byte of ids from those before it."""

    def __init__(self, options, context):
        super().__init__()
        width = options.width
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, options.heads, 4 * width, options.dropout, "gelu", batch_first=True,
                                           norm_first=True)
        self.layers = nn.TransformerEncoder(layer, options.layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        # Converted layers take the hint is_causal and do not read it.
        self.register_buffer("mask", torch.ones(context, context, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, ids):
        x = self.bytes(ids[:, :-1]) + self.places.weight
        x = self.layers(x, self.mask, is_causal=True).flatten(0, 1)
        return remnant.linear_cross_entropy(x, self.head.weight, self.head.bias, ids[:, 1:].flatten())


def generated(size, seed):
    rng = random.Random(seed)
    names = "Ada Bo Cleo Dan Eve Finn Gus Hal Ida Jo Kit Lou".split()
    things = "lamp key map coin drum kite rope shell".split()
    places = "attic barn cellar garden kitchen library mill tower".split()
    parts, length = [], 0
    while length < size:
        facts = {(name, rng.choice(things)): rng.choice(places) for name in names}
        lines = [f"{name} put the {thing} in the {place}.\n" for (name, thing), place in facts.items()]
        rng.shuffle(lines)
        asked = rng.choices(list(facts), k=12)
        lines += [f"Where is the {thing} of {name}? In the {facts[name, thing]}.\n" for name, thing in asked]
        parts.append("".join(lines))
        length += len(parts[-1])
    return "".join(parts).encode()


def read(path):
    try:
        data = Path(path).read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError) as error:
        raise SystemExit(f"long_context_lm: {path} cannot be read: {error}") from error


def windows(text, batch, context, rng):
    starts = [rng.randrange(len(text) - context) for _ in range(batch)]
    return torch.stack([text[start : start + context + 1] for start in starts]).long()


def eager_kept(options):
    """Bytes that eager PyTorch keeps: Lagrange's polynomial through three shorter contexts, at this one."""
    contexts = [options.context // 16, options.context // 8, options.context // 4]
    kept = []
    for context in contexts:
        ids = torch.randint(256, (options.batch, context + 1))
        kept.append(remnant.memory_report(Language(options, context), ids).kept_bytes)
    total = Fraction(0)
    for n, y in zip(contexts, kept, strict=True):
        others = [m for m in contexts if m != n]
        total += y * math.prod(Fraction(options.context - m, n - m) for m in others)
    return round(total)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a text file, gzip or not; without it text is generated")
    parser.add_argument("--memory", default="exact", help="eager, exact, unbiased:bits=4, or attention=POLICY")
    parser.add_argument("--context", type=int, default=2048, help="bytes, a multiple of 16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.context < 16 or options.context % 16 or min(options.steps, options.batch) < 1 or \
            options.width % options.heads:
        parser.error("--context must be a multiple of 16, --steps and --batch 1 or more and --width a multiple of "
                     f"--heads, got {options.context}, {options.steps}, {options.batch} and {options.width}")
    if options.threads:
        torch.set_num_threads(options.threads)
    source = read(options.data) if options.data else generated(64 * options.context + 100_000, 0)
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8)
    cut = len(text) * 9 // 10
    train, held = text[:cut], text[cut:]
    if len(held) <= options.context:
        raise SystemExit(f"long_context_lm: {options.data} has {len(text)} bytes, of which a tenth is held out: at "
                         f"least {10 * (options.context + 1)} are needed for a context of {options.context}")

    beside = eager_kept(options)
    torch.manual_seed(options.seed)
    model = Language(options, options.context)
    if options.memory != "eager":
        attention = options.memory.removeprefix("attention=")
        remnant.convert(model.layers, options.memory if attention == options.memory else
                        remnant.Policy(attention=attention))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    rng = random.Random(options.seed)
    first = windows(train, options.batch, options.context, rng)
    report = remnant.memory_report(model, first)
    seconds = []
    for _ in range(options.steps):
        ids = windows(train, options.batch, options.context, rng)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    model.eval()
    with torch.no_grad():
        losses = [float(model(windows(held, 1, options.context, rng))) for _ in range(4)]
    print(json.dumps({
        "memory": options.memory, "context": options.context, "batch": options.batch, "steps": options.steps,
        "loss": round(loss.item(), 4), "held_out_bits_a_byte": round(statistics.mean(losses) / math.log(2), 4),
        "kept_mb": round(report.kept_bytes / 1e6, 3), "peak_mb": round(report.peak_bytes / 1e6, 3),
        "eager_kept_mb": round(beside / 1e6, 3), "step_ms": round(1e3 * statistics.median(seconds), 1)}))


if __name__ == "__main__":
    main()
