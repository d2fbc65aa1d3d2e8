"""The measurements of the steps of an epoch, and the log entries computed from them."""

import torch

from utils import FAILED_WORK, UserError

MEASURED = ("loss", "data_term", "correct", "grad_norm")  # returned by a step; both losses are means over the batch
STEP_COLUMNS = ("size", *MEASURED)  # size: images in the batch


def new_rows(sizes, device):
    """Return the rows (steps, STEP_COLUMNS) of an epoch with batches of these sizes, with zeros for MEASURED."""
    rows = torch.zeros(len(sizes), len(STEP_COLUMNS), dtype=torch.float64)
    rows[:, 0] = torch.tensor(sizes)
    return rows.to(device)


def epoch_means(rows, data_column, seconds):
    """Return the log entries of an epoch from its steps' rows (steps, STEP_COLUMNS); the accuracy is in percent.

    data_column: the name of the data term's mean. loss_spike: True if the loss of a step was more than twice the least
    loss of the earlier steps of the epoch.
    """
    size, loss, data_term, correct, grad_norm = rows.unbind(1)
    count = float(size.sum())
    return {
        "loss": float((size * loss).sum()) / count,
        data_column: float((size * data_term).sum()) / count,
        "train_acc1": 100 * float(correct.sum()) / count,
        "grad_norm_max": float(grad_norm.max()),
        "loss_spike": bool((loss > 2 * loss.cummin(0).values).any()),
        "seconds": round(seconds, 4),
        "images_per_second": round(count / seconds, 1),
    }


def check_finite(rows, model, epoch):
    """Raise UserError if a loss in `rows`, or a weight of the model, is not finite.

    rows: (steps made in the epoch, STEP_COLUMNS), on the CPU.
    """
    finite = rows[:, STEP_COLUMNS.index("loss")].isfinite()
    if finite.all() and torch.stack([value.isfinite().all() for value in model.state_dict().values()]).all():
        return
    what, step = ("weights are", len(rows)) if finite.all() else ("loss is", int((~finite).nonzero()[0]) + 1)
    raise UserError(
        f"the {what} not finite in epoch {epoch}, step {step}: lower --lr or give --clip_grad_norm 1", FAILED_WORK
    )
