"""What each policy does to the gradient of trained models, beside the time and bytes of a step.

A causal language model at four lengths and a bidirectional classifier, each after 60, 500 and 2,000 steps. The
gradient is the whole model's. With g^ a policy's gradient, g the exact one (scaled_dot_product_attention's) and V the
variance of g between minibatches of this bench's own size:
    error           |g^ - g| / |g|
    bias2           |E[g^] - g|^2 / V, from products of independent draws: about 0, of either sign, without bias
    added_variance  E|g^ - E[g^]|^2 / V; 0 where nothing is drawn
"""

import itertools
import statistics
import time

import torch
from _measure import OUTPUT, arguments, kept_bytes, write
from _models import (
    LENGTHS,
    REVIEW_LENGTH,
    LanguageModel,
    characters,
    classifier,
    crops,
    generator,
    language_model,
    train,
    with_codes,
    with_policy,
)
from torch.nn import functional

import remnant

SAMPLED_KEYS = 128  # the m of the figures about `sampled`; the one whose speed ./dev bench attention takes
POLICIES = ["recompute", "curve:m=5", "curve:m=16", "quantized:bits=8", "quantized:bits=4", "quantized:bits=2",
            "top:m=32", "sampled:m=64", "sampled:m=128", "sampled:m=256", "unbiased:bits=8", "unbiased:bits=4",
            "unbiased:bits=2"]
MINIBATCHES = 6  # from which the variance between minibatches is taken
DRAWS = 2  # of each minibatch, for the policies that draw
REPRODUCTION = {"batch": 6, "length": 512, "step": 60, "minibatches": 4, "seeds": 3}


def reference(q, k, v, mask, causal):
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def attend_under(policy):
    """(attention, bits of all else) of a policy of attention, or of the memory setting unbiased:bits=b."""
    if policy.startswith("unbiased:bits="):
        bits = int(policy[-1])
        return with_codes(bits), bits
    return with_policy(policy), 0


def draws(policy):
    return DRAWS if policy.startswith(("quantized", "sampled", "unbiased")) else 1


def known(policies):
    """Those that the library has."""
    have, x = [], torch.zeros(1, 1, 1, 8)
    for policy in policies:
        try:
            attend_under(policy)[0](x, x, x, None, False)
            have.append(policy)
        except RuntimeError as error:
            print(f"{policy} is left out: {str(error).splitlines()[0]}")
    return have


def gradient(model, batch, under, seed=0):
    """(the whole model's gradient as one vector, seconds)."""
    torch.manual_seed(seed)
    model.attend, model.bits = under
    start = time.perf_counter()
    grads = torch.autograd.grad(model.loss(batch), list(model.parameters()))
    seconds = time.perf_counter() - start
    return torch.cat([grad.flatten() for grad in grads]), seconds


def measure(model, policies, batches, repeats):
    """One row a policy. Policies take turns, so that times are comparable."""
    exact = [gradient(model, batch, (reference, 0))[0] for batch in batches]
    mean = sum(exact) / len(exact)
    noise = (sum((g - mean).square().sum() for g in exact) / (len(exact) - 1)).item()
    seen = {policy: {"error": [], "bias2": [], "added_variance": [], "seconds": []} for policy in policies}
    gradient(model, batches[0], attend_under(policies[0]))  # warms up
    for index in range(repeats):
        batch, g = batches[index], exact[index]
        for policy, each in seen.items():
            errors = []
            for draw in range(draws(policy)):
                approximate, seconds = gradient(model, batch, attend_under(policy), 1000 * index + draw)
                errors.append(approximate - g)
                each["seconds"].append(seconds)
            each["error"].append(statistics.mean((error.norm() / g.norm()).item() for error in errors))
            if len(errors) == 1:
                each["bias2"].append(errors[0].square().sum().item() / noise)
                each["added_variance"].append(0.0)
            else:
                pairs = list(itertools.combinations(errors, 2))
                spread = statistics.mean((a - b).square().sum().item() for a, b in pairs)
                each["bias2"].append(statistics.mean((a @ b).item() for a, b in pairs) / noise)
                each["added_variance"].append(spread / 2 / noise)
    rows = []
    for policy, each in seen.items():
        model.attend, model.bits = attend_under(policy)
        rows.append({
            "impl": policy,
            "step_ms": statistics.median(each["seconds"]) * 1e3,
            "kept_bytes": kept_bytes(lambda: model.loss(batches[0]), tuple(model.parameters())),
            **{name: statistics.mean(each[name]) for name in ("error", "bias2", "added_variance")},
        })
    return rows


def reproduction(seeds):
    """Gradient error of curve:m=5 on the small set-up that other figures about it are quoted for."""
    source, text, count = characters()
    batch, length, step = (REPRODUCTION[name] for name in ("batch", "length", "step"))
    errors = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = LanguageModel(count, length)
        recipe = f"{source}, batch {batch}, length {length}, seed {seed}"
        states = train(model, lambda i, seed=seed: crops(text, batch, length, generator(seed, 1, i)),
                       f"lm{length}-{seed}", recipe, [step])
        model.load_state_dict(states[step])
        for index in range(REPRODUCTION["minibatches"]):
            data = crops(text, batch, length, generator(seed, 2, index))
            exact = gradient(model, data, (reference, 0))[0]
            errors.append(((gradient(model, data, attend_under("curve:m=5"))[0] - exact).norm() / exact.norm()).item())
    return statistics.mean(errors)


def picture(rows, path):
    """Error against step time and against kept bytes, in the stage where the error is worst."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed, ./dev setup brings it")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lowest = 1e-4
    policies = list(dict.fromkeys(row["impl"] for row in rows))
    shapes = dict(zip(dict.fromkeys((row["model"], row["n"]) for row in rows), "os^Dv", strict=False))
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axis, column, unit, label in ((axes[0], "step_ms", 1e3, "forward and backward, s"),
                                      (axes[1], "kept_bytes", 1e6, "kept for backward, MB")):
        for i, policy in enumerate(policies):
            for (model, n), shape in shapes.items():
                stages = [row for row in rows if (row["impl"], row["model"], row["n"]) == (policy, model, n)]
                worst = max(stages, key=lambda row: row["error"])
                axis.plot(statistics.median(row[column] for row in stages) / unit, max(worst["error"], lowest),
                          shape, color=f"C{i}", markersize=7)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.tick_params(axis="x", which="both", labelsize=7, labelrotation=45)
        axis.grid(which="both", alpha=0.25)
    axes[0].set_ylabel(f"relative error of the gradient, worst stage\n(at least {lowest:g} drawn)")
    handles = [pyplot.Line2D([], [], color=f"C{i}", lw=4, label=policy) for i, policy in enumerate(policies)]
    handles += [pyplot.Line2D([], [], color="0.3", marker=shape, ls="", label=f"{model}, n = {n}")
                for (model, n), shape in shapes.items()]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"picture: {path}")


def worst(rows, model, n):
    """The highest of the stages: what a policy adds, variance and bias together."""
    found = [row["added_variance"] + row["bias2"] for row in rows
             if (row["impl"], row["model"], row["n"]) == (f"sampled:m={SAMPLED_KEYS}", model, n)]
    return max(found, default=None)


def main():
    options = arguments(__doc__, repeats=3, add_options=lambda parser: parser.add_argument(
        "--quick", action="store_true", help="shortest length and earliest stage alone, one seed"))
    policies = known(POLICIES)
    stages, lengths = ([60], [512]) if options.quick else ([60, 500, 2000], list(LENGTHS))
    minibatches = max(MINIBATCHES, options.repeats)
    rows = []
    model, states, batch_of = language_model(stages)
    for stage, n in itertools.product(stages, lengths):
        model.load_state_dict(states[stage])
        batches = [batch_of(n, index) for index in range(minibatches)]
        for row in measure(model, policies, batches, options.repeats):
            rows.append({"model": "lm", "n": n, "stage": stage, **row})
        print(f"lm, n = {n}, step {stage}: measured", flush=True)
    model, states, batch_of = classifier(stages)
    for stage in stages:
        model.load_state_dict(states[stage])
        batches = [batch_of(index) for index in range(minibatches)]
        for row in measure(model, policies, batches, options.repeats):
            rows.append({"model": "classifier", "n": REVIEW_LENGTH, "stage": stage, **row})
        print(f"classifier, step {stage}: measured", flush=True)
    figures = {"curve5_gradient_error_lm": reproduction(1 if options.quick else REPRODUCTION["seeds"])}
    if not options.quick:
        figures["sampled_n4096_added_variance_over_minibatch"] = worst(rows, "lm", 4096)
        figures["sampled_imdb_added_variance_over_minibatch"] = worst(rows, "classifier", REVIEW_LENGTH)
    write("fidelity", rows, {name: value for name, value in figures.items() if value is not None})
    picture(rows, OUTPUT / "fidelity.png")


if __name__ == "__main__":
    main()
