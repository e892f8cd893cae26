"""Where a model and its tokenizer lie: a folder, a name embedded in the package, or a hub id."""

import contextlib
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from crossdict_jax.errors import UserError
from crossdict_jax.workdir import inside, read_object

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ("docs-gpt2", "docs-neox")  # folders of ASSETS, loaded by their bare names
CONFIG_FILES = ("config.json",)
SAFETENSORS_FILES = ("model*.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is needed
TOKENIZER_EXTRAS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)
LARGEST_ID = 2**24  # of a token: the library makes tables with a row for every id up to it
MODEL_FILES = CONFIG_FILES + SAFETENSORS_FILES + TOKENIZER_FILES + TOKENIZER_EXTRAS


def find_folder(path_or_id: str | Path, patterns: tuple[str, ...] = MODEL_FILES) -> Path:
    """The folder of a path, an embedded model or a hub id; UserError if there is none.

    From the hub only files that match ``patterns`` are taken.
    """
    text = str(path_or_id)
    path = Path(os.path.expanduser(text))  # a ~ of nobody stays as it is
    with contextlib.suppress(OSError):  # a name too long for a folder
        if path.is_dir():
            return path
    if text in EMBEDDED and (ASSETS / text).is_dir():
        return ASSETS / text
    if os.path.isfile(path):
        raise UserError(f"{text} is a file; name the folder that holds config.json.")
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or not text.strip():
        raise UserError(f"There is no folder {text!r}; name a folder with config.json or a hub id.")
    import huggingface_hub as hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(hub.snapshot_download(text, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise UserError(
            f"{text!r} is given on conditions only; accept them on its page on the hub, as the "
            "user of `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{text!r} is no folder here and no public model on the hub; check the spelling, log "
            f"in with `hf auth login`, or use an embedded model ({', '.join(EMBEDDED)})."
        ) from error
    except Exception as error:  # offline, proxies, time-outs: each library raises its own
        raise UserError(
            f"{text!r} is no folder here, and the hub cannot be reached "
            f"({type(error).__name__}); give the folder of a downloaded model, use an embedded one "
            f"({', '.join(EMBEDDED)}), or go on with a run in the folder where it was begun."
        ) from error


def load_tokenizer(path_or_id: str | Path):
    """The transformers tokenizer of a folder or hub id; UserError if there is none."""
    names = CONFIG_FILES + TOKENIZER_FILES + TOKENIZER_EXTRAS
    folder = find_folder(path_or_id, names)
    for name in names:
        inside(folder, folder / name)
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise UserError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); only commands that read "
            "text need it: copy the tokenizer files of its model there."
        )
    files += [folder / name for name in TOKENIZER_EXTRAS if (folder / name).is_file()]
    return _tokenizer(folder, tuple(file.stat().st_mtime_ns for file in files))


def _ids(folder: Path) -> Iterator[int]:
    """Yields the ids that a folder's files give to tokens by name."""
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        tree, ids = read_object(folder / name) if (folder / name).is_file() else {}, []
        if name == "tokenizer.json":
            model, added = tree.get("model"), tree.get("added_tokens")
            tree = model.get("vocab") if isinstance(model, dict) else None
            ids += (token.get("id") for token in added or () if isinstance(token, dict))
        ids += tree.values() if isinstance(tree, dict) else ()  # of others the place is the id
        yield from (id_ for id_ in ids if isinstance(id_, int))


@lru_cache(maxsize=16)
def _tokenizer(folder: Path, changed: tuple):
    """``changed`` keeps a rewritten folder from being answered from the cache."""
    # transformers would advise to install torch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (largest := max(_ids(folder), default=0)) > LARGEST_ID:
            raise ValueError(f"a token has the id {largest}")
        # Other classes are rebuilt from vocabulary and merges alone, with tokens of their own.
        as_it_says, about = (folder / "tokenizer.json").is_file(), folder / "tokenizer_config.json"
        if about.is_file() and read_object(about).get("fast_tokenizer_files"):
            raise ValueError("tokenizer_config.json names fast_tokenizer_files to take instead")
        kind = PreTrainedTokenizerFast if as_it_says else AutoTokenizer
        tokenizer = kind.from_pretrained(folder, trust_remote_code=False)
        if as_it_says and hasattr(model := tokenizer.backend_tokenizer.model, "dropout"):
            model.dropout = None  # of training: ids would be drawn anew at each reading
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust library raises bare exceptions, and panics
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"The tokenizer in {folder} cannot be read ({reason}).") from error
