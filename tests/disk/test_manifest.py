"""The manifest finds every way in which a folder can differ from what was written."""

import json

import pytest

from molora.disk.manifest import MANIFEST, is_complete, sha256, verify_folder, write_manifest
from molora.errors import AdapterError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "more.txt").write_text("text")
    (tmp_path / "README.md").write_text("card")
    write_manifest(tmp_path)
    return tmp_path


def test_what_was_written_verifies(folder):
    verify_folder(folder)
    assert set(json.loads((folder / MANIFEST).read_text())["files"]) == {"weights.bin", "sub/more.txt"}


def test_the_model_card_and_hidden_files_are_free(folder):
    (folder / "README.md").write_text("edited by hand")
    (folder / ".gitattributes").write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "y").write_text("x")
    verify_folder(folder)


@pytest.mark.parametrize("position", [0, 1000, 2047])
def test_a_flipped_bit_names_the_file_and_both_hashes(folder, position):
    file = folder / "weights.bin"
    before, data = sha256(file), bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)
    with pytest.raises(AdapterError) as error:
        verify_folder(folder)
    assert "weights.bin: damaged" in str(error.value)
    assert before in str(error.value) and sha256(file) in str(error.value)
    assert not is_complete(folder)


@pytest.mark.parametrize("length", [0, 1024])
def test_a_truncated_file_is_damaged(folder, length):
    file = folder / "weights.bin"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(AdapterError, match=rf"2048 bytes\n.*{length} bytes"):
        verify_folder(folder)


def test_missing_and_extra_files_are_all_listed(folder):
    (folder / "weights.bin").unlink()
    (folder / "surprise.txt").write_text("x")
    with pytest.raises(AdapterError) as error:
        verify_folder(folder)
    assert "weights.bin: missing" in str(error.value) and "surprise.txt: not in the manifest" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no MANIFEST.json"),
        ("{", "not valid JSON"),
        ("[]", "not a manifest"),
        ('{"format": 1, "files": {"weights.bin": 3}}', "not a manifest"),
        ('{"format": 99, "files": {}}', "update molora"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_manifest_is_refused(folder, content, message):
    (folder / MANIFEST).unlink()
    if content is not None:
        (folder / MANIFEST).write_text(content)
    with pytest.raises(AdapterError, match=message):
        verify_folder(folder)
