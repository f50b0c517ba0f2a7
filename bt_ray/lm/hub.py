"""Fetch a model from the Hugging Face hub: safetensors and text files only, never pickled weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bt_ray.errors import ModelError

_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja"]


def fetch(model: str) -> Path:
    """Folder of the hub model `org/name` or `org/name@revision`, downloaded unless it is on this disk.

    A model without safetensors is refused by its list of files, before anything is downloaded.
    Without a network the hub's own cache on this disk is used. Raises ModelError.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    repo, _, revision = model.partition("@")
    try:
        files = HfApi().list_repo_files(repo, revision=revision or None)
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model: the hub refuses {model!r}: {reason}. Check the id; for a gated model log in with `hf auth login`."
        ) from None
    except (httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        return _cached(model, repo, revision, error)
    # Folders inside a repository hold exports for other engines.
    top = [name for name in files if "/" not in name]
    if not any(name.endswith(".safetensors") for name in top):
        raise ModelError(
            f"model: {model!r} is pickle-only or holds no weights: the hub lists no *.safetensors. Take another one."
        )
    return _snapshot(repo, revision)


def _cached(model: str, repo: str, revision: str, cause: Exception) -> Path:
    """The copy that an earlier download left on this disk."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _snapshot(repo, revision, local_files_only=True)
    except LocalEntryNotFoundError:
        raise ModelError(
            f"model: {model!r} is not on this disk and the hub cannot be reached ({type(cause).__name__}). "
            "Connect, or copy the model's folder here and name the folder."
        ) from None


def _snapshot(repo: str, revision: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(repo, revision=revision or None, allow_patterns=_PATTERNS, ignore_patterns=["*/*"], **options)
    return Path(folder)
