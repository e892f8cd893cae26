"""The paths of a run, and its json and jsonl files, written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import socket
import tokenize
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from absl import logging

from crossdict_jax.errors import UserError

AGAIN = "delete it and run its stage again"
COPY = "restore it from a copy, or name a new --workdir"
NOT_UNDERSTOOD = (ArithmeticError, AttributeError, EOFError, FileNotFoundError, LookupError)
NOT_UNDERSTOOD += (SyntaxError, TypeError, ValueError, tokenize.TokenError)  # by numpy: headers
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
LOCK = ".lock"  # in a work directory: who works there
MEASURED = "autotuning"  # there: which kernels a GPU's compiler chose
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
FLOATS = ("float32", "float16", "bfloat16", "float64")  # what weights may be
SAVE_AGAIN = "which is not read; save the weights as float32, float16 or, in safetensors, bfloat16."
IN_THE_WAY = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def spelled(text: str) -> str:
    """Returns text with control characters as \\xNN: a terminal obeys them."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def say(text: str) -> None:
    """Prints a line of progress, unless ``--verbosity`` is -2 or below."""
    if logging.get_verbosity() >= logging.WARNING:
        print(text, flush=True)


say_once = functools.cache(say)  # what several stages would say again
RESERVED = ("shards", "training")  # folders beside those of models


def model_names(models: Iterable[str]) -> list[str]:
    """Returns a unique folder name per model: the last part of its path, -2, -3 on collision."""
    names: list[str] = []
    for model in models:
        path = os.path.abspath(os.path.expanduser(model))  # also of "." and "folder/.."
        base = re.sub(r"[^A-Za-z0-9._-]", "-", os.path.basename(path)) or "model"
        name, n = base, 1
        while name in (*names, *RESERVED):
            n += 1
            name = f"{base}-{n}"
        names.append(name)
    return names


def _below_root(name: str) -> property:
    return property(lambda work: work.root / name)


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The files of one run, all below ``root``; docs/design.md lists them."""

    root: Path

    activations = _below_root("activations")
    dictionaries = _below_root("dictionaries")
    maps = _below_root("maps")
    crosscoders = _below_root("crosscoders")
    results = _below_root("results")
    report = _below_root("report")
    timing = _below_root("results/timing.json")
    inputs = _below_root("inputs.json")

    @property
    def computed(self) -> bool:
        """Whether anything lies there beside what every command writes first."""
        beside = ("config.json", ".config.json.part", LOCK, MEASURED)  # the second after a kill
        entries = (p for p in self.root.glob("*") if p.name not in beside)
        return any(not p.is_dir() for entry in entries for p in (entry, *entry.rglob("*")))

    @property
    def trained(self) -> list[Path]:
        """The folders of all that has been trained on the activations."""
        names = ("controls", "crosscoders", "dictionaries", "efficiency", "maps", "pareto")
        return [self.root / name for name in names if (self.root / name).is_dir()]

    @property
    def controls(self) -> Workdir:
        """The controls' files, laid out as a run of its own."""
        return Workdir(self.root / "controls")

    def dictionary(self, model: str, site: Any, member: str = "seed-0") -> Path:
        return self.dictionaries / model / str(site) / member

    def map(self, source: str, target: str, site_source: Any, site_target: Any, kind: str) -> Path:
        """Returns the checkpoint directory of a map; ``kind`` ends in -shuffled for controls."""
        return self.maps / f"{source}-to-{target}" / f"{site_source}--{site_target}" / kind

    def crosscoder(self, sites: Iterable[Any], name: str = "aligned") -> Path:
        """Returns the checkpoint directory of a crosscoder of all models, each at its site."""
        return self.crosscoders / "--".join(map(str, sites)) / name

    def result(self, name: str) -> Path:
        """Returns the path of a result file such as ``transfer.jsonl``."""
        return self.results / name

    def record_timing(self, stage: str, **figures: float | int | str) -> None:
        """Merges a stage's figures (wall_s, ...) into results/timing.json; prints the main ones."""
        timing = read_json(self.timing) if self.timing.exists() else {}
        write_json(self.timing, timing | {stage: figures})
        of = ", controls" if self.root.name == "controls" else ""
        said = [f"{stage}{of}: {figures['wall_s']:.1f} s"]
        for name, figure in figures.items():
            if name.endswith("_per_s"):
                said.append(f"{figure:,.0f} {name.removesuffix('_per_s')}/s")
            elif isinstance(figure, int) and name not in ("devices", "rows", "tokens"):
                said.append(f"{figure:,} {name}")
        say(", ".join(said))


def open_workdir(
    path: str | os.PathLike,
    settings: dict,
    *,
    usual: dict | None = None,
    free: Iterable[str] = (),
    later: dict[str, tuple[str, ...]] | None = None,
) -> Workdir:
    """Returns the work directory at ``path``, made for ``settings`` or left there by an equal run.

    One in which nothing has been computed takes new settings: the first command may have failed.
    A setting that is "auto" by default, and now, is whatever the directory says.

    Args:
      usual: every setting at its default, which one had that the directory is too old to know.
      free: settings, or groups of them, that may differ from those of the directory.
      later: likewise, until there is one of these files (patterns), or a checkpoint in one of these
        folders.

    Raises:
      UserError: the directory belongs to a run with other settings (each difference is named),
        holds files that are not a run's, or cannot be written.
    """
    work = Workdir(Path(path))
    written = work.root / "config.json"
    settings, usual = (json.loads(json.dumps(tree)) for tree in (settings, usual or {}))
    if work.root.exists() and not work.root.is_dir():
        raise UserError(f"--workdir={path} is a file; name a folder, new or of an earlier run.")
    if (computed := work.computed) and not written.exists():
        raise UserError(
            f"--workdir={path} is not empty and holds no config.json; name a new folder."
        )
    if computed:
        stored = read_json(written, mend=COPY)
        old, new, defaults = (
            {k: v for k, v in flatten(tree) if k.partition(".")[0] not in set(free)}
            for tree in (stored, settings, usual)
        )
        old = {key: value for key, value in defaults.items() if key in new} | old
        unread = tuple(
            name
            for name, made in (later or {}).items()
            if not any(_finished(path) for each in made for path in work.root.glob(each))
        )
        differences, changed = [], False
        for key in sorted(old.keys() | new.keys()):
            there, now = old.get(key, "absent"), new.get(key, "absent")
            if there == now or now == defaults.get(key) == "auto":
                continue
            if key in new and key.startswith(unread):
                *groups, name = key.split(".")
                group = functools.reduce(lambda tree, g: tree.setdefault(g, {}), groups, stored)
                group[name], changed = now, True
            else:
                differences.append(f"{key}: {there} there, {now} now")
        if differences:
            raise UserError(
                f"--workdir={work.root} was made with other settings ({'; '.join(differences)}); "
                "use those settings or another --workdir."
            )
        if not changed:
            return work
        settings = stored
    try:
        write_json(written, settings)
    except OSError as error:
        raise UserError(
            f"--workdir={path} cannot be written ({error.strerror}); name a folder that can."
        ) from error
    return work


def _finished(path: Path) -> bool:
    """Whether there is this file, or in this folder a result of training."""
    seals = (seal.relative_to(path).parts for seal in path.rglob("*.sha256.json"))
    return path.is_file() or any("training" not in parts for parts in seals)


def flatten(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yields (dotted name, value) of nested dicts, as in ``sae.width``."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Keeps other processes from working in a work directory while the block runs.

    The lock is the kernel's: it ends with its process, however that ends. A directory that cannot
    be written is not locked, nor one whose file system knows no locks.

    Raises:
      UserError: another process works there; it is named.
    """
    path = root / LOCK
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+", errors="replace"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:  # its owner has just ended
                raise BlockingIOError
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{file.read().strip() or 'Another process'} is working in {root}; wait for it or "
                "stop it, or name another --workdir."
            ) from None
        except OSError:
            pass
        else:
            stack.callback(path.unlink, missing_ok=True)
            file.truncate(0)
            file.write(f"Process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def check_space(directory: Path, needed: int = 1) -> None:
    """Raises UserError if ``directory`` cannot take ``needed`` more bytes: a full disk, a quota.

    The space is allocated and freed again, which alone sees quotas and limits.
    """
    probe = directory / ".space.part"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, needed)
    except OSError as error:
        raise UserError(disk_words(directory, error, needed)) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def disk_words(
    path: Path, error: OSError, needed: int = 1, cannot: str = "cannot be written"
) -> str:
    """Returns what to do about a file that could not be written, in one line."""
    if error.errno in READ_ONLY:
        return f"{path} {cannot} ({error.strerror}); make it writable, or copy the run."
    if error.errno in IN_THE_WAY:
        return f"{path} {cannot} ({error.strerror}); move away what lies there."
    room = f"cannot take {needed / 1e6:.1f} MB more" if needed > 1 else "cannot be written"
    reason = error.strerror or error
    return f"{path} {room} ({reason}); free some space and run the same command again."


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` so that a reader never sees a part of it.

    Where nothing can be written, what says the same already may stay: a finished run.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        if error.filename == str(part):  # which is no name that a user knows
            error.filename = str(path)
        same = path.is_file() and path.read_bytes() == text.encode()
        if not (error.errno in READ_ONLY and same):
            raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON (undefined numbers become null)."""
    write_text(path, json.dumps(_strict(value), indent=1, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Writes one strict JSON object per line."""
    write_text(path, "".join(json.dumps(_strict(r), allow_nan=False) + "\n" for r in rows))


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """Returns {path in the folder: sha256} of all its files."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): file_digest(p) for p in files}


def parse_json(text: str) -> Any:
    """Returns the value that JSON spells; ValueError for all that Python's reader cannot take.

    Integers of thousands of digits are read as floats, which no setting and no text is.
    """
    try:
        return json.loads(
            text, parse_int=lambda digits: (int if len(digits) < 4000 else float)(digits)
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path: Path, kind: type = dict, *, lines: bool = False, mend: str = AGAIN) -> Any:
    """Returns the object, or list, in a JSON file; UserError if it is missing or damaged.

    With ``lines``, the list of values that are one a line. ``mend`` says what to do about damage.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors put a mark in front
        value = [parse_json(s) for s in text.splitlines() if s] if lines else parse_json(text)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run the stage that writes it first.") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged (not valid JSON: {error}); {mend}.") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} holds no JSON {'object' if kind is dict else 'list'}; {mend}.")
    return value


def read_jsonl(path: Path) -> list[dict]:
    """Returns the rows of a JSON-lines file; UserError if it is missing or damaged."""
    rows = read_json(path, list, lines=True)
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is damaged (a line is no JSON object); {AGAIN}.")
    return rows


@contextlib.contextmanager
def understood(path: Path, *, mend: str = AGAIN) -> Iterator[None]:
    """Turns what data of any content can raise in a reader into a UserError about ``path``."""
    try:
        yield
    except NOT_UNDERSTOOD as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        reason += f", {Path(at.filename).name} line {at.lineno}"
        raise UserError(f"{path} is damaged or not of its kind ({reason}); {mend}.") from error


def inside(folder: Path, file: Path) -> Path:
    """Returns a file of a folder of other people; UserError if links lead out of the folder.

    The hub's cache links to a folder of its own, beside.
    """
    root, target = (Path(os.path.realpath(path)) for path in (folder, file))
    cache = (p.parent for p in (root, *root.parents) if p.name == "snapshots")
    root = next((p for p in cache if (p / "blobs").is_dir()), root)
    if not target.is_relative_to(root):
        raise UserError(f"{file} is a link that leads out of {folder}; put the file itself there.")
    return file


def read_object(file: Path) -> dict:
    """Returns the JSON object in a file of other people; UserError if it is none."""
    if not file.is_file():
        raise UserError(f"{file.parent} lacks {file.name}; copy the whole folder.")
    return read_json(inside(file.parent, file), mend="copy it again")


def read_tensors(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields (name, numpy array) of a safetensors file; UserError if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(f"{file.parent} lacks {file.name}; copy the whole folder.")
    try:
        with safe_open(inside(file.parent, file), framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no dict
                try:
                    yield name, tensors.get_tensor(name)
                except (AttributeError, KeyError, TypeError, SafetensorError):  # unknown to numpy
                    dtype = tensors.get_slice(name).get_dtype()
                    raise UserError(f"{file}: weight {name!r} is {dtype}, {SAVE_AGAIN}") from None
    except SafetensorError as error:
        if dtype := re.search("unknown variant `(.*?)`", str(error)):  # to safetensors itself
            raise UserError(f"{file}: a weight is {dtype[1]}, {SAVE_AGAIN}") from error
        raise UserError(f"{file} is damaged ({error}); copy it again.") from error


def as_float32(value: Any, name: str, file: Path) -> Any:
    """Returns weights as float32; UserError if they are no floats."""
    if value.dtype.name not in FLOATS:
        raise UserError(f"{file}: weight {name!r} is {value.dtype.name}, {SAVE_AGAIN}")
    import numpy as np

    with np.errstate(over="ignore"):  # whoever needs finite numbers says so
        return value.astype("float32", copy=False)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
