"""What each preset follows: a release that can be found again, every difference in a sentence, and how it was trained."""

from __future__ import annotations

import re

import pytest

from molora.config.presets import PRESETS, RELEASES, summary
from molora.config.presets.release import Release
from molora.config.presets.target_patterns import ATTENTION, FEED_FORWARD, QUERY_VALUE
from molora.config.train import TrainConfig
from molora.errors import ConfigError

presets = pytest.mark.parametrize("name", sorted(PRESETS))


def test_every_preset_has_a_release_and_no_other() -> None:
    assert sorted(RELEASES) == sorted(PRESETS)


@presets
def test_a_release_can_be_found_again(name: str) -> None:
    release = RELEASES[name]
    assert re.search(r"arXiv:\d{4}\.\d{5}|OpenReview:\w+", release.paper)
    if release.repository is None:
        assert release.commit is None and "no code" in release.where.lower()
    else:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", release.repository)
        assert re.fullmatch(r"[0-9a-f]{7}", release.commit or "")
        assert release.where == f"{release.repository} at {release.commit}"


@presets
def test_differences_are_sentences(name: str) -> None:
    for sentence in RELEASES[name].differs:
        assert sentence[0].isupper() or sentence[0] == "`", sentence
        assert sentence.endswith(".") and len(sentence.split()) > 3, sentence


@presets
def test_the_suggested_training_is_one_that_a_recipe_may_have(name: str) -> None:
    train = dict(RELEASES[name].train)
    assert TrainConfig.model_validate(train).model_dump(include=set(train)) == train


def test_the_summary_names_the_paper() -> None:
    assert summary("mixlora").endswith("Li et al., arXiv:2404.15159")


@pytest.mark.parametrize("where", [("owner/name", None), (None, "abcdef0")])
def test_half_a_release_is_refused(where: tuple[str | None, str | None]) -> None:
    with pytest.raises(ConfigError, match="repository and commit"):
        Release(*where, paper="arXiv:2404.15159")


# What the scripts and configs of the releases run: experts, rank, alpha, dropout, where, and the losses.
RUN = {
    "adamole": (8, 4, 16, 0.05, ATTENTION, {"margin": 0.001}),
    "coin": (8, 16, 32, 0.05, None, {}),
    "dynmole": (
        6,
        24,
        48,
        0.05,
        FEED_FORWARD,
        {"balance": 0.001, "entropy": {"coefficient": 0.01, "index": 1.1}},
    ),
    "goat": (16, 4, 64, 0.05, None, {"balance": 0.002}),  # eight of them are the starts
    "hmora": (
        8,
        8,
        8,
        0.1,
        None,
        {"mutual_information": {"coefficient": 0.005, "certain": 0.5, "even": 0.98}},
    ),
    "hydralora": (4, 4, 32, 0.05, FEED_FORWARD, {}),
    "loramoe": (8, 4, 32, 0.05, FEED_FORWARD, {}),
    "meteora": (4, 8, 16, 0.0, None, {"task_label": 50.0}),  # experts are those of the LoRAs
    "mixlora": (8, 16, 32, 0.05, FEED_FORWARD, {"balance": 0.002}),
    "mixlora_top_p": (8, 16, 32, 0.05, FEED_FORWARD, {"balance": 0.007}),
    "mocle": (5, 8, 32, 0.1, QUERY_VALUE, {}),
    "moelora": (8, 2, 4, 0.1, None, {}),
    "mola": (8, 8, 16, 0.05, None, {}),
    "molora": (10, 4, 16, 0.0, None, {}),
    "mtl_lora": (3, 8, 16, 0.05, ATTENTION, {}),
}


@pytest.mark.parametrize("name", RUN)
def test_the_numbers_are_those_the_release_runs(name: str) -> None:
    settings = PRESETS[name]()
    found = (
        settings["num_experts"], settings["r"], settings["lora_alpha"], settings.get("lora_dropout", 0.0),
        settings.get("target_modules"), settings.get("aux_losses", {}),
    )  # fmt: skip
    assert found == RUN[name]


def test_hmora_has_one_a_and_an_ordinary_lora_on_what_closes_attention_and_feed_forward() -> None:
    settings = PRESETS["hmora"]()
    assert settings["share_A"] and settings["use_rslora"] and settings["gate"]["bias"]
    for name, closes in {
        "model.layers.0.self_attn.o_proj": True, "model.layers.0.mlp.down_proj": True,
        "model.layers.0.self_attn.q_proj": False, "model.layers.0.mlp.up_proj": False,
        "bert.encoder.layer.1.attention.output.dense": True, "bert.encoder.layer.1.output.dense": True,
        "bert.encoder.layer.1.intermediate.dense": False, "transformer.h.0.attn.c_attn": False,
        "transformer.h.0.attn.c_proj": True, "transformer.h.0.mlp.c_proj": True, "transformer.h.0.mlp.c_fc": False,
        "decoder.block.0.layer.1.EncDecAttention.o": True, "decoder.block.0.layer.2.DenseReluDense.wo": True,
        "decoder.block.0.layer.1.EncDecAttention.k": False, "decoder.block.0.layer.2.DenseReluDense.wi_0": False,
    }.items():  # fmt: skip
        assert bool(re.fullmatch(settings["plain_targets"], name)) == closes, name
