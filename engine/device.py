"""The device of a run, its arithmetic precision, and its memory allocator."""

import contextlib
import ctypes
import os
import time

import torch

from utils import UserError, message_of, under_torchrun


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


def describe(device, precision):
    """Return the text on device and precision that a run prints at its start."""
    return f"{device_name(device)}, {precision}{bf16_speed(device) if precision == 'bf16' else ''}"


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
