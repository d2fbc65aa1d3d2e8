"""The device of a run, its arithmetic precision, its memory allocator, and the processes (ranks) that share it."""

import contextlib
import ctypes
import math
import os
import signal
import sys
import time
from datetime import timedelta

import torch
from torch import distributed

from engine.batch_norm import synchronise_batch_norm
from utils import FAILED_WORK, STOP_SIGNALS, Interrupted, StopFlag, UserError, leave, message_of, under_torchrun

AGREE_SECONDS = 0.5  # time between two exchanges of signals among the ranks
ENDING_SECONDS = 3  # after an error, time for which the other ranks wait until the first has printed it and ended
STOP_SECONDS = 60  # after a signal, time for which the other ranks wait until the first has written last.pt
TIMEOUT = timedelta(hours=1)  # of a collective operation: long, because the first rank may be solving for the optimum

# ---------------------------------------------------------------------------------------------------------
# Device, precision, memory
# ---------------------------------------------------------------------------------------------------------


def pick_device(device, gpu_id):
    """Return the torch.device that --device and --gpu_id select; local ranks take consecutive GPUs from --gpu_id on."""
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cpu" or (device == "auto" and gpus == 0 and gpu_id == 0):
        return torch.device("cpu")
    if gpus == 0:
        raise UserError("this machine has no usable GPU: give --device cpu, without --gpu_id")
    if gpu_id >= gpus:
        raise UserError(f"--gpu_id {gpu_id}: this machine shows {gpus} GPUs, numbered from 0")
    if under_torchrun():
        if (wanted := gpu_id + int(os.environ["LOCAL_WORLD_SIZE"])) > gpus:
            raise UserError(f"torchrun --nproc_per_node: {wanted} GPUs are needed, this machine shows {gpus}")
        gpu_id += int(os.environ["LOCAL_RANK"])
    try:
        torch.cuda.init()
        torch.cuda.set_device(gpu_id)  # CUDA graphs and streams belong to the current device
    except RuntimeError as error:  # such as an old driver
        if device == "cuda":
            raise UserError(f"the GPU cannot be used: {message_of(error)}; give --device cpu") from None
        print(f"note       the GPU cannot be used: {message_of(error)}; training on the CPU", flush=True)
        return torch.device("cpu")
    return torch.device("cuda", gpu_id)


def send(tensor, device):
    """Return a copy of a CPU tensor on the device. A copy to a GPU is asynchronous, from pinned memory."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def device_name(device):
    """Return the GPU's name, or the CPU and the number of threads that torch uses."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.get_num_threads()} threads"


def describe(device, precision, ranks):
    """Return the text on device, precision and ranks that a run prints at its start."""
    text = f"{device_name(device)}, {precision}{bf16_speed(device) if precision == 'bf16' else ''}"
    return text if ranks.count == 1 else f"{text}, {ranks.count} ranks, each with its rows of every batch"


def set_precision(precision, device):
    """Select full fp32 or TF32 arithmetic for all of torch, deterministic algorithms, and the library for fp32."""
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError("--precision tf32 needs an NVIDIA GPU of the Ampere generation or later; give fp32 or bf16")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError("--precision bf16: this GPU has no bf16 arithmetic; give fp32")
    mode = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = mode
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.conv.fp32_precision = mode
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, sums may differ from run to run
        if precision == "fp32":  # cuBLAS is then faster than cuBLASLt, torch's choice for linear layers; read only once
            os.environ.setdefault("DISABLE_ADDMM_CUDA_LT", "1")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def bf16_speed(device):
    """Return as text whether bf16 or fp32 is faster on this CPU, from one timed matrix product; "" on a GPU."""
    if device.type != "cpu":
        return ""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(256, 512, dtype=dtype), torch.ones(512, 256, dtype=dtype)
        seconds = []
        for _ in range(11):  # the first product also chooses its kernel
            began = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - began)
        times[dtype] = min(seconds)  # the least, because other work on the machine only adds time
    ratio = times[torch.float32] / times[torch.bfloat16]
    faster = f"{ratio:.1f} times as fast as" if ratio >= 1 else f"{1 / ratio:.1f} times slower than"
    return f" (on this CPU a bf16 product is {faster} one in fp32)"


def autocast(precision, device):
    """Return the autocast context of the network's body; without a weight cache, as CUDA graphs require."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def keep_freed_memory():
    """Make glibc keep freed memory, so that large buffers are reused instead of mapped and zeroed in every step.

    On two cores this saves about 5 % of a step of the MLP, and nothing for ResNet18. Without glibc it has no effect.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest value in bytes
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# ---------------------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------------------


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
        for number in STOP_SIGNALS:
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
        parameters = list(model.parameters())
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
