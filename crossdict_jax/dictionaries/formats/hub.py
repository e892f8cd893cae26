"""The Hugging Face hub: folders of dictionaries, in and out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from crossdict_jax.errors import UserError

PREFIX = "hub:"
READ = ("*.json", "*.safetensors", "*.npz")  # what formats of dictionaries consist of, no code


@dataclass(frozen=True)
class Place:
    """A folder of a hub repository: ``hub:OWNER/NAME[/FOLDER][@REVISION]``."""

    repository: str
    folder: str
    revision: str | None


def parse(reference: str) -> Place:
    """Returns the place that ``hub:OWNER/NAME[/FOLDER][@REVISION]`` names; UserError if none."""
    path, _, revision = reference.removeprefix(PREFIX).partition("@")
    parts = path.strip("/").split("/")
    if not reference.startswith(PREFIX) or len(parts) < 2 or not all(parts) or ".." in parts:
        raise UserError(
            f"{reference!r} is no place on the hub; write hub:OWNER/NAME or hub:OWNER/NAME/FOLDER, "
            "with @REVISION behind it for an older one."
        )
    return Place("/".join(parts[:2]), "/".join(parts[2:]), revision or None)


def pull(reference: str) -> Path:
    """Returns the local copy of a folder on the hub; json, safetensors and npz files alone.

    Raises:
      UserError: there is no such repository or folder, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    place = parse(reference)
    inside = f"{place.folder}/" if place.folder else ""
    patterns = [inside + kind for kind in READ]
    root = _asked(
        reference,
        lambda: snapshot_download(
            place.repository, revision=place.revision, allow_patterns=patterns
        ),
    )
    folder = Path(root) / place.folder
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(
            f"{reference}: {place.repository} has no {', '.join(READ)} in "
            f"{place.folder or 'its top folder'}; correct the folder."
        )
    return folder


def push(folder: Path, reference: str) -> str:
    """Uploads a folder in one commit, and returns where it can be looked at.

    The repository is made, private, if it is not there. Who uploads is what ``hf auth login`` or
    HF_TOKEN says.

    Raises:
      UserError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    place, api = parse(reference), HfApi()
    _asked(reference, lambda: api.create_repo(place.repository, private=True, exist_ok=True))
    commit = _asked(
        reference,
        lambda: api.upload_folder(
            repo_id=place.repository,
            folder_path=folder,
            path_in_repo=place.folder or None,
            revision=place.revision,
            allow_patterns=[pattern for kind in READ for pattern in (kind, f"**/{kind}")],
            commit_message="Upload sparse dictionaries",
        ),
    )
    return str(commit.commit_url)


def _asked(reference: str, ask):
    """What the hub answers; every library below raises its own errors, all become one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        return ask()
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{reference}: there is no such repository, or it is private; check the spelling and "
            "`hf auth login`."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise UserError(
            f"{reference}: the hub refuses with status {status}; {_mend(status)}"
        ) from error
    except Exception as error:  # offline, proxies, time-outs
        raise UserError(
            f"{reference}: the hub cannot be reached ({type(error).__name__}); give a local folder "
            "or try again online."
        ) from error


def _mend(status: int) -> str:
    if status in (401, 403):
        return "log in with `hf auth login` as somebody who may write there."
    return "check the repository and the revision, or try again later."
