"""Check the head, its features and NC1 of 60 models of torchvision and timm, random weights, on 20 small images each.

    python scripts/zoo_check.py             (all of them, about half an hour on one CPU core)
    python scripts/zoo_check.py resnet18 timm:deit_tiny_distilled_patch16_224

Prints a row of the table of docs/measuring.md for each model: its head, the features' shape, the largest difference
of W h + b from the logits, relative to the largest logit, and of NC1 from NumPy's on the features that a hook of this
script collects. A model that has no linear head must be refused.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parent.parent))

from nc_layers import head_input, head_weight, layer_statistics
from nc_metrics import nc1

TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 "
    "mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d "
    "shufflenet_v2_x0_5 squeezenet1_0 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_32 wide_resnet50_2"
).split()
TIMM = (
    "beit_base_patch16_224 caformer_s18 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_atto "
    "crossvit_tiny_240 cspresnet50 deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 dla34 dpn68 edgenext_xx_small "
    "efficientformer_l1 eva02_tiny_patch14_224 ghostnet_050 hardcorenas_a hrnet_w18_small levit_128s "
    "lcnet_050 mixer_s32_224 mobilevit_xxs nf_resnet50 pit_ti_distilled_224 poolformer_s12 regnetx_002 repvgg_a0 "
    "resmlp_12_224 resnetv2_50 rexnet_100 tf_efficientnet_lite0 tnt_s_patch16_224 vit_tiny_patch16_224 volo_d1_224"
).split()
CLASSES = 4


def main(names):
    torch.set_num_threads(1)
    print("| model | head | features | W h + b | NC1 |\n| --- | --- | --- | --- | --- |")
    for name in names or [*TORCHVISION, *(f"timm:{name}" for name in TIMM)]:
        print(f"| {name} | {' | '.join(check(name))} |", flush=True)


def check(name):
    """Return the cells of a model's row."""
    torch.manual_seed(0)
    source, _, plain = name.rpartition(":")
    size, classes = {"inception_v3": 96, "maxvit_t": 224, "vit_b_32": 224}.get(plain, 64), {"num_classes": CLASSES}
    if source == "timm":
        model = timm.create_model(plain, **classes)
        if model.pretrained_cfg.get("fixed_input_size"):
            size = model.pretrained_cfg["input_size"][-1]
    else:
        model = torchvision.models.get_model(plain, **classes, **({"init_weights": True} if "inc" in plain else {}))
    labels = torch.arange(20) % CLASSES
    images = torch.randn(20, 3, size, size) + labels[:, None, None, None]
    loader = [*zip(images.split(5), labels.split(5), strict=True)]
    try:
        with warnings.catch_warnings(action="ignore"):
            head = head_input(model, images[:2])
            statistics = layer_statistics(model, loader, [head], CLASSES)[head]
    except ValueError as error:
        return "refused", "", "", str(error)
    module, collected = model.get_submodule(head), []
    handle = module.register_forward_hook(lambda module, inputs, output: collected.append(inputs[0]))
    with torch.no_grad():
        logits = torch.cat([model.eval()(batch) for batch, _ in loader]).double()
    handle.remove()
    h = torch.cat(collected).double().flatten(1)
    bias = ([*module] if isinstance(module, torch.nn.Sequential) else [module])[-1].bias
    z = h @ head_weight(module).T + (0 if bias is None else bias.detach().double())
    off = ((z - logits).abs().max() / logits.abs().max()).item()
    nc1_off = abs(nc1(statistics) / numpy_nc1(h.numpy(), labels.numpy()) - 1)
    return head, f"({len(h)}, {h.shape[1]})", f"{off:.0e}", f"{nc1_off:.0e}"


def numpy_nc1(h, labels):
    """Return NC1 by the d x d matrices themselves."""
    means = np.stack([h[labels == k].mean(0) for k in range(CLASSES)])
    centred, shift = h - means[labels], means - h.mean(0)
    sigma_b = shift.T @ shift / CLASSES
    return np.trace(centred.T @ centred / len(h) @ np.linalg.pinv(sigma_b, rcond=1e-10, hermitian=True)) / CLASSES


if __name__ == "__main__":
    main(sys.argv[1:])
