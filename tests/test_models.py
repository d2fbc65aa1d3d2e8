"""The model zoo: released parameter names, counts, non-negative features, and no parameter left unused."""

import pytest
import torch

from engine.checkpoints import load_weights
from models import MODELS, build_model
from models.classifier import FeatureReLU, RevivingReLU, RevivingRowReLU
from nc_layers import head_weight
from utils import UserError

CONVOLUTIONAL = [name for name in MODELS if name != "MLP"]


def small(name, **flags):
    return build_model(name, 10, **{"bias": False, "width": 32, "depth_relu": 2} | flags)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_features(name):
    torch.manual_seed(0)
    model = small(name, bias=True, depth_linear=2)
    logits, features = model(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 10)
    assert head_weight(model.fc).dtype == torch.float64  # a product in TF32 would be 1e-3 off
    assert features.shape == (4, model.fc[0].in_features)
    assert (features >= 0).all() and (features > 0).any()
    torch.testing.assert_close(logits, (features @ head_weight(model.fc).float().T) + model.fc[-1].bias)


@pytest.mark.parametrize("name", MODELS)
def test_forward_uses_every_parameter(name):
    torch.manual_seed(0)
    model = small(name, bias=True, depth_linear=2)
    logits, _ = model(torch.randn(4, 3, 32, 32))
    logits.square().sum().backward()
    unused = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert unused == []


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ResNet18", 11_174_976 - 1_024),  # the released file's count, less the batch_norm that it never uses
        ("ResNet50", 23_524_928 - 4_096),
        ("VGG11", 9_231_104),
        ("densenet_cifar", 1_000_608),
    ],
)
def test_parameter_counts(name, expected):
    assert sum(parameter.numel() for parameter in small(name).parameters()) == expected


def test_mlp_names_and_shapes():
    model = build_model("MLP", 10, bias=True, depth_linear=2, depth_relu=3, width=16)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == {
        "layers.0.weight": (16, 3072),
        "layers.0.bias": (16,),
        "layers.2.weight": (16, 16),
        "layers.2.bias": (16,),
        "layers.4.weight": (16, 16),
        "layers.4.bias": (16,),
        "intermediate_layer.weight": (16, 16),
        "intermediate_layer.bias": (16,),
        "fc.0.weight": (16, 16),
        "fc.1.weight": (10, 16),
        "fc.1.bias": (10,),
    }


def norm(planes):
    return {"weight": (planes,), "bias": (planes,)}


def test_resnet_names_and_shapes():
    """Written out from the list of names in the released files, not read off the model."""
    expected = {"conv1.weight": (64, 3, 3, 3), "fc.0.weight": (10, 512)}
    expected |= {f"bn1.{key}": shape for key, shape in norm(64).items()}
    before = 64
    for stage, planes in enumerate([64, 128, 256, 512], start=1):
        for index in range(2):
            block, entering = f"layer{stage}.{index}", before if index == 0 else planes
            expected[f"{block}.conv1.weight"] = (planes, entering, 3, 3)
            expected[f"{block}.conv2.weight"] = (planes, planes, 3, 3)
            for layer in ("bn1", "bn2"):
                expected |= {f"{block}.{layer}.{key}": shape for key, shape in norm(planes).items()}
            if entering != planes:
                expected[f"{block}.shortcut.0.weight"] = (planes, entering, 1, 1)
                expected |= {f"{block}.shortcut.1.{key}": shape for key, shape in norm(planes).items()}
        before = planes
    model = small("ResNet18")
    assert {key: tuple(value.shape) for key, value in model.named_parameters()} == expected


def test_bottleneck_vgg_and_densenet_names():
    keys = {name: set(dict(small(name).named_parameters())) for name in ("ResNet50", "VGG11", "densenet_cifar")}
    assert {"layer1.0.conv3.weight", "layer1.0.bn3.bias", "layer1.0.shortcut.0.weight"} <= keys["ResNet50"]
    convolutions = [0, 4, 8, 11, 15, 18, 22, 25]
    wanted = {f"features.{i + j}.{k}" for i in convolutions for j in (0, 1) for k in ("weight", "bias")}
    assert keys["VGG11"] == wanted | {"fc.0.weight"}
    wanted = {"conv1.weight", "bn.weight", "bn.bias", "fc.0.weight"}
    for block, count in enumerate([6, 12, 24, 16], start=1):
        for index in range(count):
            wanted |= {f"dense{block}.{index}.{bn}.{k}" for bn in ("bn1", "bn2") for k in ("weight", "bias")}
            wanted |= {f"dense{block}.{index}.{conv}.weight" for conv in ("conv1", "conv2")}
    wanted |= {f"trans{i}.{k}" for i in (1, 2, 3) for k in ("bn.weight", "bn.bias", "conv.weight")}
    assert keys["densenet_cifar"] == wanted


def test_only_the_last_layer_of_the_head_has_a_bias():
    assert [layer.bias is not None for layer in small("MLP", bias=True, depth_linear=3).fc] == [False, False, True]
    assert [layer.bias is not None for layer in small("MLP", bias=False, depth_linear=3).fc] == [False] * 3


def test_released_batch_norm_is_ignored(tmp_path):
    model = small("ResNet18")
    extra = {f"batch_norm.{key}": torch.ones(512) for key in ("weight", "bias", "running_mean", "running_var")}
    torch.save(model.state_dict() | extra, tmp_path / "epoch_001.pth")
    other = small("ResNet18")
    load_weights(other, tmp_path / "epoch_001.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    torch.save(small("MLP").state_dict(), tmp_path / "epoch_001.pth")
    with pytest.raises(
        UserError, match=r"epoch_001.pth: does not fit .* size mismatch for layers.0.weight: .*\[32, 3072\]"
    ):
        load_weights(small("MLP", width=64), tmp_path / "epoch_001.pth")


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_channels_last_gives_the_same(name):
    """In float64, because fp32 rounding in a deep network depends on the processor."""
    torch.manual_seed(0)
    model, images = small(name, planes=8).double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(images)[1]
    model.to(memory_format=torch.channels_last)
    found = model(images.contiguous(memory_format=torch.channels_last))[1]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["MLP", "ResNet18"])
def test_bf16_leaves_head_and_features_in_fp32(name):
    torch.manual_seed(0)
    model, images = small(name, planes=8), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, features = model(images)
    assert logits.dtype == features.dtype == torch.float32
    torch.testing.assert_close(logits, features @ head_weight(model.fc).float().T)
    assert torch.equal(features, features.bfloat16().float())  # the body did run in bf16


def test_tf32_leaves_the_head_at_least_fp32(monkeypatch):
    """With TF32 on, neither the head nor its gradients use the GPU's fp32 matrix products."""
    torch.manual_seed(0)
    head = small("MLP", bias=True, depth_linear=2).fc
    features = torch.rand(5, 32, requires_grad=True)
    expected = head(features)
    gradients = torch.autograd.grad(expected.square().sum(), [features, *head.parameters()])
    used = []
    original = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *rest: used.append(x.dtype) or original(x, *rest))
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "tf32"
    try:
        found = head(features)
    finally:
        switch.fp32_precision = before
    assert used == [torch.float64, torch.float64] and found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), [features, *head.parameters()]), gradients)


def test_features_at_zero_get_the_gradient_that_would_raise_them():
    inputs = torch.tensor([[1.0, -2.0, -3.0], [2.0, 0.0, -1.0]], requires_grad=True)
    outputs = RevivingReLU.apply(inputs)
    assert torch.equal(outputs, inputs.relu())
    outputs.backward(torch.tensor([[-5.0, -6.0, 7.0], [5.0, 6.0, -7.0]]))
    assert inputs.grad.tolist() == [[-5, -6, 0], [5, 0, -7]]


def test_hidden_layers_pass_a_gradient_only_to_images_that_are_all_zero():
    inputs = torch.tensor([[1.0, -2.0, -3.0], [-2.0, 0.0, -1.0]], requires_grad=True)
    outputs = RevivingRowReLU.apply(inputs)
    assert torch.equal(outputs, inputs.relu())
    outputs.backward(torch.tensor([[-5.0, -6.0, 7.0], [5.0, -6.0, -7.0]]))
    assert inputs.grad.tolist() == [[-5, 0, 0], [0, -6, -7]]


def learn_some_images(model):
    """Train a model of 10 classes on 20 random images, and return them."""
    images, labels = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images)[0], labels).backward()
        optimizer.step()
    return images


@pytest.mark.parametrize("revive", [False, True])
def test_images_without_an_active_hidden_unit_are_separated_if_revived(revive):
    torch.manual_seed(0)
    model = small("MLP", revive=revive)
    with torch.no_grad():
        model.layers[-2].bias.fill_(-2)
    images = learn_some_images(model)
    assert model.layers(images.flatten(1)).any(1).any() == revive


def test_a_dead_network_recovers_only_with_revive():
    for revive in (False, True):
        torch.manual_seed(0)
        model = small("MLP", revive=revive)
        with torch.no_grad():
            model.intermediate_layer.bias.fill_(-2)
        images = learn_some_images(model)
        assert (model(images)[1] > 0).any() == revive


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_planes_scale_every_width(name):
    """The first stage has `planes` channels, the features in proportion; parameter names are unchanged."""
    default, small = build_model(name, 4), build_model(name, 4, planes=8)
    assert list(small.state_dict()) == list(default.state_dict())
    first = [model.state_dict()[next(iter(model.state_dict()))].shape[0] for model in (default, small)]
    assert first == [24 if name == "densenet_cifar" else 64, 8]
    scale = 8 / first[0]
    assert small.fc[0].in_features == default.fc[0].in_features * scale
    logits, features = small(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 4) and features.shape == (2, small.fc[0].in_features)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_reviving_passes_a_gradient_to_dead_features(name):
    """If all pre-activations are negative, an ordinary last ReLU passes no gradient to the layers before."""
    for revive in (False, True):
        torch.manual_seed(0)
        model = build_model(name, 4, planes=8, revive=revive).eval()
        body = [p for key, p in model.named_parameters() if not key.startswith("fc.")]
        relu = next(module for module in model.modules() if isinstance(module, FeatureReLU))
        relu.register_forward_pre_hook(lambda module, inputs: (inputs[0] - 1e3,))
        _, features = model(torch.rand(2, 3, 32, 32))
        assert not features.any()
        features.sum().neg().backward()
        gradients = [p.grad for p in body if p.grad is not None]
        assert any(gradient.any() for gradient in gradients) == revive
