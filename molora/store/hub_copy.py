"""Copies of adapters on the Hugging Face hub: pushed in one commit, checked again when they come back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from molora.disk.adapter_files import check_files
from molora.disk.atomic import write_folder
from molora.disk.card import CONFIG_FILE, WEIGHTS_FILE
from molora.disk.hub import only_cached_if_offline
from molora.disk.manifest import MANIFEST
from molora.disk.out_folder import check_out
from molora.errors import AdapterError, ConfigError, MoLoraError
from molora.store.version import source_of

_TAKEN = ("*.json", "*.safetensors", "README.md")  # never a pickle, nor code


def push(
    source: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Upload the adapter of a run, or an adapter or LoRA folder, as one commit; returns its address.

    The repository is made where there is none. Files that are there under other names stay. Who pushes is known to
    huggingface_hub: `hf auth login`, or HF_TOKEN.

    Raises:
        AdapterError: the adapter is damaged. ConfigError: no such repository name, no access, or no connection.
    """
    _, adapter = source_of(Path(source))
    check_files(adapter)
    with _explained(repo):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=adapter,
            revision=revision,
            allow_patterns=list(_TAKEN),
            commit_message=message or "Upload adapter",
        )
    return str(done.commit_url)


def pull(repo: str, out: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Download an adapter into a folder, which appears whole or not at all, once every file is as its manifest says.

    Raises:
        AdapterError: it holds no adapter, or a damaged one. ConfigError: no such repository, no access, no connection, or
            a folder that may not be written.
    """
    target = check_out(out, mark=CONFIG_FILE)
    with _explained(repo):
        found = snapshot_download(repo, revision=revision, allow_patterns=list(_TAKEN))
    folder = Path(found)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise AdapterError(f"{repo} holds no adapter: there is no {name} in it.")
    check_files(folder)
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST]
    with write_folder(target, size=sum(file.stat().st_size for file in files)) as copy:
        for file in files:
            inside = copy / file.relative_to(folder)
            inside.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, inside)
    return target


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """What huggingface_hub raises as a ConfigError that says what to do."""
    with only_cached_if_offline() as offline:
        _check_name(repo)
        if offline is not None:
            raise ConfigError(
                f"{repo}: {offline.partition(';')[0]}.",
                hint="connect to the hub, or to a mirror of it (HF_ENDPOINT).",
            )
        try:
            yield
        except MoLoraError:
            raise
        except OSError as error:  # all of huggingface_hub's own are
            raise ConfigError(
                f"{repo}: {str(error).strip().splitlines()[0]}",
                hint="check the name, and that you are logged in (hf auth login) and may write there.",
            ) from error


def _check_name(repo: str) -> None:
    """ConfigError for what no repository can be called, before anybody is asked."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(
            f"{repo!r} is no repository name: {error}", hint="such as me/spelling-lora"
        ) from error
