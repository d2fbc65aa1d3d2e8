"""BatchNorm with the statistics of the whole training set, against one batch of all images in training mode."""

import pytest
import torch

from engine.batch_norm import training_set_statistics
from models import MODELS, build_model


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name in ("ResNet18", "ResNet50", "VGG11", "densenet_cifar")]
)
def test_the_model_is_that_of_one_batch_of_all_images(name):
    """In float64, features and logits agree to rounding for any batches, and the model is unchanged afterwards."""
    torch.manual_seed(0)
    model = build_model(name, 4, planes=4).double()
    images = torch.rand(22, 3, 32, 32, dtype=torch.float64) + 3.0
    model.train()(images[:9])  # running statistics that are neither the initial nor the right ones
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    with torch.no_grad():
        expected = model(images)
    model.load_state_dict(before)
    model.eval()
    with torch.no_grad(), training_set_statistics(model, lambda: images.split(5)):
        found = model(images)
        parts = [torch.cat(outputs) for outputs in zip(*map(model, images.split(3)), strict=True)]
    for a, b, c in zip(found, expected, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_statistics_are_restored_after_an_error():
    model = build_model("ResNet18", 4, planes=4).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), training_set_statistics(model, lambda: torch.rand(6, 3, 32, 32).split(2)):
        raise ZeroDivisionError
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
