"""Every lean op of a step beside the operations of PyTorch that it stands for: forward, backward, kept bytes.

float32, 4,096 rows of 256 columns, as the language model of `bench step` has them (4 x 1,024), hidden layers of 1,024; dropout 0.1. Rows of a
case take turns. kept_bytes: unique storages of the graph beyond inputs and parameters.
"""

import functools

import torch
from _measure import alternate, arguments, kept_bytes, write
from torch.nn import functional

import remnant

ROWS, COLUMNS, HIDDEN, CLASSES, P = 4096, 256, 1024, 8192, 0.1


def eager_feed_forward(x, w1, b1, w2, b2):
    hidden = functional.dropout(functional.gelu(functional.linear(x, w1, b1)), P)
    return functional.linear(hidden, w2, b2)


def cases():
    """case: (inputs' shapes, {impl: function of them})."""
    row, square, wide = (ROWS, COLUMNS), (COLUMNS, COLUMNS), (ROWS, HIDDEN)
    vector = (COLUMNS,)
    part = functools.partial
    yield "dropout", [wide], {"torch": part(functional.dropout, p=P), "remnant": part(remnant.dropout, p=P)}
    yield "relu", [wide], {"torch": torch.relu, "remnant": remnant.relu}
    yield "leaky_relu", [wide], {"torch": part(functional.leaky_relu, negative_slope=0.1),
                                 "remnant": part(remnant.leaky_relu, slope=0.1)}  # fmt: skip
    for name in ("gelu", "silu"):
        own = getattr(remnant, name)
        yield name, [wide], {"torch": getattr(functional, name), "remnant": own, "remnant fewbit:bits=3": part(own, policy="fewbit:bits=3"),
                             "remnant quantized:bits=4": part(own, policy="quantized:bits=4")}  # fmt: skip
    yield "layer_norm", [row, vector, vector], {
        "torch": lambda x, w, b: functional.layer_norm(x, (COLUMNS,), w, b), "remnant": remnant.layer_norm,
        "remnant quantized:bits=4": part(remnant.layer_norm, policy="quantized:bits=4")}  # fmt: skip
    yield "rms_norm", [row, vector], {
        "torch": lambda x, w: functional.rms_norm(x, (COLUMNS,), w), "remnant": remnant.rms_norm,
        "remnant quantized:bits=4": part(remnant.rms_norm, policy="quantized:bits=4")}  # fmt: skip
    yield "dropout_add_layer_norm", [row, row, vector, vector], {
        "torch": lambda x, r, w, b: functional.layer_norm(r + functional.dropout(x, P), (COLUMNS,), w, b),
        "remnant": lambda x, r, w, b: remnant.dropout_add_layer_norm(x, r, P, w, b)[0]}  # fmt: skip
    yield "linear", [row, square, vector], {
        "torch": functional.linear, "remnant": remnant.linear,
        "remnant quantized:bits=4": part(remnant.linear, policy="quantized:bits=4")}  # fmt: skip
    own = part(remnant.feed_forward, activation="gelu", dropout=P)
    yield "feed_forward, gelu, dropout", [row, (HIDDEN, COLUMNS), (HIDDEN,), (COLUMNS, HIDDEN), vector], {
        "torch": eager_feed_forward, "remnant": own,
        **{f"remnant quantized:bits={b}": part(own, policy=f"quantized:bits={b}") for b in (8, 4, 2)}}  # fmt: skip
    target = torch.randint(CLASSES, (ROWS,))
    yield "linear_cross_entropy, 8,192 classes", [row, (CLASSES, COLUMNS)], {
        "torch": lambda x, w: functional.cross_entropy(functional.linear(x, w), target),
        "remnant": lambda x, w: remnant.linear_cross_entropy(x, w, None, target)}  # fmt: skip


def main():
    options = arguments(__doc__, repeats=9)
    torch.manual_seed(0)
    rows, figures = [], {}
    for case, shapes, functions in cases():
        inputs = [(torch.randn(shape) / (shape[-1] ** 0.5 if len(shape) == 2 and shape[0] != ROWS else 1)).requires_grad_()
                  for shape in shapes]
        runs = {impl: functools.partial(function, *inputs) for impl, function in functions.items()}
        grad = torch.randn_like(runs["torch"]())
        times = alternate({impl: (run, grad) for impl, run in runs.items()}, options.repeats, inputs)
        for impl, run in runs.items():
            row = {"case": case, "impl": impl, **times[impl], "kept_bytes": kept_bytes(run, inputs)}
            row["step_vs_torch"] = row["step_ms"] / times["torch"]["step_ms"]
            rows.append(row)
        figures[f"{case.split(',')[0]}_step_vs_torch"] = rows[-len(runs) + 1]["step_vs_torch"]
    write("ops", rows, figures)


if __name__ == "__main__":
    main()
