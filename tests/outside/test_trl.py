"""TRL's trainers on mixtures: SFT (packed and padded), DPO and GRPO train experts and gate, and nothing else."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import molora
from molora.errors import RoutingError
from molora.hf import KeepTaskIds, MoLoraTrainerMixin
from tests.outside.bases import TASKS, TEXTS, base, config, mixture, tokenizer, values

trl = pytest.importorskip("trl", reason="needs TRL: pip install molora[trl]")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning"),
]
datasets = pytest.importorskip("datasets")

TEXT = datasets.Dataset.from_dict({"text": TEXTS})
PAIRS = datasets.Dataset.from_dict(
    {"prompt": TEXTS, "chosen": [" yes"] * len(TEXTS), "rejected": [" no no"] * len(TEXTS)}
)
PROMPTS = PAIRS.select_columns(["prompt"])


class SFT(MoLoraTrainerMixin, trl.SFTTrainer):
    """What a user writes."""


class DPO(MoLoraTrainerMixin, trl.DPOTrainer):
    """What a user writes."""


class GRPO(MoLoraTrainerMixin, trl.GRPOTrainer):
    """What a user writes."""


def distinct_characters(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [float(len(set(text))) for text in completions]


def trainer(kind: type, model: Any, folder: Path, **settings: Any) -> Any:
    """A trainer of that kind for two steps of four samples."""
    common = {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "max_steps": 2,
        "learning_rate": 1e-2, "disable_tqdm": True, "per_device_train_batch_size": 4, "max_grad_norm": 0.0,
    }  # fmt: skip
    given: dict[str, Any] = {"model": model, "processing_class": tokenizer()}
    if issubclass(kind, trl.SFTTrainer):
        arguments, data = trl.SFTConfig(**{**common, "max_length": 64, **settings}), TEXT
    elif issubclass(kind, trl.DPOTrainer):
        arguments, data = trl.DPOConfig(**{**common, "max_length": 64, **settings}), PAIRS
    else:
        own = {"num_generations": 4, "max_completion_length": 8, **settings}
        arguments, data = trl.GRPOConfig(**{**common, **own}), PROMPTS
        given["reward_funcs"] = distinct_characters
    return kind(args=arguments, train_dataset=data, **given)


class Step:
    """Records the gradients of the first step, on the way to the optimiser."""

    def __init__(self, trained: Any) -> None:
        self.gradients: dict[str, Tensor] = {}
        step = trained.training_step

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            loss = step(*args, **kwargs)
            if not self.gradients:
                named = trained.model.named_parameters()
                self.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}
            return loss

        trained.training_step = recorded


def check_trained(before: dict[str, Tensor], model: Any, step: Step, *, gate: bool) -> None:
    """Experts (and gate) had finite gradients and moved; the base and a reference adapter did not."""
    after = values(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(gradient.isfinite().all() for gradient in step.gradients.values())
    assert moved == set(step.gradients)
    assert all("molora_" in name and ".default." in name for name in moved)
    assert {name for name in before if "lora_B" in name and ".default." in name} <= moved
    assert any("molora_gate" in name for name in moved) == gate
    assert all(torch.isfinite(value).all() for value in after.values())


def check_saved(model: Any, folder: Path, **routed: Any) -> None:
    """What was trained comes back with PEFT's loader, with equal logits."""
    model.save_pretrained(folder / "adapter", selected_adapters=["default"])
    again = PeftModel.from_pretrained(base(), folder / "adapter")
    ids = tokenizer()(TEXTS[:1], return_tensors="pt").input_ids
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, **routed).logits
        assert torch.equal(logits, again(input_ids=ids, **routed).logits)
        assert not torch.equal(logits, base()(input_ids=ids).logits)


KINDS = {"sft": SFT, "dpo": DPO, "grpo": GRPO}


@pytest.mark.parametrize("gate", ["token", "sequence", "task"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_trains_experts_and_gate_and_nothing_else(tmp_path: Path, kind: str, gate: str) -> None:
    model = mixture(gate)
    trained = trainer(KINDS[kind], model, tmp_path)
    before, step = values(model), Step(trained)
    one_task = gate == "task"
    with molora.routing(model, task_ids="beta") if one_task else nullcontext():
        trained.train()
    check_trained(before, model, step, gate=not one_task)
    check_saved(model, tmp_path, **({"routing_task_ids": ["beta"]} if one_task else {}))
    if one_task:  # the other task's expert stayed as it was
        B = next(p for name, p in model.named_parameters() if "default.stacks.B" in name)
        assert [bool(expert.abs().sum()) for expert in B] == [False, True, False]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_config_for_the_trainer_to_wrap_the_base_with(tmp_path: Path, kind: str) -> None:
    settings = {"beta": 0.1} if kind == "grpo" else {}
    given = base()
    common = trainer(KINDS[kind], mixture("token"), tmp_path, **settings)
    extra = {"reward_funcs": distinct_characters} if kind == "grpo" else {}
    trained = KINDS[kind](
        model=given, args=common.args, train_dataset=common.train_dataset, processing_class=tokenizer(),
        peft_config=config("token"), **extra,
    )  # fmt: skip
    before, step = values(trained.model), Step(trained)
    trained.train()
    check_trained(before, trained.model, step, gate=True)
    assert list(trained.model.peft_config) == ["default"]  # the reference is the base: adapters disabled


def test_packed_rows_train_a_token_gate(tmp_path: Path) -> None:
    model = mixture("token")
    trained = trainer(SFT, model, tmp_path, packing=True)
    before, step = values(model), Step(trained)
    trained.train()
    check_trained(before, model, step, gate=True)


def test_packed_rows_are_refused_by_a_gate_that_reads_whole_sequences(tmp_path: Path) -> None:
    with pytest.raises(RoutingError, match="packed"):
        trainer(SFT, mixture("sequence"), tmp_path, packing=True).train()


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_auxiliary_loss_is_in_the_loss_once(tmp_path: Path, kind: str) -> None:
    """Gradients with two coefficients and with none differ by exactly the auxiliary part, under accumulation as well."""

    def gate_gradient(coefficient: float, accumulate: int) -> Tensor:
        torch.manual_seed(3)
        model = mixture("token", aux_losses={"z": coefficient} if coefficient else {})
        settings = {
            "learning_rate": 0.0,
            "max_steps": 1,
            "gradient_accumulation_steps": accumulate,
            "seed": 5,
        }
        trained = trainer(KINDS[kind], model, tmp_path, **settings)
        totals: dict[str, Tensor] = {}
        step = trained.training_step

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            loss = step(*args, **kwargs)
            totals.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            return loss

        trained.training_step = recorded
        trained.train()
        return torch.cat([value.flatten() for name, value in sorted(totals.items()) if "molora_gate" in name])

    for accumulate in (1, 2):
        none, once, twice = (gate_gradient(c, accumulate) for c in (0.0, 0.5, 1.0))
        assert (once - none).abs().max() > 1e-4
        assert torch.allclose(twice - none, 2 * (once - none), atol=1e-6)
        if accumulate == 1:
            alone = (once - none).norm()
        else:  # a mean over the accumulated batches, not their sum
            assert 0.5 * alone < (once - none).norm() < 1.5 * alone


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_trainer_without_the_mixin_says_what_it_loses(tmp_path: Path, kind: str) -> None:
    stock = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer, "grpo": trl.GRPOTrainer}[kind]
    with pytest.warns(UserWarning, match="MoLoraTrainerMixin"):
        trainer(stock, mixture("token"), tmp_path).train()


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_the_reference_of_an_adapter_is_the_adapter_as_it_was(tmp_path: Path, kind: str) -> None:
    """TRL copies "default" to "ref"; the copy computes the same, and stays while "default" learns."""
    model = mixture("token")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    ids = tokenizer()(TEXTS[:1], return_tensors="pt").input_ids
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
    trained = trainer(KINDS[kind], model, tmp_path, **({"beta": 0.1} if kind == "grpo" else {}))
    assert set(model.peft_config) == {"default", "ref"}
    trained.train()
    model.eval()
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, before)
        model.set_adapter("ref")
        assert torch.equal(model(input_ids=ids).logits, before)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, base().eval()(input_ids=ids).logits)


def test_each_samples_own_task_in_sft(tmp_path: Path) -> None:
    model = mixture("task")
    trained = trainer(SFT, model, tmp_path, remove_unused_columns=False)
    rows = trained.train_dataset.add_column("routing_task_ids", [TASKS[i % 2] for i in range(len(TEXTS))])
    trained.train_dataset = rows
    with pytest.raises(molora.ConfigError, match="collator drops it"):
        trained.train()
    trained.data_collator = KeepTaskIds(trained.data_collator)
    trained.train()
    B = next(p for name, p in model.named_parameters() if "lora_B" in name)
    assert [bool(expert.abs().sum()) for expert in B] == [True, True, False]
