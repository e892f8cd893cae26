"""Documents: read from docstrings, files or the hub, NFC-normalised, cut, and split by hash."""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crossdict_jax.activations.column import nameless_file
from crossdict_jax.activations.docstrings import ModuleText, module_texts, package_versions
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


class Documents(Sequence[Document]):
    """Documents in a nameless file: train, validation, test, each in the order of adding.

    Args:
      directory: where the file takes its room; None: where temporary files lie.
    """

    def __init__(self, directory: Path | None = None):
        self._file = nameless_file(directory)
        self._starts = {split: array("q") for split in SPLITS}  # bytes of the file

    def add(self, document: Document) -> None:
        self._starts[document.split].append(self._file.seek(0, 2))
        self._file.write(json.dumps([document.name, document.text]).encode() + b"\n")

    def counts(self) -> dict[str, int]:
        """Returns how many documents each split has."""
        return {split: len(starts) for split, starts in self._starts.items()}

    def __len__(self) -> int:
        return sum(self.counts().values())

    def __getitem__(self, number: int) -> Document:
        for split, starts in self._starts.items():
            if 0 <= number < len(starts):
                self._file.seek(starts[number])
                name, text = json.loads(self._file.readline())
                return Document(name=name, text=text, split=split)
            number -= len(starts)
        raise IndexError("There are no more documents.")


@dataclass(frozen=True)
class Corpus:
    """All documents of a run, ordered train, validation, test, and how they came about."""

    documents: Documents
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


def load_corpus(text: TextConfig, *, directory: Path | None = None) -> Corpus:
    """Returns the first `text.documents` documents of `text.source`, cut and split.

    They lie in a nameless file of `directory` (None: where temporary files lie) and are read from
    it one at a time. What is held of each is 8 bytes, and the hashes that find duplicates.

    Blank documents and duplicates are skipped and counted; they do not count as documents. The
    split is drawn from the dotted module name (docstrings) or the whole NFC text (everything
    else), so it depends neither on `max_bytes` nor on what else is read.

    Raises:
      UserError: a bad setting, an unreadable source, or a split left without a document.
    """
    _check_settings(text)
    raw, details = _open_source(text)
    counts = Counter()
    documents = Documents(directory)
    for document in _prepare(raw, text=text, counts=counts):
        documents.add(document)
    _check_splits(documents, text=text)
    provenance = _provenance(documents, text=text, counts=counts) | details()
    return Corpus(documents=documents, provenance=provenance)


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


def _check_splits(documents: Documents, *, text: TextConfig) -> None:
    if not len(documents):
        raise UserError(f"text.source={text.source} holds no text: every document is blank.")
    empty = [split for split, count in documents.counts().items() if not count]
    if empty:
        raise UserError(
            f"text.source={text.source} gave {len(documents)} documents, none of them in the split "
            f"{' or '.join(empty)}: raise text.documents={text.documents}, the split's fraction, "
            "or give more text."
        )


def _provenance(documents: Documents, *, text: TextConfig, counts: Counter) -> dict:
    digest = hashlib.sha256()
    bytes_of = Counter()
    for document in documents:
        encoded = document.text.encode()
        bytes_of[document.split] += len(encoded)
        digest.update(f"{document.split} {len(encoded)}\n".encode() + encoded)
    return {
        "source": text.source,
        "documents": documents.counts(),
        "bytes": {split: bytes_of[split] for split in SPLITS},
        "documents_asked": text.documents,
        "max_bytes": text.max_bytes,
        **{k: counts[k] for k in ("changed_by_nfc", "cut_to_max_bytes", "blank", "duplicates")},
        "sha256": digest.hexdigest(),
    }


def _open_source(text: TextConfig) -> tuple[Iterator[_Raw], Callable[[], dict]]:
    """Returns the raw documents, and what gives the source's own provenance once they are read."""
    if text.source == "docstrings":
        reader = _Docstrings(text.documents)
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
    for number, piece in enumerate(_pieces(_lines(path), max_bytes=max_bytes)):
        yield _Raw(name=f"{path.name}:{number}", text=piece)


def _lines(path: Path) -> Iterator[str]:
    r"""Yields the lines of a text file, each with its \n."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            yield _decode(line, where=str(path), offset=offset)
            offset += len(line)


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Yields the NFC text between blank lines, which are dropped with all whitespace after them."""
    paragraph: list[str] = []
    begun = True  # False: only whitespace since the last paragraph
    for line in lines:
        line = unicodedata.normalize("NFC", line)  # nothing composes across a line's end
        if paragraph and line.endswith("\n") and not line.strip(" \t\r\f\v\n"):
            yield "".join(paragraph)[:-1]
            paragraph, begun = [], False
        elif begun or line.lstrip():
            paragraph.append(line if begun else line.lstrip())
            begun = True
    yield "".join(paragraph)


def _pieces(lines: Iterable[str], *, max_bytes: int) -> Iterator[str]:
    # NFC is made before, or a piece could grow beyond max_bytes later and lose its tail.
    piece, size = "", 0
    for paragraph in _paragraphs(lines):
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


def json_lines(path: Path) -> Iterator[tuple[int, str, dict]]:
    """Yields (number of the line, "FILE line N", its object) of a file of JSON lines.

    Raises:
      UserError: a line is not UTF-8, or not a JSON object; it is named.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            if line.strip():
                yield number, where, _parse_json(_decode(line, where=where), where=where)


def _read_jsonl(path: Path, *, name: str, column: str) -> Iterator[_Raw]:
    for number, where, row in json_lines(path):
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


def _decode(data: bytes, *, where: str, offset: int = 0) -> str:
    """Returns the text of bytes that begin at an offset of a file; a mark at its start is none."""
    try:
        return data.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as error:
        at = len(data) - len(error.object) + error.start  # the object is without the mark
        raise UserError(
            f"{where} is not UTF-8 (byte {data[at]:#04x} at offset {offset + at}): convert it to "
            "UTF-8."
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
            "set text.column (or the last part of hf:NAME:CONFIG:SPLIT:COLUMN)."
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
        value = _column(row, column=column or text.column, where=where)
        yield _Raw(f"{Path(name).name}:{number}", value)


def _stream(name: str, *, config: str, split: str, source: str) -> Iterator[dict]:
    import datasets

    try:
        yield from datasets.load_dataset(name, config or None, split=split, streaming=True)
    except Exception as error:  # the library's, the network's, a file's: all mean "unreadable"
        raise UserError(
            f"text.source={source} cannot be read ({_one_line(error)}): check the name, the "
            "config, the split and the network, or use docstrings or a file."
        ) from error


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip().rstrip(".")


# ---------------------------------------------------------------- docstrings


class _Docstrings:
    """A document per module of the installed packages; split by the module's dotted name."""

    def __init__(self, documents: int):
        self._documents = documents
        self._last: ModuleText | None = None

    def read(self) -> Iterator[_Raw]:
        done, wanted = 0, self._documents
        while done < len(modules := module_texts(wanted)):  # again if some were duplicates
            for module in modules[done:]:
                self._last = module
                yield _Raw(name=module.name, text=module.text, key=module.name)
            done, wanted = len(modules), 2 * wanted

    def details(self) -> dict:
        return {
            "packages": package_versions(),
            "modules_read": self._last.modules_read,
            "repeated_paragraphs": self._last.repeated_paragraphs,
        }
