"""What a compiled program costs on a device, read off the text of its instructions.

XLA's own analysis counts the body of a loop once and every branch, and gives nothing for GPUs.
"""

import functools
import math
import re
from collections import Counter
from typing import NamedTuple

from crossdict_jax.compile.machines import Machine

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8}
BYTES |= {"f64": 8, "token": 0}  # all others: 4
OP = re.compile(r" +(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")  # name, type, kind, rest
OPERANDS = re.compile(r"(?:[^()]|\((?:[^()]|\([^()]*\))*\))*")  # to their closing parenthesis
ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota")
FREE += ("partition-id", "replica-id", "optimization-barrier")
NO_WORK = ("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound")  # libtpu's
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
HOST = ("infeed", "outfeed", "send", "recv")
HOST_CALL = re.compile(r'custom_call_target="[^"]*(callback|MoveToHost|MoveToDevice)')
PRODUCT_CALL = re.compile(r'custom_call_target="[^"]*(gemm|matmul)')
KERNEL_CALL = re.compile(r'custom_call_target="[^"]*triton')  # of ops/kernels.py
SLICES = {"dynamic-slice", "slice", "gather"}


class Array(NamedTuple):
    """An array of a program."""

    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes, wherever it lies
    bytes: int  # in the device's memory: 0 in the chip's own small memory


class Op(NamedTuple):
    """One instruction."""

    kind: str
    arrays: tuple[Array, ...]  # its results
    operands: tuple[str, ...]
    about: str  # its line from the operands on

    def calls(self, *keys: str) -> list[str]:
        """Returns the computations named in attributes of these keys."""
        named = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|\S+)", self.about)
        return re.findall(r"[\w.\-]+", " ".join(named))


Computation = dict[str, Op]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns ({name: computation}, the name of the entry)."""
    computations, entry, current = {}, "", {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            current = computations[name] = {}
            entry = name if line.startswith("ENTRY") else entry
        elif op := OP.match(line):
            name, types, kind, about = op.groups()
            arrays = []
            for dtype, sizes, layout in ARRAY.findall(types):
                shape = tuple(map(int, filter(None, sizes.split(","))))
                size = math.prod(shape) * BYTES.get(dtype, 4)
                arrays.append(Array(dtype, shape, size, 0 if "S(" in layout else size))
            operands = re.findall(r"%([\w.\-]+)", OPERANDS.match(about)[0])
            current[name] = Op(kind, tuple(arrays), tuple(operands), about)
    return computations, entry


def cost(text: str, machine: Machine, trips: int) -> Counter:
    """Returns what the program of this text costs one device.

    "flops" of matrix products, "bytes" through its memory; seconds "compute" of products and "busy"
    of operations one after another; "waits", reads by the host of a loop's or branch's condition;
    by kind "sent KIND", bytes of collectives, and "host KIND", exchanges with the host.

    Args:
      trips: of a loop whose number of turns is not in the program: a chunk's steps.
    """
    computations, entry = parse(text)

    @functools.cache
    def of(name: str) -> Counter:
        """The cost of a computation whose instructions run one after another."""
        total = Counter()
        for op in computations[name].values():
            kind, called, times = op.kind.removesuffix("-start"), [], 1
            if kind in HOST or HOST_CALL.search(op.about):
                total[f"host {kind}"] += 1
            if kind in FREE or kind.endswith("-done") or any(word in op.about for word in NO_WORK):
                continue
            if kind == "while":
                called = [*op.calls("body"), *op.calls("condition")]
                turns = _turns(op, computations[called[1]])
                times = turns or trips
                total["waits"] += 0 if turns else trips
            elif kind == "conditional":
                branches = op.calls("branch_computations", "true_computation", "false_computation")
                called = [min(branches, key=lambda branch: of(branch)["busy"])]
                total["waits"] += 1
            elif kind in ("call", "async"):
                called = op.calls("to_apply", "calls", "called_computations")
            elif kind in COLLECTIVES:
                # Beside the result of a start the operand is named.
                both = kind != op.kind and kind != "all-reduce"
                total[f"sent {kind}"] += sum(a.size for a in op.arrays) / (1 + both)
            else:
                total.update(_cost_alone(op, computations[name], computations, machine))
            for inner in map(of, called):
                total.update({key: value * times for key, value in inner.items()})
        return total

    return of(entry)


def _turns(op: Op, condition: Computation) -> int:
    """How often a loop turns; 0 if the program does not say."""
    if told := re.search(r'"known_trip_count":\{"n":"(\d+)"', op.about):
        return int(told[1])
    limits = [re.match(r"\d+", o.about) for o in condition.values() if o.kind == "constant"]
    return int(limits[0][0]) if len(limits) == 1 and limits[0] else 0


def _cost_alone(op: Op, scope: Computation, computations, machine: Machine) -> Counter:
    """The cost of one instruction or fusion: its products, and the bytes it reads and writes."""
    device, total = machine.device, Counter()
    todo = [(op, scope)]
    for o, names in todo:  # grows by what fusions hold
        if o.kind == "fusion":
            todo += [
                (p, computations[c]) for c in o.calls("calls") for p in computations[c].values()
            ]
        if o.kind not in ("dot", "convolution") and not PRODUCT_CALL.search(o.about):
            continue
        a, b = (names[operand].arrays[0] for operand in o.operands[:2])
        batch, out = 1, o.arrays[0].shape
        if dims := re.search(r'lhs_batch_dim(?:s=\{|ensions":\[)([\d,"]+)', o.about):
            batch = math.prod(a.shape[int(i)] for i in re.findall(r"\d+", dims[1]))
        if labels := re.search(r"dim_labels=\w+_(\w+)->", o.about):  # a product in TPUs' words
            batch = math.prod(n for n, label in zip(b.shape, labels[1]) if label.isdigit())
        sizes = math.prod(a.shape) * math.prod(b.shape) * math.prod(out)
        flops = 2 * math.sqrt(sizes / max(batch, 1))
        exact = "operand_precision={highest" in o.about or device.platform != "tpu"
        rate = device.float32 if a.dtype == "f32" and exact else device.bfloat16
        total.update({"flops": flops, "compute": flops / rate})
    total["bytes"] = sum(_traffic(op, scope, computations))
    seconds = total["bytes"] / device.bandwidth
    if op.kind == "sort":  # how many passes is a guess
        seconds *= math.log2(max(2, max(op.arrays[0].shape)))
    if not op.kind.endswith("-start"):  # those go on beside what follows
        total["busy"] = max(total["compute"], seconds, device.launch)
    return total


def _traffic(op: Op, scope: Computation, computations):
    """Yields the bytes that an instruction reads and writes; of slices only what is taken."""
    operands = [scope[name].arrays for name in op.operands if name in scope]
    if op.kind in ("copy-start", "slice-start"):  # both ends are named as results
        yield sum(min(a.size for a in op.arrays[:2]) for a in op.arrays[:2] if a.bytes)
    elif op.kind in SLICES:
        yield op.arrays[0].bytes + (op.arrays[0].size if operands[0][0].bytes else 0)
    elif KERNEL_CALL.search(op.about):  # a row for every entry, as if no cache kept any
        *others, (index,) = operands
        yield from (a.bytes for a in (*op.arrays, index))
        for (a,) in others:
            table = len(a.shape) > len(index.shape)
            yield a.bytes * math.prod(index.shape) // math.prod(a.shape[:-1]) if table else a.bytes
    elif op.kind == "dynamic-update-slice":
        yield 2 * operands[1][0].bytes
    else:
        yield from (a.bytes for a in op.arrays)
        fused = computations[op.calls("calls")[0]] if op.kind == "fusion" else {}
        parameters = {
            o.about.partition(")")[0]: {name} for name, o in fused.items() if o.kind == "parameter"
        }
        for i, arrays in enumerate(operands):
            names = parameters.get(str(i), set())
            for name, o in fused.items():  # in the order in which they are computed
                if o.kind == "bitcast" and o.operands[0] in names:
                    names.add(name)
            uses = [o for n, o in fused.items() if n not in names and names & set(o.operands)]
            kinds = {o.kind if o.operands[0] in names else "whole" for o in uses}
            if kinds and kinds <= SLICES:
                yield from (a.bytes for o in uses for a in o.arrays)
            elif kinds == {"dynamic-update-slice"}:
                # In place: neither the operand nor the result is moved whole.
                yield from (
                    2 * fused[o.operands[1]].arrays[0].bytes - o.arrays[0].bytes for o in uses
                )
            else:
                yield from (a.bytes for a in arrays)
