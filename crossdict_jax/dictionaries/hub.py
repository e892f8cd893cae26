"""The Hugging Face hub: folders of dictionaries, in and out."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from crossdict_jax.errors import UserError

PREFIX = "hub:"
READ = ("*.json", "*.safetensors", "*.npz")  # what formats of dictionaries consist of, no code


def parse(text: str) -> tuple[str, str, str | None]:
    """Returns repository, folder and revision of ``hub:OWNER/NAME[/FOLDER][@REVISION]``.

    UserError: it is written otherwise.
    """
    path, _, revision = text.removeprefix(PREFIX).partition("@")
    parts = path.strip("/").split("/")
    wrong = {"", ".", "..", ".git"} & {*parts}
    if not text.startswith(PREFIX) or len(parts) < 2 or wrong:
        raise UserError(
            f"{text!r} is no place on the hub; write hub:OWNER/NAME or hub:OWNER/NAME/FOLDER, "
            "with @REVISION behind it for an older one."
        )
    return "/".join(parts[:2]), "/".join(parts[2:]), revision or None


def fetch(path: str) -> Path:
    """Returns a local copy of a folder on the hub, and any other path with its ~ expanded.

    UserError: there is no such repository or folder, or the hub cannot be reached.
    """
    if not path.startswith(PREFIX):
        return Path(os.path.expanduser(path))
    from huggingface_hub import snapshot_download

    repository, inner, revision = parse(path)
    patterns = [f"{inner}/{kind}" if inner else kind for kind in READ]
    # Where a run of sparsify says of which model its folders are.
    patterns += [str(above / "config.json") for above in PurePosixPath(inner).parents]
    with _errors_in_one_line(path):
        root = snapshot_download(repository, revision=revision, allow_patterns=patterns)
    folder = Path(root) / inner
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(
            f"{path}: {repository} has no {', '.join(READ)} in {inner or 'its top folder'}; "
            "correct the folder."
        )
    return folder


def push(folder: Path, text: str) -> str:
    """Uploads a folder in one commit and returns its address; UserError: the hub refuses.

    A missing repository is made, private.
    """
    from huggingface_hub import HfApi

    repository, inner, revision = parse(text)
    with _errors_in_one_line(text):
        HfApi().create_repo(repository, private=True, exist_ok=True)
        commit = HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            path_in_repo=inner or None,
            revision=revision,
            allow_patterns=[*READ, *(f"**/{kind}" for kind in READ)],
            commit_message="Upload sparse dictionaries",
        )
    return str(commit.commit_url)


@contextlib.contextmanager
def _errors_in_one_line(text: str) -> Iterator[None]:
    """Turns errors into a UserError."""
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:  # of the hub; or offline, proxies, time-outs
        mend = "give a local folder or try again online."
        problem = f"the hub cannot be reached ({type(error).__name__})"
        if isinstance(error, errors.GatedRepoError):
            mend = "accept them on its page, as the user of `hf auth login`."
            problem = "it is given on conditions only"
        elif isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            mend = "check the spelling and `hf auth login`."
            problem = "there is no such repository, or it is private"
        elif isinstance(error, errors.HfHubHTTPError):
            status, mend = error.response.status_code, "check the revision, or try again later."
            if status in (401, 403):
                mend = "log in with `hf auth login` as somebody who may write there."
            problem = f"the hub refuses with status {status}"
        raise UserError(f"{text}: {problem}; {mend}") from error
