"""torch.export of a wrapped model, task ids as an input: equal outputs at other batch sizes, lengths and tasks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.zoo import batch_for, molora_model


class Exportable(nn.Module):
    """What an export needs: positional tensors in, one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, task_ids: torch.Tensor
    ) -> torch.Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, routing_task_ids=task_ids
        ).logits


def arguments(architecture, batch, seq, seed, tasks):
    inputs = batch_for(architecture, batch=batch, seq=seq, seed=seed, padding="right")
    return inputs["input_ids"], inputs["attention_mask"], torch.tensor(tasks)


@pytest.mark.parametrize(
    "gate", ["top2-group", "task-group", pytest.param("constant-global", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("architecture", ["gpt2", pytest.param("bert", marks=pytest.mark.slow)])
def test_an_exported_model_gives_equal_outputs(architecture, gate):
    blocks = 2 if gate == "constant-global" else 1  # the others do not reach over several
    model = Exportable(molora_model(architecture, gate, blocks=blocks)).eval()
    batch, seq = torch.export.Dim("batch", min=2, max=8), torch.export.Dim("seq", min=2, max=32)
    shapes = {"input_ids": {0: batch, 1: seq}, "attention_mask": {0: batch, 1: seq}, "task_ids": {0: batch}}
    with torch.no_grad():
        program = torch.export.export(
            model, arguments(architecture, 3, 7, 0, [0, 1, 2]), dynamic_shapes=shapes, strict=False
        )
        for batch_size, length, tasks in ((3, 7, [2, 0, -1]), (4, 9, [1, 1, 0, 2])):
            inputs = arguments(architecture, batch_size, length, 1, tasks)
            assert_close(program.module()(*inputs), model(*inputs), atol=1e-5, rtol=1e-5)
    assert not any("molora" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
