"""ReLoRA: one expert follows PEFT's LoRA that is merged and begun anew; the optimiser forgets; exports are exact."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close

import molora
from molora import GateConfig, MoLoraConfig
from molora.continual.sequence import train_sequence
from molora.errors import ConfigError
from molora.training import module
from molora.training.train import train
from tests.experts.test_kinds import TARGETS, banks
from tests.training.runs import adapter_weights, assert_same_weights, recipe_for, write_base
from tests.training.test_hf import MoLoraTrainer, trainer_for
from tests.zoo import base_model, batch_for, config_for, molora_model

SETTINGS = {"links": 2, "every": 4, "rewarm": 0}
ALONE = {"num_experts": 1, "gate": GateConfig(top_k=1), "tasks": None, "target_modules": TARGETS}


def relora(**changes):
    torch.manual_seed(0)
    config = config_for("llama", kind="relora", kind_settings=SETTINGS, **changes)
    return get_peft_model(base_model("llama", dtype=torch.float64), config).double().train()


def loss_of(model):
    return model(**batch_for("llama")).loss


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)


def step_of(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def link(model):
    """PEFT's layers of one LoRA of rank 2 with our scaling, 8 / 4."""
    made = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS)).double()
    return made, [m for m in made.modules() if hasattr(m, "lora_A")]


def test_one_expert_is_pefts_lora_that_is_merged_and_begun_anew_with_a_new_optimiser():
    model = relora(**ALONE)
    ours = optimizer_of(model)
    reference, layers = link(base_model("llama", dtype=torch.float64))
    for begun in (0, 4):
        for layer, bank in zip(layers, banks(model), strict=True):
            layer.lora_A["default"].weight.data.copy_(bank.stacks["A"].rows[0])
            assert not bank.stacks["B"].rows.any()
        theirs = optimizer_of(reference)
        for step in range(begun + 1, begun + 5):
            step_of(model, ours)
            step_of(reference, theirs)
            for layer, bank in zip(layers, banks(model), strict=True):
                assert_close(bank.stacks["A"].rows[0], layer.lora_A["default"].weight, atol=1e-9, rtol=1e-7)
                assert_close(bank.stacks["B"].rows[0].T, layer.lora_B["default"].weight, atol=1e-9, rtol=1e-7)
            before = model(**batch_for("llama")).logits
            molora.after_step(model, step, 8, optimizer=ours)
            assert_close(model(**batch_for("llama")).logits, before, atol=1e-12, rtol=1e-12)
        if not begun:
            reference, layers = link(reference.merge_and_unload())
    assert_close(loss_of(model), loss_of(reference), atol=1e-9, rtol=1e-9)


def test_the_optimiser_forgets_the_link_and_nothing_else():
    model = relora()
    model.freeze_experts(["expert_1"])
    optimizer = optimizer_of(model)
    for step in range(1, 5):
        step_of(model, optimizer)
        kept = {p: state["exp_avg"].clone() for p, state in optimizer.state.items()}
        with pytest.raises(ConfigError, match="nobody gave the optimiser") if step == 4 else nullcontext():
            molora.after_step(model, step)
    frozen = [bank.row(1).rows["A"].clone() for bank in banks(model)]
    molora.after_step(model, 4, optimizer=optimizer)
    links = {bank.stacks[name].trainable for bank in banks(model) for name in "AB"}
    assert links and not links & set(optimizer.state)
    assert set(optimizer.state) == set(kept) - links  # the gates'
    assert all(torch.equal(optimizer.state[p]["exp_avg"], kept[p]) for p in set(kept) - links)
    for bank, old in zip(banks(model), frozen, strict=True):
        assert torch.equal(bank.row(1).rows["A"], old) and not bank.row(1).rows["held_B"].any()
        assert bank.row(0).rows["held_B"].any() and not bank.row(0).rows["B"].any()
    step_of(model, optimizer)
    assert all(optimizer.state[p]["step"] == 1 for p in links)
    molora.after_step(model, 8, optimizer=optimizer)  # no room for a third link: the second learns on
    assert all(bank.row(0).rows["B"].any() for bank in banks(model))


def test_an_export_is_one_lora_of_the_sum_of_ranks(tmp_path):
    model = relora()
    optimizer = optimizer_of(model)
    for step in range(1, 7):
        step_of(model, optimizer)
        molora.after_step(model, step, 8, optimizer=optimizer)
    model.eval()
    with molora.routing(model, experts=["expert_2"]):
        expected = model(**batch_for("llama")).logits
    molora.export_lora(model, tmp_path / "out", expert="expert_2")
    loaded = PeftModel.from_pretrained(
        base_model("llama", dtype=torch.float64), tmp_path / "out", autocast_adapter_dtype=False
    )
    assert loaded.peft_config["default"].r == 4
    assert_close(loaded(**batch_for("llama")).logits, expected, atol=1e-10, rtol=1e-10)


def test_a_recipe_warms_up_again_and_a_killed_run_ends_the_same(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")

    def recipe(folder: str) -> dict[str, Any]:
        made = recipe_for(
            base, tmp_path / folder, max_steps=6, save_every=1, log_every=1, schedule="constant"
        )
        settings = {"links": 2, "every": 3, "rewarm": 1}
        made["adapter"] |= {"kind": "relora", "kind_settings": settings}
        made["train"]["warmup"] = 0
        return made

    full = train(recipe("full"))
    rows = [line.split(",") for line in (full.path / "metrics.csv").read_text().splitlines()]
    rates = [row[rows[0].index("lr")] for row in rows[1:]]
    assert [float(rate) for rate in rates if rate] == [0.01, 0.01, 0.01, 0.005, 0.01, 0.01]

    def crash(model: Any, step: int, *rest: Any) -> None:
        if step == 4:
            raise KeyError("a crash")
        molora.after_step(model, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "after_step", crash)
        with pytest.raises(KeyError):
            train(recipe("killed"))
    assert_same_weights(full.adapter, train(recipe("killed"), resume=True).adapter)


def test_the_trainer_with_the_mixin_begins_new_links(tmp_path):
    model = molora_model("llama", trained=False, kind="relora", kind_settings={**SETTINGS, "every": 2})
    trainer_for(MoLoraTrainer, model, tmp_path, max_steps=3, per_device_train_batch_size=4).train()
    assert all(bank.stacks["held_B"].rows.any() for bank in banks(model))


def test_ranks_that_no_links_make_are_refused():
    with pytest.raises(
        ConfigError, match=r"r: 6 is the rank of all links together, and no multiple of .*links = 4"
    ):
        MoLoraConfig(kind="relora", r=[8, 6])
    with pytest.raises(ConfigError, match=r"links: is 1; allowed: 2 or more"):
        MoLoraConfig(kind="relora", kind_settings={"links": 1})


@pytest.mark.slow
def test_a_sequence_gives_each_task_a_chain_of_its_own(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    recipe = recipe_for(base, tmp_path / "runs", max_steps=4)
    settings = {"links": 2, "every": 2}
    recipe["adapter"] = {"r": 2, "kind": "cola", "kind_settings": settings, "target_modules": ["q_proj"]}
    recipe |= {"continual": {"strategy": "independent"}, "eval": {"batch_size": 4, "modes": ["task"]}}
    weights = adapter_weights(train_sequence(recipe).adapter)
    chains = {name: held for name, held in weights.items() if name.endswith("held_B")}
    assert len(chains) == 2
    for name, held in chains.items():
        links = held, weights[name.replace("held_B", "B")]
        assert all(len(link) == 2 and link[expert].any() for link in links for expert in range(2))
