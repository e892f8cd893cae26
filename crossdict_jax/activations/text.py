"""Documents: read, NFC-normalised, cut, and split by hash."""

import hashlib
import json
import os
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crossdict_jax.activations.docstrings import module_texts, package_versions
from crossdict_jax.activations.pairing import normalize
from crossdict_jax.config import TextConfig
from crossdict_jax.errors import UserError
from crossdict_jax.workdir import inside, parse_json

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Document:
    """A text (NFC, cut to ``max_bytes``) and its split."""

    name: str  # where it came from: a dotted module, a file, a file and row
    text: str
    split: str  # train | validation | test


class Corpus(Sequence[Document]):
    """All documents: train, validation, test, each in the order of the source.

    They lie in a nameless file of ``directory`` (None: the folder of temporary files), which is
    gone with the process however that ends. ``provenance`` holds JSON values.
    """

    def __init__(self, directory: Path | None = None):
        self.provenance: dict = {}
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        self._starts = {split: array("q") for split in SPLITS}  # bytes of the file

    def add(self, document: Document) -> None:
        self._starts[document.split].append(self._file.seek(0, 2))
        self._file.write(json.dumps([document.name, document.text]).encode() + b"\n")

    def counts(self) -> dict[str, int]:
        """Documents per split."""
        return {split: len(starts) for split, starts in self._starts.items()}

    def split(self, name: str) -> tuple[Document, ...]:
        return tuple(d for d in self if d.split == name)

    def __len__(self) -> int:
        return sum(self.counts().values())

    def __getitem__(self, number: int) -> Document:
        for split, starts in self._starts.items():
            if 0 <= number < len(starts):
                self._file.seek(starts[number])
                return Document(*json.loads(self._file.readline()), split)
            number -= len(starts)
        raise IndexError("There are no more documents.")


def load_corpus(text: TextConfig, *, directory: Path | None = None) -> Corpus:
    """Returns the first `text.documents` documents of `text.source`, cut and split.

    Blank documents and duplicates are skipped and counted. The split is drawn from the dotted
    module name (docstrings) or the whole NFC text (all else): neither `max_bytes` nor the other
    documents change it.

    Raises:
      UserError: a bad setting, an unreadable source, or a split without a document.
    """
    counts, seen, details, corpus = Counter(), set(), {}, Corpus(directory)
    for name, raw, key in _open_source(text, details):
        normal = normalize(raw)
        head = cut(normal, max_bytes=text.max_bytes)
        # Documents equal after the cut are duplicates too: they may lie in two splits.
        digests = {hashlib.sha256(t.encode()).digest() for t in (normal, head)}
        if not head.strip():
            counts["blank"] += 1
            counts["emptied"] += bool(normal.strip())
        elif digests & seen:
            counts["duplicates"] += 1
        else:
            seen |= digests
            counts["changed_by_nfc"] += normal != raw
            counts["cut_to_max_bytes"] += head != normal
            corpus.add(Document(name, head, split_of(key or normal, text)))
        if len(corpus) == text.documents:
            break
    empty = [split for split, count in corpus.counts().items() if not count]
    if empty:
        within = f"text.max_bytes={text.max_bytes}"
        left_out = {
            "were blank": counts["blank"] - counts["emptied"],
            f"are blank within {within}": counts["emptied"],
            f"are equal to one of these within {within}": counts["duplicates"],
        }
        told = "".join(f"; {n} others {words}" for words, n in left_out.items() if n)
        more = f"raise text.documents={text.documents}"
        if len(corpus) < text.documents:
            more = "give more text"
        if counts["emptied"] + counts["duplicates"] > len(corpus):
            more = "raise text.max_bytes, or give text that differs"
        elif text.source.endswith(".txt"):
            more = f"lower {within}, the length of documents that a file is cut into, or {more}"
        shares = {
            s: f"raise text.{s}_fraction={getattr(text, f'{s}_fraction')}" for s in SPLITS[1:]
        }
        shares["train"] = "lower the fractions of the other splits"
        mends = [more, *(shares[split] for split in empty if len(corpus))]
        raise UserError(
            f"text.source={text.source} gave {len(corpus)} documents, none of them in the split "
            f"{' or '.join(empty)}{told}; {', or '.join(mends)}."
        )
    digest, bytes_of = hashlib.sha256(), dict.fromkeys(SPLITS, 0)
    for document in corpus:
        encoded = document.text.encode()
        bytes_of[document.split] += len(encoded)
        digest.update(f"{document.split} {len(encoded)}\n".encode() + encoded)
    corpus.provenance = {
        "source": text.source,
        "documents": corpus.counts(),
        "bytes": bytes_of,
        "documents_asked": text.documents,
        "max_bytes": text.max_bytes,
        **{k: counts[k] for k in ("changed_by_nfc", "cut_to_max_bytes", "blank", "duplicates")},
        "sha256": digest.hexdigest(),
        **details,
    }
    return corpus


def split_of(key: str, text: TextConfig) -> str:
    """Returns the split of a document, from sha256(key) and the two fractions alone."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    if share < text.test_fraction:
        return "test"
    return "validation" if share < text.test_fraction + text.validation_fraction else "train"


def cut(text: str, *, max_bytes: int) -> str:
    """Returns the longest head of `text` within `max_bytes` UTF-8 bytes.

    Ends at a character, and before the last whitespace if that costs less than half.
    """
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return text
    head = encoded[:max_bytes].decode(errors="ignore")
    if text[len(head)].isspace():
        return head
    last = max((m.start() for m in re.finditer(r"\s", head)), default=0)
    return head[:last] if 2 * last >= len(head) else head


# Sources


def _open_source(text: TextConfig, details: dict) -> Iterator[tuple[str, str, str]]:
    """Yields (name, text, key of its split: "" for the NFC text) of raw documents.

    Fills ``details`` with the source's provenance.
    """
    path = Path(os.path.expanduser(text.source))
    if text.source == "docstrings":  # a document for each module; its name decides on its split
        details["packages"] = package_versions()
        yield from ((name, documentation, name) for name, documentation in module_texts())
        return
    if text.source.startswith("hf:"):
        yield from _hub_rows(text)
        return
    files, suffixes = [path], " ".join(SUFFIXES)
    if path.is_dir():
        below = sorted(path.rglob("*"))
        if linked := [p for p in below if p.is_symlink() and p.is_dir()]:
            raise UserError(
                f"text.source={text.source} holds a link to a folder, {linked[0]}, which is not "
                "followed; put the folder itself there, or delete the link."
            )
        files = [inside(path, p) for p in below if p.suffix in SUFFIXES and p.is_file()]
        wrong = "" if files else f"holds no file ending in {suffixes}."
    elif not path.is_file():
        wrong = f"is no file: give docstrings, a file or folder of {suffixes}, or hf:NAME."
    elif path.suffix not in SUFFIXES:
        wrong = f"must end in one of {suffixes}."
    else:
        wrong = "" if path.stat().st_size else "is an empty file: give one with text."
    if wrong:
        raise UserError(f"text.source={text.source} {wrong}")
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        if file.suffix == ".txt":
            content = read_txt(file)
            if file == path:
                pieces = _pieces(content, max_bytes=text.max_bytes)
                yield from ((f"{name}:{i}", piece, "") for i, piece in enumerate(pieces))
            else:
                yield name, content, ""
            continue
        jsonl = file.suffix == ".jsonl"
        for number, where, row in json_lines(file) if jsonl else _parquet_rows(file, text.column):
            yield f"{name}:{number}", _column(row, text.column, where), ""


def _pieces(text: str, *, max_bytes: int) -> Iterator[str]:
    """Yields paragraphs of a text together, as many as ``max_bytes`` hold."""
    piece = ""
    for paragraph in re.split(r"\n[ \t\r\f\v]*\n\s*", text):
        if piece and len(f"{piece}\n\n{paragraph}".encode()) > max_bytes:
            yield piece
            piece = ""
        at = 0  # where the rest of a paragraph that is too long for one piece begins
        while len((head := paragraph[at : at + max_bytes + 1]).encode()) > max_bytes:
            head = cut(head, max_bytes=max_bytes)
            if not head:
                raise UserError(f"text.max_bytes={max_bytes} is too small for one character.")
            yield head
            at = re.compile(r"\s*").match(paragraph, at + len(head)).end()
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph[at:]
    yield piece


def json_lines(path: Path) -> Iterator[tuple[int, str, dict]]:
    """Yields (line number, "FILE line N", object) of a file of JSON lines.

    Raises:
      UserError: a line is not UTF-8 or not a JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            if not line.strip():
                continue
            try:
                row = parse_json(_decode(line, where))
            except ValueError as error:
                raise UserError(f"{where} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise UserError(f"{where} is a JSON {kind}; each line must be an object.")
            yield number, where, row


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[int, str, dict]]:
    """Yields (row number, "FILE row N", {column: value})."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if column in names:
            batches = file.iter_batches(batch_size=16, columns=[column])  # of texts of any length
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((i, f"{path} row {i}", row) for i, row in enumerate(rows, start=1))
            return
    except (pyarrow.ArrowException, ArithmeticError, OSError, ValueError) as error:  # at any row
        raise UserError(f"{path} is not a parquet file, or damaged: {_one_line(error)}") from error
    _column(dict.fromkeys(names), column, str(path))


def _hub_rows(text: TextConfig) -> Iterator[tuple[str, str, str]]:
    """Yields (name, text, "") of hf:NAME[:CONFIG[:SPLIT[:COLUMN]]], streamed in order."""
    import datasets

    source = text.source
    parts = source.removeprefix("hf:").split(":")
    if len(parts) > 4 or not parts[0]:
        raise UserError(f"text.source={source} must be hf:NAME[:CONFIG[:SPLIT[:COLUMN]]].")
    name, config, split, column = (*parts, "", "", "")[:4]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            value = _column(row, column or text.column, f"text.source={source} row {number}")
            yield f"{Path(name).name}:{number}", value, ""
    except UserError:
        raise
    except Exception as error:  # the library's, the network's, a file's: all mean "unreadable"
        raise UserError(
            f"text.source={source} cannot be read ({_one_line(error)}): check the name, the "
            "config, the split and the network, or use docstrings or a file."
        ) from error


def read_txt(file: Path) -> str:
    """Returns the text of a UTF-8 file; its lines end in \\n, wherever it was written."""
    return _decode(file.read_bytes(), str(file)).replace("\r\n", "\n")


def _decode(data: bytes, where: str) -> str:
    """Returns the text of bytes, without a byte order mark at their start."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = len(data) - len(error.object) + error.start  # the object is without the mark
        raise UserError(
            f"{where} is not UTF-8 (byte {data[at]:#04x} at offset {at}): convert it to UTF-8."
        ) from error


def _column(row: dict, column: str, where: str) -> str:
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


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip().rstrip(".")
