"""Clusters of texts: fitting, assigning, the file, and embeddings that padding does not change."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import BertConfig, BertModel

from molora.data.clusters import TextClusters, encode
from molora.errors import AdapterError, ConfigError, DataError

PAD = 0


@pytest.fixture
def blobs():
    """Three groups of texts far from each other, mixed, and which group each is from."""
    torch.manual_seed(0)
    group = torch.arange(90) % 3
    return 10 * torch.eye(3, 8)[group] + 0.1 * torch.randn(90, 8), group


@pytest.fixture
def clusters():
    torch.manual_seed(1)
    return TextClusters(torch.randn(7, 16))


@pytest.fixture
def bert():
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=PAD,
    )
    return BertModel(config)


def tokenizer(texts, *, padding, truncation, return_tensors, extra=0):
    """One token a byte, padded to the longest text and `extra` tokens more."""
    assert padding and truncation and return_tensors == "pt"
    rows = [torch.tensor([1 + byte for byte in text.encode()][:50], dtype=torch.long) for text in texts]
    width = max(len(row) for row in rows) + extra
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


TEXTS = ["translate this", "a much longer text about nothing", "sum up", "x", "write a poem now"]

# -- fit ------------------------------------------------------------------------------------------------


def test_fit_finds_the_groups(blobs):
    pytest.importorskip("sklearn")
    embeddings, group = blobs
    found = TextClusters.fit(embeddings, 3)
    assert found.centroids.shape == (3, 8) and found.centroids.dtype == torch.float32
    labels = found.assign(embeddings)
    assert len({(int(a), int(b)) for a, b in zip(labels, group, strict=True)}) == 3
    means = torch.stack([embeddings[labels == i].mean(0) for i in range(3)])
    assert_close(found.centroids, means)


def test_the_seed_decides(blobs):
    pytest.importorskip("sklearn")
    embeddings = torch.randn(200, 8, generator=torch.Generator().manual_seed(3))
    first = TextClusters.fit(embeddings, 12, seed=5).centroids
    assert torch.equal(TextClusters.fit(embeddings, 12, seed=5).centroids, first)
    assert not torch.equal(TextClusters.fit(embeddings, 12, seed=6).centroids, first)


@pytest.mark.parametrize("num_clusters", [0, -1, 4])
def test_more_clusters_than_different_texts_are_refused(num_clusters):
    pytest.importorskip("sklearn")
    embeddings = torch.eye(3).repeat(5, 1)
    with pytest.raises(ConfigError, match="allowed: 1 to 3"):
        TextClusters.fit(embeddings, num_clusters)
    assert TextClusters.fit(embeddings, 3).assign(embeddings).unique().tolist() == [0, 1, 2]


def test_without_scikit_learn_the_extra_is_named(blobs, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ConfigError, match=r"pip install 'molora\[cluster\]'"):
        TextClusters.fit(blobs[0], 3)


# -- assign ---------------------------------------------------------------------------------------------


def test_assign_takes_the_nearest(clusters):
    embeddings = torch.randn(100, 16)
    labels = clusters.assign(embeddings)
    assert labels.shape == (100,) and labels.dtype == torch.int64
    distances = (embeddings.double().unsqueeze(1) - clusters.centroids.double()).norm(dim=-1)
    assert torch.equal(labels, distances.argmin(1)) and len(labels.unique()) > 1
    weights = clusters.one_hot(embeddings)
    assert weights.shape == (100, 7) and weights.dtype == torch.float32
    assert torch.equal(weights.argmax(1), labels) and torch.equal(weights.sum(1), torch.ones(100))
    assert clusters.one_hot(embeddings[:0]).shape == (0, 7)


def test_ties_go_to_the_lowest_index():
    centroids = torch.tensor([[5.0, 5.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert (
        TextClusters(centroids).assign(torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])).tolist() == [1] * 3
    )


def test_neither_order_nor_number_of_texts_matters():
    # Far from the origin, close to the border between two clusters: where a matrix product rounds most.
    torch.manual_seed(0)
    offset = 1000 * torch.ones(16)
    found = TextClusters(torch.randn(40, 16) + offset)
    embeddings = (found.centroids[::2] + found.centroids[1::2]).repeat(20, 1) / 2 + 1e-4 * torch.randn(
        400, 16
    )
    labels = found.assign(embeddings)
    order = torch.randperm(400)
    assert torch.equal(found.assign(embeddings[order]), labels[order])
    assert torch.equal(torch.cat([found.assign(row) for row in embeddings.split(1)]), labels)
    exact = (embeddings.double().unsqueeze(1) - found.centroids.double()).norm(dim=-1).argmin(1)
    assert (labels == exact).float().mean() > 0.95


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.zeros(3, 15), r"expected \(text, 16\)"),
        (torch.zeros(16), r"expected \(text, 16\)"),
        (torch.zeros(3, 16).index_fill(0, torch.tensor([1]), torch.nan), r"texts \[1\]"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(clusters, embeddings, message):
    with pytest.raises(DataError, match=message):
        clusters.assign(embeddings)


# -- the file -------------------------------------------------------------------------------------------


def test_the_file_holds_the_clusters(clusters, tmp_path):
    path = tmp_path / "new" / "clusters.safetensors"
    for found in (TextClusters(torch.ones(2, 3)), clusters):  # the second replaces the first
        found.save(path)
        assert torch.equal(TextClusters.load(path).centroids, found.centroids)
    assert [file.name for file in path.parent.iterdir()] == ["clusters.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(clusters, tmp_path, monkeypatch):
    path = tmp_path / "clusters.safetensors"
    clusters.save(path)

    def fail(descriptor):
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        TextClusters(torch.ones(2, 3)).save(path)
    assert torch.equal(TextClusters.load(path).centroids, clusters.centroids)
    assert [file.name for file in tmp_path.iterdir()] == ["clusters.safetensors"]


def test_a_damaged_file_is_refused(clusters, tmp_path):
    path = tmp_path / "clusters.safetensors"
    with pytest.raises(AdapterError, match="cannot be read"):
        TextClusters.load(path)
    clusters.save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:40], whole[:-1], whole + b"\0", b"\xff" * 8 + whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(AdapterError, match="is damaged"):
            TextClusters.load(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weights": torch.ones(2, 3)}, "expected 'centroids' alone"),
        ({"centroids": torch.ones(2, 3), "more": torch.ones(1)}, "expected 'centroids' alone"),
        ({"centroids": torch.ones(2, 3).double()}, "float64"),
        ({"centroids": torch.ones(3)}, r"\(3,\)"),
        ({"centroids": torch.ones(0, 3)}, r"\(0, 3\)"),
        ({"centroids": torch.tensor([[1.0, torch.nan]])}, "not all finite"),
        ({"centroids": torch.tensor([[1.0, torch.inf]])}, "not all finite"),
    ],
)
def test_a_file_of_something_else_is_refused(tensors, message, tmp_path):
    path = tmp_path / "clusters.safetensors"
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=message):
        TextClusters.load(path)


# -- encode ---------------------------------------------------------------------------------------------


def test_an_embedding_is_the_mean_hidden_state_of_unit_length(bert):
    found = encode(TEXTS, bert, tokenizer)
    assert found.shape == (5, 32) and found.dtype == torch.float32 and not found.requires_grad
    bert.eval()
    for text, row in zip(TEXTS, found, strict=True):
        ids = torch.tensor([[1 + byte for byte in text.encode()]])
        mean = bert(input_ids=ids).last_hidden_state[0].mean(0)
        assert_close(row, (mean / mean.norm()).detach(), atol=1e-5, rtol=0)
    assert (found[0] - found[1]).abs().max() > 0.01


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_and_batches_do_not_change_an_embedding(bert, attention):
    bert.set_attn_implementation(attention)
    found = encode(TEXTS, bert, tokenizer)
    assert_close(encode(TEXTS, bert, tokenizer, batch_size=1), found, atol=1e-5, rtol=0)
    assert_close(encode(TEXTS, bert, tokenizer, batch_size=2), found, atol=1e-5, rtol=0)
    assert_close(encode(TEXTS[::-1], bert, tokenizer), found.flip(0), atol=1e-5, rtol=0)
    padded = encode(TEXTS, bert, lambda texts, **options: tokenizer(texts, **options, extra=9))
    assert_close(padded, found, atol=1e-5, rtol=0)


def test_a_text_without_tokens_gets_zeros(bert):
    found = encode(["", "two words"], bert, tokenizer)
    assert not found[0].any()
    assert_close(found[1].norm(), torch.tensor(1.0))


def test_dropout_is_off_and_every_mode_comes_back(bert):
    bert.train()
    bert.pooler.eval()
    before = [module.training for module in bert.modules()]
    assert torch.equal(encode(TEXTS, bert, tokenizer), encode(TEXTS, bert, tokenizer))
    assert [module.training for module in bert.modules()] == before

    def broken(*args, **kwargs):
        raise ValueError("no such words")

    with pytest.raises(ValueError, match="no such words"):
        encode(TEXTS, bert, broken)
    assert [module.training for module in bert.modules()] == before and True in before and False in before


@pytest.mark.parametrize(("texts", "batch_size"), [([], 4), (["x"], 0)])
def test_nothing_to_encode_is_refused(bert, texts, batch_size):
    with pytest.raises(DataError, match="1 or more"):
        encode(texts, bert, tokenizer, batch_size)
