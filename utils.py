"""One-line errors, functions of users' files, ranks, signals, atomic file writes, and progress."""

import ast
import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

BAD_INPUT, FAILED_WORK = 2, 1  # exit statuses


class UserError(Exception):
    """An error that the user can fix. The message, one line, says what is wrong and how to fix it."""

    def __init__(self, message, status=BAD_INPUT):
        super().__init__(printable(" ".join(str(message).split())))
        self.status = status


def message_of(error):
    """Return an exception's message on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text):
    """Return a text with escapes such as \\xe9 for what cannot be printed, such as bytes of a name not in UTF-8."""
    if text.isprintable():
        return text
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escaped.replace("\\udc", "\\x")  # how Python writes a byte that is not UTF-8


def class_text(label, names):
    """Return "class 3", or "class 3 (cat)" if the class has a name."""
    return f"class {label}" if names[label] == str(label) else f"class {label} ({names[label]})"


def shortened(text, width):
    """Return a text of at most `width` characters, the last one of which is "…" if something was cut off."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def run_script(main, resume_hint="run the same command again", takes_ranks=False):
    """Run the `main` of an entry script and exit; expected errors are printed as one line, without a traceback.

    resume_hint: how to continue after a signal or a full disk. takes_ranks: True if torchrun may run the script.
    """
    name = Path(sys.argv[0]).name
    if not (takes_ranks or is_first_rank()):
        time.sleep(5)  # the first rank prints the error below, and torchrun then ends this one
    for number in stop_signals():
        signal.signal(number, raise_interrupted)
    try:
        if under_torchrun() and not takes_ranks:
            raise UserError("only training runs on several ranks: start this script without torchrun")
        status = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        status = error.status
    except Interrupted as stop:
        print(f"{name}: stopped by {stop.signal.name}; to continue, {resume_hint}", file=sys.stderr)
        status = 128 + stop.signal
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = FAILED_WORK
    except OSError as error:
        print(f"{name}: error: {message_of(error)}; once this is fixed, {resume_hint}", file=sys.stderr)
        status = FAILED_WORK
    except (MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "allocate memory" not in str(error):
            raise  # a bug, not a lack of memory: show the traceback
        print(f"{name}: error: {message_of(error)}", file=sys.stderr)
        status = FAILED_WORK
    leave(status)


def leave(status):
    """End this process with an exit status, without Python's own exit where that is not safe."""
    # Under torchrun, threads of the process group may abort it. `torchrun --run-path`, whose processes come from
    # multiprocessing, must see the end of the script instead, and would wait for it for ever.
    if under_torchrun() and not multiprocessing.parent_process():
        sys.stdout.flush()
        os._exit(status)
    for number in stop_signals():  # the work is done: a signal from here on ends the process without a traceback
        signal.signal(number, signal.SIG_DFL)
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------------
# Functions in files of users, such as `my_losses.py:focal`
# ---------------------------------------------------------------------------------------------------------

FILE_FUNCTION = re.compile(r"(.+\.py):([A-Za-z_]\w*)")


def short_name(text):
    """Return the name of a function in logs, labels and folders: my_losses.focal for path/my_losses.py:focal.

    Any other text is returned unchanged.
    """
    found = FILE_FUNCTION.fullmatch(text)
    return f"{Path(found[1]).stem}.{found[2]}" if found else text


def file_digest(text):
    """Return the SHA-256 of the file of FILE.py:function; raise UserError if it cannot be read."""
    path = Path(FILE_FUNCTION.fullmatch(text)[1])
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def load_function(text):
    """Run the file of FILE.py:function and return the function; raise UserError if it fails or has no such function."""
    file_digest(text)
    path, name = FILE_FUNCTION.fullmatch(text).groups()
    if not callable(function := getattr(run_file(path, f"file_of_{Path(path).stem}"), name, None)):
        raise UserError(f"{path}: has no function {name}")
    return function


def run_file(path, name):
    """Run a Python file as the module `name`, and return the module; raise UserError if it fails."""
    specification = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(specification)  # dataclasses look there
    try:
        specification.loader.exec_module(module)
    except Exception as error:  # of whatever is in the file
        raise UserError(f"{path}: {type(error).__name__}: {message_of(error)}") from None
    return module


def read_arguments(text):
    """Return {key: value} of `key=value,...`; raise ValueError or SyntaxError for anything else.

    Values are numbers, True, False, None, words, and tuples of these but words. Nothing is evaluated.
    """
    call = ast.parse(f"dict({text})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args or len({word.arg for word in call.keywords}) < len(call.keywords):
        raise ValueError
    found = {}
    for word in call.keywords:
        value = word.value.id if isinstance(word.value, ast.Name) else ast.literal_eval(word.value)
        if word.arg is None or not isinstance(value, (bool, int, float, str, tuple, type(None))):
            raise ValueError
        found[word.arg] = value
    return found


# ---------------------------------------------------------------------------------------------------------
# Ranks: the processes that torchrun starts for one run
# ---------------------------------------------------------------------------------------------------------


def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first_rank():
    """Return True in the rank that prints and writes files; always without torchrun."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def first_rank_only(method):
    """Decorate a method, one that writes files, so that it does nothing on ranks other than the first."""

    @functools.wraps(method)
    def written_once(*args, **kwargs):
        return method(*args, **kwargs) if is_first_rank() else None

    return written_once


# ---------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------

# SIGHUP: the terminal has closed; SIGUSR1: a batch system's warning; SIGXCPU: a limit on the time of the processor.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)


def stop_signals():
    """Return those of STOP_SIGNALS that stop this process: all, but under nohup not SIGHUP."""
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


class Interrupted(BaseException):
    """Raised on one of STOP_SIGNALS. It is no `Exception`, so that `except Exception` does not catch it."""

    def __init__(self, number):
        super().__init__(number)
        self.signal = signal.Signals(number)


def raise_interrupted(number, frame):
    """Handle the first signal by raising Interrupted; ignore later ones, so that the exit is not cut short."""
    for other in stop_signals():
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


class StopFlag:
    """Make STOP_SIGNALS only set a flag inside the `with` block; `check()` raises Interrupted if it is set."""

    def __enter__(self):
        self.number = None
        self.previous = {number: signal.signal(number, self.set) for number in stop_signals()}
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def set(self, number, frame):
        self.number = self.number or number

    def check(self):
        if self.number:
            raise Interrupted(self.number)


# ---------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path, mode="wb", **kwargs):
    """Open a temporary file that replaces `path` once the `with` block ends and the file is flushed to the disk."""
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
            error = error.__context__  # torch.save raises a RuntimeError for a full disk
        if isinstance(error, OSError) and error.errno and not error.filename:
            error = OSError(error.errno, error.strerror, str(path))
        raise error from None


def remove_temporaries(folder, *patterns):
    """Delete the temporary files that a killed process left behind for files matching the glob patterns."""
    for pattern in patterns:
        for path in Path(folder).glob(f".{pattern}.*.tmp"):
            path.unlink(missing_ok=True)


def write_json(path, value):
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


# ---------------------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------------------


class Progress:
    """A progress bar on a terminal; elsewhere a plain line every `every` seconds and at the end.

    total: the number of steps, or None if it is not known.
    """

    def __init__(self, total, unit, start=0, every=15.0):
        self.total, self.unit, self.every = total, unit, every
        self.done, self.began, self.start, self.last = start, time.monotonic(), start, -math.inf
        self.bar = None
        if sys.stderr.isatty() and is_first_rank():
            from tqdm import tqdm  # here, so that this module needs no package: scripts/tables.py runs without any

            self.bar = tqdm(total=total, initial=start, unit=unit, dynamic_ncols=True)

    def step(self, text):
        """Advance by one and show `text`."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
            return
        now = time.monotonic()
        if self.done == self.total or now - self.last >= self.every:
            of_total = left = ""
            if self.total is not None:
                seconds = (now - self.began) / (self.done - self.start) * (self.total - self.done)
                of_total, left = f"/{self.total}", f"  {duration(seconds)} left"
            print(f"{self.unit} {self.done}{of_total}  {text}{left}", flush=True)
            self.last = now

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()


def duration(seconds):
    """Format seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
