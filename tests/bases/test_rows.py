"""Whose rows a layer reads: on bases that call their linears with other things than (batch, seq, d)."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import molora
from eval.architectures import TASKS, adapted, logits, tried
from eval.bases import batch_of, model_of
from molora import GateConfig, RoutingError
from molora.continual.inf_lora import covariances

ODD = ["opt", "qwen2_moe", "xlnet", "longformer", "led", "deepseek_v2", "deepseek_v3", "wav2vec2", "hubert", "whisper",
       "bert2bert", "bert_choice", "swin", "jamba"]  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_B2_a_sample_of_a_mixed_batch_is_what_it_is_alone(name):
    assert tried(name, "mixed ids") == "yes"


@pytest.mark.parametrize(
    "name", ["opt", "qwen2_moe", "xlnet", "longformer", "deepseek_v3", "deberta", "deberta-v2", "bert_choice"]
)
def test_B2_statistics_count_the_tokens_and_no_padding(name):
    assert tried(name, "statistics") == "yes"


@pytest.mark.parametrize("name", ["xlnet", "longformer"])
def test_B2_a_batch_as_long_as_its_sequences_is_not_turned_around(name):
    """(seq, batch, d) and (batch, seq, d) are one shape there."""
    model = adapted(model_of(name))
    batch = batch_of(name, samples=4, seq=4, padded=False)
    batch.pop("labels")
    tasks = ["alpha", "beta", "gamma", "alpha"]
    with torch.no_grad():
        together = logits(model(**batch, routing_task_ids=tasks))
        for i, task in enumerate(tasks):
            alone = logits(model(**{k: v[i : i + 1] for k, v in batch.items()}, routing_task_ids=[task]))
            assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["deberta", "deberta-v2", "switch_transformers"])
def test_B2_rows_of_nobody_are_refused_where_ids_differ(name):
    """Embeddings of relative positions serve all samples; an expert of the base's own is sent some tokens of any of them."""
    model, batch = adapted(model_of(name)), batch_of(name)
    with pytest.raises(RoutingError, match="rows are not the tokens of known samples"):
        model(**batch, routing_task_ids=TASKS)
    assert torch.isfinite(model(**batch, routing_task_ids="beta").loss)


@pytest.mark.parametrize("name", ["deberta", "opt", "qwen2_moe"])
def test_B2_the_balance_depends_on_the_tokens_and_not_on_padding(name):
    model = adapted(model_of(name), "token", aux_losses={"balance": 1.0}).train()

    def balance(samples):
        model(**samples)
        return float(molora.aux_losses(model)["balance"])

    short = batch_of(name, seq=6, padded=False)
    long = batch_of(name, seq=6, padded=False, seed=5)
    padded = {
        k: torch.nn.functional.pad(v, (0, 4), value=-100 if k == "labels" else 0) if v.dim() == 2 else v
        for k, v in short.items()
    }
    assert balance(short) == pytest.approx(balance(padded), abs=1e-5)
    assert abs(balance(short) - balance(long)) > 1e-6


def test_B2_frames_are_masked_by_the_model_that_makes_them():
    model, batch = adapted(model_of("wav2vec2"), "token"), batch_of("wav2vec2")
    with molora.record_routing(model) as record:
        model(**batch)
    frames = int(model_of("wav2vec2")._get_feature_vector_attention_mask(8, batch["attention_mask"]).sum())
    assert {s.tokens for (gate, _), s in record.sums.items() if ".layers." in gate} == {frames}


def test_B2_what_the_mask_does_not_tell_of_is_left_out_and_said():
    model, batch = adapted(model_of("funnel"), "token"), batch_of("funnel")
    with (
        pytest.warns(UserWarning, match="losses and statistics leave it out"),
        molora.record_routing(model) as record,
    ):
        model(**batch)
    assert {s.tokens for s in record.sums.values()} <= {int(batch["attention_mask"].sum()), 3}


@pytest.mark.parametrize(
    "name", ["whisper", "bert2bert", "recurrent_gemma", "opt", "deepseek_v3", "xlnet", "mamba"]
)
def test_B2_two_pass_gates(name):
    gate = molora.GateConfig(scope="two_pass", select="dense", share="global")
    model = adapted(model_of(name), gate=gate, tasks=None)
    batch = batch_of(name)
    with torch.no_grad():
        together = logits(model(**batch))
        alone = logits(model(**{k: v[:1] for k, v in batch.items()}))
    assert_close(together[:1], alone, atol=1e-3, rtol=1e-3)


# -- a tower beside the language model -----------------------------------------------------------------


def test_B3_experts_stay_out_of_the_tower_unless_it_is_named():
    with pytest.warns(UserWarning, match="they read images or sound"):
        model = adapted(model_of("llava"))
    inside = [n for n, _ in model.named_parameters() if "molora_" in n]
    assert inside and not any("vision_tower" in n or "multi_modal_projector" in n for n in inside)


def test_B3_a_tower_that_is_named_is_refused_ids_that_cannot_follow_images():
    model = adapted(model_of("llava"), target_modules=r".*(language_model|vision_tower).*\.(q_proj|v_proj)")
    assert any("vision_tower" in n and "molora_" in n for n, _ in model.named_parameters())
    batch = batch_of("llava")
    with pytest.raises(RoutingError, match="vision_tower"):
        model(**batch, routing_task_ids=TASKS)
    assert torch.isfinite(model(**batch, routing_task_ids="alpha").loss)


def test_B3_samples_with_different_numbers_and_sizes_of_images_follow_their_ids():
    """Qwen's way: patches of all images of a batch below each other."""
    model = adapted(model_of("qwen2_5_vl"))
    assert not any("visual" in name for name, _ in model.named_parameters() if "molora_" in name)
    grids = [[(1, 4, 4), (1, 2, 4)], [(1, 4, 8)], []]  # of each sample's images
    tokens = [[t * h * w // 4 for t, h, w in images] for images in grids]
    widest = max(map(sum, tokens)) + 6
    ids, mask = torch.full((3, widest), 9), torch.zeros(3, widest, dtype=torch.long)
    for i, images in enumerate(tokens):
        text = [token for count in images for token in (3, *[5] * count, 2)] + [10 + i, 11, 12]
        ids[i, -len(text[:widest]) :] = torch.tensor(text[:widest])
        mask[i, -len(text[:widest]) :] = 1
    patches = [torch.randn(sum(t * h * w for t, h, w in images), 96) for images in grids]
    batch = {
        "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == 5).int(),
        "pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor([g for images in grids for g in images]),
    }  # fmt: skip
    with torch.no_grad():
        together = model(**batch, routing_task_ids=TASKS).logits
        for i in range(2):
            own = {key: batch[key][i : i + 1] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
            own |= {"pixel_values": patches[i], "image_grid_thw": torch.tensor(grids[i])}
            alone = model(**own, routing_task_ids=[TASKS[i]]).logits
            kept = mask[i].bool()
            assert_close(together[i][kept], alone[0][kept], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "jamba"])
def test_B4_weights_that_are_read_without_a_forward_have_no_experts(name):
    with pytest.warns(UserWarning, match=r"dt_proj.*uses their weights without calling"):
        model = adapted(model_of(name))
    assert not any("dt_proj.molora" in n for n, _ in model.named_parameters())
    assert tried(name, "train") == tried(name, "merge") == "yes"


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_B4_a_gate_of_sequences_remembers_its_prompt_in_whatever_cache(name):
    gate = molora.GateConfig(scope="sequence", select="dense")
    model = adapted(model_of(name), gate=gate, tasks=None)
    batch = batch_of(name, padded=False)
    batch.pop("labels")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, anew = (model.base_model.generate(**batch, **settings, use_cache=c) for c in (True, False))
    assert torch.equal(cached, anew)


def test_B2_what_inf_lora_reads_leaves_padding_out_where_layers_read_tokens():
    """OPT's feed-forwards read (tokens, d)."""
    model, batch = adapted(model_of("opt"), GateConfig(scope="constant")), batch_of("opt")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    found = covariances(model, lambda: iter([inputs]))
    kept = [mask.bool() for mask in batch["attention_mask"]]
    rows = [{k: v[i : i + 1, kept[i]] for k, v in inputs.items()} for i in range(len(kept))]
    alone = covariances(model, lambda: iter(rows))
    assert any("fc1" in key for key in found) and any(not mask.all() for mask in kept)
    for key in found:
        assert_close(found[key], alone[key], atol=1e-4, rtol=1e-4)
