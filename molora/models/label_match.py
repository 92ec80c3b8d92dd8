"""LabelMatcher: classification by the label whose text is nearest, so that one head serves any labels and forgets none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from molora.data.clusters import encode, mean_vector

SCALE = 20.0  # of the cosine: what sentence encoders are trained with


class LabelMatcher(PreTrainedModel):
    """An encoder whose logits are `20 · cos(text, label text)`; nothing of it is trained but adapters.

    A text's vector is the mean of its last hidden states. The labels' unit vectors `labels` (class, d) are those of the
    encoder as it was loaded, so logits of a label do not depend on which other labels there are.
    """

    wraps = "encoder"  # the name of what an exported LoRA belongs to
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, encoder: PreTrainedModel, labels: Tensor) -> None:
        super().__init__(encoder.config)
        self.encoder = encoder
        self.label_vectors: Tensor
        self.register_buffer("label_vectors", labels, persistent=False)
        self.classes: list[int] | None = None  # those in the softmax of the loss; None: all

    def get_input_embeddings(self) -> Any:
        return self.encoder.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """Logits (batch, class) and, with `labels` (batch,), the cross-entropy over the classes in use."""
        options.pop("return_dict", None)
        out = self.encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **options)
        logits = SCALE * mean_vector(out.last_hidden_state, attention_mask) @ self.label_vectors.float().t()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(self._in_use(logits), labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions
        )

    def _in_use(self, logits: Tensor) -> Tensor:
        if self.classes is None:
            return logits
        others = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        others[self.classes] = False
        return logits.masked_fill(others, float("-inf"))


def compete(model: Any, classes: Iterable[int]) -> None:
    """Let only these classes compete in the loss of the LabelMatcher under a PEFT model; other bases stay as they are."""
    matcher = model.get_base_model()
    if isinstance(matcher, LabelMatcher):
        matcher.classes = sorted(set(classes))


def match_labels(
    encoder: PreTrainedModel, tokenizer: Callable[..., Mapping[str, Any]], labels: Sequence[str]
) -> LabelMatcher:
    """A classifier over the texts of `labels`, lower-cased, with the frozen encoder's own idea of them."""
    return LabelMatcher(encoder, encode([label.lower() for label in labels], encoder, tokenizer)).eval()


def add_labels(model: Any, tokenizer: Callable[..., Mapping[str, Any]], labels: Sequence[str]) -> None:
    """Let the LabelMatcher under a PEFT model serve these labels; vectors are those of the base without adapters."""
    matcher = model.get_base_model()
    with model.disable_adapter():
        vectors = encode([label.lower() for label in labels], matcher.encoder, tokenizer)
    matcher.label_vectors = vectors.to(matcher.label_vectors)
