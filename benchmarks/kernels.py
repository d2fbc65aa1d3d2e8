"""List the kernels of a training step of the paper's MLP, and time the step with its network compiled.

    python benchmarks/kernels.py [--width 1024] [--device cpu]

For each precision: the kernels of a step, how often each runs, and the microseconds that it takes in a step, as the
profiler sees them on a GPU. On a CPU, the operations that a GPU would launch as kernels are counted. Then the time of a
step as it is, and with the network compiled by torch.compile, in turn.
"""

import math
import statistics
from collections import Counter
from functools import partial

import torch
from common import make_parser, paper_args, random_images, ratios, report, time_in_turn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from training import OurTraining

from engine.device import keep_freed_memory, pick_device

STEPS = 20  # in a timing or a profile


class Trace(TorchDispatchMode):
    """Records the operations that reach the device."""

    def __enter__(self):
        self.operations = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations.append(function)
        return function(*args, **(kwargs or {}))

    def launches(self):
        """Return the operations that compute: no views, and no marks for a profiler."""
        return [
            operation
            for operation in self.operations
            if operation.namespace == "aten"
            and not any(out.alias_info and not out.alias_info.is_write for out in operation._schema.returns)
        ]


def kernels_of_a_step(training):
    """Return {name: (how often it runs in a step, microseconds of a step)} of the kernels of a training step."""
    training.run(1)
    if training.device.type != "cuda":
        with Trace() as trace:
            training.run(1)
        counts = Counter(operation.name().split(".")[0] for operation in trace.launches())
        return {name: (count, math.nan) for name, count in counts.most_common()}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        training.run(STEPS)
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total]
    events.sort(key=lambda event: -event.self_device_time_total)
    return {event.key: (event.count / STEPS, event.self_device_time_total / STEPS) for event in events}


def compile_body(model):
    """Compile the layers of an MLP but the last two, which must be computed as they are in every precision."""
    model.layers.compile()


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--batch_size", type=int, default=256)
    options = parser.parse_args()
    device, data = pick_device(options.device, 0), random_images(options.fraction)
    keep_freed_memory()
    rows, steps = [], []
    for precision in ["fp32", "tf32", "bf16"] if device.type == "cuda" else ["fp32", "bf16"]:
        args = paper_args("MLP", options.batch_size, options.width, precision)
        plain = OurTraining(args, data, device)
        kernels = kernels_of_a_step(plain)
        kernels["all"] = tuple(map(sum, zip(*kernels.values(), strict=True)))
        for name, (count, spent) in kernels.items():
            rows.append({"precision": precision, "kernel": name[:80], "in a step": count, "microseconds": spent})
        works = {"as it is": plain, "network compiled": OurTraining(args, data, device, prepare=compile_body)}
        times = time_in_turn({name: partial(work.run, STEPS) for name, work in works.items()}, options.pairs, device)
        for name, spent in times.items():
            row = {"precision": precision, "step": name, "microseconds": 1e6 * statistics.median(spent) / STEPS}
            row["times as fast"], row["least"], row["most"] = ratios(times["as it is"], spent)
            steps.append(row)
    report("kernels", rows, device, options.out)
    report("compiled", steps, device, options.out)


if __name__ == "__main__":
    main()
