"""What a base cannot do is said before anything is trained: by `validate`, and by `train`."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForSequenceClassification

from molora import ConfigError, DataError
from molora.config import load_recipe
from molora.models.base import load_base
from molora.models.base_check import check_base, positions_of
from molora.models.build import load_trained
from molora.training.steps import notes_on_length
from molora.training.train import train
from tests.training.runs import recipe_for, write_base, write_encoder, write_tokenizer


def small_gpt2(folder, positions=32, vocabulary=None):
    tokenizer = write_tokenizer(folder)
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=positions, vocab_size=vocabulary or len(tokenizer),
        eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def recipe(base, tmp_path, **data):
    found = recipe_for(base, tmp_path / "run")
    found["data"].update(data)
    return found


def checked(found):
    config = load_recipe(found)
    base, tokenizer = load_base(config.base)
    check_base(config, base, tokenizer)


def test_B7_a_tokenizer_larger_than_the_embeddings(tmp_path):
    found = recipe(small_gpt2(tmp_path / "base", vocabulary=100), tmp_path, max_length=16)
    with pytest.raises(ConfigError, match="the base has embeddings for 100") as error:
        train(found)
    assert error.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_B7_a_length_beyond_the_positions(tmp_path):
    base = small_gpt2(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"data.max_length is 48, but .* has positions for 32 tokens"):
        train(recipe(base, tmp_path, max_length=48))
    checked(recipe(base, tmp_path, max_length=32))


def test_B7_positions_of_RoBERTa_begin_behind_the_padding():
    config = RobertaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20, max_position_embeddings=34,
        pad_token_id=1,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config)
    assert positions_of(model) == 32
    model(input_ids=torch.full((1, 32), 5))
    with pytest.raises(Exception, match=r"index|size|must match"):
        model(input_ids=torch.full((1, 33), 5))


def test_B7_records_longer_than_the_positions_are_refused_where_the_recipe_names_no_length(tmp_path):
    found = recipe(small_gpt2(tmp_path / "base", positions=8), tmp_path)
    del found["data"]["max_length"]
    with pytest.raises(ConfigError, match="has positions for 8 tokens"):
        train(found)


def test_B7_prompts_of_which_nothing_is_left(tmp_path):
    found = recipe(write_base(tmp_path / "base"), tmp_path, max_length=4)
    with pytest.raises(DataError, match="leaves nothing of any of its") as error:
        train(found)
    assert error.value.exit_code == 3


def test_B7_an_encoder_is_no_language_model(tmp_path):
    with pytest.raises(ConfigError, match="is an encoder"):
        train(recipe(write_encoder(tmp_path / "base"), tmp_path))


def test_B7_the_last_window_of_an_epoch_is_told_of(tmp_path):
    config = load_recipe(recipe_for(tmp_path, tmp_path / "run", accumulate=3))
    assert ["its last step sees 2 of them" in note for note in notes_on_length(config, 5)] == [True]
    assert not [*notes_on_length(config, 6)]


@pytest.mark.parametrize(
    ("recipe", "enough", "said"),
    [
        (
            "kind_sparse",
            30,
            "kind sparse: training ends at step 29, and kind_settings.after is 30: experts stay dense",
        ),
        ("kind_relora", 226, "training ends at step 225, and kind_settings.every is 75: only 3 of 4 links"),
        ("kind_adalora", 200, "training ends at step 199, and the budget reaches target_r = 4 at step 200"),
        ("rank_growth", 61, "training ends at step 60, and train.rank_growth.every is 60: no rank grows"),
    ],
)
def test_what_a_short_training_never_comes_to_is_told_of(recipe, enough, said):
    def notes(steps):
        return [*notes_on_length(load_recipe(f"recipes/{recipe}.yaml", [f"train.max_steps={steps}"]), 5)]

    assert not notes(enough)
    (note,) = notes(enough - 1)
    assert said in note


@pytest.mark.parametrize(
    ("broken", "code", "said"),
    [
        ("vocabulary", 2, "embeddings for 100"),
        ("positions", 2, "positions for 32"),
        ("prompts", 3, "leaves nothing"),
    ],
)
def test_B7_validate_says_the_same(tmp_path, broken, code, said):
    import yaml
    from typer.testing import CliRunner

    from molora.cli.main import app

    base = small_gpt2(tmp_path / "base", vocabulary=100 if broken == "vocabulary" else None)
    found = recipe(base, tmp_path, max_length={"positions": 48, "prompts": 4}.get(broken, 16))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(found))
    result = CliRunner().invoke(app, ["validate", str(tmp_path / "recipe.yaml")])
    told = result.output + str(result.exception)
    assert said in told
    assert getattr(result.exception, "exit_code", result.exit_code) == code


# -- heads that the checkpoint lacks -------------------------------------------------------------------


@pytest.fixture
def headless(tmp_path):
    """A BERT without its pooler."""
    folder = write_encoder(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    kept = {
        name: tensor for name, tensor in weights.items() if "pooler" not in name and "classifier" not in name
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def classifier_recipe(base, tmp_path):
    records = tmp_path / "records.jsonl"
    records.write_text("\n".join(f'{{"text": "{"abc" * (i % 3 + 1)}", "label": {i % 2}}}' for i in range(12)))
    found = recipe_for(base, tmp_path / "run")
    task = {
        "source": "jsonl", "train": str(records), "eval": str(records), "kind": "classification",
        "text": "{text}", "label": "label", "labels": ["no", "yes"],
    }  # fmt: skip
    found["data"]["tasks"] = {"a": task}
    found["base"] = {"model": str(base), "task_type": "SEQ_CLS"}
    found["adapter"]["target_modules"] = "all-linear"
    return found


def test_B1_what_the_checkpoint_lacks_begins_the_same_way_at_each_load(headless, tmp_path):
    config = load_recipe(classifier_recipe(headless, tmp_path))
    loads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loads.append(load_base(config.base, 2)[0].bert.pooler.dense.weight)
    assert torch.equal(*loads) and loads[0].std() > 0


def test_B1_what_the_checkpoint_lacks_is_trained_and_saved_with_the_adapter(headless, tmp_path):
    run = train(classifier_recipe(headless, tmp_path))
    saved = load_file(run.adapter / "adapter_model.safetensors")
    mine = next(tensor for name, tensor in saved.items() if name.endswith("pooler.dense.weight"))
    config = load_recipe(classifier_recipe(headless, tmp_path))
    assert not torch.equal(mine, load_base(config.base, 2)[0].bert.pooler.dense.weight)
    ids = torch.randint(2, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    logits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model, _, _ = load_trained(run.path)
        logits.append(model(input_ids=ids).logits)
    assert torch.equal(*logits)
