"""The English documentation inside installed packages: a text per module, read with `ast`."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crossdict_jax.training.stage import progress_bar

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


def module_texts() -> Iterator[ModuleText]:
    """Yields the modules with enough documentation, in the hash order of their names.

    In that order the first N modules are a random sample, and a paragraph belongs to the first
    module that holds it: later ones lose it. So no paragraph is in two splits, and what a module
    keeps does not depend on how many are read. Parses no more than is consumed.
    """
    seen: set[int] = set()
    repeated = 0
    # Other bytes of the hash than split_of reads: else the first N would all be test documents.
    by_hash = sorted(_modules().items(), key=lambda m: hashlib.sha256(m[0].encode()).digest()[8:])
    progress = progress_bar(by_hash, desc="Reading docstrings", unit=" modules")
    for number, (name, path) in enumerate(progress, start=1):
        paragraphs = [p for text in _docstrings(path) for p in _paragraphs(text)]
        kept = [p for p in paragraphs if _is_new(p, seen)]
        repeated += len(paragraphs) - len(kept)
        text = "\n\n".join(kept)
        if len(text.encode()) >= MIN_DOCUMENT_BYTES:
            yield ModuleText(name, text, modules_read=number, repeated_paragraphs=repeated)


def _modules() -> dict[str, Path]:
    """Returns dotted name -> file of every module, tests left out; imports nothing."""
    modules = dict(_walk(Path(sysconfig.get_path("stdlib")), prefix=""))
    for package in PACKAGES:
        for root in _package_folders(package):
            modules |= dict(_walk(Path(root), prefix=f"{package}."))
    return modules


def _package_folders(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)  # of a top-level name: finds, does not import
    return list(spec.submodule_search_locations or []) if spec else []


def _walk(root: Path, *, prefix: str) -> Iterator[tuple[str, Path]]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if s.isidentifier() and s not in _EXCLUDED_FOLDERS]
        parents = Path(folder).relative_to(root).parts
        for file in files:
            stem, suffix = os.path.splitext(file)
            is_test = stem.startswith("test_") or stem.endswith("_test") or stem == "conftest"
            if suffix == ".py" and stem.isidentifier() and not is_test:
                parts = parents if stem == "__init__" else (*parents, stem)
                yield (prefix + ".".join(parts)).rstrip("."), Path(folder, file)


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
    """Returns a docstring's English paragraphs, without fenced code and doctests."""
    docstring = unicodedata.normalize("NFC", _FENCE.sub("", docstring))
    parts = re.split(r"\n[ \t]*\n\s*?(?=[^\n\s]|[ \t]+\S)", docstring)
    parts = [p for p in parts if p.strip() and not p.lstrip().startswith((">>>", "..."))]
    dense = [_RULE.sub("", part) for part in parts]
    letters = [sum(map(str.isalpha, filter(str.isascii, text))) for text in dense]
    is_english = [n > MIN_LETTERS * len(text) for n, text in zip(letters, dense)]
    return [part.rstrip() for part, english in zip(parts, is_english) if english]


def _is_new(paragraph: str, seen: set[int]) -> bool:
    """Whether a paragraph is not a repetition; records it and its lines in `seen`.

    A repetition is a paragraph seen before, whatever its line breaks, or one with more than half
    of its (long) lines seen before: copies with a name changed.
    """
    lines = [" ".join(line.split()) for line in paragraph.splitlines()]
    paragraph = " ".join(" ".join(lines).split())
    lines = [line for line in lines if len(line) >= MIN_REPEAT]
    old = sum(len(line) for line in lines if hash(line) in seen)
    is_new = hash(paragraph) not in seen and 2 * old <= sum(map(len, lines))
    seen.update(hash(line) for line in lines)
    if len(paragraph) >= MIN_REPEAT:
        seen.add(hash(paragraph))
    return is_new


def package_versions() -> dict[str, str]:
    """Returns the version of Python and of every installed package that is read."""
    versions = {"python": platform.python_version()}
    for package, distribution in PACKAGES.items():
        if _package_folders(package):
            try:
                versions[distribution] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:  # importable, but not installed
                versions[distribution] = "unknown"
    return versions
