"""The processes (ranks) that torchrun starts for one run: their shares of a batch, sums, signals and errors."""

import contextlib
import math
import os
import signal
import sys
import time
from datetime import timedelta

import torch
from torch import distributed

from engine.batch_norm import synchronise_batch_norm
from utils import FAILED_WORK, Interrupted, StopFlag, UserError, leave, stop_signals, under_torchrun

AGREE_SECONDS = 0.5  # time between two exchanges of signals among the ranks
ENDING_SECONDS = 3  # after an error, time for which the other ranks wait until the first has printed it and ended
STOP_SECONDS = 60  # after a signal, time for which the other ranks wait until the first has written last.pt
TIMEOUT = timedelta(hours=1)  # of a collective operation: long, because the first rank may be solving for the optimum


def get_ranks():
    """Return a `Ranks` if torchrun has started this process, else a `OneProcess`."""
    return Ranks() if under_torchrun() else OneProcess()


class OneProcess:
    """A run in a single process: the interface of `Ranks`, without any communication."""

    count = 1
    argv = None  # parse sys.argv unchanged
    stop_flag = StopFlag

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def first_alone(self):
        return contextlib.nullcontext()

    def connect(self, state, split, sizes):
        pass

    def rows(self, batch):
        return batch

    def sum_with_gradients(self, *scalars):
        return scalars

    def sum(self, tensor):
        return tensor


class Ranks(OneProcess):
    """The processes (ranks) that torchrun has started for one run; only the first one prints and writes files.

    Every rank draws the same batches and computes the loss of its own rows of each. The gradients, summed over the
    ranks, are then those of a run on one device, and all ranks make the same optimizer step.

    Use as a context manager. On leaving, the other ranks wait for the first; if it fails or is stopped, they end
    with the exit status of the first and print nothing.
    """

    def __init__(self):
        self.rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.all_attempts, *_ = next(distributed.rendezvous("env://"))
        # A prefix for each attempt: otherwise a restarted one would find the addresses of the failed one in the store
        self.store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], self.all_attempts)
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    @property
    def argv(self):
        """The command line; if torchrun restarts a run that had begun, with --resume added and --force removed."""
        if not self.all_attempts.check(["begun"]):
            return sys.argv[1:]
        return [word for word in sys.argv[1:] if word != "--force"] + ["--resume"]

    @contextlib.contextmanager
    def first_alone(self):
        """Run the `with` block on the first rank before the others, so that an error in the input is printed once."""
        self.await_first("prepared")
        yield
        if not self.rank:
            self.store.set("prepared", "")

    def await_first(self, event, seconds=math.inf):
        """Wait at most `seconds` until the first rank announces `event`; if it has ended, exit with its exit status."""
        deadline = time.monotonic() + seconds
        while self.rank and not self.store.check([event]):
            if self.store.check(["ended"]):
                status = int(self.store.get("ended"))
                time.sleep(ENDING_SECONDS if status else 0)  # torchrun stops all ranks once one has failed
                leave(status)
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)

    def __exit__(self, kind, error, trace):
        for number in stop_signals():
            signal.signal(number, signal.SIG_DFL if self.rank else signal.SIG_IGN)
        if not self.rank:
            self.store.set("ended", str(exit_status(error)))
        if isinstance(error, LostRank):  # if the first rank had failed, the store would say so already
            patience = 0
        else:
            patience = math.inf if error is None else ENDING_SECONDS if isinstance(error, Exception) else STOP_SECONDS
        self.await_first("nothing more", patience)

    def connect(self, state, split, sizes):
        """Connect the ranks, and prepare the model of a `TrainingState` to train on all of them as on one device.

        sizes: of the batches that all ranks share.
        Raises UserError if the ranks do not all have the same state and training set.
        """
        model, device = state.model, split.labels.device
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        group = {"store": self.store, "rank": self.rank, "world_size": self.count, "timeout": TIMEOUT}
        with lost_rank():
            distributed.init_process_group(backend, **group)
        sums = [tensor.sum(dtype=torch.float64) for tensor in (split.pixels, *model.state_dict().values())]
        mark = torch.tensor([state.epoch, state.step, *sums], dtype=torch.float64)
        largest, least = all_reduce(torch.stack([mark, -mark]), distributed.ReduceOp.MAX)
        if not torch.equal(largest, -least):
            raise UserError("the ranks have read different images or checkpoints: give all nodes the same files")
        synchronise_batch_norm(model, all_reduce, fused=device.type == "cuda" and min(sizes) >= self.count)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffer = parameters[0].new_zeros(sum(parameter.numel() for parameter in parameters) + 3)
        offset = 0
        for parameter in parameters:  # with the same strides: the optimizer pairs elements by their order in memory
            parameter.grad = self.buffer.as_strided(parameter.size(), parameter.stride(), offset)
            offset += parameter.numel()
        self.all_attempts.set("begun", "")

    def rows(self, batch):
        """Return this rank's rows of a batch (B, ...); possibly none."""
        return batch.tensor_split(self.count)[self.rank]

    def sum_with_gradients(self, *scalars):
        """Sum the gradients (in place) and three scalars over the ranks in one all-reduce; return the scalars' sums."""
        self.buffer[-3:] = torch.stack(scalars)
        return all_reduce(self.buffer)[-3:]

    def sum(self, tensor):
        """Sum a tensor over the ranks, in place, and return it."""
        return all_reduce(tensor)

    def stop_flag(self):
        return SharedStopFlag()


class SharedStopFlag(StopFlag):
    """A StopFlag whose `check()` raises Interrupted in the same call on every rank; all must call it equally often.

    About every AGREE_SECONDS the ranks exchange the signals that have arrived and the number of calls until the next
    exchange. The result is read only at the next exchange, so that no rank waits for it.
    """

    def __enter__(self):
        self.calls, self.interval, self.exchange, self.began = 0, 1, None, time.monotonic()
        return super().__enter__()

    def check(self):
        self.calls += 1
        if self.calls < self.interval:
            return
        if self.exchange is not None:
            with lost_rank():
                self.exchange.wait()
            number, self.interval = self.answer.tolist()
            if number:
                raise Interrupted(number)
        calls_a_second = self.calls / (time.monotonic() - self.began)
        self.answer = torch.tensor([self.number or 0, max(1, min(100, int(calls_a_second * AGREE_SECONDS)))])
        self.exchange = distributed.all_reduce(self.answer, distributed.ReduceOp.MAX, async_op=True)
        self.calls, self.began = 0, time.monotonic()


class LostRank(UserError):
    """Raised when another rank has ended during the run."""

    def __init__(self):
        super().__init__("another rank has ended; to continue, run the same command with --resume", FAILED_WORK)


@contextlib.contextmanager
def lost_rank():
    """Raise LostRank if a collective operation in the `with` block fails."""
    try:
        yield
    except RuntimeError:
        raise LostRank from None


def all_reduce(tensor, operation=distributed.ReduceOp.SUM):
    """Reduce a tensor over the ranks, in place, and return it."""
    with lost_rank():
        distributed.all_reduce(tensor, operation)
    return tensor


def exit_status(error):
    """Return the exit status of a process that ends with an exception, or without one (None)."""
    if isinstance(error, Interrupted):
        return 128 + error.signal
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    return 0 if error is None else getattr(error, "status", FAILED_WORK)
