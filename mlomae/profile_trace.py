"""What a trace of torch's profiler says about outer iterations: time by part, by kind and by operator.

A trace is the dictionary of ``export_chrome_trace``. On the host, time is counted once: what is nested in
something else belongs to the inner one (its *own* time). On a GPU, kernels belong to the part that launched
them, and where two streams overlap, to the kernel that began first. So everything adds up to the whole.
"""

from __future__ import annotations

import bisect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlomae.ranges import PREFIX

ITERATION = "iteration"
REST = "rest"
PARTS = {
    "data": "data",
    "selection": "mask selection",
    "pretrain/forward": "pretrain forward",
    "pretrain/backward": "pretrain backward",
    # What is left of the step when its backward pass, a range inside, is taken off.
    "pretrain/descend": "pretrain optimizer",
    "direction": "direction",
    "influence": "influence",
    "head/features": "head step",
    "head/step": "head step",
    "mask/step": "mask step",
    ITERATION: REST,
}
"""Parts of an outer iteration by the range that they lie in (``mlomae.ranges``)."""

OTHER, BETWEEN = "other", "between operators"
# The first pattern found in an operator's or a kernel's name decides: kernels of attention are built like
# those of products, and those of products name the activation that they could end with.
_KINDS = {
    "optimizer": r"^Optimizer\.|adam|Adam|multi_tensor_apply|lpnorm|::_foreach_",
    "patch operators": r"^mlomae(_native)?::|mlomae::cuda|_patch_(gather|scatter|loss)|_select_patch",
    "attention": r"scaled_dot_product|flash|fmha|sdpa|attention|(?<!log_)softmax",
    "matrix products": (
        r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitK|triton_tem_|mkl|conv(?!ert)|[dw]grad|fprop"
        r"|::(addmm|addmv|mm|mv|bmm|baddbmm|matmul|linear|einsum|dot)\b"
    ),
    "normalisation": r"layer_norm|LayerNorm|GammaBeta|RowwiseMoments|ComputeInternalGradients",
    "activation": r"gelu|Gelu|GELU|relu|sigmoid|tanh|threshold",
    "copies": (
        r"[Mm]em(cpy|set)|copy|CatArray|Fill|index_(elementwise|kernel)|indexSelect|gather|scatter"
        r"|::(to|clone|contiguous|cat|stack|pad|flip|index|index_select|fill_|zero_|zeros)\b"
    ),
    # What torch.compile has fused; its names say what of, where they do not match above.
    "generated code": r"CompiledFxGraph|triton_(poi|per|red)_",
}
KINDS = (
    "matrix products", "attention", "normalisation", "activation", "patch operators", "generated code",
    "optimizer", "copies", OTHER, BETWEEN,
)  # fmt: skip
"""Kinds of operations. The last one is the host's own time: Python, autograd and the compiler's wrappers."""
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _KINDS.items()}
# Nodes of a backward graph carry names of operators but do not compute.
_NODE = re.compile(r"autograd::|Backward\d*$")
# What is nested in these may be of another kind; everywhere else it is part of the operation.
_TRANSPARENT = ("matrix products", "generated code", OTHER, BETWEEN)

# Times in a trace are floating microseconds since the machine started: good to a ns or two.
_ROUNDING = 2
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class Piece:
    """An operator on the host, or a kernel.

    Attributes:
        name, kind, part: see ``KINDS`` and ``PARTS``.
        start, end: ns.
        own: ns of its own, see the module.
        launched: ns; of an operator its start.
        lane: depth among the operators around it; of a kernel the number of its stream.
    """

    name: str
    kind: str
    part: str
    start: int
    end: int
    own: int
    launched: int
    lane: int


@dataclass(frozen=True)
class Reading:
    """Outer iterations as a trace shows them.

    Attributes:
        iterations: (start, end) of each on the host, ns.
        changes: (time, part) wherever the host goes from one part to another, in order; None outside.
        host: everything on the thread of the iterations, in the order of its end.
        device: kernels, copies and fills that these iterations launched; empty on a CPU.
    """

    iterations: list[tuple[int, int]] = field(default_factory=list)
    changes: list[tuple[int, str | None]] = field(default_factory=list)
    host: list[Piece] = field(default_factory=list)
    device: list[Piece] = field(default_factory=list)

    @property
    def host_time(self) -> int:
        """ns of all iterations on the host; the sum of all ``own`` there."""
        return sum(end - start for start, end in self.iterations)

    @property
    def device_time(self) -> int:
        """ns from the beginning of the first iteration to the end of the last kernel."""
        ends = [self.iterations[-1][1], *(piece.end for piece in self.device)]
        return max(ends) - self.iterations[0][0]

    def part_at(self, time: int) -> str | None:
        """The part that the host was in; None outside the iterations."""
        position = bisect.bisect_right(self.changes, time, key=lambda change: change[0])
        return self.changes[position - 1][1] if position else None


@dataclass
class _Frame:
    """An event of the host that is still open."""

    name: str
    start: int
    end: int
    own: int
    kind: str
    part: str
    lane: int

    @property
    def is_range(self) -> bool:
        return self.name.startswith(PREFIX)

    def piece(self) -> Piece:
        return Piece(self.name, self.kind, self.part, self.start, self.end, self.own, self.start, self.lane)

    def inside(self, name: str, start: int, end: int) -> _Frame:
        """What is called within this one."""
        end = min(end, self.end)
        self.own -= end - start
        frame = _Frame(name, start, end, end - start, BETWEEN, self.part, self.lane)
        frame.lane += self.kind != BETWEEN
        if frame.is_range:
            frame.part = PARTS.get(name.removeprefix(PREFIX), REST)
        else:
            frame.kind = kind_of(name, self.kind)
        return frame


def read_trace(trace: Mapping[str, Any]) -> Reading:
    """Takes the outer iterations out of a trace.

    Raises:
        ValueError: there is none in it.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    marks = [event for event in events if event["name"] == PREFIX + ITERATION and _is_host(event)]
    if not marks:
        raise ValueError(f"trace: found no range {PREFIX + ITERATION}, expected one per outer iteration")
    thread = _thread(marks[0])
    reading = Reading()
    _read_host((event for event in events if _is_host(event) and _thread(event) == thread), reading)
    _read_device(events, reading)
    return reading


def kind_of(name: str, around: str = BETWEEN) -> str:
    """The kind of an operator or a kernel.

    Args:
        around: kind of what it is nested in.
    """
    if around not in _TRANSPARENT:
        return around
    if not _NODE.search(name):
        for kind, pattern in _PATTERNS.items():
            if pattern.search(name):
                return kind
        if "::" in name:
            return OTHER if around == BETWEEN else around
    return around


def _read_host(events: Iterable[Mapping[str, Any]], reading: Reading) -> None:
    stack: list[_Frame] = []

    def close(time: int) -> None:
        while stack and stack[-1].end <= time + _ROUNDING:
            frame = stack.pop()
            reading.host.append(frame.piece())
            if frame.is_range:
                reading.changes.append((min(frame.end, time), stack[-1].part if stack else None))

    for start, end, name in sorted(map(_interval, events), key=lambda found: (found[0], -found[1])):
        close(start)
        if stack:
            stack.append(stack[-1].inside(name, start, end))
        elif name == PREFIX + ITERATION:
            reading.iterations.append((start, end))
            stack.append(_Frame(name, start, end, end - start, BETWEEN, REST, 0))
        else:
            continue
        if stack[-1].is_range:
            reading.changes.append((start, stack[-1].part))
    close(sys.maxsize)


def _read_device(events: Iterable[Mapping[str, Any]], reading: Reading) -> None:
    launched, running = {}, []
    for event in events:
        if event.get("cat") in _LAUNCHES:
            launched[event["args"].get("correlation")] = _interval(event)[0]
        elif event.get("cat") in _ON_DEVICE:
            running.append((*_interval(event), event["args"]))
    busy_until = 0
    for start, end, name, args in sorted(running, key=lambda found: found[0]):
        launch = launched.get(args.get("correlation"), start)
        part = reading.part_at(launch)
        if part is None:
            continue
        own = max(0, end - max(start, busy_until))
        busy_until = max(end, busy_until)
        lane = int(args.get("stream", 0))
        reading.device.append(Piece(name, kind_of(name, OTHER), part, start, end, own, launch, lane))


def _is_host(event: Mapping[str, Any]) -> bool:
    return event.get("cat") in ("cpu_op", "user_annotation")


def _thread(event: Mapping[str, Any]) -> tuple[Any, Any]:
    return event["pid"], event["tid"]


def _interval(event: Mapping[str, Any]) -> tuple[int, int, str]:
    """Start and end in ns, and the name."""
    start = round(1e3 * event["ts"])
    return start, start + round(1e3 * event["dur"]), event["name"]
