"""Networks: their size, their seeded weights, and that every kind of derivative passes through."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vjp

from lsa.runtime.errors import InputError
from lsa.training import models, networks

CIFAR = (3, 32, 32)


def build(name, input_shape=CIFAR, classes=10, seed=0, **options):
    return models.build(name, input_shape=input_shape, classes=classes, seed=seed, **options)


def size(model):
    return sum(p.numel() for p in model.parameters())


def test_simple_cnn_is_the_network_of_the_reference_study():
    # 3·64·9+64, 64·128·9+128, 128·64·9+64, 1024·32+32, 32·10+10
    assert size(build("simple_cnn", width=64)) == 1792 + 73856 + 73792 + 32800 + 330 == 182_570


def test_simple_cnn_is_the_same_with_its_rectifiers_before_the_pools():
    model = build("simple_cnn", width=4)
    layers = list(model)
    for i in (1, 4, 7):
        assert isinstance(layers[i], nn.MaxPool2d)
        assert isinstance(layers[i + 1], nn.ReLU)
        layers[i : i + 2] = layers[i + 1], layers[i]
    x = torch.randn(5, *CIFAR, generator=torch.Generator().manual_seed(0))
    found = []
    for network in (model, nn.Sequential(*layers)):
        outputs = network(x)
        gradient = torch.autograd.grad(outputs.logsumexp(1).sum(), list(network.parameters()))
        found.append([outputs, *gradient])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_resnet20_has_the_size_of_its_paper(norm):
    # He et al. 2016, table 6: 0.27 M. By hand: convolutions, scale and shift of the norms, linear.
    convolutions = 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert size(build("resnet20", norm=norm)) == convolutions + norms + 650 == 269_722


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 5, 1), (2, 1, 1), (3, 33, 47)])
@pytest.mark.parametrize("name", ["simple_cnn", "mlp", "resnet20"])
def test_any_image_size_fits(name, shape):
    model = build(name, shape, classes=7).eval()
    assert model(torch.zeros(4, *shape)).shape == (4, 7)


@pytest.mark.parametrize("name", ["simple_cnn", "mlp", "resnet20", "squeezenet1_1"])
def test_seed_decides_the_weights_and_nothing_else_does(name):
    before = torch.get_rng_state()
    first = build(name, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, other = build(name, seed=3).state_dict(), build(name, seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_weights_are_float32_whatever_the_default_type():
    torch.set_default_dtype(torch.float64)
    try:
        model = build("simple_cnn", (1, 8, 8), width=4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.training


def test_simple_cnn_starts_kaiming_normal():
    for module in build("simple_cnn").modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            n = module.weight.numel()
            # Var of the mean square of n normal numbers is 2σ⁴/n.
            deviation = module.weight.square().mean().item() / (2 / fan_in) - 1
            assert abs(deviation) < 5 * math.sqrt(2 / n)
            assert not module.bias.any()


def test_default_initialisation_can_be_chosen():
    first = build("simple_cnn", init="default")[0]
    assert first.bias.abs().max() > 0
    assert first.weight.abs().max() <= 1 / math.sqrt(27)  # uniform within ±1/√fan_in


def test_mlp_without_hidden_layers_is_softmax_regression():
    model = build("mlp", (1, 3, 3), classes=4, hidden=[])
    x = torch.randn(5, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    weight, bias = model.parameters()
    torch.testing.assert_close(model(x), x.flatten(1) @ weight.T + bias)


@pytest.mark.parametrize("activation", networks.ACTIVATIONS)
def test_every_activation_that_is_listed_is_accepted(activation):
    model = build("mlp", (1, 3, 3), hidden=[5], activation=activation)
    assert type(model[2]) is networks.ACTIVATIONS[activation]


def test_resnet20_shortcut_subsamples_and_pads_with_zeros():
    block = networks._Block(4, 8, stride=2, norm="group").eval()
    nn.init.zeros_(block.norm2.weight)  # silences the other branch
    x = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))  # positive: ReLU is id
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 6:].any()


def test_resnet20_shortcut_is_the_identity_at_equal_shape():
    block = networks._Block(4, 4, stride=1, norm="batch").eval()
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, in jvp
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("simple_cnn", {"width": 4}),
        ("mlp", {"hidden": [6], "activation": "gelu"}),
        ("resnet20", {"width": 2}),
        ("resnet20", {"width": 2, "norm": "group"}),
    ],
)
def test_forward_over_reverse_equals_reverse_over_reverse(name, options):
    model = build(name, (2, 8, 8), classes=3, **options).double().eval()
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 8, 8, generator=rng, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 1])
    theta = {key: p.detach() for key, p in model.named_parameters()}
    v = {key: torch.randn(p.shape, generator=rng, dtype=torch.float64) for key, p in theta.items()}

    def loss(theta):
        return F.cross_entropy(functional_call(model, theta, (x,)), y)

    forward = jvp(grad(loss), (theta,), (v,))[1]
    (reverse,) = vjp(grad(loss), theta)[1](v)
    for key in theta:
        torch.testing.assert_close(forward[key], reverse[key], rtol=1e-9, atol=1e-9)


def test_torchvision_classifiers_are_known_by_name():
    model = build("squeezenet1_1", classes=7, dropout="0.25")
    assert model.eval()(torch.zeros(2, *CIFAR)).shape == (2, 7)
    assert any(isinstance(module, nn.Dropout) and module.p == 0.25 for module in model.modules())


def test_inception_returns_logits_only_and_warns_of_nothing():
    model = build("inception_v3", (3, 80, 80))
    assert isinstance(model.train()(torch.zeros(2, 3, 80, 80)), torch.Tensor)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("simple_cn", {}, "unknown model 'simple_cn'. Did you mean 'simple_cnn'"),
        ("resnet19", {}, "Did you mean 'resnet18'"),
        ("fcn_resnet50", {}, "unknown model"),  # segmentation: no logits of an image
        ("simple_cnn", {"widht": 3}, "no option 'widht'. Did you mean 'width'. .*width, init"),
        ("simple_cnn", {"width": 0}, "width=0 must be greater than 0; the default is 64"),
        ("simple_cnn", {"init": "zero"}, "init='zero' must be 'kaiming_normal' or 'default'"),
        ("mlp", {"hidden": [20, "x"]}, r"hidden=\[20, 'x'\] must be a valid integer"),
        ("mlp", {"hidden": 300}, "hidden=300 must be a list"),
        ("resnet18", {"foo": 1}, "no option 'foo'.*width_per_group"),
        ("resnet18", {"weights": "DEFAULT"}, "no option 'weights'"),
        ("resnet18", {"block": "x"}, "cannot be made"),
        ("resnet18", {"input_shape": (1, 28, 28)}, r"does not take inputs of shape \(1, 28, 28\)"),
        ("simple_cnn", {"input_shape": (64,)}, r"\(64,\) is not \(channels, height, width\)"),
        ("vit_b_32", {}, "does not take inputs.*Wrong image height"),
        ("mlp", {"hidden": [1] * 1001}, "model mlp of 1001 hidden layers; give at most 1000"),
    ],
)
def test_bad_models_are_refused_in_one_line(name, options, message):
    with pytest.raises(InputError, match=message) as caught:
        build(name, **options)
    assert "\n" not in str(caught.value)


NETS = """
import torch
from torch import nn

def tiny(input_shape, classes, width=4):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.Linear(width, classes))

def short(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))

def wave(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes, dtype=torch.complex64))

def text(input_shape, classes):
    return "network"
"""


@pytest.mark.parametrize(
    "name",
    ["Module", "Sequential", "ModuleList", "ParameterList", "Flatten", "Container", "Transformer",
     "Linear", "Identity", "DataParallel", "modules.lazy:LazyModuleMixin", "LazyLinear"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:`nn.Container` is deprecated")
def test_classes_of_torch_that_a_stranger_may_name_get_one_line(name):
    with pytest.raises(InputError) as caught:
        build(f"torch.nn:{name}" if ":" not in name else f"torch.nn.{name}")
    assert "\n" not in str(caught.value)


def test_complex_weights_are_refused_where_float32_would_keep_half(my_nets):
    with pytest.raises(InputError, match=r"complex weights \(1.weight\)"):
        build(f"{my_nets}:wave", trusted=[my_nets])


@pytest.fixture
def my_nets(tmp_path, monkeypatch):
    (tmp_path / "my_nets_for_test.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_nets_for_test"
    sys.modules.pop("my_nets_for_test", None)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_own_factory_needs_trust_and_obeys_the_seed(my_nets):
    with pytest.raises(InputError, match="--trust my_nets_for_test"):
        build(f"{my_nets}:tiny")
    assert my_nets not in sys.modules
    first, again = (build(f"{my_nets}:tiny", trusted=[my_nets], width=5) for _ in range(2))
    assert first[1].weight.shape == (5, 3 * 32 * 32)
    assert torch.equal(first[1].weight, again[1].weight)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("short", r"returns \(2, 3\) for two samples; it must return logits \(2, 10\)"),
        ("text", "made a str, not a torch.nn.Module"),
    ],
)
def test_own_factory_must_return_logits(my_nets, factory, message):
    with pytest.raises(InputError, match=message):
        build(f"{my_nets}:{factory}", trusted=[my_nets])
