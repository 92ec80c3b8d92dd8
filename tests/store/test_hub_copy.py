"""An adapter goes to a hub on loopback and comes back bit for bit; what is damaged on the way is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import molora
from molora.disk import hub as reach
from molora.disk.manifest import verify_folder
from molora.errors import AdapterError, ConfigError
from molora.store.hub_copy import pull, push
from tests.store.hub import Hub, running
from tests.zoo import molora_model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", found.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr(reach.urllib.request, "getproxies", dict)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        reach._unreachable.cache_clear()
        yield found
        reach._unreachable.cache_clear()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return molora.save(molora_model("llama"), tmp_path_factory.mktemp("hub") / "adapter")


def test_there_and_back(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    assert push(adapter, "me/words", private=True).startswith(f"{hub.endpoint}/me/words/commit/")
    assert hub.commits == ["me/words"] and hub.private == {"me/words": True}
    assert {file.name for file in adapter.iterdir()} <= {*hub.repos["me/words"]}
    back = pull("me/words", tmp_path / "back")
    verify_folder(back)
    for file in adapter.iterdir():
        assert (back / file.name).read_bytes() == file.read_bytes(), file.name
    push(adapter, "me/words")  # it is there already, which is no fault


def test_what_was_changed_on_the_hub_is_refused(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    push(adapter, "me/words")
    weights = hub.repos["me/words"]["adapter_model.safetensors"]
    hub.repos["me/words"]["adapter_model.safetensors"] = weights[:-4] + b"\x00\x00\x80\x3f"
    with pytest.raises(AdapterError, match="not as it was written"):
        pull("me/words", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_pickles_and_code_stay_there(hub: Hub, tmp_path: Path) -> None:
    hub.repos["me/old"] = {"adapter_config.json": b"{}", "adapter_model.bin": b"x", "run.py": b"x"}
    with pytest.raises(AdapterError, match=r"holds no adapter: there is no adapter_model\.safetensors"):
        pull("me/old", tmp_path / "back")
    assert not [*(tmp_path / "cache").rglob("*.bin")] and not [*(tmp_path / "cache").rglob("run.py")]


def test_what_the_hub_refuses_is_said(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="me/nothing"):
        pull("me/nothing", tmp_path / "back")
    with pytest.raises(ConfigError, match="is no repository name"):
        push(adapter, "a name with spaces")
    hub.denied = 403
    with pytest.raises(ConfigError, match=r"me/words: .*403") as raised:
        push(adapter, "me/words")
    assert "hf auth login" in str(raised.value)


def test_no_hub_at_all_is_said_at_once(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(reach.urllib.request, "getproxies", dict)
    reach._unreachable.cache_clear()
    with pytest.raises(ConfigError, match="cannot be reached"):
        push(adapter, "me/words")
    with pytest.raises(ConfigError, match="cannot be reached"):
        pull("me/words", tmp_path / "back")
    reach._unreachable.cache_clear()
