"""The metric in one pass against two passes and SciPy, merged in every way that torchmetrics merges."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")

from torchmetrics import MetricCollection

from nc_metrics import nc_metrics
from nc_theory import UFM, solve
from nc_torchmetrics import COLUMNS, OPTIMUM_COLUMNS, REFERENCE_COLUMNS, NeuralCollapse
from tests.conftest import full_nc1, samples, statistics_of

COUNTS = [5, 16, 27, 9]
FEATURES, TARGET, _ = samples(COUNTS, 8)
FEATURES, TARGET = torch.from_numpy(FEATURES), torch.from_numpy(TARGET)
EXPECTED = nc_metrics(statistics_of(FEATURES.numpy(), TARGET.numpy(), 4))


def fed(metric, part=slice(None), batch=7):
    for h, y in zip(FEATURES[part].split(batch), TARGET[part].split(batch), strict=True):
        metric.update(h, y)
    return metric


def same(found, rel=1e-9):
    return {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: EXPECTED[name] for name in COLUMNS}, rel=rel
    )


@pytest.mark.parametrize("batch", [1, 7, 57])
def test_one_pass_is_two_passes(batch):
    found = fed(NeuralCollapse(4, 8), batch=batch).compute()
    assert list(found) == list(COLUMNS) and same(found)
    assert all(value.shape == () and value.dtype == torch.float64 for value in found.values())


@pytest.mark.parametrize("between", ["classes", "means", "samples"])
def test_optimum_reference_means_and_predictions(between):
    optimum = solve(UFM(COUNTS, 1e-2, 1e-3))
    predictions = torch.randint(4, (57,), generator=torch.Generator().manual_seed(0))
    statistics = statistics_of(FEATURES.numpy(), TARGET.numpy(), 4, predictions.numpy(), between=between)
    expected = nc_metrics(statistics, optimum=optimum)
    metric = NeuralCollapse(4, 8, between=between, optimum=optimum, reference_means=statistics.means)
    metric.update(FEATURES, TARGET, predictions)
    found = metric.compute()
    assert found.keys() == {*COLUMNS, "NC2_H", "norm_rel_err", "NC4", "NCM_acc1"}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: expected[name] for name in found}, rel=1e-9
    )
    metric.reset()
    metric.update(FEATURES, TARGET)
    found = metric.compute()
    assert found["NC4"].isnan() and float(found["NCM_acc1"]) == pytest.approx(expected["NCM_acc1"])
    metric.update(FEATURES, TARGET)
    with pytest.raises(ValueError, match="the optimum is of class counts"):
        metric.compute()


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("batch", [1, 10, 1000])
def test_collapsed_features_keep_their_digits(offset, batch):
    """NC1 of 1e-10 for features far from the origin, in batches that mix the classes."""
    features, labels, _ = samples([300, 500, 200], 6, noise=1e-5, seed=3)
    features += offset
    expected = full_nc1(features, labels, 3)
    assert 1e-12 < expected < 1e-9
    metric = NeuralCollapse(3, 6)
    for h, y in zip(torch.from_numpy(features).split(batch), torch.from_numpy(labels).split(batch), strict=True):
        metric.update(h, y)
    assert float(metric.compute()["NC1"]) == pytest.approx(expected, rel=1e-6)


def test_states_merge():
    parts = [slice(0, 20), slice(20, 21), slice(21, 57)]
    merged, *others = [fed(NeuralCollapse(4, 8), part) for part in parts]
    with pytest.warns(UserWarning, match="no samples"):
        merged.compute()  # torchmetrics 1.9 would return this again after merge_state
    for other in others:
        merged.merge_state(other)
    assert same(merged.compute())
    first, rest = fed(NeuralCollapse(4, 8), slice(0, 20)), fed(NeuralCollapse(4, 8), slice(20, 57))
    first.merge_state(rest.metric_state)
    assert same(first.compute())


def test_what_is_merged_after_compute_counts():
    """torchmetrics 1.9 keeps the value that `compute` has returned."""
    first, rest = fed(NeuralCollapse(4, 8), slice(0, 20)), fed(NeuralCollapse(4, 8), slice(20, 57))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes without samples
        first.compute(), rest.compute()
    first.merge_state(rest)
    assert same(first.compute())


def test_inference_mode_may_begin_and_end_anywhere():
    metric = NeuralCollapse(4, 8, reference_means=np.zeros((4, 8)))
    with torch.inference_mode():
        fed(metric, slice(0, 20))
        metric.reset()
        fed(metric, slice(0, 7))
    fed(metric, slice(7, 30))
    with torch.inference_mode():
        fed(metric, slice(30, 57))
    found = metric.compute()
    assert same({name: found[name] for name in COLUMNS})
    metric.reset()
    fed(metric)


def test_predictions_are_classes_of_any_integer_type():
    means = torch.stack([FEATURES[label == TARGET].mean(0) for label in range(4)])
    predictions = torch.randint(4, (57,), generator=torch.Generator().manual_seed(0))
    nearest = ((FEATURES[:, None] - means) ** 2).sum(2).argmin(1)
    for given in (predictions, predictions.to(torch.uint8), predictions.numpy(), predictions.tolist()):
        metric = NeuralCollapse(4, 8, reference_means=means)
        metric.update(FEATURES, TARGET, given)
        assert float(metric.compute()["NC4"]) == pytest.approx((nearest != predictions).double().mean().item())
    logits = torch.eye(4)[predictions]
    for given, features, target in (
        (predictions[:, None], FEATURES, TARGET),
        (logits, FEATURES, TARGET),
        (logits[:4], FEATURES[:4], TARGET[:4]),  # B = K
        (logits[:, 0], FEATURES, TARGET),
    ):
        with pytest.raises(ValueError, match=r"predictions are .*, wanted integers of shape .*, such as logits"):
            metric.update(features, target, given)


def test_the_reference_means_may_be_far_from_the_origin():
    means = np.stack([FEATURES[label == TARGET].mean(0).numpy() for label in range(4)])
    metric, far = NeuralCollapse(4, 8, reference_means=means), NeuralCollapse(4, 8, reference_means=means + 1e8)
    fed(metric)
    far.update(FEATURES + 1e8, TARGET)
    assert metric.compute()["NCM_acc1"] == far.compute()["NCM_acc1"] > 90


def test_equal_class_means_are_nan_and_a_warning():
    metric = NeuralCollapse(2, 8, reference_means=np.zeros((2, 8)))
    metric.update(torch.zeros(6, 8), [0, 0, 1, 1, 0, 1])
    with pytest.warns(UserWarning, match=r"^all features are zero \(dead ReLUs\)"):
        assert all(value.isnan() for value in metric.compute().values())


def test_forward_gives_the_batch_and_keeps_the_sum():
    metric = NeuralCollapse(4, 8)
    halves = [slice(0, None, 2), slice(1, None, 2)]
    for half in halves:
        of_batch = metric(FEATURES[half], TARGET[half])
        alone = nc_metrics(statistics_of(FEATURES[half].numpy(), TARGET[half].numpy(), 4))
        assert float(of_batch["NC1"]) == pytest.approx(alone["NC1"], rel=1e-9)
    assert same(metric.compute())
    metric.reset()
    assert same(fed(metric).compute())


def test_it_survives_dtypes_copies_and_checkpoints():
    metric = fed(NeuralCollapse(4, 8).set_dtype(torch.half).half(), slice(0, 30))
    assert metric.moments.dtype == torch.float64
    fed(metric, slice(30, 57))
    assert same(copy.deepcopy(metric).compute()) and same(pickle.loads(pickle.dumps(metric)).compute())
    metric.persistent(True)
    loaded = NeuralCollapse(4, 8)
    loaded.load_state_dict(metric.state_dict())
    assert torch.equal(loaded.moments, metric.moments)


def test_low_precision_features_are_summed_in_double():
    metric = NeuralCollapse(4, 8)
    metric.update(FEATURES.to(torch.bfloat16).requires_grad_(), TARGET.int())
    expected = nc_metrics(statistics_of(FEATURES.bfloat16().double().numpy(), TARGET.numpy(), 4))
    assert float(metric.compute()["NC1"]) == pytest.approx(expected["NC1"], rel=1e-9)
    assert not metric.moments.requires_grad


def test_a_collection():
    collection = MetricCollection({"nc": NeuralCollapse(4, 8), "samples": NeuralCollapse(4, 8, between="samples")})
    collection.set_dtype(torch.float16)
    for h, y in zip(FEATURES.split(7), TARGET.split(7), strict=True):
        collection.update(h, y)
    found = collection.compute()
    assert same({name: found[f"nc_{name}"] for name in COLUMNS})
    assert found["samples_NC1"] != found["nc_NC1"] and found["samples_CDNV"] == found["nc_CDNV"]


def in_a_process(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    metric = fed(NeuralCollapse(4, 8), [slice(0, 19), slice(19, 57)][rank])
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    fed(metric, slice(0, 3))  # after the synced values are taken back
    assert metric.moments[:4, -1].sum() == [22, 41][rank]
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    torch.multiprocessing.start_processes(in_a_process, (str(tmp_path),), nprocs=2, start_method="fork")
    assert all(same(torch.load(tmp_path / f"{rank}.pt")) for rank in range(2))


def test_a_class_without_samples_is_nan_and_a_warning():
    metric = fed(NeuralCollapse(4, 8), TARGET != 2)
    with pytest.warns(UserWarning, match="1 of 4 classes have no samples: all columns are NaN"):
        assert all(value.isnan() for value in metric.compute().values())
    with pytest.raises(ValueError, match="every class needs a sample before its mean is known, found none of class 2"):
        metric.class_statistics()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric NeuralCollapse was called before:UserWarning")
def test_no_samples_at_all_are_nan_and_a_warning():
    with pytest.warns(UserWarning, match="4 of 4 classes have no samples: all columns are NaN"):
        found = NeuralCollapse(4, 8).compute()
    assert list(found) == list(COLUMNS) and all(value.isnan() for value in found.values())


def test_the_statistics_can_go_on_without_changing_the_metric():
    metric = fed(NeuralCollapse(4, 8, reference_means=np.zeros((4, 8))))
    before = {name: value.clone() for name, value in metric.metric_state.items()}
    statistics = metric.class_statistics()
    statistics.update_within(FEATURES, TARGET)
    assert statistics.within_counts.tolist() == [2 * count for count in COUNTS]
    assert nc_metrics(statistics)["NC1"] == pytest.approx(EXPECTED["NC1"], rel=1e-9)
    assert all(torch.equal(getattr(metric, name), before[name]) for name in ("moments", "negatives", "hits"))


def test_some_classes_of_a_head():
    classes = [30, 2, 17, 9]
    target, means = torch.tensor(classes)[TARGET], np.stack([FEATURES[k == TARGET].mean(0) for k in range(4)])
    metric = NeuralCollapse(40, 8, classes=classes, reference_means=means)
    all_of = NeuralCollapse(4, 8, reference_means=means)
    predictions = torch.randint(4, (57,), generator=torch.Generator().manual_seed(0))
    metric.update(FEATURES, target, torch.tensor(classes)[predictions])
    all_of.update(FEATURES, TARGET, predictions)
    assert metric.compute() == all_of.compute()
    weight = np.random.default_rng(0).standard_normal((40, 8))
    row = nc_metrics(metric.class_statistics(), weight)
    assert row["NC2_W"] == nc_metrics(all_of.class_statistics(), weight[classes])["NC2_W"]
    metric.reset()
    metric.update(FEATURES, target, torch.full((57,), 5))  # a class that is not measured
    assert metric.compute()["NC4"] == 1


def test_bad_input_is_an_error():
    metric = NeuralCollapse(4, 8)
    for features, target, message in (
        (FEATURES[:, :5], TARGET, r"features have shape \(57, 5\), wanted finite \(B, 8\)"),
        (FEATURES * np.nan, TARGET, r"features have shape \(57, 8\), wanted finite"),
        (FEATURES, TARGET + 1, "labels go from 1 to 4, wanted 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(features, target)
    with pytest.raises(ValueError, match=r"reference_means have shape \(3, 8\), wanted \(4, 8\)"):
        NeuralCollapse(4, 8, reference_means=np.zeros((3, 8)))
    with pytest.raises(ValueError, match="between is 'all'"):
        NeuralCollapse(4, 8, between="all")
    assert metric.moments.sum() == 0


def test_it_has_every_column_that_needs_no_head():
    """A new column of `nc_metrics` must be listed in nc_torchmetrics too."""
    features, labels, _ = samples([4, 5, 6], 8)
    columns = set(nc_metrics(statistics_of(features, labels, 3)))
    assert columns == {*COLUMNS, *OPTIMUM_COLUMNS, *REFERENCE_COLUMNS}
