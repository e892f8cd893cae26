"""What a compiled program costs on a device, read off the text of its instructions.

XLA's own analysis counts the body of a loop once and every branch, and gives nothing for GPUs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from crossdict_jax.compile.machines import Machine

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8}
BYTES |= {"f64": 8, "c64": 8, "token": 0, "opaque": 0}  # all others: 4
ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *(
        "copy-done",
        "slice-done",
        "async-done",
        "partition-id",
        "replica-id",
        "optimization-barrier",
    ),
}
NO_WORK = ("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound")  # libtpu's
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all"),
)
HOST = ("infeed", "outfeed", "send", "recv")
HOST_CALLS = re.compile(r'custom_call_target="[^"]*(callback|MoveToHost|MoveToDevice)')
SLICES = ("dynamic-slice", "slice", "gather")


class Array(NamedTuple):
    """An array of a program; ``near``: in memory on the chip, as the compiler has placed it."""

    dtype: str
    shape: tuple[int, ...]
    near: bool

    @property
    def size(self) -> int:
        """Its bytes, wherever it lies."""
        return math.prod(self.shape) * BYTES.get(self.dtype, 4)

    @property
    def bytes(self) -> int:
        """Those of the device's memory."""
        return 0 if self.near else self.size


class Op(NamedTuple):
    """One instruction."""

    name: str
    kind: str
    arrays: tuple[Array, ...]  # its results
    operands: tuple[str, ...]
    about: str  # its line from the operands on
    root: bool

    def calls(self, *keys: str) -> list[str]:
        """Returns the computations named in attributes of these keys."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", self.about)
        names = (name for several, one in found for name in (several or one).split(","))
        return [name.strip().lstrip("%") for name in names]


@dataclass
class Cost:
    """What a part of a program costs on one device.

    Attributes:
      flops: of matrix products.
      bytes: that go through the device's memory.
      compute, busy: seconds of products, and of operations one after another.
      waits: times that the host is asked for the condition of a loop or branch.
      sent: bytes by kind of collective, ``times`` how many.
      host: operations that send to the host or receive from it.
    """

    flops: float = 0.0
    bytes: float = 0.0
    compute: float = 0.0
    busy: float = 0.0
    waits: float = 0.0
    sent: Counter = field(default_factory=Counter)
    times: Counter = field(default_factory=Counter)
    host: Counter = field(default_factory=Counter)

    def add(self, other: Cost, factor: float = 1.0) -> None:
        """Adds what is done ``factor`` times."""
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update({key: n * factor for key, n in value.items()})
            else:
                setattr(self, name, getattr(self, name) + value * factor)


def cost(text: str, machine: Machine, trips: int) -> Cost:
    """Returns what the program of this text costs.

    Args:
      trips: of a loop whose number of turns is not in the program: a chunk's steps.
    """
    computations, entry = parse(text)
    return _Walk(computations, machine, trips).of(entry)


def parse(text: str) -> tuple[dict[str, dict[str, Op]], str]:
    """Returns ({computation: {name: instruction}}, the name of the first one)."""
    computations, entry, current = {}, "", {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            current = computations[name] = {}
            entry = name if line.startswith("ENTRY") else entry
        elif " = " in line and line.startswith(" "):
            name, _, rest = line.strip().partition(" = ")
            root, name = name.startswith("ROOT "), name.removeprefix("ROOT ").lstrip("%")
            end = _closing(rest) if rest.startswith("(") else rest.index(" ")
            kind, _, rest_ = rest[end:].strip().partition("(")
            close = _closing("(" + rest_) - 2
            operands = tuple(re.findall(r"%([\w.\-]+)", rest_[:close]))
            arrays = tuple(
                Array(dtype, tuple(map(int, filter(None, shape.split(",")))), "S(" in layout)
                for dtype, shape, layout in ARRAY.findall(rest[:end])
            )
            current[name] = Op(name, kind, arrays, operands, rest_, root)
    return computations, entry


def _closing(text: str) -> int:
    """The index after the parenthesis that closes the one at the start."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i + 1
    return len(text)


class _Walk:
    def __init__(self, computations, machine: Machine, trips: int):
        self.computations, self.machine, self.trips = computations, machine, trips
        self.known: dict[str, Cost] = {}

    def of(self, name: str) -> Cost:
        """The cost of a computation whose instructions run one after another."""
        if name not in self.known:
            total = Cost()
            for op in self.computations[name].values():
                total.add(self.of_op(op, self.computations[name]))
            self.known[name] = total
        return self.known[name]

    def of_op(self, op: Op, near: dict[str, Op]) -> Cost:
        device, kind, total = self.machine.device, op.kind.removesuffix("-start"), Cost()
        if kind in HOST or HOST_CALLS.search(op.about):
            total.host[kind] += 1
        if op.kind in FREE or op.kind.endswith("-done") or any(t in op.about for t in NO_WORK):
            return total
        if kind == "while":
            (body,), (condition,) = op.calls("body"), op.calls("condition")
            count, known = self.turns(op, condition)
            total.add(self.of(body), count)
            total.add(self.of(condition), count)
            total.waits += 0 if known else count
        elif kind == "conditional":
            branches = op.calls("branch_computations", "true_computation", "false_computation")
            total.add(min((self.of(branch) for branch in branches), key=lambda c: c.busy))
            total.waits += 1
        elif kind in ("call", "async"):
            for called in op.calls("to_apply", "calls", "called_computations"):
                total.add(self.of(called))
        elif kind in COLLECTIVES:
            both = op.kind != kind and kind != "all-reduce"  # operand and result are named
            size = sum(a.size for a in op.arrays)
            total.sent[kind], total.times[kind] = size / (1 + both), 1
        else:
            inner = [self.computations[c] for c in op.calls("calls") if c in self.computations]
            total.flops, total.compute = self.products([near, *inner], op)
            total.bytes = sum(self.traffic(op, near, inner))
            memory = total.bytes / device.bandwidth
            if kind == "sort":  # passes are a guess
                memory *= math.log2(max(2, max(op.arrays[0].shape, default=2)))
            if op.kind == kind:  # others go on beside what follows
                total.busy = max(total.compute, memory, device.launch)
        return total

    def turns(self, op: Op, condition: str) -> tuple[int, bool]:
        """How often a loop turns, and whether the program says so."""
        if told := re.search(r'"known_trip_count":\{"n":"(\d+)"', op.about):
            return int(told[1]), True
        ops = self.computations[condition].values()
        limits = [re.match(r"\d+", o.about) for o in ops if o.kind == "constant"]
        limits = [int(limit[0]) for limit in limits if limit]
        return (limits[0], True) if len(limits) == 1 else (self.trips, False)

    def products(self, scopes: list[dict[str, Op]], op: Op) -> tuple[float, float]:
        """Operations and seconds of an instruction's own matrix products, or of its fusion's."""
        device, flops, seconds = self.machine.device, 0.0, 0.0
        todo = [(op, scopes[0])] + [(o, scope) for scope in scopes[1:] for o in scope.values()]
        for o, scope in todo:
            called = re.search(r'custom_call_target="[^"]*(gemm|matmul)', o.about)
            if o.kind == "fusion" and o is not op:
                for name in o.calls("calls"):
                    more = self.products([scope, self.computations[name]], o)
                    flops, seconds = flops + more[0], seconds + more[1]
            if o.kind not in ("dot", "convolution") and not called:
                continue
            a, b = (scope[name].arrays[0] for name in o.operands[:2])
            batch = 1
            if dims := re.search(r"lhs_batch_dims=\{([\d,]+)\}", o.about):
                batch = math.prod(a.shape[int(i)] for i in dims[1].split(","))
            if labels := re.search(r"dim_labels=\w+->(\w+)", o.about):
                out = o.arrays[0].shape
                batch = math.prod(n for n, label in zip(out, labels[1]) if label.isdigit())
            sizes = (math.prod(array.shape) for array in (a, b, o.arrays[0]))
            work = 2 * math.sqrt(math.prod(sizes) / max(batch, 1))
            exact = "operand_precision={highest" in o.about or device.platform != "tpu"
            rate = device.float32 if a.dtype == "f32" and exact else device.bfloat16
            flops, seconds = flops + work, seconds + work / rate
        return flops, seconds

    def traffic(self, op: Op, near: dict[str, Op], inner: list[dict[str, Op]]):
        """Yields the bytes of all arrays that an instruction reads and writes."""
        operands = [near[name] for name in op.operands if name in near]
        if op.kind in ("copy-start", "slice-start"):  # what is read, what is written, in any order
            yield sum(min(a.size for a in op.arrays[:2]) for a in op.arrays[:2] if not a.near)
            return
        if op.kind in SLICES:
            yield op.arrays[0].bytes + (0 if operands[0].arrays[0].near else op.arrays[0].size)
            return
        if op.kind == "dynamic-update-slice":
            yield 2 * sum(a.bytes for a in operands[1].arrays)
            return
        whole = [True] * len(operands)
        for fused in inner[:1]:  # what only slices of an operand are read of
            users = {name: [] for name in fused}
            for o in fused.values():
                for i, name in enumerate(o.operands):
                    if name in users:
                        users[name].append((o, i))
            parameters = [o for o in fused.values() if o.kind == "parameter"]
            for parameter in parameters:
                index = int(re.match(r"\d+", parameter.about)[0])
                uses = users[parameter.name]
                updated = [o for o, i in uses if o.kind == "dynamic-update-slice" and i == 0]
                if index < len(whole) and all(o.kind in SLICES and not i for o, i in uses):
                    whole[index] = False
                    yield sum(a.bytes for o, _ in uses for a in o.arrays)
                elif index < len(whole) and len(updated) == len(uses) == 1:
                    whole[index] = False
                    # In place: neither the operand nor the result is moved whole.
                    update = fused[updated[0].operands[1]]
                    written = sum(a.bytes for a in update.arrays)
                    yield 2 * written - sum(a.bytes for a in updated[0].arrays)
        yield from (a.bytes for o, counts in zip(operands, whole) if counts for a in o.arrays)
        yield from (a.bytes for a in op.arrays)
