"""Every fault of the machine many times over, in a whole small run, and a table of what it cost.

    python tests/fault_table.py [--kills=100] [--times=10] [--seed=0] [--only=WORD]

A run is forked from this process, which has imported everything and computed nothing. After each
fault the same command runs again: all bits of its rows, activations, parameters and results must
be those of a run that nothing disturbed. Mounts need ``unshare``; without it they are not tried.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | dict(os.environ)  # JAX reads it
STAGES = {  # and what each writes; the controls lie beside the run's own
    "extract_activations": ("activations", "results/pairing.json"),
    "train_saes": ("dictionaries", "controls/dictionaries"),
    "train_hypernetworks": ("maps", "controls/maps"),
    "evaluate": ("results/transfer*", "results/evaluate*", "results/controls*"),
    "intervene": ("results/causal*", "results/feature*"),
    "report": ("report",),
}
ODD = ("a b", "ü–漢", "it's", '"q"', "$(x)", ";&|", "100%", "a:b", "#1", "[x]", "-x")
ODD += ("new\nline", "\udcff")
SECONDS = 30  # within which a run that is told to stop has saved and ended


def fork(call, log: Path) -> int:
    """Runs ``call`` in a process of its own, what it says in ``log``; returns the process."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    code = 70
    try:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
        code = call() or 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def digests(work: Path) -> dict[str, str]:
    """{file or parameter: its sha256} of all that a finished run leaves."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from crossdict_jax.training import checkpoint

    values = {}
    for pattern in ("results/*.jsonl", "results/pairing.json", "activations/**/*.*"):
        for file in filter(Path.is_file, work.glob(pattern)):
            values[str(file.relative_to(work))] = file.read_bytes()
    seals = [*work.glob("**/seed-*/*.sha256.json"), *work.glob("**/maps/**/*.sha256.json")]
    for folder in {file.parent for file in seals}:
        path = folder / str(checkpoint.finished_step(folder)) / "params"
        tree = ocp.PyTreeCheckpointer().restore(path.absolute())
        for key, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = f"{folder.relative_to(work)}{jax.tree_util.keystr(key)}"
            values[name] = np.asarray(leaf).tobytes()
    return {name: hashlib.sha256(value).hexdigest() for name, value in values.items()}


class Lab:
    """The undisturbed run, and what starts, disturbs and compares others."""

    def __init__(self, root: Path, seed: int):
        self.root, self.draw, self.log, self.count = root, random.Random(seed), root / "log", 0
        flags = self.computed("tiny_run", "small_flags", root / "a b'ü,;$(x)")
        self.flags = [*flags, "--config.controls=ceiling"]
        for name in ("cold", "undisturbed"):  # the second finds its programs compiled
            self.finished, started = root / name, time.monotonic()
            assert self.run(self.finished) == (0, ""), self.told()
        self.seconds = time.monotonic() - started
        self.bits = self.bits_of(self.finished)
        assert self.bits == self.bits_of(root / "cold") and len(self.bits) > 40

    def computed(self, module: str, function: str, *arguments):
        """What a function gives in a process of its own: this one must not start JAX."""

        def call():
            value = getattr(importlib.import_module(module), function)(*arguments)
            (self.root / "value").write_text(json.dumps(value))

        assert wait(fork(call, self.root / "value.log")) == 0, self.root
        return json.loads((self.root / "value").read_text())

    def told(self) -> str:
        return Path(f"{self.log}.err").read_text(errors="replace")

    def start(self, work: Path, before=lambda: None, log: Path | None = None) -> int:
        from launch import command, experiment

        def call():
            before()
            sys.argv = ["experiment", f"--workdir={work}", *self.flags]
            command.run(experiment.main)

        return fork(call, log or self.log)

    def run(self, work: Path, before=lambda: None) -> tuple[int, str]:
        return wait(self.start(work, before)), self.told()

    def stages(self) -> list[str]:
        """The stages that the last run has begun."""
        said = re.findall(r"^\[\d/6\] (\w+)", Path(f"{self.log}.out").read_text(), re.MULTILINE)
        return ["before", *said]

    def killed(self, work: Path, number: int, *, before=lambda: None) -> tuple[int, float]:
        """Sends a signal at a random moment of a random stage; the exit code, seconds to end."""
        left = [s for s, parts in STAGES.items() if not list(work.glob(parts[0]))]
        process, wanted = self.start(work, before), self.draw.choice(("before", *(left or STAGES)))
        while not (over := os.waitpid(process, os.WNOHANG))[0] and wanted not in self.stages():
            time.sleep(0.01)
        started = time.monotonic()
        if not over[0]:
            time.sleep(self.draw.uniform(0, self.seconds / 12))
            os.kill(process, number)
            started = time.monotonic()
            over = os.waitpid(process, 0)
        return os.waitstatus_to_exitcode(over[1]), time.monotonic() - started

    def begun(self, first: int | None = None) -> Path:
        """A new copy of the run as it was before one of its stages, at random."""
        self.count += 1
        work = Path(shutil.copytree(self.finished, self.root / f"run-{self.count}"))
        first = self.draw.randrange(len(STAGES)) if first is None else first
        for pattern in (p for part in list(STAGES.values())[first:] for p in part):
            for path in work.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return work

    def bits_of(self, work: Path) -> dict[str, str]:
        return self.computed("fault_table", "digests", work)

    def ends_the_same(self, work: Path) -> bool:
        """Whether the command, run again, ends with the bits of the undisturbed run."""
        code, told = self.run(work)
        same = (code, told) == (0, "") and self.bits_of(work) == self.bits
        if same:
            shutil.rmtree(work)
        else:
            print(f"LOST: {work}: exit code {code}: {told.strip()[-600:]}", flush=True)
        return same


# Each fault: (lab, number of the try) -> (whether it ended as it must, work directory, note).


def refused(ended: tuple[int, str], words: str) -> bool:
    """Whether a run ended in one line with these words."""
    code, told = ended
    return code == 2 and len(told.splitlines()) == 1 and re.search(words, told) is not None


def sigkill(lab, number):
    work, stages = lab.begun(), []
    for _ in range(5):  # in a row
        code, _ = lab.killed(work, signal.SIGKILL)
        if code == 0:
            break
        stages.append(lab.stages()[-1])
    return code in (0, -9), work, stages


def sigterm(lab, number):
    work = lab.begun()
    code, seconds = lab.killed(work, signal.SIGTERM)
    one_line = code == 0 or len(lab.told().splitlines()) == 1
    return code in (0, 130) and one_line and seconds < SECONDS, work, f"{seconds:.0f} s:"


@contextlib.contextmanager
def mounted(*options: str, at: Path):
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", *options, at], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", at], check=True)


def full_disk(lab, number):
    work, disk = lab.begun(), lab.root / "disk"
    used = sum(f.stat().st_size + 4096 for f in work.rglob("*"))
    size = f"size={used + int(2 ** lab.draw.uniform(10, 20))}"
    with mounted("-t", "tmpfs", "-o", size, "tmpfs", at=disk):
        shutil.copytree(work, disk / "run")
        ended = lab.run(disk / "run")
        shutil.rmtree(work)
        shutil.copytree(disk / "run", work)
    return ended[0] == 0 or refused(ended, "free some"), work, ""


def no_room(lab, number):
    """No file may grow beyond a block, in every stage in turn."""

    def limit():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is said has room
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    works = [lab.begun(first) for first in range(len(STAGES))]
    told = [refused(lab.run(work, limit), "free some") for work in works]
    return all(told + [lab.ends_the_same(work) for work in works[1:]]), works[0], ""


@contextlib.contextmanager
def fixed(work: Path):
    with mounted("--bind", work, at=work):
        subprocess.run(["mount", "-o", "remount,bind,ro", work], check=True)
        yield


def read_only(lab, number):
    """A finished run can be looked at, another one cannot go on."""
    finished, work = lab.begun(len(STAGES)), lab.begun()
    good = lab.run(finished) == (0, "")  # the page tells the folder's name
    with fixed(finished):
        good &= lab.run(finished) == (0, "")
    shutil.rmtree(finished)
    with fixed(work):
        return good and refused(lab.run(work), "Read-only file system"), work, ""


DAMAGED = {  # a pattern of files; the first stage done again, which reads them; what made them
    "shard": ("activations/*/*/shard-*.npy", 1, "activations"),
    "index": ("activations/*.*", 1, "activations"),
    "checkpoint": ("dictionaries/*/*/seed-*/**/*", 3, "dictionaries"),
    "result file": ("results/*.jsonl", 5, None),
}


def damaged(kind, change):
    pattern, first, folder = DAMAGED[kind]

    def fault(lab, number):
        work = lab.begun(first)
        files = sorted(f for f in work.glob(pattern) if f.is_file() and f.stat().st_size)
        file = lab.draw.choice(files)
        data, at = file.read_bytes(), lab.draw.randrange(file.stat().st_size)
        flipped = data[:at] + bytes([data[at] ^ 1 << lab.draw.randrange(8)]) + data[at + 1 :]
        file.write_bytes(data[:at] if change == "truncated" else flipped)
        ended = lab.run(work)
        noticed = refused(ended, f"{re.escape(file.name)}|delete ")
        if noticed and number % 2:  # the line is followed: the stage that made it runs again
            shutil.rmtree(work / folder) if folder else file.unlink()
        elif ended[0] != 0 or file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)  # the file is brought back from elsewhere
        return noticed or ended[0] == 0, work, "noticed" if noticed else "not read"

    return fault


def jumping_clock(lab, number):
    work, real, draw = lab.begun(), time.time, random.Random(number)
    years = lambda: draw.uniform(-10, 10) * 3e7  # noqa: E731

    def jump():
        time.time = lambda: real() + years()
        time.time_ns = lambda: int(1e9 * time.time())

    lab.killed(work, signal.SIGKILL, before=jump)
    for file in work.rglob("*"):
        os.utime(file, (real() + years(), real() + years()))
    return lab.run(work, jump) == (0, ""), work, ""


def two_runs(lab, number):
    work, other = lab.begun(), lab.root / "other"
    process = lab.start(work, log=other)
    while not (work / ".lock").exists() and not os.waitpid(process, os.WNOHANG)[0]:
        time.sleep(0.01)
    time.sleep(lab.draw.uniform(0, 1))
    ended = lab.run(work)
    os.kill(process, signal.SIGKILL)
    wait(process)
    return refused(ended, f"Process {process} on .* is working in"), work, ""


def poisoned(where):
    def fault(lab, number):
        work, at = lab.begun(1), (5, 25, 45)[number % 3]

        def poison():
            import jax
            import jax.numpy as jnp

            from crossdict_jax.training.ensemble import Ensemble

            def spoil(leaf):
                if leaf.dtype == jnp.uint16:  # the bits of bfloat16
                    return jnp.full_like(leaf, 0x7FC0)
                return leaf * jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

            def put(tree, number):
                bad = jax.tree.map(spoil, tree)
                return jax.tree.map(lambda a, b: jnp.where(number == at, a, b), bad, tree)

            whole = Ensemble.step

            def step(self, state, batch, number, *more, **static):
                batch = put(batch, number) if where == "batch" else batch
                state, metrics = whole(self, state, batch, number, *more, **static)
                params = state["params"]
                params = put(params, number) if where == "gradient" else params
                return state | {"params": params}, metrics

            Ensemble.step = step

        ended = lab.run(work, poison)
        seals = work.glob("dictionaries/training/*/checkpoints/*.sha256.json")
        kept = [file.name for file in seals] == [f"{at // 20 * 20}.sha256.json"][: at // 20]
        return refused(ended, "is not finite (at|after) step") and kept, work, ""

    return fault


def no_memory(where):
    def fault(lab, number):
        work, after = lab.begun(1), lab.draw.randrange(6)

        def starve():
            import jax

            from crossdict_jax.training import loop

            told = "RESOURCE_EXHAUSTED: Out of memory allocating 1048576 bytes."
            error = MemoryError() if where == "host" else jax.errors.JaxRuntimeError(told)
            call, left = loop.Chunks.__call__, [after]

            def starved(self, *arguments):
                left[0] -= 1
                if left[0] < 0:
                    raise error
                return call(self, *arguments)

            loop.Chunks.__call__ = starved

        return refused(lab.run(work, starve), "Out of memory.*lower a batch_size"), work, ""

    return fault


def elsewhere(lab, number):
    work, link = lab.begun(), lab.root / "link"
    lab.killed(work, signal.SIGKILL)
    moved = work.rename(f"{work} {ODD[number % len(ODD)]}")
    link.symlink_to(moved)

    def bare():
        for name in ("HOME", "XDG_CACHE_HOME", "CROSSDICT_DATA"):
            os.environ.pop(name, None)
        os.chdir("/")

    good = lab.run(link if number % 2 else moved, bare) == (0, "")
    link.unlink()
    return good, moved, ""


FAULTS = {"SIGKILL, up to 5 in a row": sigkill, "SIGTERM": sigterm}
FAULTS |= {"full disk (mount)": full_disk, "no room in any stage": no_room}
FAULTS |= {"read-only directory (mount)": read_only}
FAULTS |= {f"{w}, {how}": damaged(w, how) for w in DAMAGED for how in ("truncated", "bit flipped")}
FAULTS |= {"a clock that jumps": jumping_clock, "two runs, one is killed": two_runs}
FAULTS |= {f"NaN in a {where}": poisoned(where) for where in ("batch", "gradient")}
FAULTS |= {f"no memory on the {where}": no_memory(where) for where in ("device", "host")}
FAULTS |= {"moved, odd names, links, no HOME": elsewhere}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("kills", 100), ("times", 10), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="", help="the faults whose names hold this word")
    asked = parser.parse_args()
    print(f"{'fault':32}  tried  survived  lost  seen", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        lab = Lab(Path(folder), asked.seed)
        for name, fault in FAULTS.items():
            if asked.only not in name or ("mount" in name and not os.environ.get("MOUNTS")):
                continue
            survived, lost, number, seen = 0, 0, 0, Counter()
            while (seen.total() < asked.kills) if fault is sigkill else number < asked.times:
                good, work, notes = fault(lab, number)
                number += 1
                if not good:
                    print(f"NOT SURVIVED: {name}: {lab.told().strip()[-600:]}", flush=True)
                survived, lost = survived + good, lost + (not lab.ends_the_same(work))
                seen.update([notes] if isinstance(notes, str) else notes)
                print(f"  {name}: {number} tried, {lost} lost, {dict(seen)}", file=sys.stderr)
            failed += lost + number - survived
            notes = ", ".join(f"{note} {n}" for note, n in seen.items() if note)
            print(f"{name:32}  {number:5}  {survived:8}  {lost:4}  {notes}", flush=True)
    return failed > 0


def prepare() -> None:
    """Imports everything, so that forked runs need not, and computes nothing."""
    os.environ["PYTHONPATH"] = str(ROOT)
    for name in ("matplotlib.pyplot", "orbax.checkpoint", "pyarrow.parquet", "transformers"):
        importlib.import_module(name)
    importlib.import_module("launch.experiment")


if __name__ == "__main__":
    mine = ["unshare", "-rm", sys.executable, *sys.argv]  # where mounts are this process's alone
    if not os.environ.get("MOUNTS") and not subprocess.run([*mine[:2], "true"]).returncode:
        os.execvpe(mine[0], mine, os.environ | {"MOUNTS": "1"})
    prepare()
    sys.exit(main())
