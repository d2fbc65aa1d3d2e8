"""Check the head, its features and NC1 of models of torchvision, timm and transformers, with random weights.

    pip install timm transformers
    python scripts/zoo_check.py zoo.csv             (all of them, about half an hour on one CPU core)
    python scripts/zoo_check.py zoo.csv resnet18 timm:deit_tiny_distilled_patch16_224 transformers:gpt2

Adds a row for each model to the CSV file, which holds the table of docs/measuring.md: its head, the features' shape,
the largest difference of W h + b from the logits, relative to the largest logit, and of NC1 from NumPy's on the
features that a hook of this script collects, from 20 small images or texts. "matched" means that both are rounding,
"refused" that there is an error, with its reason. Models that are in the file already are left out. Exit status 1 if
one is wrong.
"""

import csv
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
TRANSFORMERS = (  # of images, then of text
    "vit beit swin convnext resnet mobilenet_v2 dinov2 "
    "bert roberta distilbert electra albert deberta-v2 gpt2 gpt_neo gpt_neox opt bloom llama mistral qwen2 gemma phi "
    "t5 bart xlnet"
).split()
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "pooler_hidden_size": 32}
CLASSES, IMAGES, TOKENS, EOS = 4, 20, 12, 2
COLUMNS = ("model", "result", "head", "features", "W h + b", "NC1", "reason")


def main(path, names):
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # as in layer_statistics, for the same rounding of the features
    names = names or [
        *TORCHVISION,
        *(f"timm:{name}" for name in TIMM),
        *(f"transformers:{name}" for name in TRANSFORMERS),
    ]
    done = [row["model"] for row in csv.DictReader(path.open())] if path.exists() else []
    with path.open("a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        if not done:
            table.writeheader()
        results = []
        for name in names:
            if name not in done:
                row = {"model": name} | check(name)
                results.append(row["result"])
                table.writerow(row)
                file.flush()
                print(*row.values(), flush=True)
    sys.exit("wrong" in results)


def check(name):
    """Return the cells of a model's row."""
    torch.manual_seed(0)
    source, _, plain = name.rpartition(":")
    model, loader, last = (of_transformers if source == "transformers" else of_images)(source, plain)
    labels = torch.cat([batch[1] for batch in loader])
    for weight in model.parameters():  # some heads start at zero, and so do their logits
        if weight.ndim == 2 and not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    try:
        with warnings.catch_warnings(action="ignore"):
            head = head_input(model, loader[0][0])
            statistics = layer_statistics(model, loader, [head], CLASSES)[head]
    except ValueError as error:
        return {"result": "refused", "reason": " ".join(str(error).split())}
    module, collected = model.eval().get_submodule(head), []
    handle = module.register_forward_hook(lambda module, inputs, output: collected.append(inputs[0]))
    with torch.no_grad():
        outputs = [model(**batch) if isinstance(batch, dict) else model(batch) for batch, _ in loader]
    handle.remove()
    logits = torch.cat([getattr(output, "logits", output) for output in outputs]).double()
    h = torch.cat(collected).double()
    h = h[torch.arange(len(h)), last] if h.ndim == 3 else h.flatten(1)  # of a head of tokens, the last of each text
    bias = ([*module] if isinstance(module, torch.nn.Sequential) else [module])[-1].bias
    z = h @ head_weight(module).T + (0 if bias is None else bias.detach().double())
    off = ((z - logits).abs().max() / logits.abs().max()).item()
    nc1_off = abs(nc1(statistics) / numpy_nc1(h.numpy(), labels.numpy()) - 1)
    result = "matched" if off < 1e-5 and nc1_off < 1e-9 else "wrong"
    return dict(zip(COLUMNS[1:], (result, head, tuple(h.shape), f"{off:.0e}", f"{nc1_off:.0e}"), strict=False))


def of_images(source, name):
    """Return (model, loader, None) of a model of timm or torchvision."""
    size, classes = {"inception_v3": 96, "maxvit_t": 224, "vit_b_32": 224}.get(name, 64), {"num_classes": CLASSES}
    if source == "timm":
        model = timm.create_model(name, **classes)
        if model.pretrained_cfg.get("fixed_input_size"):
            size = model.pretrained_cfg["input_size"][-1]
    else:
        model = torchvision.models.get_model(name, **classes, **({"init_weights": True} if "inc" in name else {}))
    return model, images(size), None


def images(size, name=None):
    """Return batches of pairs (images, labels); with a name, the images are a keyword argument of the model."""
    labels = torch.arange(IMAGES) % CLASSES
    x = torch.randn(IMAGES, 3, size, size) + labels[:, None, None, None]
    return [({name: part} if name else part, y) for part, y in zip(x.split(5), labels.split(5), strict=True)]


def of_transformers(source, name):
    """Return (model, loader, index of the last token of each text or None) of a small model of transformers."""
    import transformers

    config = transformers.AutoConfig.for_model(name, num_labels=CLASSES)
    for key, value in SMALL.items():
        if hasattr(config, key) and not hasattr(config, "depths"):
            setattr(config, key, value)
    if name in TRANSFORMERS[: TRANSFORMERS.index("bert")]:
        model = transformers.AutoModelForImageClassification.from_config(config)
        return model, images(getattr(config, "image_size", 64), "pixel_values"), None
    config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = 0, EOS, 0
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    labels = torch.arange(IMAGES) % CLASSES
    lengths = torch.randint(3, TOKENS + 1, (IMAGES,))
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    ids = torch.randint(5, 50, (IMAGES, TOKENS)) * mask
    ids[torch.arange(IMAGES), lengths - 1] = EOS  # which BART and T5 classify
    parts = zip(ids.split(5), mask.split(5), labels.split(5), strict=True)
    return model, [({"input_ids": x, "attention_mask": m}, y) for x, m, y in parts], lengths - 1


def numpy_nc1(h, labels):
    """Return NC1 by the d x d matrices themselves."""
    means = np.stack([h[labels == k].mean(0) for k in range(CLASSES)])
    centred, shift = h - means[labels], means - h.mean(0)
    sigma_b = shift.T @ shift / CLASSES
    return np.trace(centred.T @ centred / len(h) @ np.linalg.pinv(sigma_b, rcond=1e-10, hermitian=True)) / CLASSES


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
