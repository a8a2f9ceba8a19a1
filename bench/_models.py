"""The two small models that benchmarks train, with any attention plugged in: a causal character language model
and a bidirectional classifier of film reviews. Data: tinyshakespeare and IMDb, generated text where absent."""

import gzip
import os
import random
import re
import time
from collections import Counter
from pathlib import Path

import torch
from _measure import OUTPUT
from torch import nn
from torch.nn import functional

import remnant

MODELS = OUTPUT / "models"
STAGES = (60, 500, 2000)
WIDTH, HEADS = 256, 8
TOKENS = 4096  # of every step of the language model, at any length
LENGTHS = {512: 0.7, 1024: 0.15, 2048: 0.1, 4096: 0.05}  # how often a step has this length
REVIEW_LENGTH, REVIEW_BATCH, REVIEW_WORDS = 512, 8, 20_000


# --- models --------------------------------------------------------------------------------------


def with_policy(policy):
    """An `attend` that calls remnant.attention under `policy`."""
    return lambda q, k, v, mask, causal: remnant.attention(q, k, v, mask=mask, causal=causal, policy=policy)


def with_codes(bits):
    """An `attend` whose value and output are kept at so many bits."""
    return lambda q, k, v, mask, causal: remnant.attention(q, k, v, mask=mask, causal=causal, bits=bits)


def codes(bits):
    return f"quantized:bits={bits}" if bits else "exact"


def norm(layer, x, bits):
    return remnant.layer_norm(x, layer.weight, layer.bias, policy=codes(bits)) if bits else layer(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x, attend, mask, causal, bits=0):
        """`bits`: everything kept as codes, as the memory setting unbiased:bits=b does."""
        batch, length, _ = x.shape


        def linear(layer, y):
            return remnant.linear(y, layer.weight, layer.bias, policy=codes(bits))

        qkv = linear(self.qkv, norm(self.norm1, x, bits)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + linear(self.out, attend(q, k, v, mask, causal).transpose(1, 2).reshape(batch, length, WIDTH))
        y = norm(self.norm2, x, bits)
        if bits:
            return x + remnant.feed_forward(y, self.up.weight, self.up.bias, self.down.weight, self.down.bias,
                                            activation="gelu", policy=codes(bits))
        return x + linear(self.down, functional.gelu(linear(self.up, y)))


class Trunk(nn.Module):
    """Embeddings and pre-norm blocks. `attend(q, k, v, mask, causal)` and `bits` may be replaced at any time."""

    bits = 0

    def __init__(self, vocabulary, positions, layers, outputs):
        super().__init__()
        self.attend = with_policy("recompute")
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(positions, WIDTH)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs)

    def features(self, tokens, mask, causal):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, self.attend, mask, causal, self.bits)
        return norm(self.norm, x, self.bits)


class LanguageModel(Trunk):
    def __init__(self, characters, positions):
        super().__init__(characters, positions, layers=4, outputs=characters)

    def loss(self, batch):
        return functional.cross_entropy(self.head(self.features(batch[:, :-1], None, True)).flatten(0, 1),
                                        batch[:, 1:].flatten())


class Classifier(Trunk):
    def __init__(self):
        super().__init__(REVIEW_WORDS, REVIEW_LENGTH, layers=3, outputs=2)

    def loss(self, batch):
        words, labels = batch
        valid = words != 0
        x = self.features(words, valid[:, None, None, :], False) * valid[:, :, None]
        return functional.cross_entropy(self.head(x.sum(1) / valid.sum(1, keepdim=True)), labels)


# --- data ----------------------------------------------------------------------------------------


def data_folder(name):
    """The folder of a data set, or None where it is absent."""
    root = Path(os.environ.get("REMNANT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    return root / name if (root / name).is_dir() else None


def generated_reviews(count, seed=0):
    """(label, text) pairs from a small grammar; what the label says is in a few words of a long text."""
    rng = random.Random(seed)
    things = "plot cast music script camera ending dialogue director pacing humour lead sequel".split()
    people = "the director|a critic|my brother|the audience|an old friend|nobody i know|the lead".split("|")
    plain = "long short quiet loud french early modern familiar second local".split()
    judging = {1: "superb moving clever gripping honest charming".split(),
               0: "dull clumsy shallow tedious lazy hollow".split()}
    verbs = "saw remembered described expected followed discussed filmed watched".split()
    places = "in the first hour|near the end|before the war|one rainy evening|at the festival|in every scene".split("|")
    reviews = []
    for _ in range(count):
        label = rng.randrange(2)
        sentences = []
        for _ in range(rng.randrange(4, 60)):
            thing = rng.choice(things)
            if rng.random() < 0.12:
                judged = label if rng.random() < 0.8 else 1 - label
                negated = rng.random() < 0.25
                word = rng.choice(judging[1 - judged if negated else judged])
                sentences.append(f"the {thing} was {'not ' if negated else ''}{word} {rng.choice(places)}")
            else:
                sentences.append(f"{rng.choice(people)} {rng.choice(verbs)} the {rng.choice(plain)} {thing} "
                                 f"{rng.choice(places)}")
        reviews.append((label, ". ".join(sentences) + "."))
    return reviews


def characters():
    """(source, the text as one tensor of character numbers, number of characters)."""
    folder = data_folder("tinyshakespeare")
    if folder is not None:
        source, text = "tinyshakespeare", gzip.decompress((folder / "input.txt.gz").read_bytes()).decode()
    else:
        source, text = "generated text", "\n".join(text for _, text in generated_reviews(1200))
    alphabet = {letter: i for i, letter in enumerate(sorted(set(text)))}
    return source, torch.tensor([alphabet[letter] for letter in text]), len(alphabet)


def reviews():
    """(source, [count, length] word numbers with 0 for padding, [count] labels)."""
    folder = data_folder("imdb")
    if folder is not None:
        lines = gzip.decompress((folder / "train.tsv.gz").read_bytes()).decode().splitlines()
        source, pairs = "imdb", [(int(line[0]), line[2:]) for line in lines]
    else:
        source, pairs = "generated text", generated_reviews(10_000)
    texts = [re.findall(r"[a-z0-9']+|[.,!?]", text.lower().replace("<br />", " ")) for _, text in pairs]
    frequent = Counter(word for text in texts for word in text).most_common(REVIEW_WORDS - 2)
    number = {word: i + 2 for i, (word, _) in enumerate(frequent)}
    words = torch.zeros(len(texts), REVIEW_LENGTH, dtype=torch.int64)
    for row, text in zip(words, texts, strict=True):
        known = [number.get(word, 1) for word in text[:REVIEW_LENGTH]]
        row[: len(known)] = torch.tensor(known)
    return source, words, torch.tensor([label for label, _ in pairs])


def generator(*numbers):
    """A generator of its own for each tuple of numbers, so that no step depends on the ones before it."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 62)
    return torch.Generator().manual_seed(seed)


def crops(text, batch, length, rng):
    """`batch` random pieces of length + 1 characters."""
    starts = torch.randint(len(text) - length, (batch, 1), generator=rng)
    return text[starts + torch.arange(length + 1)]


def pick(words, labels, rng):
    rows = torch.randint(len(words), (REVIEW_BATCH,), generator=rng)
    return words[rows], labels[rows]


# --- training ------------------------------------------------------------------------------------


def train(model, batch_of, name, recipe, stages=STAGES, report=print):
    """Trains with batch_of(step) and keeps the weights after each stage; {stage: state}. Weights that an
    earlier run with the same recipe left in build/bench/models are taken from there, and a run that was
    cut short is continued."""
    MODELS.mkdir(parents=True, exist_ok=True)
    stages = sorted(stages)

    def load(path):
        if not path.is_file():
            return None
        found = torch.load(path, weights_only=True)
        return found if found["recipe"] == recipe else None

    files = {stage: MODELS / f"{name}-{stage}.pt" for stage in stages}
    found = {stage: load(path) for stage, path in files.items()}
    if all(found.values()):
        return {stage: each["model"] for stage, each in found.items()}
    report(f"{name}: training on {recipe}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.01)
    resume, begin = MODELS / f"{name}-resume.pt", 0
    if (last := load(resume)) is not None and all(found[stage] for stage in stages if stage <= last["step"]):
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        begin = last["step"]
    start, total = time.perf_counter(), 0.0
    for step in range(begin + 1, stages[-1] + 1):
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * min(1.0, step / 50)
        optimizer.zero_grad()
        loss = model.loss(batch_of(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if step in files:
            torch.save({"recipe": recipe, "step": step, "model": model.state_dict()}, files[step])
        if step % 100 == 0 or step in files:
            torch.save({"recipe": recipe, "step": step, "model": model.state_dict(),
                        "optimizer": optimizer.state_dict()}, resume)
        if step % 20 == 0 or step in files:
            report(f"{name}: step {step} of {stages[-1]}, loss {total / (step - begin):.4f}, "
                   f"{(time.perf_counter() - start) / (step - begin):.2f} s a step", flush=True)
            start, total, begin = time.perf_counter(), 0.0, step
    return {stage: torch.load(path, weights_only=True)["model"] for stage, path in files.items()}


def language_model(stages=STAGES, seed=0, attend=None):
    """(model, {stage: weights}, batch_of(length, index)): one set of weights for every length in LENGTHS."""
    source, text, count = characters()
    torch.manual_seed(seed)
    model = LanguageModel(count, max(LENGTHS))
    model.attend = attend or model.attend

    def batch_of(step):
        rng = generator(seed, 1, step)
        length = list(LENGTHS)[torch.multinomial(torch.tensor(list(LENGTHS.values())), 1, generator=rng).item()]
        return crops(text, TOKENS // length, length, rng)

    recipe = f"{source}, lengths {LENGTHS}, {TOKENS} tokens a step, seed {seed}"
    states = train(model, batch_of, f"lm-{seed}", recipe, stages)
    return model, states, lambda length, index: crops(text, TOKENS // length, length, generator(seed, 2, length, index))


def classifier(stages=STAGES, seed=0, attend=None):
    """(model, {stage: weights}, batch_of(index))."""
    source, words, labels = reviews()
    torch.manual_seed(seed)
    model = Classifier()
    model.attend = attend or model.attend
    states = train(model, lambda step: pick(words, labels, generator(seed, 1, step)), f"classifier-{seed}",
                   f"{source}, batch {REVIEW_BATCH}, length {REVIEW_LENGTH}, seed {seed}", stages)
    return model, states, lambda index: pick(words, labels, generator(seed, 2, index))
