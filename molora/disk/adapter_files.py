"""What is checked of an adapter folder's files before any of them is believed, whoever loads them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from molora.disk.card import WEIGHTS_FILE
from molora.disk.manifest import MANIFEST, verify_folder
from molora.errors import AdapterError

_MOST_HEADER = 10_000_000  # bytes: names, shapes and places of some 80,000 tensors
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
_COPY = "copy the folder again."


def check_files(folder: Path) -> None:
    """Links, the manifest where there is one, and the header of the weights; nothing is unpickled.

    Raises:
        AdapterError: a link that leads out of the folder, files that are not as they were written, weights that are no
            safetensors file or only there as a pickle.
    """
    if not folder.is_dir():
        return  # of the Hub: PEFT downloads what it needs
    check_links(folder)
    if (folder / MANIFEST).is_file():
        verify_folder(folder)
    weights = folder / WEIGHTS_FILE
    if weights.exists():
        check_header(weights)
        return
    for name in _PICKLES:
        if (folder / name).exists():
            raise AdapterError(
                f"{folder / name} is a pickle, which can run any code when read; it was not opened.",
                hint=f"only {WEIGHTS_FILE} is read; convert the file where you trust it.",
            )


def check_no_pickle(folder: Path) -> None:
    """Before an adapter's config is written: AdapterError where its tensors have just been written as a pickle.

    That file is of no use to anyone and goes; what else is in the folder stays as it was.
    """
    pickle, weights = folder / _PICKLES[0], folder / WEIGHTS_FILE
    if not pickle.is_file():
        return
    if weights.is_file() and weights.stat().st_mtime_ns >= pickle.stat().st_mtime_ns:
        return  # an older file of somebody else's
    pickle.unlink()
    raise AdapterError(
        f"{folder}: adapters of molora are stored as safetensors, never as a pickle.",
        hint="leave safe_serialization out.",
    )


def check_links(folder: Path) -> None:
    """AdapterError for a link in the folder that leads nowhere or out of it, but for those of the Hub's own cache."""
    inside = folder.resolve()
    cache = inside.parent.parent / "blobs"  # <cache>/snapshots/<revision>/file -> <cache>/blobs/<hash>
    for file in folder.iterdir():
        if not file.is_symlink():
            continue
        try:
            target = file.resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: a circle, before Python 3.13
            raise AdapterError(f"{file} is a link that leads nowhere.", hint=_COPY) from None
        if inside not in target.parents and target.parent != cache:
            raise AdapterError(
                f"{file} is a link out of the folder, to {target}.", hint="put the file itself there."
            )


def check_header(file: Path) -> None:
    """AdapterError where a safetensors file is none, or names more tensors than any adapter has."""
    if not file.is_file():
        raise AdapterError(f"{file} is not a file.", hint=_COPY)
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
        if _MOST_HEADER < length <= file.stat().st_size:  # safetensors itself refuses one beyond the file
            raise AdapterError(
                f"{file}: its header has {length:,} bytes; no adapter has more than {_MOST_HEADER:,}.",
                hint=_COPY,
            )
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is damaged: {error}.", hint="copy it again.") from error
