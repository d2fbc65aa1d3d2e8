"""Errors, seeds, devices, and the files of a run."""

import contextlib
import csv
import ctypes
import fcntl
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

BAD_INPUT, FAILED_WORK = 2, 1
LOCK_SECONDS = 60  # how long a lock of one file is waited for
LEASE_SECONDS = 60  # a lease that was not renewed for so long is free


class UserError(Exception):
    """Something that the user can mend. Its message is one line: what is wrong, and the mend."""

    def __init__(self, message, status=BAD_INPUT):
        super().__init__(" ".join(str(message).split()))
        self.status = status


def run_script(main, go_on="the same command starts anew"):
    """Runs an entry script's `main` and exits: errors as one line on standard error, without a traceback.

    go_on: how to go on after a signal, or once the machine is mended.
    """
    name = Path(sys.argv[0]).name
    try:
        with signals_to(interrupt):
            status = main() or 0
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        status = error.status
    except Interrupted as stop:
        print(f"{name}: stopped by {stop.signal.name}; {go_on}", file=sys.stderr)
        status = 128 + stop.signal
    except OSError as error:
        print(f"{name}: error: {one_line(error)}; once that is mended, {go_on}", file=sys.stderr)
        status = FAILED_WORK
    except (MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "allocate memory" not in str(error):
            raise  # not of the machine, but of this code
        print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        status = FAILED_WORK
    sys.exit(status)


def one_line(error):
    """An exception in one line: its message, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------------------------------
# Signals: SIGTERM and SIGINT stop a script where its files are whole
# ---------------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """SIGTERM or SIGINT has come; no Exception, so that nothing on the way up takes it for an error of its own."""

    def __init__(self, number):
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def signals_to(handler):
    """Within it, SIGTERM and SIGINT call `handler(number, frame)`."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def interrupt(number, frame):
    """A handler of signals that raises Interrupted, once: what then winds up is not cut short."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


class HeldSignals:
    """Within it, SIGTERM and SIGINT wait until `check()`, which raises Interrupted where one has come."""

    def __enter__(self):
        self.number = None
        self.handlers = signals_to(self.note)
        self.handlers.__enter__()
        return self

    def __exit__(self, *error):
        self.handlers.__exit__(*error)

    def note(self, number, frame):
        self.number = self.number or number

    def check(self):
        if self.number:
            raise Interrupted(self.number)

    @contextlib.contextmanager
    def released(self):
        """Within it, a signal raises Interrupted at once: for work that may be cut anywhere."""
        with signals_to(interrupt):
            self.check()
            yield


# ---------------------------------------------------------------------------------------------------------
# Machine
# ---------------------------------------------------------------------------------------------------------


def pick_device(device, gpu_id):
    """The torch.device that --device and --gpu_id mean on this machine."""
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cpu" or (device == "auto" and gpus == 0 and gpu_id == 0):
        return torch.device("cpu")
    if gpus == 0:
        raise UserError("this machine has no usable GPU: give --device cpu, without --gpu_id")
    if gpu_id >= gpus:
        raise UserError(f"--gpu_id {gpu_id}: this machine shows {gpus} GPUs, numbered from 0")
    torch.cuda.set_device(gpu_id)  # CUDA graphs and streams are of the current device
    return torch.device("cuda", gpu_id)


def device_name(device):
    """The GPU's name, or the CPU with the threads that torch uses."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.get_num_threads()} threads"


def set_precision(precision, device):
    """Makes fp32 mean full fp32, or TF32 on request; same flags, same device, same weights."""
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError("--precision tf32 needs an NVIDIA GPU of the Ampere generation or later; give fp32 or bf16")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError("--precision bf16: this GPU has no bf16 arithmetic; give fp32")
    mode = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = mode
    torch.backends.cudnn.conv.fp32_precision = mode
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, sums may differ from run to run
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def keep_freed_memory():
    """Lets glibc keep what is freed: a step's large buffers are reused, not mapped and zeroed anew each time.

    Measured on two cores: about 5 % of a step of the MLP, nothing for ResNet18. Without glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: its largest value, in bytes
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def autocast(precision, device):
    """The context in which the network's body runs; without a cache of cast weights, for CUDA graphs."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def epoch_generator(seed, epoch, purpose):
    """A CPU generator that depends on nothing but its arguments, so that a resumed run draws the same."""
    words = np.random.SeedSequence([seed, epoch, purpose]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


class GraphedStep:
    """`step(rows)` captured as CUDA graphs, one for each length that `rows` will have, and replayed.

    sizes: the lengths. state(): all tensors that a step changes, some of which may come into being in the first
    step; those are zero before it. A step that is not for keeps warms the device up; the state is then put back,
    so that training goes as if there had been none. `capture(step, rows)` returns what replays the step.
    """

    def __init__(self, step, sizes, state, device, capture=None):
        before = {tensor.data_ptr(): tensor.clone() for tensor in state()}
        capture = capture or capture_cuda_graph
        self.replays = {}
        for size in sizes:
            rows = torch.zeros(size, dtype=torch.int64, device=device)
            self.replays[size] = rows, capture(step, rows)
        with torch.no_grad():
            for tensor in state():
                if tensor.data_ptr() in before:
                    tensor.copy_(before[tensor.data_ptr()])
                else:
                    tensor.zero_()

    def __call__(self, rows):
        buffer, replay = self.replays[len(rows)]
        buffer.copy_(rows)
        replay()


def capture_cuda_graph(step, rows):
    """Captures step(rows) after three of them on a side stream; `rows` and all state keep their addresses."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), warnings.catch_warnings(action="ignore"):  # capturable Adam wants a graph
        for _ in range(3):
            step(rows)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(rows)
    return graph.replay


# ---------------------------------------------------------------------------------------------------------
# Files: written to a temporary name and renamed, so that a reader never sees half of one
# ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path, mode="wb", **kwargs):
    """Opens a file that takes its name only when it is complete and on the disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            error = error.__context__  # torch.save wraps a full disk in a RuntimeError of its own
        if isinstance(error, OSError) and error.errno and not error.filename:
            error = OSError(error.errno, error.strerror, str(path))
        raise error from None


def clear_temporaries(folder, *patterns):
    """Deletes what a killed process left of files that nobody but the caller may be writing now."""
    for pattern in patterns:
        for path in Path(folder).glob(f".{pattern}.*.tmp"):
            path.unlink(missing_ok=True)


def flush_to_disk(path):
    """Returns when what was appended to a file is on the disk."""
    with open(path, "a") as file:
        os.fsync(file.fileno())


def save_torch(path, state):
    """`torch.save`, atomically."""
    with atomic_write(path) as file:
        torch.save(state, file)


class Writer:
    """Writes files in a thread of its own, in order, while training goes on; errors come up at the next call."""

    def __init__(self):
        self.thread, self.pending = ThreadPoolExecutor(1), None

    def save(self, path, state):
        """Writes a state that the caller will not change any more; waits for the one before."""
        self.wait()
        self.pending = self.thread.submit(save_torch, path, state)

    def wait(self):
        """Returns when everything is on the disk."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.thread.shutdown()
        self.wait()


def copy_state(state):
    """A nested dict or list with its tensors cloned: later steps do not change it."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return type(state)((key, copy_state(value)) for key, value in state.items())
    return [copy_state(value) for value in state] if isinstance(state, (list, tuple)) else state


def load_torch(path, device="cpu"):
    """Reads a file of tensors and plain values; a pickle that would run code is refused, and so is any wrong bit."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    if not Path(path).is_file():
        raise UserError(f"{path}: not a file")  # opening a pipe would wait for ever
    try:
        if zipfile.is_zipfile(path):  # as torch.save writes since 1.6; torch.load does not look at its checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise UserError(f"{path}: truncated or damaged, cannot be read: {damaged}", FAILED_WORK)
        return torch.load(path, map_location=device, weights_only=True)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path}: not a plain checkpoint, cannot be read", FAILED_WORK) from None
    except Exception as error:  # whatever damaged bytes lead the readers of zip files and pickles to
        opened = not isinstance(error, OSError) or error.filename is None
        reason = "truncated or damaged" if opened else error.strerror
        raise UserError(f"{path}: {reason}, cannot be read", FAILED_WORK) from None


def load_weights(model, path, device="cpu"):
    """Loads a checkpoint into `model`."""
    set_weights(model, load_torch(path, device), path)


def set_weights(model, state, path):
    """Puts what a checkpoint holds into `model`; names the first thing that does not fit."""
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for key, value in state.items()
    ):
        raise UserError(f"{path}: holds no state_dict of a model", FAILED_WORK)
    state = {key: value for key, value in state.items() if not key.startswith("batch_norm.")}  # never used there
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if wanted != found:
        key = next(key for key in [*wanted, *found] if wanted.get(key) != found.get(key))
        raise UserError(
            f"{path}: does not fit the model's flags: {key} is {found.get(key, 'missing')} in the file, "
            f"{wanted.get(key, 'missing')} in the model",
            FAILED_WORK,
        )
    for key, value in model.state_dict().items():
        if state[key].is_floating_point() != value.is_floating_point():
            raise UserError(f"{path}: {key} is {state[key].dtype} in the file, {value.dtype} in the model", FAILED_WORK)
    if not all(value.isfinite().all() for value in state.values()):
        raise UserError(f"{path}: holds weights that are not finite", FAILED_WORK)
    model.load_state_dict(state)


def checkpoint_path(folder, epoch):
    return Path(folder) / f"epoch_{epoch:03d}.pth"


def find_checkpoints(folder):
    """{epoch: path} of a folder's checkpoints, in order."""
    found = {}
    for path in Path(folder).glob("epoch_*.pth"):
        if match := re.fullmatch(r"epoch_(\d+)\.pth", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def write_json(path, value):
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read_config(folder):
    """A run's config.json, or None where there is none."""
    path = Path(folder) / "config.json"
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
        if not (isinstance(config["flags"], dict) and isinstance(config["class_counts"], list)):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: damaged, not a run's config") from None
    return config


def read_log(folder):
    """The lines of a run's train_log.jsonl by epoch; of two, the later. Half-written and damaged ones are left out."""
    path = Path(folder) / "train_log.jsonl"
    lines = {}
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("epoch"), int):
                lines[line["epoch"]] = line
    return [lines[epoch] for epoch in sorted(lines)]


def write_log(folder, lines):
    """Writes train_log.jsonl anew."""
    with atomic_write(Path(folder) / "train_log.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def append_line(path, value):
    with open(path, "a") as file:
        file.write(json.dumps(value) + "\n")


def read_csv(path):
    """Rows of an nc_metrics CSV as dicts of floats, NaN for an empty cell; [] where there is no file."""
    path = Path(path)
    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            table = csv.DictReader(file, restval="cut off")  # a row too short is no row with empty cells
            rows = [{name: float(cell) if cell else math.nan for name, cell in row.items()} for row in table]
        if not all(row["epoch"].is_integer() for row in rows):
            raise ValueError
        return rows
    except (ValueError, KeyError, TypeError, csv.Error):
        raise UserError(f"{path}: damaged, not a table of numbers; delete it to have it measured again") from None


def write_csv(path, rows):
    """Writes dicts of numbers and texts; NaN and a missing one become an empty cell, a whole number has no point."""
    names = dict.fromkeys(name for row in rows for name in row)  # rows of an older version may have fewer
    with atomic_write(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: cell(value) for name, value in row.items()})


def cell(value):
    """A number as a cell of a CSV file that `read_csv` reads back as the same float; a text as it is."""
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return ""
    return int(value) if float(value).is_integer() else value


# ---------------------------------------------------------------------------------------------------------
# Locks: each dies with its holder
# ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def file_lock(path):
    """Waits for, and holds, a lock: what is read and written in it stays together."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(path, LOCK_SECONDS))
        except BlockingIOError:
            raise UserError(f"{path}: another process holds this lock and does not move on", FAILED_WORK) from None
        yield


@contextlib.contextmanager
def run_lock(folder):
    """Holds a run's folder for this process."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(Path(folder) / ".lock", 1))  # longer than is_locked takes
        except BlockingIOError:
            raise UserError(f"{folder}: another process is training there; wait for it or give --save_path") from None
        yield


def is_locked(folder):
    """Whether a training process holds the folder."""
    path = Path(folder) / ".lock"
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return is_leased(path)
    return False


@contextlib.contextmanager
def lock(path, seconds):
    """Holds the lock of a file; raises BlockingIOError where another process has it for `seconds` longer."""
    deadline = time.monotonic() + seconds
    with open(path, "a") as file, contextlib.ExitStack() as stack:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            except OSError:  # a file system without flock
                with contextlib.suppress(FileExistsError):
                    stack.enter_context(lease(path))
                    break
                if time.monotonic() > deadline:
                    raise BlockingIOError from None
            time.sleep(0.05)
        yield


@contextlib.contextmanager
def lease(path):
    """A lock without flock: a file beside `path` that its holder renews while it lives; FileExistsError where held.

    As good as the clocks of the machines agree: one that stands LEASE_SECONDS behind the others loses its leases.
    """
    if not is_leased(path):
        lease_path(path).unlink(missing_ok=True)
    lease_path(path).touch(exist_ok=False)
    ended = threading.Event()

    def renew():
        while not ended.wait(LEASE_SECONDS / 6):
            with contextlib.suppress(OSError):
                os.utime(lease_path(path))

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        lease_path(path).unlink(missing_ok=True)


def is_leased(path):
    """Whether the lease of a file is held: it was renewed of late."""
    try:
        return time.time() - lease_path(path).stat().st_mtime < LEASE_SECONDS
    except FileNotFoundError:
        return False


def lease_path(path):
    return Path(f"{path}.lease")


def git_commit():
    """The commit of this code, with '-dirty' where files differ from it, or None outside a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


# ---------------------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then, and one at the end."""

    def __init__(self, total, unit, start=0, every=15.0):
        self.total, self.unit, self.every = total, unit, every
        self.done, self.began, self.start, self.last = start, time.monotonic(), start, -math.inf
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit=unit, dynamic_ncols=True) if terminal else None

    def step(self, text):
        """One more is done; `text` says how it stands."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
            return
        now = time.monotonic()
        if self.done == self.total or now - self.last >= self.every:
            left = (now - self.began) / (self.done - self.start) * (self.total - self.done)
            print(f"{self.unit} {self.done}/{self.total}  {text}  {duration(left)} left", flush=True)
            self.last = now

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()


def duration(seconds):
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
