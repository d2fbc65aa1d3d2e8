"""Capture a training step as CUDA graphs, which replay it without launching each kernel from Python."""

import warnings

import torch

from utils import UserError


class GraphedStep:
    """A function `step(indices)` that is captured once for each length of `indices`, and replayed when called.

    step: must read and change tensors at fixed addresses only, never wait for the device, and return a tensor.
    sizes: the batch sizes, that is the lengths of `indices` (B,).
    state: a function that returns all tensors that a step changes. Those that the first step creates, such as an
        optimizer's moments, must start at zero.
    capture: `capture(step, indices)` returns a function that replays the step and returns its result; by default
        a `CudaGraphs`. It is called for the largest size first, whose memory the smaller sizes reuse.

    Capturing runs the step a few times and then restores the state to what it was before. Raises RuntimeError if a
    capture fails; its traceback shows the first cause. A lack of memory and a UserError are passed on.
    """

    def __init__(self, step, sizes, state, device, capture=None):
        before = {tensor.data_ptr(): tensor.clone() for tensor in state()}
        capture = capture or CudaGraphs()
        self.step = step  # a graph reads the tensors of the step, which must live as long as it
        self.replays = {}
        try:
            for size in sorted(set(sizes), reverse=True):
                indices = torch.zeros(size, dtype=torch.int64, device=device)
                self.replays[size] = indices, capture(step, indices)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise RuntimeError(
                "the step cannot be captured; the first error above says why: give --no-cuda_graph"
            ) from error
        with torch.no_grad():
            for tensor in state():
                if tensor.data_ptr() in before:
                    tensor.copy_(before[tensor.data_ptr()])
                else:
                    tensor.zero_()

    def __call__(self, indices):
        buffer, replay = self.replays[len(indices)]
        buffer.copy_(indices)
        return replay()


class CudaGraphs:
    """Capture steps as CUDA graphs. These share one memory pool, since they are never replayed at the same time."""

    pool = None

    def __call__(self, step, indices):
        """Capture step(indices) after three warm-up calls on a side stream; return a function that replays it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), warnings.catch_warnings(action="ignore"):  # capturable Adam warns outside a graph
            for _ in range(3):
                step(indices)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = step(indices)
        self.pool = graph.pool()

        def replay():
            graph.replay()
            return result

        return replay
