"""The English documentation inside installed packages: a text per module, read with `ast`."""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import sys
import sysconfig
import tempfile
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Import name -> distribution. The standard library and packages that the project requires, as far
# as they are installed and document themselves in English.
PACKAGES = {
    "PIL": "pillow",
    "_pytest": "pytest",
    "absl": "absl-py",
    "datasets": "datasets",
    "etils": "etils",
    "flax": "flax",
    "fsspec": "fsspec",
    "huggingface_hub": "huggingface_hub",
    "hypothesis": "hypothesis",
    "jax": "jax",
    "jinja2": "Jinja2",
    "matplotlib": "matplotlib",
    "ml_collections": "ml_collections",
    "numpy": "numpy",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "packaging": "packaging",
    "pandas": "pandas",
    "pyarrow": "pyarrow",
    "rich": "rich",
    "scipy": "scipy",
    "tokenizers": "tokenizers",
    "tqdm": "tqdm",
    "transformers": "transformers",
    "treescope": "treescope",
}
EXTRACTION = 1  # raise it when the extraction changes: older caches are then rebuilt
MIN_DOCUMENT_BYTES = 200
MIN_REPEAT = 40  # characters; shorter lines and paragraphs ("Returns") may repeat anywhere
MIN_LETTERS = 0.7  # of a paragraph's characters other than spaces and ruled lines

_EXCLUDED_FOLDERS = {"__pycache__", "idle_test", "site-packages", "dist-packages", "test", "tests"}
_EXCLUDED_FOLDERS |= {"_tests", "testing", "testdata", "_testing"}
_FENCE = re.compile(r"^[ \t]*```.*?^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
_RULE = re.compile(r"[-=~*#^_]{3,}|\s+")


@dataclass(frozen=True)
class ModuleText:
    """The documentation of one module, and running totals of the scan up to it."""

    name: str
    text: str
    modules_read: int
    repeated_paragraphs: int


def module_texts(wanted: int) -> list[ModuleText]:
    """Returns the documentation of the first `wanted` modules (or all), in the hash order of names.

    In that order the first N modules are a random sample, and a paragraph belongs to the first
    module that holds it: later ones lose it. So no paragraph is in two splits, and what a module
    keeps does not depend on `wanted`. Read from the user's cache when that holds enough.
    """
    key = [EXTRACTION, sys.platform, package_versions()]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / f"docstrings-{digest[:16]}.jsonl"
    modules = _read_cache(path, wanted=wanted)
    if modules is None:
        modules, complete = _take(wanted)
        _write_cache(path, modules=modules, complete=complete)
    return modules[:wanted]


def _scan() -> Iterator[ModuleText]:
    """Yields every module with enough documentation; parses no more than is consumed."""
    seen: set[int] = set()
    repeated = 0
    for number, (name, path) in enumerate(sorted(_modules().items(), key=_order), start=1):
        paragraphs = [p for d in _docstrings(path) for p in _paragraphs(d) if _is_english(p)]
        kept = [p for p in paragraphs if _is_new(p, seen)]
        repeated += len(paragraphs) - len(kept)
        text = "\n\n".join(kept)
        if len(text.encode()) >= MIN_DOCUMENT_BYTES:
            yield ModuleText(name, text, modules_read=number, repeated_paragraphs=repeated)


def _order(module: tuple[str, Path]) -> bytes:
    # Other bytes of the hash than split_of reads: else the first N would all be test documents.
    return hashlib.sha256(module[0].encode()).digest()[8:]


def _modules() -> dict[str, Path]:
    """Returns dotted name -> file of every module, tests left out; imports nothing."""
    found = dict(_walk(Path(sysconfig.get_path("stdlib")), prefix=""))
    for package in PACKAGES:
        for root in _package_folders(package):
            found |= dict(_walk(Path(root), prefix=f"{package}."))
    return found


def _package_folders(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)  # of a top-level name: finds, does not import
    return list(spec.submodule_search_locations or []) if spec else []


def _walk(root: Path, *, prefix: str) -> Iterator[tuple[str, Path]]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if s.isidentifier() and s not in _EXCLUDED_FOLDERS]
        parents = Path(folder).relative_to(root).parts
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix == ".py" and stem.isidentifier() and not _is_test(stem):
                parts = parents if stem == "__init__" else (*parents, stem)
                yield (prefix + ".".join(parts)).rstrip("."), Path(folder, file)


def _is_test(stem: str) -> bool:
    return stem.startswith("test_") or stem.endswith("_test") or stem == "conftest"


def _docstrings(path: Path) -> Iterator[str]:
    """Yields the docstrings of a source file in their order; none of one that does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError, OSError):  # templates, broken links
            return
    for node in _definitions(tree):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield inspect.cleandoc(docstring)


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the module and every class and function in source order, statements only."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, ()):
            yield from _definitions(child)


def _paragraphs(docstring: str) -> list[str]:
    """Returns a docstring's paragraphs without fenced code and doctests."""
    docstring = unicodedata.normalize("NFC", _FENCE.sub("", docstring))
    parts = re.split(r"\n[ \t]*\n\s*?(?=[^\n\s]|[ \t]+\S)", docstring)
    return [p.rstrip() for p in parts if p.strip() and not p.lstrip().startswith((">>>", "..."))]


def _is_english(paragraph: str) -> bool:
    dense = _RULE.sub("", paragraph)
    letters = sum(map(str.isalpha, filter(str.isascii, dense)))
    return letters > MIN_LETTERS * len(dense)


def _is_new(paragraph: str, seen: set[int]) -> bool:
    """Whether a paragraph is not a repetition; records it and its lines in `seen`.

    A repetition is a paragraph seen before, whatever its line breaks, or one with more than half
    of its (long) lines seen before: copies with a name changed.
    """
    lines = [" ".join(line.split()) for line in paragraph.splitlines()]
    whole = " ".join(" ".join(lines).split())
    lines = [line for line in lines if len(line) >= MIN_REPEAT]
    old = sum(len(line) for line in lines if hash(line) in seen)
    is_new = hash(whole) not in seen and 2 * old <= sum(map(len, lines))
    seen.update(hash(line) for line in lines)
    if len(whole) >= MIN_REPEAT:
        seen.add(hash(whole))
    return is_new


@functools.cache
def package_versions() -> dict[str, str]:
    """Returns the version of Python and of every installed package that is read."""
    versions = {"python": platform.python_version()}
    for package, distribution in PACKAGES.items():
        if _package_folders(package):
            versions[distribution] = _version(distribution)
    return versions


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # importable, but not installed
        return "unknown"


# ---------------------------------------------------------------- the cache


def cache_folder() -> Path:
    """Returns the user's cache folder of this project, by the platform's convention."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "crossdict_jax"


def _take(wanted: int) -> tuple[list[ModuleText], bool]:
    """Returns (the first `wanted` modules, whether the scan ended before that)."""
    from tqdm import tqdm

    modules = []
    with _paused_collection():
        for module in tqdm(_scan(), desc="Reading docstrings", unit=" modules", disable=None):
            modules.append(module)
            if len(modules) == wanted:
                return modules, False
    return modules, True


@contextlib.contextmanager
def _paused_collection() -> Iterator[None]:
    """Pauses garbage collection, which finds no cycles in syntax trees and takes a third longer."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_cache(path: Path, *, wanted: int) -> list[ModuleText] | None:
    """Returns the cached modules, or None when they are missing, damaged or too few."""
    try:
        head, body = path.read_bytes().split(b"\n", 1)
        seal, found, complete = json.loads(head)
    except (OSError, ValueError, TypeError):
        return None
    enough = complete or found >= wanted
    if not enough or seal != hashlib.sha256(body).hexdigest():
        return None
    return [ModuleText(**json.loads(line)) for line in body.splitlines()[:wanted]]


def _write_cache(path: Path, *, modules: list[ModuleText], complete: bool) -> None:
    """Writes the cache in one move; a cache folder that cannot be written costs time only."""
    body = "".join(json.dumps(vars(module)) + "\n" for module in modules).encode()
    header = [hashlib.sha256(body).hexdigest(), len(modules), complete]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(json.dumps(header).encode() + b"\n" + body)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"The docstring cache {path} cannot be written: {error}")
