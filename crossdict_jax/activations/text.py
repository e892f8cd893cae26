"""Documents: read from docstrings, files or the hub, NFC-normalised, cut, and split by hash."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import sys
import sysconfig
import tempfile
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crossdict_jax.config import TextConfig
from crossdict_jax.errors import UserError

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text (NFC, cut to the configured size) and the split that its hash puts it in."""

    name: str  # where it came from: a dotted module, a file, a file and row
    text: str
    split: str  # train | validation | test


@dataclass(frozen=True)
class Corpus:
    """All documents of a run, ordered train, validation, test, and how they came about."""

    documents: tuple[Document, ...]
    provenance: dict  # JSON values only

    def split(self, name: str) -> tuple[Document, ...]:
        """Returns the documents of one split, in source order."""
        return tuple(d for d in self.documents if d.split == name)


@dataclass(frozen=True)
class _Raw:
    """A document as its source gives it."""

    name: str
    text: str
    key: str = ""  # what the split is drawn from; "" means the NFC text


# ---------------------------------------------------------------- loading


def load_corpus(text: TextConfig) -> Corpus:
    """Returns the first `text.documents` documents of `text.source`, cut and split.

    Blank documents and duplicates are skipped and counted; they do not count as documents. The
    split is drawn from the dotted module name (docstrings) or the whole NFC text (everything
    else), so it depends neither on `max_bytes` nor on what else is read.

    Raises:
      UserError: a bad setting, an unreadable source, or a split left without a document.
    """
    _check_settings(text)
    raw, details = _open_source(text)
    counts = Counter()
    documents = sorted(_prepare(raw, text=text, counts=counts), key=lambda d: SPLITS.index(d.split))
    _check_splits(documents, text=text)
    provenance = _provenance(documents, text=text, counts=counts) | details()
    return Corpus(documents=tuple(documents), provenance=provenance)


def split_of(key: str, *, validation_fraction: float, test_fraction: float) -> str:
    """Returns the split of a document: a pure function of sha256(key) and the two fractions."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    if share < test_fraction:
        return "test"
    return "validation" if share < test_fraction + validation_fraction else "train"


def cut(text: str, *, max_bytes: int) -> str:
    """Returns the longest head of `text` within `max_bytes` UTF-8 bytes.

    Ends at a character, and before the last whitespace when that costs less than half.
    """
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return text
    head = encoded[:max_bytes].decode(errors="ignore")
    if text[len(head)].isspace():
        return head
    last = max((m.start() for m in re.finditer(r"\s", head)), default=0)
    return head[:last] if 2 * last >= len(head) else head


def _prepare(raw: Iterator[_Raw], *, text: TextConfig, counts: Counter) -> Iterator[Document]:
    seen = set()
    for item in raw:
        normal = unicodedata.normalize("NFC", item.text)
        head = cut(normal, max_bytes=text.max_bytes)
        # Documents equal after the cut are duplicates too: they may lie in two splits.
        digests = {_digest(normal), _digest(head)}
        if not head.strip():
            counts["blank"] += 1
        elif digests & seen:
            counts["duplicates"] += 1
        else:
            seen |= digests
            counts["documents"] += 1
            counts["changed_by_nfc"] += normal != item.text
            counts["cut_to_max_bytes"] += head != normal
            yield Document(name=item.name, text=head, split=_split(item.key or normal, text))
        if counts["documents"] == text.documents:
            return


def _split(key: str, text: TextConfig) -> str:
    return split_of(
        key, validation_fraction=text.validation_fraction, test_fraction=text.test_fraction
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _check_settings(text: TextConfig) -> None:
    if text.max_bytes <= 0:
        raise UserError(f"text.max_bytes={text.max_bytes} must be 1 or more bytes.")
    if text.documents <= 0:
        raise UserError(f"text.documents={text.documents} must be 1 or more (3 splits need 3).")
    fractions = (text.validation_fraction, text.test_fraction)
    if not (min(fractions) > 0 and math.fsum(fractions) < 1):
        raise UserError(
            f"text.validation_fraction={fractions[0]} and text.test_fraction={fractions[1]} must "
            "both be above 0 and add up to less than 1."
        )


def _check_splits(documents: list[Document], *, text: TextConfig) -> None:
    if not documents:
        raise UserError(f"text.source={text.source} holds no text: every document is blank.")
    sizes = Counter(d.split for d in documents)
    empty = [split for split in SPLITS if not sizes[split]]
    if empty:
        raise UserError(
            f"text.source={text.source} gave {len(documents)} documents, none of them in the split "
            f"{' or '.join(empty)}: raise text.documents={text.documents}, the split's fraction, "
            "or give more text."
        )


def _provenance(documents: list[Document], *, text: TextConfig, counts: Counter) -> dict:
    digest = hashlib.sha256()
    bytes_of = Counter()
    for document in documents:
        encoded = document.text.encode()
        bytes_of[document.split] += len(encoded)
        digest.update(f"{document.split} {len(encoded)}\n".encode() + encoded)
    sizes = Counter(d.split for d in documents)
    return {
        "source": text.source,
        "documents": {split: sizes[split] for split in SPLITS},
        "bytes": {split: bytes_of[split] for split in SPLITS},
        "documents_asked": text.documents,
        "max_bytes": text.max_bytes,
        **{k: counts[k] for k in ("changed_by_nfc", "cut_to_max_bytes", "blank", "duplicates")},
        "sha256": digest.hexdigest(),
    }


def _open_source(text: TextConfig):
    """Returns (iterator of raw documents, function giving the source's own provenance)."""
    if text.source == "docstrings":
        reader = _Docstrings(documents=text.documents)
        return reader.read(), reader.details
    if text.source.startswith("hf:"):
        return _read_hub(text), dict
    return _read_path(Path(text.source).expanduser(), text=text), dict


# ---------------------------------------------------------------- files and folders


def _read_path(path: Path, *, text: TextConfig) -> Iterator[_Raw]:
    if path.is_dir():
        return _read_folder(path, text=text)
    if not path.is_file():
        raise UserError(
            f"text.source={text.source} does not exist: give docstrings, a file or folder of "
            f"{' '.join(SUFFIXES)}, or hf:NAME."
        )
    if path.suffix not in SUFFIXES:
        raise UserError(f"text.source={text.source} must end in one of {' '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise UserError(f"text.source={text.source} is an empty file: give one with text.")
    if path.suffix == ".txt":
        return _read_long_text(path, max_bytes=text.max_bytes)
    return _READERS[path.suffix](path, name=path.name, column=text.column)


def _read_folder(folder: Path, *, text: TextConfig) -> Iterator[_Raw]:
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"text.source={text.source} holds no file ending in {' '.join(SUFFIXES)}.")
    for file in files:
        name = file.relative_to(folder).as_posix()
        yield from _READERS[file.suffix](file, name=name, column=text.column)


def _read_text(path: Path, *, name: str, column: str) -> Iterator[_Raw]:
    del column  # a .txt file of a folder is one document
    yield _Raw(name=name, text=_decode(path.read_bytes(), where=str(path)))


def _read_long_text(path: Path, *, max_bytes: int) -> Iterator[_Raw]:
    """Yields a text file in pieces of at most `max_bytes`, cut at blank lines where possible."""
    text = _decode(path.read_bytes(), where=str(path))
    for number, piece in enumerate(_pieces(text, max_bytes=max_bytes)):
        yield _Raw(name=f"{path.name}:{number}", text=piece)


def _pieces(text: str, *, max_bytes: int) -> Iterator[str]:
    # NFC here, or a piece could grow beyond max_bytes later and lose its tail.
    piece, size = "", 0
    for paragraph in re.split(r"\n[ \t\r\f\v]*\n\s*", unicodedata.normalize("NFC", text)):
        length = len(paragraph.encode())
        if piece and size + 2 + length > max_bytes:
            yield piece
            piece, size = "", 0
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
        while (size := len(piece.encode())) > max_bytes:  # a paragraph too long for one piece
            head = cut(piece, max_bytes=max_bytes)
            if not head:
                raise UserError(f"text.max_bytes={max_bytes} is too small for one character.")
            yield head
            piece = piece[len(head) :].lstrip()
    yield piece


def _read_jsonl(path: Path, *, name: str, column: str) -> Iterator[_Raw]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            if line.strip():
                row = _parse_json(_decode(line, where=where), where=where)
                yield _Raw(f"{name}:{number}", _column(row, column=column, where=where))


def _read_parquet(path: Path, *, name: str, column: str) -> Iterator[_Raw]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file: {_one_line(error)}") from error
    if column not in file.schema_arrow.names:
        _column(dict.fromkeys(file.schema_arrow.names), column=column, where=str(path))
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=[column]):
        for row in batch.to_pylist():
            number += 1
            where = f"{path} row {number}"
            yield _Raw(f"{name}:{number}", _column(row, column=column, where=where))


_READERS = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _decode(data: bytes, *, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}): "
            "convert it to UTF-8."
        ) from error


def _parse_json(line: str, *, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is a JSON {type(row).__name__}; each line must be an object.")
    return row


def _column(row: dict, *, column: str, where: str) -> str:
    """Returns the text of a row; null counts as a blank text."""
    if column not in row:
        raise UserError(
            f"{where} has no column {column!r}: it has {', '.join(map(repr, row)) or 'none'}; "
            "set text.column."
        )
    value = "" if row[column] is None else row[column]
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} is {type(value).__name__}, not text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: column {column!r} has a lone surrogate (half a UTF-16 character) at "
            f"character {error.start}: remove or repair that row."
        ) from error
    return value


# ---------------------------------------------------------------- the Hugging Face hub


def _read_hub(text: TextConfig) -> Iterator[_Raw]:
    """Yields the rows of hf:NAME[:CONFIG[:SPLIT[:COLUMN]]] in their order, streamed."""
    parts = text.source.removeprefix("hf:").split(":")
    if len(parts) > 4 or not parts[0]:
        raise UserError(f"text.source={text.source} must be hf:NAME[:CONFIG[:SPLIT[:COLUMN]]].")
    name, config, split, column = (*parts, "", "", "")[:4]
    rows = _stream(name, config=config, split=split or "train", source=text.source)
    for number, row in enumerate(rows):
        where = f"text.source={text.source} row {number}"
        yield _Raw(f"{name}:{number}", _column(row, column=column or text.column, where=where))


def _stream(name: str, *, config: str, split: str, source: str) -> Iterator[dict]:
    import datasets

    try:
        yield from datasets.load_dataset(name, config or None, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"text.source={source} cannot be read ({_one_line(error)}): check the name, the "
            "config, the split and the network, or use docstrings or a file."
        ) from error


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip().rstrip(".")


# ---------------------------------------------------------------- docstrings

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
class _ModuleText:
    """The documentation of one module, and running totals of the scan up to it."""

    name: str
    text: str
    modules_read: int
    repeated_paragraphs: int


class _Docstrings:
    """Reads a document per module, in the hash order of their names.

    In that order the first N modules are a random sample, and a paragraph belongs to the first
    module that holds it: later ones lose it. So no paragraph is in two splits, and what a module
    keeps does not depend on how many documents were asked for.
    """

    def __init__(self, *, documents: int):
        self._wanted = documents
        self._last: _ModuleText | None = None

    def read(self) -> Iterator[_Raw]:
        done, wanted = 0, self._wanted
        while done < len(modules := _cached_scan(wanted)):  # again if some were duplicates
            for module in modules[done:]:
                self._last = module
                yield _Raw(name=module.name, text=module.text, key=module.name)
            done, wanted = len(modules), 2 * wanted

    def details(self) -> dict:
        return {
            "packages": _versions(),
            "modules_read": self._last.modules_read,
            "repeated_paragraphs": self._last.repeated_paragraphs,
        }


def _scan() -> Iterator[_ModuleText]:
    """Yields every module with enough documentation; parses no more than is consumed."""
    seen: set[int] = set()
    repeated = 0
    for number, (name, path) in enumerate(sorted(_modules().items(), key=_order), start=1):
        paragraphs = [p for d in _docstrings(path) for p in _paragraphs(d) if _is_english(p)]
        kept = [p for p in paragraphs if _is_new(p, seen)]
        repeated += len(paragraphs) - len(kept)
        text = "\n\n".join(kept)
        if len(text.encode()) >= MIN_DOCUMENT_BYTES:
            yield _ModuleText(name, text, modules_read=number, repeated_paragraphs=repeated)


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
def _versions() -> dict[str, str]:
    """Returns the version of Python and of every installed package that is read."""
    versions = {"python": platform.python_version()}
    for package, distribution in PACKAGES.items():
        if _package_folders(package):
            versions[distribution] = importlib.metadata.version(distribution)
    return versions


# ---------------------------------------------------------------- the docstring cache


def cache_folder() -> Path:
    """Returns the user's cache folder of this project, by the platform's convention."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "crossdict_jax"


def _cached_scan(wanted: int) -> list[_ModuleText]:
    """Returns the first `wanted` modules of the scan, from the cache if it holds them."""
    key = hashlib.sha256(
        json.dumps([EXTRACTION, sys.platform, _versions()], sort_keys=True).encode()
    ).hexdigest()
    path = cache_folder() / f"docstrings-{key[:16]}.jsonl"
    modules = _read_cache(path, wanted=wanted)
    if modules is None:
        modules, complete = _take(wanted)
        _write_cache(path, modules=modules, complete=complete)
    return modules[:wanted]


def _take(wanted: int) -> tuple[list[_ModuleText], bool]:
    """Returns (the first `wanted` modules, whether the scan ended before that)."""
    from tqdm import tqdm

    modules = []
    for module in tqdm(_scan(), desc="Reading docstrings", unit=" modules", disable=None):
        modules.append(module)
        if len(modules) == wanted:
            return modules, False
    return modules, True


def _read_cache(path: Path, *, wanted: int) -> list[_ModuleText] | None:
    """Returns the cached modules, or None when they are missing, damaged or too few."""
    try:
        head, body = path.read_bytes().split(b"\n", 1)
        header = json.loads(head)
    except (OSError, ValueError):
        return None
    if header.get("sha256") != hashlib.sha256(body).hexdigest():
        return None
    if not header["complete"] and header["modules"] < wanted:
        return None
    return [_ModuleText(**json.loads(line)) for line in body.splitlines()[:wanted]]


def _write_cache(path: Path, *, modules: list[_ModuleText], complete: bool) -> None:
    """Writes the cache in one move; a cache folder that cannot be written costs time only."""
    body = "".join(json.dumps(vars(module)) + "\n" for module in modules).encode()
    digest = hashlib.sha256(body).hexdigest()
    header = {"sha256": digest, "modules": len(modules), "complete": complete}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(json.dumps(header).encode() + b"\n" + body)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"The docstring cache {path} cannot be written: {error}")
