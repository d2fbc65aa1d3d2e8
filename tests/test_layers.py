"""Statistics of layers against features collected by hand, and models that are left as they were."""

import copy
import warnings
import weakref

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from models import build_model
from nc_layers import head_input, head_weight, layer_statistics
from nc_metrics import nc_metrics
from tests.conftest import full_nc1

COUNTS = [5, 9, 4]
LABELS = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
IMAGES = torch.randn(18, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + LABELS[:, None, None, None]
LOADER = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=7)


class Small(nn.Module):
    """A convolution whose output is overwritten in place, tokens, and a head under a name of its own."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 3)  # registered first, called last
        self.conv, self.norm, self.relu = nn.Conv2d(3, 6, 3, 4), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.tokens = nn.Linear(6, 6)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls = self.calls + 1
        maps = self.relu(self.norm(self.conv(images)))
        tokens = self.tokens(maps.flatten(2).mT)
        return self.out(tokens.mean(1)).log_softmax(1)


def small():
    torch.manual_seed(0)
    return Small()


def by_hand(features):
    """Return NC1 by SciPy, and the percentage of samples that are nearest to the mean of their own class."""
    features, labels = features.detach().double().numpy(), LABELS.numpy()
    means = np.stack([features[labels == k].mean(0) for k in range(3)])
    nearest = ((features[:, None] - means) ** 2).sum(2).argmin(1)
    return full_nc1(features, labels, 3), 100 * np.mean(nearest == labels), nearest


def test_each_layer_is_that_of_features_collected_by_hand():
    model = small().eval()
    maps = model.norm(model.conv(IMAGES))
    tokens = model.tokens(maps.relu().flatten(2).mT)
    logits = model.out(tokens.mean(1))
    expected = {"norm": maps.mean((2, 3)), "relu": maps.relu().mean((2, 3)), "tokens": tokens.mean(1)}
    expected["out"] = tokens.mean(1)  # the head, by its input
    found = layer_statistics(model, LOADER, list(expected), 3)
    assert list(found) == list(expected)
    for name, features in expected.items():
        row, (nc1, accuracy, nearest) = nc_metrics(found[name]), by_hand(features)
        assert row["NC1"] == pytest.approx(nc1, rel=1e-4), name
        assert row["NCM_acc1"] == pytest.approx(accuracy), name
        assert row["NC4"] == pytest.approx(np.mean(nearest != logits.argmax(1).numpy())), name
    assert nc_metrics(found["out"], head_weight(model.out))["NC0"] > 0


def test_other_features_and_other_outputs():
    """A callable replaces the average; NC4 is empty where the model has other classes than the loader."""
    model = small()
    centre = layer_statistics(model, LOADER, ["norm"], 3, features=lambda maps: maps[:, :, 4, 4])["norm"]
    nc1, *_ = by_hand(model.eval().norm(model.conv(IMAGES))[:, :, 4, 4])
    assert nc_metrics(centre)["NC1"] == pytest.approx(nc1, rel=1e-4)
    model.out = nn.Linear(6, 8)
    row = nc_metrics(layer_statistics(model, LOADER, ["out"], 3)["out"])
    assert np.isnan(row["NC4"]) and row["NCM_acc1"] > 0


def test_keyword_inputs_and_outputs_with_logits():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small()

        def forward(self, *, images, scale):
            class Output:
                logits = self.model(images * scale[:, None, None, None])

            return Output

    pairs = [({"images": x, "scale": torch.ones(len(x))}, y.tolist()) for x, y in LOADER]
    found = layer_statistics(Keywords(), pairs, ["model.tokens"], 3)["model.tokens"]
    expected = layer_statistics(small(), LOADER, ["tokens"], 3)["tokens"]
    assert nc_metrics(found) == pytest.approx(nc_metrics(expected), nan_ok=True)


def test_samples_against_the_means_of_others():
    model = small()
    train = layer_statistics(model, LOADER, ["tokens"], 3)
    test = layer_statistics(model, [(IMAGES[::2] + 0.5, LABELS[::2])], ["tokens"], 3, reference=train)["tokens"]
    assert torch.equal(test.means, train["tokens"].means) and test.within_counts.sum() == 9
    assert nc_metrics(test)["NC1"] != nc_metrics(train["tokens"])["NC1"]
    with pytest.raises(ValueError, match="the reference has no layer out: it has tokens"):
        layer_statistics(model, LOADER, ["tokens", "out"], 3, reference=train)


@pytest.mark.parametrize("per_class", [2, 5])
def test_random_augmentation_between_the_passes_is_noticed(per_class):
    """NC1 of images with fresh noise in each pass, over that of the same noise in both: large for few images."""
    labels = torch.arange(3).repeat_interleave(per_class)

    class Augmented(list):
        def __iter__(self):
            return iter([(4 * torch.eye(3, 40)[labels] + torch.randn(len(labels), 40), labels)])

    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(40, 3))
    with pytest.warns(UserWarning, match="layer '1': the two passes had different features"):
        layer_statistics(model, Augmented(), ["1"], 3)
    ratios = []
    for _ in range(100):
        with warnings.catch_warnings(action="ignore"):
            once = layer_statistics(model, [*Augmented()], ["1"], 3)["1"]
            ratios.append(
                once.within_sums.sum() / layer_statistics(model, Augmented(), ["1"], 3)["1"].within_sums.sum()
            )
    assert 1 / np.mean(ratios) == pytest.approx((per_class + 1) / (per_class - 1), rel=0.1)


def test_the_order_of_the_batches_may_change_between_the_passes():
    shuffled = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=7, shuffle=True)
    with warnings.catch_warnings(action="error"):
        layer_statistics(small(), shuffled, ["tokens", "out"], 3)


def test_memory_does_not_grow_with_the_loader():
    """The feature maps of a batch are freed once the batch after the next is read."""
    alive = []

    def features(maps):
        alive[:] = [reference for reference in alive if reference() is not None]
        assert len(alive) <= 2
        alive.append(weakref.ref(maps))
        return maps.mean((2, 3))

    layer_statistics(small(), [*LOADER] * 5, ["norm"], 3, features=features)


# ---------------------------------------------------------------------------------------------------------
# The model is left as it was
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = small().train()
    model.norm.eval()
    model.calls += 5
    state = {name: value.clone() for name, value in model.state_dict().items()}
    loader = [*LOADER, (IMAGES * torch.nan, LABELS)] if fails else LOADER
    if fails:
        with pytest.raises(ValueError, match="layer 'conv': the features of batch 3 are not finite"):
            layer_statistics(model, loader, ["conv", "out"], 3)
    else:
        layer_statistics(model, loader, ["conv", "out"], 3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and model.relu.training and not model.norm.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(IMAGES).sum().backward()


# ---------------------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, head",
    [
        ("resnet18", "fc"),
        ("vgg11", "classifier.6"),
        ("mobilenet_v3_small", "classifier.3"),
        ("convnext_tiny", "classifier.2"),
        ("swin_t", "head"),
        ("vit_b_32", "heads"),
        ("densenet121", "classifier"),
    ],
)
def test_heads_of_torchvision(name, head):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=7)
    assert head_input(model) == head
    assert head_weight(model.get_submodule(head)).shape[0] == 7


def test_the_head_of_our_models_is_a_chain():
    model = build_model("MLP", 3, depth_relu=1, width=8, depth_linear=3)
    assert head_input(model) == "fc"
    expected = model.fc[2].weight.double() @ model.fc[1].weight.double() @ model.fc[0].weight.double()
    torch.testing.assert_close(head_weight(model.fc), expected)
    found = layer_statistics(model, LOADER, ["fc"], 3)["fc"]
    features = model(IMAGES)[1]
    assert nc_metrics(found)["NC1"] == pytest.approx(by_hand(features)[0], rel=1e-4)


def test_other_heads_are_the_linear_layer_that_is_called_last():
    model = small().train()
    assert head_input(model, IMAGES[:2]) == "out" and model.training and model.calls == 0
    with pytest.raises(ValueError, match=r"Small has no Linear layer under fc, .* give a batch of inputs"):
        head_input(model)
    with pytest.raises(ValueError, match="the head is a Conv2d, wanted a linear map"):
        head_weight(nn.Conv2d(3, 4, 2))
    with pytest.raises(ValueError, match="Conv2d has no Linear layer"):
        head_input(nn.Conv2d(3, 3, 2), IMAGES[:2])


class Body(nn.Module):
    """Any heads {name: module} on 8 features; `join` makes the output of the features and a dict of their outputs."""

    def __init__(self, join=lambda h, made: made["fc"], **heads):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3 * 32 * 32, 8)
        for name, head in heads.items():
            self.add_module(name, head)
        self.heads, self.join = list(heads), join

    def features(self, images=IMAGES):
        return self.body(images.flatten(1)).relu()

    def forward(self, images):
        h = self.features(images)
        return self.join(h, {name: getattr(self, name)(h) for name in self.heads})


def rotation(join):
    torch.manual_seed(1)
    return Body(join, fc=nn.Linear(8, 3), rotation=nn.Linear(8, 4)).eval()


@pytest.mark.parametrize(
    "join",
    [
        lambda h, made: (made["fc"], made["rotation"]),
        lambda h, made: (made["rotation"], {"aux": [made["fc"]]}),
        lambda h, made: {"aux": made["rotation"], "logits": made["fc"]},
        lambda h, made: made["fc"],
        lambda h, made: made["fc"].softmax(1),
        lambda h, made: (None, made["fc"].log_softmax(1)),
    ],
)
def test_a_head_is_the_layer_that_makes_the_logits_whatever_is_called_later(join):
    model = rotation(join)
    found = layer_statistics(model, LOADER, ["body", "fc"], 3)
    nc1, _, nearest = by_hand(model.features())
    assert found["fc"].means.shape == (3, 8) and found["fc"].at_head and not found["body"].at_head
    row, predicted = nc_metrics(found["fc"], head_weight(model.fc)), model.fc(model.features()).argmax(1).numpy()
    assert row["NC1"] == pytest.approx(nc1, rel=1e-4) and row["NC4"] == pytest.approx(np.mean(nearest != predicted))
    assert head_input(model) == head_input(model, IMAGES) == "fc"
    if "rotation" in str(join.__code__.co_consts):
        parallel = layer_statistics(model, [(IMAGES, LABELS)], ["rotation"], 3)["rotation"]
        assert parallel.at_head and parallel.means.shape == (3, 8)


@pytest.mark.parametrize(
    "join, message",
    [
        (lambda h, made: (made["fc"] + made["other"]) / 2, r"layer 'fc', a Linear, is no head .* \(7, 3\) is not what"),
        (lambda h, made: 2 * made["fc"], "layer 'fc', a Linear, is no head that can be measured"),
        (lambda h, made: h, r"layer 'fc', .* its output \(7, 3\) is not what the model returns, \(7, 8\)"),
    ],
    ids=["distilled", "scaled", "features"],
)
def test_a_head_that_does_not_make_the_logits_is_refused(join, message):
    model = Body(join, fc=nn.Linear(8, 3), other=nn.Linear(8, 3))
    with pytest.raises(ValueError, match=message):
        layer_statistics(model, LOADER, ["fc"], 3)
    with pytest.raises(ValueError, match="Body has no Linear layer, or the like, that is its head: layer 'fc'"):
        head_input(model, IMAGES)


def test_an_encoder_without_a_head_has_none():
    model = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=3).eval()
    model.heads = nn.Identity()
    with pytest.raises(ValueError, match="none makes what the model returns"):
        head_input(model, IMAGES)
    inner = "encoder.layers.encoder_layer_0.mlp.3"
    with pytest.warns(UserWarning, match="NC4 is NaN"):
        found = layer_statistics(model, LOADER, [inner, "encoder", "heads"], 3)
    assert not any(of_layer.at_head for of_layer in found.values())
    assert nc_metrics(found["heads"])["NC1"] == pytest.approx(by_hand(model(IMAGES))[0], rel=1e-4)


class Adapted(nn.Module):
    """A low-rank adapter around a Linear layer, with the names of PEFT."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self.base_layer = 8, 3, nn.Linear(8, 3)
        self.lora_A, self.lora_B = (nn.ModuleDict({"default": nn.Linear(*s, bias=False)}) for s in ((8, 2), (2, 3)))

    def forward(self, h):
        return self.base_layer(h) + 3 * self.lora_B["default"](self.lora_A["default"](h))


class Saved(nn.Module):
    """A Linear layer and the copy of it that is trained and called, with the names of PEFT's modules_to_save."""

    def __init__(self):
        super().__init__()
        self.modules_to_save = nn.ModuleDict({"default": nn.Linear(8, 3)})
        self.original_module = nn.Linear(8, 3)

    def forward(self, h):
        return self.modules_to_save["default"](h)


def quantised():
    return torch.ao.nn.quantized.dynamic.Linear.from_float(calibrated(nn.Linear(8, 3)))


def calibrated(layer):
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return layer


def expected_weight(head):
    """W by single unit vectors."""
    with torch.no_grad():
        return torch.stack([head(row[None]) - head(torch.zeros(1, 8)) for row in torch.eye(8)], 2)[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(8, 3).bfloat16().float(),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)),
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 3)),
        lambda: nn.utils.weight_norm(nn.Linear(8, 3)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3)),
        Adapted,
        Saved,
        quantised,
        lambda: nn.Sequential(nn.Dropout(), nn.Linear(8, 5), nn.Linear(5, 3)),
        lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)),
        lambda: nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 3, 1), nn.Flatten()),
    ],
    ids="linear weight_norm orthogonal old_norm spectral_norm lora saved quantised chain batch_norm conv".split(),
)
@pytest.mark.filterwarnings("ignore")
def test_heads_that_are_no_plain_linear_layer(make):
    model = Body(fc=make()).eval()
    found = layer_statistics(model, LOADER, ["fc"], 3)["fc"]
    assert found.at_head and nc_metrics(found)["NC1"] == pytest.approx(by_hand(model.features())[0], rel=1e-4)
    torch.testing.assert_close(head_weight(model.fc).float(), expected_weight(model.fc), rtol=2e-2, atol=1e-4)
    assert layer_statistics(model, LOADER, [head_input(model, IMAGES)], 3).popitem()[1].at_head


class Int8(torch.Tensor):
    """Weights like those of torchao's tensors: 8-bit numbers and scales, which stay such for double() and the like."""

    @staticmethod
    def __new__(cls, weight):
        self = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.numbers = (weight / self.scale).round().to(torch.int8)
        return self

    def dequantize(self):
        return self.numbers * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.dequantize(), *bias)
        kept = (torch.Tensor.double, torch.Tensor.to, torch.Tensor.float, torch.Tensor.detach)
        return args[0] if function in kept else super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function} of 8-bit numbers")


def test_a_head_of_8_bit_tensors():
    model = Body(fc=nn.Linear(8, 3)).eval()
    exact = model.fc.weight.detach()
    model.fc.weight = nn.Parameter(Int8(exact), requires_grad=False)
    found = layer_statistics(model, LOADER, ["fc"], 3)["fc"]
    assert found.at_head and nc_metrics(found)["NC1"] == pytest.approx(by_hand(model.features())[0], rel=1e-4)
    weight = head_weight(model.fc)
    assert torch.equal(weight, model.fc.weight.dequantize().double()) and not torch.equal(weight, exact.double())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")
def test_a_head_that_is_sharded(tmp_path):
    """FSDP2, whose parameters are DTensors, in a group of one process."""
    from torch.distributed.fsdp import fully_shard

    whole = Body(fc=nn.Linear(8, 3)).eval()
    model = copy.deepcopy(whole)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for part in (model.body, model.fc, model):
            fully_shard(part)
        assert type(model.fc.weight) is torch.distributed.tensor.DTensor
        found = layer_statistics(model, LOADER, ["body", "fc"], 3)["fc"]
        assert torch.equal(head_weight(model.fc), whole.fc.weight.detach().double()) and head_input(model) == "fc"
        model(IMAGES).sum().backward()  # it can still be trained
    finally:
        torch.distributed.destroy_process_group()
    assert found.at_head and nc_metrics(found)["NC1"] == pytest.approx(by_hand(whole.features())[0], rel=1e-4)


class OnMPS(torch.Tensor):
    """A tensor that says it is on Apple's MPS, and that has no float64 until it is on the CPU."""

    device = property(lambda self: torch.device("mps"))

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.double or any(of is torch.float64 for of in (*args, *(kwargs or {}).values())):
            raise TypeError("MPS has no float64")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_features_on_mps_are_summed_on_the_cpu():
    expected = layer_statistics(rotation(lambda h, made: made["fc"]), LOADER, ["body", "fc"], 3)
    loader = [(x.as_subclass(OnMPS), y) for x, y in LOADER]
    model = rotation(lambda h, made: made["fc"])
    model.fc.weight = nn.Parameter(model.fc.weight.detach().as_subclass(OnMPS))
    found = layer_statistics(model, loader, ["body", "fc"], 3)
    for layer, of_layer in found.items():
        assert nc_metrics(of_layer) == pytest.approx(nc_metrics(expected[layer]), nan_ok=True)
    assert type(found["fc"].sums) is type(head_weight(model.fc)) is torch.Tensor
    with pytest.raises(TypeError, match="MPS has no float64"):
        loader[0][0].double()


def test_parallel_heads_are_no_chain():
    model = Body(lambda h, made: made["fc"], fc=nn.Linear(8, 3))
    model.classifier = nn.ModuleDict({"a": nn.Linear(8, 3), "b": nn.Linear(8, 3)})
    model.fc = None
    model.heads, model.join = [], lambda h, made: {"a": model.classifier["a"](h), "b": model.classifier["b"](h)}
    with pytest.raises(ValueError, match=r"Body has several heads: classifier.a, classifier.b; name one"):
        head_input(model)
    assert head_input(model, IMAGES) == "classifier.a"
    found = layer_statistics(model, LOADER, ["classifier.a", "classifier.b"], 3)
    assert all(of_layer.at_head and of_layer.means.shape == (3, 8) for of_layer in found.values())
    with pytest.raises(ValueError, match="the head is a ModuleDict of Linear, wanted a linear map"):
        head_weight(model.classifier)


def test_convolutions_of_one_pixel():
    class Pooled(nn.Module):
        def __init__(self, relu):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc, self.relu = nn.Conv2d(3, 8, 5, 5), nn.Conv2d(8, 3, 1), relu

        def forward(self, images):
            maps = self.fc(self.conv(images).relu().mean((2, 3), keepdim=True))
            return (maps.relu() if self.relu else maps).flatten(1)

    model = Pooled(relu=False).eval()
    found = layer_statistics(model, LOADER, ["fc"], 3)["fc"]
    expected = by_hand(model.conv(IMAGES).relu().mean((2, 3)))[0]
    assert found.at_head and nc_metrics(found)["NC1"] == pytest.approx(expected, rel=1e-4)
    assert head_weight(model.fc).shape == (3, 8) and head_input(model, IMAGES) == "fc"
    with pytest.raises(ValueError, match="layer 'fc'"):
        layer_statistics(Pooled(relu=True), LOADER, ["fc"], 3)


def test_what_holds_the_head_names_it():
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 3)))
    with pytest.raises(ValueError, match=r"layer '1', .* makes the logits, .* name the linear layer in it, '1\.2'"):
        layer_statistics(model, LOADER, ["1"], 3)


class Decoder(nn.Module):
    """Tokens of padded sequences, and the logits of the last token that is none, or of all tokens, or their mean."""

    def __init__(self, pick):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.score, self.pick = nn.Embedding(20, 8), nn.Linear(8, 3, bias=False), pick

    def forward(self, ids, mask):
        logits = self.score(self.embed(ids))
        last = mask.sum(1) - 1
        return {"last": logits[torch.arange(len(ids)), last], "mean": logits.mean(1), "all": logits}[self.pick]


IDS = torch.randint(20, (18, 6), generator=torch.Generator().manual_seed(2))
MASK = torch.arange(6) < torch.randint(1, 6, (18, 1), generator=torch.Generator().manual_seed(3))
TEXT = [({"ids": IDS[i : i + 7], "mask": MASK[i : i + 7]}, LABELS[i : i + 7]) for i in range(0, 18, 7)]


def test_a_head_of_tokens_is_measured_at_the_token_that_the_model_picks():
    model = Decoder("last")
    h = model.embed(IDS)
    picked = h[torch.arange(18), MASK.sum(1) - 1]
    found = layer_statistics(model, TEXT, ["score"], 3)["score"]
    assert nc_metrics(found)["NC1"] == pytest.approx(by_hand(picked)[0], rel=1e-4)
    assert nc_metrics(found)["NC1"] != pytest.approx(by_hand(h.mean(1))[0], rel=0.1)
    assert nc_metrics(found)["NC4"] == np.mean(by_hand(picked)[2] != model.score(picked).argmax(1).numpy())
    found = layer_statistics(Decoder("mean"), TEXT, ["score"], 3)["score"]
    assert nc_metrics(found)["NC1"] == pytest.approx(by_hand(h.mean(1))[0], rel=1e-4)


def test_features_may_depend_on_the_inputs_such_as_a_mask():
    def without_padding(tokens, inputs):
        mask = inputs["mask"][..., None]
        return (tokens * mask).sum(1) / mask.sum(1)

    model = Decoder("last")
    found = layer_statistics(model, TEXT, ["embed", "score"], 3, features=without_padding)
    expected = by_hand(without_padding(model.embed(IDS), {"mask": MASK}))[0]
    assert nc_metrics(found["embed"])["NC1"] == pytest.approx(expected, rel=1e-4)
    assert found["score"].at_head


def test_a_language_model_keeps_nc4():
    """Every token is a sample; its label is a class."""
    model, labels = Decoder("all"), IDS % 3
    loader = [(inputs, labels[7 * i : 7 * i + 7].flatten()) for i, (inputs, _) in enumerate(TEXT)]
    found = layer_statistics(model, loader, ["embed", "score"], 3, features=lambda h: h.flatten(0, 1))
    h = model.embed(IDS).flatten(0, 1)
    means = torch.stack([h[labels.flatten() == k].mean(0) for k in range(3)])
    expected = (torch.cdist(h, means).argmin(1) != model.score(h).argmax(1)).double().mean().item()
    for of_layer in found.values():
        assert nc_metrics(of_layer)["NC4"] == pytest.approx(expected)


def test_outputs_and_inputs_of_all_kinds():
    """No output at all; arrays of float64, lists of views, and dicts with None and text, as inputs."""
    model = rotation(lambda h, made: None)
    with pytest.warns(UserWarning, match=r"NC4 is NaN: the model returns no logits of shape \(B, 3\)"):
        found = layer_statistics(model, LOADER, ["rotation", "body"], 3)
    assert found["rotation"].at_head and not found["body"].at_head
    expected = nc_metrics(layer_statistics(rotation(lambda h, made: made["fc"]), LOADER, ["fc"], 3)["fc"])

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = rotation(lambda h, made: made["fc"])

        def forward(self, views, text=None, nothing=None):
            assert text in (None, "a cat") and nothing is None
            return {"out": self.model(views[0] if isinstance(views, list) else views)}

    for inputs in (
        lambda x: x.double().numpy(),
        lambda x: [x, x + 1],
        lambda x: [x.numpy()],
        lambda x: {"views": x, "text": "a cat", "nothing": None},
    ):
        loader = [(inputs(x), y) for x, y in LOADER]
        row = nc_metrics(layer_statistics(Views(), loader, ["model.fc"], 3)["model.fc"])
        assert row == pytest.approx(expected, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("way", ["wrapped", "in place", "inside"])
def test_compiled_models_are_measured_as_they_are(way):
    expected = nc_metrics(layer_statistics(rotation(lambda h, made: made["fc"]), LOADER, ["body", "fc"], 3)["fc"])
    model = rotation(lambda h, made: made["fc"])
    if way == "wrapped":
        model = torch.compile(model, backend="eager")
    elif way == "in place":
        model.compile(backend="eager")
    else:
        model.body = torch.compile(model.body, backend="eager")
    with torch.no_grad():
        model(IMAGES)
    found = layer_statistics(model, LOADER, ["body", head_input(model)], 3)
    assert list(found) == ["body", "fc"] and nc_metrics(found["fc"]) == pytest.approx(expected, nan_ok=True)


def test_the_fast_path_of_a_transformer_is_left_out_and_then_restored():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.embed, self.encoder, self.fc = nn.Embedding(20, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

        def forward(self, ids, mask):
            return self.fc(self.encoder(self.embed(ids), src_key_padding_mask=~mask)[:, 0])

    found = layer_statistics(Encoder(), TEXT, ["encoder.layers.0", "fc"], 3)
    assert found["fc"].at_head and torch.backends.mha.get_fastpath_enabled()


def test_a_layer_that_is_called_several_times_is_said_with_the_call():
    class Twice(Body):
        def forward(self, images):
            h = self.features(images)
            logits = self.fc(h)
            self.fc(h + 1), self.body(images.flatten(1) + 1)
            return logits

    model = Twice(fc=nn.Linear(8, 3)).eval()
    with pytest.warns(UserWarning) as caught:
        found = layer_statistics(model, LOADER, ["fc", "body"], 3)
    assert [str(of.message) for of in caught] == [
        "layer 'fc' is called 2 times in a batch: measured at call 1, which makes the logits",
        "layer 'body' is called 2 times in a batch: measured at the last one",
    ]
    assert nc_metrics(found["fc"])["NC1"] == pytest.approx(by_hand(model.features())[0], rel=1e-4)


def test_buffers_made_by_expand_and_those_behind_them_are_restored():
    class Counting(Body):
        def __init__(self):
            super().__init__(fc=nn.Linear(8, 3))
            self.register_buffer("positions", torch.arange(3.0)[:, None].expand(3, 5))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, images):
            self.calls += 1
            return super().forward(images)

    model = Counting()
    layer_statistics(model, LOADER, ["fc"], 3)
    assert model.calls == 0 and torch.equal(model.positions, torch.arange(3.0)[:, None].expand(3, 5))


@pytest.mark.parametrize(
    "name, head", [("vit_tiny_patch16_224", "head"), ("resnet10t", "fc"), ("convnext_atto", "head.fc")]
)
def test_heads_of_timm(name, head):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    assert head_input(timm.create_model(name, num_classes=7)) == head


def test_heads_of_hugging_face():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, patch_size=16))
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=11))
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11))
    assert [head_input(model) for model in (vit, bert, gpt)] == ["classifier", "classifier", "lm_head"]


# ---------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loader, layers, message",
    [
        (LOADER, ["tokns"], "the model has no layer 'tokns'; the nearest names are tokens"),
        (LOADER, ["stem.7"], "no layer 'stem.7'; the nearest names are out, conv, norm, relu, tokens, unused"),
        (LOADER, ["unused"], "layer 'unused' is not called when the model runs"),
        ([{"pixel_values": IMAGES, "labels": LABELS}], ["conv"], r"a dict of pixel_values, labels, wanted pairs"),
        ([(IMAGES, LABELS, LABELS)], ["conv"], r"yields a tuple, wanted pairs \(inputs, labels\)"),
        ([(IMAGES, LABELS + 1)], ["conv"], "labels go from 1 to 3, wanted 0 to 2 for 3 classes"),
        ([(IMAGES, LABELS.clamp(max=1))], ["conv"], "found none of class 2"),
        ([], ["conv"], "the loader yields no batch"),
        ((pair for pair in LOADER), ["conv"], "the loader can be read once only, and two passes are needed"),
    ],
)
def test_bad_input_is_one_clear_error(loader, layers, message):
    with pytest.raises(ValueError, match=message):
        layer_statistics(small(), loader, layers, 3)


def test_a_loader_that_changes_between_passes_is_an_error():
    class Changing(list):
        def __iter__(self):
            self.append((IMAGES[:1], LABELS[:1]))
            return super().__iter__()

    with pytest.raises(ValueError, match="the second pass over the loader has other samples"):
        layer_statistics(small(), Changing([(IMAGES, LABELS)]), ["conv"], 3)


@pytest.mark.parametrize("name, layers", [("resnet18", ["layer4", "avgpool", "fc"]), ("vit", ["encoder.ln", "heads"])])
def test_torchvision(name, layers):
    """ResNet18: the last maps, their average and the head's input are the same features. ViT: tokens, and one token."""
    torch.manual_seed(0)
    if name == "vit":
        model = torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=3).eval()
        nn.init.normal_(model.heads.head.weight)
        tokens = model.encoder(torch.cat([model.class_token.expand(18, -1, -1), model._process_input(IMAGES)], 1))
        expected = [tokens.mean(1), tokens[:, 0]]
    else:
        model = torchvision.models.resnet18(num_classes=3).eval()
        body = nn.Sequential(*list(model.children())[:-2])
        expected = [body(IMAGES).mean((2, 3))] * 3
    found = layer_statistics(model, LOADER, layers, 3)
    for layer, features in zip(layers, expected, strict=True):
        if layer == "avgpool":
            assert nc_metrics(found[layer]) == pytest.approx(nc_metrics(found["layer4"]), rel=1e-3, nan_ok=True)
        assert nc_metrics(found[layer])["NC1"] == pytest.approx(by_hand(features)[0], rel=1e-3), layer


# ---------------------------------------------------------------------------------------------------------
# Some classes of a head
# ---------------------------------------------------------------------------------------------------------


def test_data_with_some_classes_of_the_head():
    """As a model with a head for these classes alone, but NC0, which is that of the whole head."""
    torch.manual_seed(0)
    classes, x = [17, 3, 11], torch.randn(60, 4)
    body, fc = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh()), torch.nn.Linear(6, 20)
    small = torch.nn.Linear(6, 3)
    small.load_state_dict({name: value[classes] for name, value in fc.state_dict().items()})
    position = torch.arange(60) % 3
    whole, part = (torch.nn.Sequential(body, head) for head in (fc, small))
    found = layer_statistics(whole, [(x, torch.tensor(classes)[position])], ["0", "1"], 20, classes=classes)
    expected = layer_statistics(part, [(x, position)], ["0", "1"], 3)
    for layer in found:
        row, wanted = nc_metrics(found[layer], fc.weight), nc_metrics(expected[layer], small.weight)
        assert row.pop("NC0") == pytest.approx((fc.weight.sum(0).norm() / fc.weight.norm()).item())
        assert wanted.pop("NC0") and row == pytest.approx(wanted, nan_ok=True) and row["NC4"] > 0
        assert nc_metrics(found[layer], small.weight)["NC2_W"] == row["NC2_W"]
    test = layer_statistics(whole, [(x, torch.tensor(classes)[position])], ["1"], 20, reference=found, classes=classes)
    assert nc_metrics(test["1"])["NC4"] == row["NC4"]
    for given, message in (
        ([3, 11], "there are labels of class 17, which is not in `classes`"),
        ([17, 3, 11, 5], "found none of class 5; to measure the others alone, give `classes`"),
        ([17, 3, 20], r"classes are \[17, 3, 20\], wanted different numbers from 0 to 19"),
        ([17, 3, 3], "wanted different numbers"),
        ([17], r"classes are \[17\], wanted two or more whole numbers"),
        ([0.5, 1.0], "wanted two or more whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_statistics(whole, [(x, torch.tensor(classes)[position])], ["1"], 20, classes=given)


def test_a_head_with_an_adapter_is_named_as_a_whole():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.lora_A, self.lora_B = nn.Linear(8, 3), nn.Linear(8, 2), nn.Linear(2, 3)

        def forward(self, h):
            return self.base(h) + self.lora_B(self.lora_A(h))

    model = Body(fc=Adapted())
    assert head_input(model) == head_input(model, IMAGES) == "fc"
    head = model.fc
    torch.testing.assert_close(head_weight(head), (head.base.weight + head.lora_B.weight @ head.lora_A.weight).double())
