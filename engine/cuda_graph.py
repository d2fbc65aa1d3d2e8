"""A training step captured as CUDA graphs, which replay it without launching each kernel from Python."""

import warnings

import torch


class GraphedStep:
    """A function `step(indices)` captured once for each length of `indices`, and replayed when called.

    step: reads and changes tensors at fixed addresses only, never waits for the device, and returns a tensor.
    sizes: the lengths that `indices` (B,) will have.
    state: a function that returns all tensors that a step changes. Those that the first step creates, such as an
        optimizer's moments, must start at zero.
    capture: `capture(step, indices)` returns a function that replays the step and returns what it returned; by default
        a `CudaGraphs`. It is called for the largest size first, whose memory the others reuse.

    Capturing runs the step a few times; afterwards the state is restored, as if no step had been made. Raises
    RuntimeError if a capture fails; its traceback shows the first cause.
    """

    def __init__(self, step, sizes, state, device, capture=None):
        before = {tensor.data_ptr(): tensor.clone() for tensor in state()}
        capture = capture or CudaGraphs()
        self.replays = {}
        try:
            for size in sorted(set(sizes), reverse=True):
                indices = torch.zeros(size, dtype=torch.int64, device=device)
                self.replays[size] = indices, capture(step, indices)
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
    """Captures steps as CUDA graphs, which share one pool of memory: they are never replayed at the same time."""

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
