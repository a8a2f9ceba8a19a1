"""remnant.convert on models of torch.nn: equal to PyTorch, smaller, reversible, and plain about what it cannot do."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import remnant

WIDTH, HEADS = 32, 4


def transformer(norm_first=False, batch_first=True, activation="relu", dropout=0.0):
    return nn.Transformer(WIDTH, HEADS, 2, 2, 64, dropout, activation, batch_first=batch_first, norm_first=norm_first)


def mixed():
    return nn.Sequential(nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.0), nn.Linear(64, 64),
                         nn.SiLU(), nn.LayerNorm(64), nn.Linear(64, WIDTH), nn.ReLU(), nn.RMSNorm(WIDTH),
                         nn.GELU("tanh"), nn.Linear(WIDTH, 5))


def gradients(model, *inputs, **kwargs):
    model.zero_grad()
    y = model(*inputs, **kwargs)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(found, wanted, tolerance=2e-5):
    assert torch.allclose(found[0], wanted[0], atol=1e-5)
    for name, g in wanted[1].items():
        assert (found[1][name] - g).abs().max() <= tolerance * (1 + g.abs().max()), name


def kept(model, *inputs, **kwargs):
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *inputs)}
    seen = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held = model(*inputs, **kwargs)
    del held
    return sum(seen.values())


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_exact_transformer_equals_torch(norm_first, batch_first, activation):
    model = transformer(norm_first, batch_first, activation)
    shape = (3, 7, WIDTH) if batch_first else (7, 3, WIDTH)
    source, target = torch.randn(shape), torch.randn(shape)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding,
             "tgt_mask": nn.Transformer.generate_square_subsequent_mask(7), "tgt_is_causal": True}
    wanted = gradients(model, source, target, **masks)
    eager = kept(model, source, target, **masks)
    remnant.convert(model, "exact")
    assert_close(gradients(model, source, target, **masks), wanted)
    lean = kept(model, source, target, **masks)
    assert lean < 0.6 * eager
    remnant.revert(model)
    found = gradients(model, source, target, **masks)
    assert torch.equal(found[0], wanted[0]) and kept(model, source, target, **masks) == eager
    remnant.convert(model, "unbiased:bits=4")
    assert torch.allclose(model(source, target, **masks), wanted[0], atol=1e-5)
    assert kept(model, source, target, **masks) < eager / 3
    # Nothing of the layers' own where nothing is trained.
    with torch.no_grad():
        assert torch.allclose(model.eval()(source, target, **masks), wanted[0], atol=1e-5)


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=8"])
def test_layers_alone(memory):
    model, ids = mixed(), torch.randint(0, 20, (6, 9))
    wanted = gradients(model, ids)
    remnant.convert(model, memory)
    found = gradients(model, ids)
    assert_close(found, wanted, 2e-5 if memory == "exact" else 3e-2)
    assert not remnant.conversion(model).left


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_unbiased_through_a_model(bits):
    model, ids = mixed().double(), torch.randint(0, 20, (6, 9))
    _, wanted = gradients(model, ids)
    remnant.convert(model, f"unbiased:bits={bits}")
    draws, total, squares = 150, {}, {}
    for _ in range(draws):
        for name, g in gradients(model, ids)[1].items():
            total[name] = total.get(name, 0) + g
            squares[name] = squares.get(name, 0) + g.square()
    for name, g in wanted.items():
        mean = total[name] / draws
        variance = (squares[name] / draws - mean.square()).clamp_min(0).sum() / (draws - 1)
        # Norms leave a second-order bias, far below the noise of one draw.
        assert (mean - g).square().sum() < 4 * variance + 1e-3 * g.square().sum(), name


MASKS = {
    "none": lambda b, n, m: {},
    "boolean": lambda b, n, m: {"attn_mask": torch.rand(n, m) < 0.3},
    "added": lambda b, n, m: {"attn_mask": torch.randn(n, m)},
    "a head each": lambda b, n, m: {"attn_mask": torch.randn(b * HEADS, n, m)},
    "padding": lambda b, n, m: {"key_padding_mask": torch.arange(m).ge(m - 2).expand(b, m)},
    "added padding": lambda b, n, m: {"key_padding_mask": torch.randn(b, m)},
    "both": lambda b, n, m: {"attn_mask": torch.rand(n, m).lt(0.2), "key_padding_mask": torch.arange(m).ge(m - 1).expand(b, m)},
    "added and padding": lambda b, n, m: {"attn_mask": torch.randn(n, m),
                                          "key_padding_mask": torch.arange(m).ge(m - 1).expand(b, m)},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["self", "memory", "apart"])
@pytest.mark.parametrize("memory", ["exact", remnant.Policy(recompute=False), "unbiased:bits=8"], ids=str)
def test_attention_module_equals_torch(mask, kind, memory):
    for batch_first, bias, weights in itertools.product((False, True), (False, True), (False, True)):
        model = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=batch_first)
        b, n, m = 2, 6, 6 if kind == "self" else 9
        shape = (lambda k: (b, k, WIDTH)) if batch_first else (lambda k: (k, b, WIDTH))
        query = torch.randn(shape(n), requires_grad=True)
        key = query if kind == "self" else torch.randn(shape(m), requires_grad=True)
        value = torch.randn(shape(m), requires_grad=True) if kind == "apart" else key
        options = {**MASKS[mask](b, n, m), "need_weights": weights}
        leaves = list(dict.fromkeys([query, key, value, *model.parameters()]))

        def run():
            y, w = model(query, key, value, **options)
            g = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
            return y, w, torch.autograd.grad((y * g).sum(), leaves)

        y, w, wanted = run()
        remnant.convert(model, memory)
        z, v, found = run()
        assert torch.allclose(z, y, atol=1e-5)
        assert (v is None) == (w is None) and (w is None or torch.allclose(v, w, atol=1e-5))
        tolerance = 0.03 if "unbiased" in str(memory) else 2e-5
        for a, e in zip(found, wanted, strict=True):
            assert (a - e).norm() <= tolerance * (1e-2 + e.norm())


def test_attention_module_without_a_batch_and_by_head():
    model = nn.MultiheadAttention(WIDTH, HEADS)
    x = torch.randn(5, WIDTH)
    wanted = model(x, x, x, average_attn_weights=False)
    remnant.convert(model)
    found = model(x, x, x, average_attn_weights=False)
    assert all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    with pytest.raises(RuntimeError, match="give attn_mask too"):
        model(x, x, x, is_causal=True)


def test_what_stays_is_the_very_same():
    model = transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters, state = dict(model.named_parameters()), model.state_dict()
    calls = []
    model.encoder.layers[0].linear1.register_forward_pre_hook(lambda *_: calls.append(1))
    model.encoder.norm.weight.requires_grad_(False)
    remnant.convert(model, "unbiased:bits=4")
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert model.state_dict().keys() == state.keys()
    assert isinstance(model.encoder.norm, nn.LayerNorm) and isinstance(model.encoder.layers[0], nn.TransformerEncoderLayer)
    x = torch.randn(2, 5, WIDTH)
    before = model.encoder.layers[0].linear2.weight.clone()
    model(x, x).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.encoder.layers[0].linear2.weight) and model.encoder.norm.weight.grad is None
    fresh = transformer()
    fresh.load_state_dict(model.state_dict())
    model.load_state_dict(state)


def test_frozen_layers_keep_nothing():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    for p in model.parameters():
        p.requires_grad_(False)
    remnant.convert(model, "unbiased:bits=4")
    assert kept(model, torch.randn(128, 64)) == 0
    model[2].weight.requires_grad_()  # as an adapter would be
    x = torch.randn(128, 64)
    assert kept(model, x) == remnant.linear_code_bytes(x.numel(), 4)


def test_copies_pickles_and_prints():
    model = transformer()
    remnant.convert(model, "unbiased:bits=2", overrides={"decoder.*": "exact"})
    assert "memory=unbiased:bits=2" in str(model) and "memory=exact" in str(model)
    x = torch.randn(2, 5, WIDTH)
    wanted = model.eval()(x, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(other(x, x), wanted) and str(other) == str(model)
        assert remnant.conversion(other) == remnant.conversion(model)
        remnant.revert(other)
        assert type(other.encoder.norm) is nn.LayerNorm
    assert type(model.encoder.norm) is remnant.nn.LayerNorm


def test_overrides_decide_by_name():
    model = transformer()
    remnant.convert(model, "unbiased:bits=4", overrides={
        "encoder": "exact", "*.norm*": remnant.Policy(bits=8), "decoder.layers.1": "eager", "decoder.layers.1.linear1": "exact"})
    done = remnant.conversion(model)
    assert done.converted["encoder.layers.0.linear1"] == ("Linear", "exact")
    assert done.converted["encoder.layers.0.norm1"] == ("LayerNorm", "unbiased:bits=8")
    assert done.converted["decoder.layers.0.linear1"] == ("Linear", "unbiased:bits=4")
    assert done.converted["decoder.layers.1.linear1"] == ("Linear", "exact")
    assert "decoder.layers.1.linear2" in done.left and type(model.decoder.layers[1]) is nn.TransformerDecoderLayer
    assert "layers converted" in str(done) and "decoder.layers.1.linear2: Linear left" in str(done)


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_what_cannot_be_converted_is_left_and_said():
    model = nn.ModuleDict({
        "odd": Odd(4, 4), "image": nn.LayerNorm((3, 4)), "widths": nn.MultiheadAttention(8, 2, kdim=4),
        "bias": nn.MultiheadAttention(8, 2, add_bias_kv=True), "pool": nn.AvgPool2d(2), "fine": nn.Linear(4, 4)})
    kinds = {name: type(module) for name, module in model.named_modules()}
    remnant.convert(model)
    left = remnant.conversion(model).left
    assert {name: type(module) for name, module in model.named_modules() if name != "fine"} == \
        {name: kind for name, kind in kinds.items() if name != "fine"}
    for name, why in {"odd": "subclass", "image": "2 dimensions", "widths": "kdim", "bias": "add_bias_kv", "pool": "no twin"}.items():
        assert why in left[name][1], (name, left[name])
    assert "fine" not in left


def test_mistakes_are_named_and_change_nothing():
    model = mixed()
    before = str(model)
    with pytest.raises(ValueError, match="did you mean 'unbiased:bits=4'"):
        remnant.convert(model, "unbiased:bit=4")
    with pytest.raises(ValueError, match="did you mean 'exact'"):
        remnant.convert(model, "exat")
    with pytest.raises(ValueError, match="no layer's name fits the pattern 'layers.*'"):
        remnant.convert(model, overrides={"layers.*": "exact"})
    with pytest.raises(TypeError, match=r"should be a torch.nn.Module, got function"):
        remnant.convert(lambda x: x)
    with pytest.raises(TypeError, match="got int"):
        remnant.convert(model, 4)
    with pytest.raises(TypeError, match="scripted module"):
        remnant.convert(nn.Sequential(torch.jit.script(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match="8, 4 or 2, got 3"):
        remnant.Policy(bits=3)
    with pytest.raises(ValueError, match="bits needs attention 'recompute'"):
        remnant.Policy(bits=4, attention="curve:m=5")
    assert str(model) == before
    remnant.convert(model)
    after = str(model)
    with pytest.raises(ValueError, match=r"converted already \(memory=exact\): call remnant.revert"):
        remnant.convert(model, "unbiased:bits=4")
    assert str(model) == after


def test_eager_changes_nothing():
    model = mixed()
    before = str(model)
    assert str(remnant.convert(model, "eager")) == before and not remnant.conversion(model).converted


def test_autocast_and_checkpoint():
    model = transformer(dropout=0.1)
    remnant.convert(model, "unbiased:bits=8")
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x, x)
    y.float().sum().backward()
    assert x.grad.isfinite().all()
    layer = model.encoder.layers[0]
    torch.manual_seed(1)
    wanted = torch.autograd.grad(layer(x).sum(), x)[0]
    torch.manual_seed(1)
    found = torch.autograd.grad(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum(), x)[0]
    assert torch.allclose(found, wanted, rtol=0.1, atol=1e-5)


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=4"])
def test_compiles_as_one_graph(memory):
    model = mixed()
    remnant.convert(model, memory)
    ids = torch.randint(0, 20, (6, 9))
    wanted = gradients(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = gradients(compiled, ids)
    assert torch.allclose(found[0], wanted[0], atol=1e-5)
    for name, g in wanted[1].items():
        other = found[1]["_orig_mod." + name]
        assert (other - g).norm() <= (2e-5 if memory == "exact" else 0.5) * (1e-3 + g.norm()), name


def test_a_budget_takes_the_fastest_setting_that_fits():
    model = transformer(dropout=0.1)
    x = torch.randn(16, 64, WIDTH)
    before = str(model)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    remnant.convert(model, budget="10GB", example=(x, x))
    assert torch.equal(torch.get_rng_state(), random) and all(p.grad is None for p in model.parameters())
    remnant.revert(model)
    with pytest.raises(ValueError, match=r"the smallest peak found for this example is (.*) MB") as refusal:
        remnant.convert(model, "unbiased:bits=2", budget=1000, example=lambda: model(x, x).sum())
    assert str(model) == before
    least = float(str(refusal.value).split("example is ")[1].split(" MB")[0])
    remnant.convert(model, "unbiased:bits=2", budget=f"{1.05 * least:.3f}MB", example={"src": x, "tgt": x})
    assert str(model) != before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_budget_mixes_settings_over_layers(monkeypatch):
    """Where a faster setting does not fit, as few layers as it takes are leaner, and what was measured is what there is."""
    model = nn.Sequential(*(nn.TransformerEncoderLayer(WIDTH, HEADS, 64, 0.1, batch_first=True) for _ in range(5)))
    x, seen = torch.randn(8, 24, WIDTH), {}
    real = remnant._budget.measure

    def measure(model, loss, memory):  # real bytes; times from what is converted, since clocks are noisy
        trial = real(model, loss, memory)
        lean = sum(str(each.memory) == "unbiased:bits=4" for each in model.modules() if hasattr(each, "memory"))
        seen[str(model)] = trial.peak_bytes
        times = {"exact": 1000.0, "recompute=False": 90.0}
        return remnant._budget.Trial(memory, trial.peak_bytes, times.get(memory, 100.0) + lean)

    monkeypatch.setattr(remnant._budget, "measure", measure)
    peaks = {}
    for name in (remnant.Policy(recompute=False), "unbiased:bits=4"):
        remnant.convert(model, name)
        peaks[str(name)] = remnant.memory_report(model, x).peak_bytes
        remnant.revert(model)
    budget = (peaks["recompute=False"] + peaks["unbiased:bits=4"]) // 2
    remnant.convert(model, "unbiased:bits=4", budget=budget, example=x, overrides={"4.norm2": "exact"})
    settings = [str(layer.linear1.memory) for layer in model]
    lean = settings.count("unbiased:bits=4")
    assert 0 < lean < 5 and settings == ["unbiased:bits=4"] * lean + ["recompute=False"] * (5 - lean)
    assert str(model[4].norm2.memory) == "exact"
    assert seen[str(model)] <= budget
    fewer = [seen[text] for text in seen if text.count("memory=unbiased:bits=4") < str(model).count("memory=unbiased:bits=4")
             and text.count("memory=recompute=False") > str(model).count("memory=recompute=False")]
    assert fewer and min(fewer) > budget


@pytest.mark.parametrize("budget", ["2 gigabytes", "GB", "1..5GB", 0, "-1GB"])
def test_budgets_that_are_none(budget):
    with pytest.raises(ValueError, match="budget should be"):
        remnant.convert(mixed(), budget=budget, example=torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="needs example="):
        remnant.convert(mixed(), budget="1GB")
