"""remnant.convert where more happens than a layer's own forward: adapters, hooks, parametrizations, other types."""

import copy
import tempfile

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune

import remnant

WIDTH, HEADS = 16, 4
MEMORY = ["exact", "unbiased:bits=8"]


def encoder(dropout=0.0):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout, batch_first=True)


def batch():
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def gradients(model, *inputs):
    model.zero_grad()
    y = model(*inputs)
    y = y[0] if isinstance(y, tuple) else y
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, wanted, memory="exact"):
    assert torch.allclose(found[0], wanted[0], atol=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, g in wanted[1].items():
        assert (found[1][name] - g).norm() <= (1e-5 if memory == "exact" else 0.05) * (1e-2 + g.norm()), name


class Adapter(nn.Module):
    """A low-rank adapter whose weight is the layer's, as PEFT's."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Plain(Adapter):
    weight = bias = None


def own_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def mark_prune(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


CHANGES = {
    "adapter": Adapter, "adapter without a weight": Plain, "parametrization": parametrizations.weight_norm,
    "weight norm": nn.utils.weight_norm, "spectral norm": nn.utils.spectral_norm, "pruning": mark_prune,
    "a forward of its own": own_forward,
    "hook": lambda layer: layer.register_forward_hook(lambda module, inputs, output: 3 * output) and None,
    "hook before": lambda layer: layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)) and None,
    "hook of the gradient":
        lambda layer: layer.register_full_backward_hook(lambda module, grads, _: (2 * grads[0],)) and None,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["linear1", "linear2"])
def test_what_sits_on_a_feed_forward_layer_counts(which, change, when, memory):
    models = []
    for converted in (False, True):
        model = encoder()
        if converted and when == "after":
            remnant.convert(model, memory)
        changed = CHANGES[change](getattr(model, which))
        if changed is not None:
            setattr(model, which, changed)
        if converted and when == "before":
            remnant.convert(model, memory)
        models.append(model)
    for wide in (1.0, 3.0):  # again after a step, which a weight made at another time does not see
        wanted, found = (gradients(model, batch()) for model in models)
        assert_equal(found, wanted, memory)
        for model in models:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(wide)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_global_hooks_see_every_layer(kind):
    model = remnant.convert(kind(WIDTH, HEADS, 32, 0.0, batch_first=True))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        model(*[batch()] * (2 if "Decoder" in kind.__name__ else 1))
    finally:
        handle.remove()
    assert any(each is model.linear1 for each in seen) and any(each is model.dropout for each in seen)


def test_a_feed_forward_block_without_guests_is_one_op():
    """Also while memory_report's own hooks are on it."""
    model = remnant.convert(encoder(0.1), "unbiased:bits=4")
    ops = {row["op"] for row in remnant.memory_report(model, batch()).rows}
    assert "remnant::CodedFeedForward" in ops


@pytest.mark.parametrize("change", ["eval", "identity", "one", "another class"])
def test_the_dropout_between_decides(change):
    class Twice(nn.Dropout):
        def forward(self, x):
            return 2 * x

    wanted, found = encoder(0.5), encoder(0.5)
    remnant.convert(found, overrides={"dropout1": "eager", "dropout2": "eager"})
    results = []
    for model in (wanted, found):
        model.self_attn.dropout = model.dropout1.p = model.dropout2.p = 0.0
        if change == "eval":
            model.dropout.eval()
        elif change == "one":
            model.dropout.p = 1.0
        else:
            model.dropout = nn.Identity() if change == "identity" else Twice()
        results.append(gradients(model, batch()))
    assert_equal(results[1], results[0])


def test_a_setting_of_its_own_keeps_a_feed_forward_layer_apart():
    model = nn.Sequential(encoder())
    for overrides in ({"0.linear1": "eager", "0.linear2": "eager"}, {"0.linear1": "exact"},
                      {"0.linear2": "unbiased:bits=8"}):
        remnant.convert(model, "unbiased:bits=2", overrides=overrides)
        rows = remnant.memory_report(model, batch()).rows
        assert "remnant::CodedFeedForward" not in {row["op"] for row in rows}
        # One that reads codes shares those of the norm before it.
        assert {row["layer"] for row in rows} & {"0.linear1", "0.linear2"}
        remnant.revert(model)


@pytest.fixture
def one_process():
    distributed = pytest.importorskip("torch.distributed")
    with tempfile.NamedTemporaryFile() as file:
        distributed.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        yield
        distributed.destroy_process_group()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("parts", [["linear1", "linear2"], ["self_attn"], ["dropout"]])
def test_single_layers_may_be_sharded_and_reverted(one_process, parts, memory):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, x = encoder(), batch()
    wanted = gradients(copy.deepcopy(model), x)
    remnant.convert(model, memory)
    for name in parts:
        fully_shard(getattr(model, name))
    fully_shard(model)

    def full():
        y, found = gradients(model, x)
        return y, {name: g.full_tensor() for name, g in found.items()}

    assert_equal(full(), wanted, memory)
    remnant.revert(model)
    for module in (model, *(getattr(model, name) for name in parts)):
        assert isinstance(module, FSDPModule) and not isinstance(module, remnant.nn.Converted)
    assert_equal(full(), wanted)


def test_tensors_of_several_devices_get_pytorch_s_operations(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh, x = init_device_mesh("cpu", (1,)), batch()
    spread = distribute_tensor(x, mesh, [Replicate()])
    for layer in (nn.Linear(WIDTH, 8), nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), nn.GELU(), nn.SiLU(), nn.ReLU()):
        wanted = layer(x)
        for name, p in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()])))
        remnant.convert(layer, "unbiased:bits=4")
        assert torch.allclose(layer(spread).full_tensor(), wanted, atol=1e-6)


@pytest.mark.parametrize("change", ["parametrization", "spectral norm", "hook", "adapter", "weight norm of out_proj"])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_attention_does_as_pytorch_with_what_sits_on_it(change, memory):
    models = []
    for converted in (False, True):
        torch.manual_seed(0)
        model = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        if converted:
            remnant.convert(model, memory)
        torch.manual_seed(1)
        if change == "parametrization":
            parametrizations.weight_norm(model, "in_proj_weight")
            parametrizations.weight_norm(model.out_proj)
        elif change == "spectral norm":  # a power iteration each time that the weight is read
            parametrizations.spectral_norm(model, "in_proj_weight")
        elif change == "hook":
            model.out_proj.register_forward_hook(lambda module, inputs, output: 3 * output)
        elif change == "adapter":
            model.out_proj = Adapter(model.out_proj)
        else:
            parametrizations.weight_norm(model.out_proj)
            parametrize.remove_parametrizations(model.out_proj, "weight")
        models.append(model)
    for _ in range(2):
        wanted, found = (gradients(model, batch(), batch(), batch()) for model in models)
        assert_equal(found, wanted, memory)


MASKS = {
    "none": {}, "boolean": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(2)},
    "causal": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "is_causal": True},
    "added": {"attn_mask": torch.randn(5, 5, generator=torch.Generator().manual_seed(3))},
    "padding": {"key_padding_mask": torch.arange(5).ge(torch.tensor([[3], [5]]))},
    "a head each": {"attn_mask": torch.randn(2 * HEADS, 5, 5, generator=torch.Generator().manual_seed(3))},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("memory", [*MEMORY, remnant.Policy(attention="curve:m=2")], ids=str)
def test_attention_weights_have_their_gradient(mask, average, memory):
    model = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    options = {**MASKS[mask], "average_attn_weights": average}
    x = batch().requires_grad_()
    if mask == "added":
        options["attn_mask"] = options["attn_mask"].clone().requires_grad_()

    def run():
        _, weights = model(x, x, x, **options)
        loss = (weights * torch.randn(weights.shape, generator=torch.Generator().manual_seed(4))).sum()
        leaves = [x, model.in_proj_weight] + [v for v in options.values() if getattr(v, "requires_grad", False)]
        return torch.autograd.grad(loss, leaves)

    wanted = run()
    remnant.convert(model, memory)
    for found, g in zip(run(), wanted, strict=True):
        assert (found - g).norm() <= (0.05 if "unbiased" in str(memory) else 1e-5) * (1e-3 + g.norm())


def test_weights_keep_nothing_more_and_have_no_second_derivative():
    def kept(model, x, **options):
        seen = {}

        def pack(t):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output, weights = model(x, x, x, **options)
        del output, weights
        return sum(seen.values())

    model, x = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), torch.randn(1, 256, WIDTH, requires_grad=True)
    n = 256 * 256 * 4
    assert kept(model, x) > HEADS * n
    remnant.convert(model)
    assert kept(model, x, average_attn_weights=False) < n
    weights = model(x, x, x)[1]
    (g,) = torch.autograd.grad(weights.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|gradient of its gradient"):
        g.sum().backward()


def test_rows_that_attend_nothing_give_weights_no_gradient():
    model = remnant.convert(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    x = batch().requires_grad_()
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[2] = True
    model(x, x, x, attn_mask=mask)[1].square().sum().backward()
    assert x.grad.isfinite().all() and bool(x.grad.abs().sum() > 0)


@pytest.mark.parametrize("layer", [nn.GELU(), nn.SiLU(), nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 4),
                                   nn.ReLU()], ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("memory", MEMORY)
def test_forward_mode_gradients(layer, memory):
    layer, x, direction = copy.deepcopy(layer), batch(), batch().flip(0)

    def tangent():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent

    wanted = tangent()
    remnant.convert(layer, memory)
    assert torch.allclose(tangent(), wanted, atol=1e-6)


def test_changes_in_place_are_mended_as_the_error_s_documentation_says():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.norm, self.act = nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(inplace=True)
            self.self_attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.enter(x)
            x += self.self_attn(x, x, x, need_weights=False)[0]
            return self.act(self.norm(x))

    x = torch.randn(2, 4, 8)
    model = nn.ModuleDict({"block": Residual()})
    remnant.convert(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model["block"](x).sum().backward()
    remnant.revert(model)
    remnant.convert(model, overrides={"*.norm*": "eager", "*.self_attn": "eager"})
    model["block"](x).sum().backward()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention])
@pytest.mark.parametrize("training", [False, True])
def test_a_parametrization_makes_weights_once_a_run(kind, memory, training):
    class Counted(nn.Module):
        runs = 0

        def forward(self, x):
            self.runs += 1
            return x.tanh()

    layer = remnant.convert(kind(*{nn.Linear: (8, 8), nn.MultiheadAttention: (8, 2)}.get(kind, (8,))), memory)
    name = "in_proj_weight" if kind is nn.MultiheadAttention else "weight"
    counted, x = Counted(), torch.randn(4, 3, 8)
    parametrize.register_parametrization(layer, name, counted)
    counted.runs = 0
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient):
            layer.train(training)(*[x] * (3 if kind is nn.MultiheadAttention else 1))
    # PyTorch's own attention reads it more often where it looks for its fast path.
    assert counted.runs == 2 or (kind is nn.MultiheadAttention and not training)


@pytest.mark.parametrize("when", ["parametrized", "parametrized twice"])
def test_revert_after_a_parametrization(when):
    model = remnant.convert(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4)))
    parametrizations.weight_norm(model[0])
    if when == "parametrized twice":
        parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    x = torch.randn(2, 4)
    wanted = gradients(model, x)
    remnant.revert(model)
    assert isinstance(model[0], nn.Linear) and not isinstance(model[0], remnant.nn.Converted)
    assert not any("memory" in each.__dict__ or "torch_class" in each.__dict__ for each in model)
    assert_equal(gradients(model, x), wanted)
    assert_equal(gradients(copy.deepcopy(model), x), wanted)
    for name in list(model[0].parametrizations):
        parametrize.remove_parametrizations(model[0], name)
    assert type(model[0]) is nn.Linear


def test_revert_refuses_what_it_cannot_take_back_and_changes_nothing():
    class Own(remnant.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.GELU(), nn.LayerNorm(4))
    remnant.convert(model)
    model.append(Own(4, 4))
    before = str(model)
    with pytest.raises(TypeError, match=r"Own is a subclass of remnant.nn.Linear"):
        remnant.revert(model)
    assert str(model) == before


def test_symbolic_tracing_takes_converted_layers_as_one_node():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(0.0),
                          nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), nn.Linear(16, 4))
    x = torch.randn(3, 5, 8)
    plain = torch.fx.symbolic_trace(model)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    remnant.convert(model)
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes] == [n.target for n in plain.graph.nodes]
    assert type(traced.get_submodule("0")).__module__ == "remnant.nn"
    for g, w in zip(torch.autograd.grad(traced(x).square().sum(), list(model.parameters())), wanted, strict=True):
        assert torch.allclose(g, w, rtol=1e-4, atol=1e-5)
    assert remnant.revert(model)[0].__module__ == "torch.nn.modules.linear"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_is_for_reverted_models():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    with pytest.raises(TypeError, match=r"revert it before torch.jit.script"):
        remnant.convert(nn.Sequential(torch.jit.script(nn.Linear(4, 4))))
    x = torch.randn(2, 4)
    assert torch.allclose(torch.jit.trace(remnant.convert(model), x)(x), model(x), atol=1e-6)
    assert torch.allclose(torch.jit.script(remnant.revert(model))(x), model(x), atol=1e-6)


LAID_OUT = {
    "channels last": lambda: torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(3, 5, 8).transpose(0, 1), "turned": lambda: torch.randn(3, 5, 8).permute(2, 0, 1),
    "apart": lambda: torch.randn(3, 5, 8)[:, ::2],
    "apart and transposed": lambda: torch.randn(3, 5, 8)[:, ::2].transpose(0, 1),
    "expanded": lambda: torch.randn(1, 4).expand(3, 4), "one": lambda: torch.randn(3, 1, 5).transpose(0, 2),
}


@pytest.mark.parametrize("layout", LAID_OUT)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("layer", [nn.GELU(), nn.SiLU(), nn.ReLU(), nn.LeakyReLU(), nn.Dropout(0.5)],
                         ids=lambda layer: type(layer).__name__)
def test_elementwise_layers_keep_the_order_of_dimensions(layer, memory, layout):
    layer, x = copy.deepcopy(layer), LAID_OUT[layout]()
    results = []
    for _ in range(2):
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
        results.append((y, leaf.grad))
        remnant.revert(layer)
        remnant.convert(layer, memory)
    (wanted, g_wanted), (found, g_found) = results
    strides = [[stride for stride, size in zip(y.stride(), y.shape, strict=True) if size > 1] for y in (found, wanted)]
    assert strides[0] == strides[1]
    if isinstance(layer, nn.Dropout):  # other elements than PyTorch's
        assert torch.allclose(found, torch.where(found != 0, 2 * x, 0))
        assert torch.allclose(g_found, torch.where(found != 0, 2.0, 0.0) * torch.arange(x.numel()).view(x.shape))
        return
    assert torch.allclose(found, wanted, atol=1e-6)
    assert (g_found - g_wanted).norm() <= 2e-2 * g_wanted.norm()


def test_elementwise_layers_compile_with_any_order_and_size():
    model = remnant.convert(nn.Sequential(nn.GELU(), nn.ReLU()), "unbiased:bits=8")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: model(x.transpose(1, 2)), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 6):
        x = torch.randn(2, n, 4, requires_grad=True)
        y = compiled(x)
        assert y.stride() == model(x.transpose(1, 2)).stride()
        y.sum().backward()


@pytest.mark.parametrize("memory", [*MEMORY, remnant.Policy(recompute=False)], ids=str)
def test_attention_s_output_can_be_viewed(memory):
    model = remnant.convert(nn.MultiheadAttention(WIDTH, HEADS), memory)
    x = torch.randn(5, 3, WIDTH)
    for weights in (False, True):
        assert model(x, x, x, need_weights=weights)[0].view(-1, WIDTH).shape == (15, WIDTH)


@pytest.mark.parametrize("memory", MEMORY)
def test_types_that_only_pytorch_takes(memory):
    whole = torch.arange(-8, 8).view(1, 1, 4, 4)
    for layer, x in ((nn.Linear(4, 4, dtype=torch.complex64), torch.randn(2, 4, dtype=torch.complex64)),
                     (nn.ReLU(), whole), (nn.MaxPool2d(2), whole)):
        wanted = layer(x)
        assert torch.equal(remnant.convert(layer, memory)(x), wanted)
    ragged = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)
    for layer in (nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.SiLU(), nn.ReLU(), nn.Dropout(0.5)):
        remnant.convert(layer, memory)
        assert layer(ragged).is_nested


@pytest.mark.parametrize("memory", MEMORY)
def test_types_that_do_not_go_together_are_refused_as_by_pytorch(memory):
    for layer, x in ((nn.Linear(4, 4), torch.randn(2, 4).double()), (nn.Linear(4, 4).bfloat16(), torch.randn(2, 4))):
        remnant.convert(layer, memory)
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x.float()).dtype == torch.bfloat16
    model = remnant.convert(encoder(), memory)
    with pytest.raises(RuntimeError, match="dtype"):
        model(batch().double())


def test_layers_of_this_library_can_be_constructed():
    for kind, arguments, x in (
            (remnant.nn.Linear, (4, 8), torch.randn(2, 4)), (remnant.nn.LayerNorm, (4,), torch.randn(2, 4)),
            (remnant.nn.LayerNorm, ((2, 4),), torch.randn(3, 2, 4)), (remnant.nn.GELU, (), torch.randn(3)),
            (remnant.nn.TransformerEncoderLayer, (WIDTH, HEADS, 32), batch())):
        layer = kind(*arguments)
        assert "memory=exact" in repr(layer)
        x.requires_grad_()
        layer(x).sum().backward()
        assert x.grad is not None
        assert type(remnant.revert(layer)) is kind.torch_class
    for more in ({"kdim": 4}, {"add_bias_kv": True}):
        x = torch.randn(2, 3, 8)
        key = torch.randn(2, 3, more.get("kdim", 8))
        value = torch.randn(2, 3, 8)
        assert remnant.nn.MultiheadAttention(8, 2, batch_first=True, **more)(x, key, value)[0].shape == x.shape
    model = remnant.convert(nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    model[0] = type(model[0])(4, 8)
    assert model(torch.randn(2, 4)).shape == (2, 8)
