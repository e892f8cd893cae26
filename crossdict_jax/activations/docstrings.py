"""The English docstrings of installed packages: a text per module, read with `ast`."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from crossdict_jax.training.stage import progress_bar

# Import name -> distribution, where they differ. Read beside the standard library: packages that
# the project requires, if installed and documented in English.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "_pytest": "pytest",
    "absl": "absl-py",
    "jinja2": "Jinja2",
    "orbax": "orbax-checkpoint",
}
PACKAGES = (
    *("PIL", "_pytest", "absl", "datasets", "etils", "flax", "fsspec", "huggingface_hub"),
    *("hypothesis", "jax", "jinja2", "matplotlib", "ml_collections", "numpy", "optax", "orbax"),
    *("packaging", "pandas", "pyarrow", "rich", "scipy", "tokenizers", "tqdm", "transformers"),
    "treescope",
)
MIN_DOCUMENT_BYTES = 200
MIN_REPEAT = 40  # characters; shorter lines and paragraphs ("Returns") may repeat anywhere
MIN_LETTERS = 0.7  # of a paragraph's characters other than spaces and ruled lines

_EXCLUDED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "idle_test", "test", "tests"}
_EXCLUDED_FOLDERS |= {"_tests", "testing", "testdata", "_testing"}
_FENCE = re.compile(r"^[ \t]*```.*?^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
_RULE = re.compile(r"[-=~*#^_]{3,}|\s+")
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def module_texts(roots: Iterable[tuple[str, Path]] | None = None) -> Iterator[tuple[str, str]]:
    """Yields (module name, documentation) in the hash order of the names.

    So the first N modules are a random sample. A paragraph belongs to the first module that holds
    it, so none is in two splits, and a module's text does not depend on how many are read. Repeated
    are paragraphs seen before, whatever their line breaks, or with more than half of the (long)
    lines seen before.

    Args:
      roots: (prefix of names, folder); default: the installed packages.
    """
    seen: set[int] = set()
    modules = find_modules(installed() if roots is None else roots)
    # Other bytes of the hash than split_of reads: else the first N would all be test documents.
    by_hash = sorted(modules.items(), key=lambda m: hashlib.sha256(m[0].encode()).digest()[8:])
    for name, path in progress_bar(by_hash, desc="Reading docstrings", unit=" modules"):
        kept = []
        for paragraph in _paragraphs(path):
            lines = [" ".join(line.split()) for line in paragraph.splitlines()]
            joined = " ".join(" ".join(lines).split())
            long = [line for line in lines if len(line) >= MIN_REPEAT]
            old = sum(len(line) for line in long if hash(line) in seen)
            if hash(joined) not in seen and 2 * old <= sum(map(len, long)):
                kept.append(paragraph)
            seen.update(hash(text) for text in (*long, joined) if len(text) >= MIN_REPEAT)
        text = "\n\n".join(kept)
        if len(text.encode()) >= MIN_DOCUMENT_BYTES:
            yield name, text


def installed() -> list[tuple[str, Path]]:
    """Returns (prefix of names, folder) of the standard library and the installed packages."""
    roots = [("", Path(sysconfig.get_path("stdlib")))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # of a top-level name: finds, does not import
        folders = spec.submodule_search_locations if spec else ()
        roots += [(f"{package}.", Path(folder)) for folder in folders or ()]
    return roots


def find_modules(roots: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Returns {dotted name: file} of every module but tests; imports nothing."""
    modules = {}
    for prefix, root in roots:
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = {s for s in subfolders if s.isidentifier()} - _EXCLUDED_FOLDERS
            parents = Path(folder).relative_to(root).parts
            for file in files:
                stem, suffix = os.path.splitext(file)
                is_test = stem.startswith("test_") or stem.endswith("_test") or stem == "conftest"
                if suffix == ".py" and stem.isidentifier() and not is_test:
                    parts = parents if stem == "__init__" else (*parents, stem)
                    modules[(prefix + ".".join(parts)).rstrip(".")] = Path(folder, file)
    return modules


def _paragraphs(path: Path) -> Iterator[str]:
    """Yields the English paragraphs of a file's docstrings, without fenced code and doctests.

    Nothing of a file that does not parse.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        try:
            nodes = [ast.parse(path.read_bytes())]
        except (SyntaxError, ValueError, RecursionError, OSError):  # templates, broken links
            return
    while nodes:
        node = nodes.pop()
        blocks = (getattr(node, block, ()) for block in ("body", "handlers", "orelse", "finalbody"))
        nodes += reversed([child for block in blocks for child in block])
        if not isinstance(node, _DOCUMENTED) or not (text := ast.get_docstring(node, clean=False)):
            continue
        text = _FENCE.sub("", inspect.cleandoc(text))
        for part in re.split(r"\n[ \t]*\n\s*?(?=[^\n\s]|[ \t]+\S)", text):
            dense = _RULE.sub("", part)
            letters = sum(map(str.isalpha, filter(str.isascii, dense)))
            is_code = part.lstrip().startswith((">>>", "..."))
            if part.strip() and not is_code and letters > MIN_LETTERS * len(dense):
                yield part.rstrip()


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that are read."""
    versions = {"python": platform.python_version()}
    for package in dict.fromkeys(prefix for prefix, _ in installed()[1:]):
        distribution = DISTRIBUTIONS.get(package := package.rstrip("."), package)
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:  # importable, but not installed
            versions[distribution] = "unknown"
    return versions
