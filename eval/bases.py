"""Tiny models of many architectures, made from their configs alone, and batches for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

VOCAB, WIDTH = 64, 16

_TINY: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "d_model": WIDTH, "n_embd": WIDTH, "dim": WIDTH, "embedding_size": WIDTH,
    "emb_dim": WIDTH, "word_embed_proj_dim": WIDTH, "intermediate_size": 32, "ffn_dim": 32, "d_ff": 32, "d_inner": 32,
    "n_inner": 32, "hidden_dim": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_hidden_layers": 2, "n_layer": 2,
    "n_layers": 2, "num_layers": 2, "num_decoder_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 2,
    "n_head": 2, "n_heads": 2, "num_heads": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "d_head": 8, "max_position_embeddings": 64, "n_positions": 64,
    "max_source_positions": 64, "max_target_positions": 64, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "hidden_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0, "dropout_rate": 0.0, "classifier_dropout": 0.0, "layerdrop": 0.0, "encoder_layerdrop": 0.0,
    "summary_last_dropout": 0.0, "decoder_layerdrop": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "initializer_range": 0.2, "init_std": 0.2, "num_labels": 3, "image_size": 16, "patch_size": 4, "num_channels": 3,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": None,
    "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "state_size": 4, "time_step_rank": 4,
    "conv_kernel": 2, "expand": 2, "chunk_size": 4, "attention_window": 4, "type_vocab_size": 2, "layer_norm_eps": 1e-5,
    "router_aux_loss_coef": 0.0, "attn_type": "bi", "mask_token_id": 3, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
"""What a config takes of this makes its model tiny, without dropout, and with weights that let outputs differ."""


@dataclass(frozen=True)
class Base:
    """One architecture.

    Attributes:
        kind: causal, encoder, encoder-decoder, moe, state-space, vision, speech, vision-language.
        head: the class of transformers with its head.
        changes: settings beside the tiny ones.
        type: the config's, where it is not the name.
    """

    kind: str
    head: str
    changes: dict[str, Any] = field(default_factory=dict)
    type: str | None = None
    batch: str = "text"

    @property
    def generates(self) -> bool:
        return self.head.endswith(
            ("CausalLM", "LMHeadModel", "ConditionalGeneration", "EncoderDecoderModel", "MTModel")
        )


_CLASSES = "SequenceClassification"
_SPEECH = {
    "conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [4, 2], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "feat_proj_dropout": 0.0, "final_dropout": 0.0, "mask_time_prob": 0.0,
    "apply_spec_augment": False, "feat_extract_norm": "layer", "do_stable_layer_norm": True,
}  # fmt: skip


def _both(encoder: str, decoder: str) -> dict[str, Any]:
    return {"encoder": encoder, "decoder": decoder}


BASES: dict[str, Base] = {
    # -- causal
    "llama": Base("causal", "LlamaForCausalLM"),
    "mistral": Base("causal", "MistralForCausalLM"),
    "qwen2": Base("causal", "Qwen2ForCausalLM"),
    "qwen3": Base("causal", "Qwen3ForCausalLM"),
    "gemma2": Base("causal", "Gemma2ForCausalLM"),
    "gemma3_text": Base("causal", "Gemma3ForCausalLM"),
    "phi": Base("causal", "PhiForCausalLM"),
    "phi3": Base("causal", "Phi3ForCausalLM", {"rope_parameters": None}),
    "gpt2": Base("causal", "GPT2LMHeadModel"),
    "gptj": Base("causal", "GPTJForCausalLM", {"rotary_dim": 4}),
    "gpt_neo": Base("causal", "GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]]}),
    "gpt_neox": Base("causal", "GPTNeoXForCausalLM"),
    "opt": Base("causal", "OPTForCausalLM"),
    "bloom": Base("causal", "BloomForCausalLM"),
    "falcon": Base("causal", "FalconForCausalLM", {"head_dim": None}),
    "stablelm": Base("causal", "StableLmForCausalLM"),
    "cohere": Base("causal", "CohereForCausalLM"),
    "olmo2": Base("causal", "Olmo2ForCausalLM"),
    "mpt": Base("causal", "MptForCausalLM"),
    "xlnet": Base("causal", "XLNetLMHeadModel", {"max_position_embeddings": None}),
    # -- mixtures of experts of their own
    "mixtral": Base("moe", "MixtralForCausalLM"),
    "qwen2_moe": Base("moe", "Qwen2MoeForCausalLM"),
    "qwen3_moe": Base("moe", "Qwen3MoeForCausalLM"),
    "olmoe": Base("moe", "OlmoeForCausalLM"),
    "deepseek_v2": Base("moe", "DeepseekV2ForCausalLM", {"num_experts_per_tok": 2, "topk_method": "greedy"}),
    "deepseek_v3": Base("moe", "DeepseekV3ForCausalLM", {"q_lora_rank": 8, "head_dim": None}),
    "qwen3_next": Base(
        "moe",
        "Qwen3NextForCausalLM",
        {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "switch_transformers": Base(
        "moe",
        "SwitchTransformersForConditionalGeneration",
        {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 1},
        batch="seq2seq",
    ),
    # -- state space
    "mamba": Base("state-space", "MambaForCausalLM"),
    "mamba2": Base("state-space", "Mamba2ForCausalLM", {"num_heads": 4, "head_dim": 8, "n_groups": 1}),
    "falcon_mamba": Base("state-space", "FalconMambaForCausalLM"),
    "jamba": Base(
        "state-space",
        "JambaForCausalLM",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "recurrent_gemma": Base(
        "state-space",
        "RecurrentGemmaForCausalLM",
        {"lru_width": WIDTH, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
    "rwkv": Base("state-space", "RwkvForCausalLM", {"attention_hidden_size": WIDTH}),
    # -- encoders
    "bert": Base("encoder", f"BertFor{_CLASSES}"),
    "roberta": Base("encoder", f"RobertaFor{_CLASSES}", {"pad_token_id": 1, "bos_token_id": 0}),
    "distilbert": Base("encoder", f"DistilBertFor{_CLASSES}"),
    "electra": Base("encoder", f"ElectraFor{_CLASSES}"),
    "albert": Base("encoder", f"AlbertFor{_CLASSES}"),
    "deberta": Base(
        "encoder",
        f"DebertaFor{_CLASSES}",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8},
    ),
    "deberta-v2": Base(
        "encoder",
        f"DebertaV2For{_CLASSES}",
        {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 4,
            "max_relative_positions": 8,
            "share_att_key": True,
        },
    ),
    "modernbert": Base("encoder", f"ModernBertFor{_CLASSES}", {"local_attention": 4}),
    "mpnet": Base("encoder", f"MPNetFor{_CLASSES}"),
    "longformer": Base("encoder", f"LongformerFor{_CLASSES}"),
    "funnel": Base(
        "encoder",
        f"FunnelFor{_CLASSES}",
        {"block_sizes": [1, 1], "num_hidden_layers": None, "num_decoder_layers": 1},
    ),
    "convbert": Base("encoder", f"ConvBertFor{_CLASSES}", {"head_ratio": 1}),
    "bert_choice": Base("encoder", "BertForMultipleChoice", type="bert", batch="choices"),
    # -- encoder-decoders
    "t5": Base(
        "encoder-decoder", "T5ForConditionalGeneration", {"decoder_start_token_id": 1}, batch="seq2seq"
    ),
    "bart": Base("encoder-decoder", "BartForConditionalGeneration", batch="seq2seq"),
    "led": Base(
        "encoder-decoder",
        "LEDForConditionalGeneration",
        {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
        batch="seq2seq",
    ),
    "marian": Base("encoder-decoder", "MarianMTModel", batch="seq2seq"),
    "bert2bert": Base(
        "encoder-decoder", "EncoderDecoderModel", _both("bert", "bert"), "encoder-decoder", batch="seq2seq"
    ),
    # -- vision, speech, both with text
    "vit": Base("vision", "ViTForImageClassification", batch="image"),
    "swin": Base(
        "vision",
        "SwinForImageClassification",
        {
            "embed_dim": 8,
            "depths": [2, 1],
            "num_heads": [2, 2],
            "window_size": 2,
            "patch_size": 2,
            "num_hidden_layers": None,
            "num_layers": None,
            "num_attention_heads": None,
        },
        batch="image",
    ),
    "dinov2": Base("vision", "Dinov2ForImageClassification", batch="image"),
    "wav2vec2": Base(
        "speech", f"Wav2Vec2For{_CLASSES}", {**_SPEECH, "classifier_proj_size": 8}, batch="sound"
    ),
    "hubert": Base("speech", f"HubertFor{_CLASSES}", {**_SPEECH, "classifier_proj_size": 8}, batch="sound"),
    "whisper": Base(
        "speech",
        "WhisperForConditionalGeneration",
        {
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        batch="speech",
    ),
    "llava": Base(
        "vision-language",
        "LlavaForConditionalGeneration",
        {"image_token_index": 5, "vision_feature_select_strategy": "full", "vision_feature_layer": -1},
        batch="image+text",
    ),
    "qwen2_5_vl": Base("vision-language", "Qwen2_5_VLForConditionalGeneration", batch="patches+text"),
}


_QWEN_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
}  # fmt: skip
_QWEN_VISION = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 16,
    "window_size": 16, "fullatt_block_indexes": [1],
}  # fmt: skip


def config_of(name: str) -> Any:
    """The config of a tiny model."""
    base = BASES[name]
    kind, changes = base.type or name, dict(base.changes)
    if "encoder" in changes and "decoder" in changes:
        encoder, decoder = (_tiny(changes[side]) for side in ("encoder", "decoder"))
        decoder.is_decoder = decoder.add_cross_attention = True
        found = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
        found.decoder_start_token_id, found.pad_token_id, found.eos_token_id, found.vocab_size = (
            1,
            0,
            2,
            VOCAB,
        )
        return found
    if kind == "llava":
        vision = transformers.CLIPVisionConfig(**_fit(transformers.CLIPVisionConfig(), {}))
        return transformers.LlavaConfig(vision_config=vision, text_config=_tiny("llama"), **changes)
    if kind == "qwen2_5_vl":
        return transformers.Qwen2_5_VLConfig(
            text_config=_QWEN_TEXT, vision_config=_QWEN_VISION, image_token_id=5, video_token_id=4,
            vision_start_token_id=3, vision_end_token_id=2,
        )  # fmt: skip
    return _tiny(kind, changes)


def _tiny(kind: str, changes: dict[str, Any] | None = None) -> Any:
    changes = changes or {}
    return AutoConfig.for_model(kind, **_fit(AutoConfig.for_model(kind), changes))


def _fit(default: Any, changes: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in _TINY.items() if hasattr(default, name)}
    return {
        name: value
        for name, value in {**known, **changes}.items()
        if value is not None or name == "q_lora_rank"
    }


def model_of(name: str, seed: int = 0) -> nn.Module:
    """A freshly initialised tiny model, frozen, in eval mode and float32."""
    torch.manual_seed(seed)
    config = config_of(name)
    model = getattr(transformers, BASES[name].head)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.1:  # families differ in how small they begin
                parameter.mul_(0.2 / parameter.std().clamp(min=1e-4))
    return model.requires_grad_(False).eval()


def batch_of(
    name: str, samples: int = 3, seq: int = 8, *, seed: int = 1, padded: bool = True
) -> dict[str, Tensor]:
    """A batch with labels; the second sample is padded at its end, where the architecture knows padding."""
    base, g = BASES[name], torch.Generator().manual_seed(seed)
    ids = torch.randint(6, VOCAB, (samples, seq), generator=g)
    mask = torch.ones_like(ids)
    if padded and samples > 1:
        mask[1, seq - 3 :] = 0
    labels = torch.arange(samples) % 3
    if base.batch == "choices":
        ids = torch.randint(6, VOCAB, (samples, 2, seq), generator=g)
        return {"input_ids": ids, "attention_mask": mask.unsqueeze(1).repeat(1, 2, 1), "labels": labels % 2}
    if base.batch == "image":
        return {"pixel_values": torch.randn(samples, 3, 16, 16, generator=g), "labels": labels}
    if base.batch == "sound":
        sound = torch.ones(samples, 64, dtype=torch.long)
        if padded and samples > 1:
            sound[1, 40:] = 0
        values = torch.randn(samples, 64, generator=g) * sound
        return {"input_values": values, "attention_mask": sound, "labels": labels}
    if base.batch == "speech":
        return {"input_features": torch.randn(samples, 8, 20, generator=g), "labels": ids}
    if base.batch == "patches+text":
        return _with_patches(ids, mask, g)
    if base.batch == "image+text":
        patches = (16 // 4) ** 2 + 1
        images = torch.full((samples, patches), 5)
        ids, mask = torch.cat([images, ids], 1), torch.cat([torch.ones_like(images), mask], 1)
        pixels = torch.randn(samples, 3, 16, 16, generator=g)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": pixels,
            "labels": ids.masked_fill(mask == 0, -100),
        }
    ids = ids.masked_fill(mask == 0, int(config_of(name).pad_token_id or 0) if name == "roberta" else 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if base.batch == "seq2seq":
        return {**inputs, "labels": torch.randint(6, VOCAB, (samples, 5), generator=g)}
    if base.generates or base.kind == "causal":
        return {**inputs, "labels": ids.masked_fill(mask == 0, -100)}
    return {**inputs, "labels": labels}


def _with_patches(ids: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """An image of 4 x 4 patches before each text, patches of all samples below each other, as Qwen's processor makes them."""
    samples = len(ids)
    image = torch.full((samples, 4), 5)  # 2 x 2 patches are one token
    ids, mask = torch.cat([image, ids], 1), torch.cat([torch.ones_like(image), mask], 1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(samples * 16, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * samples),
        "mm_token_type_ids": (ids == 5).int(),
        "labels": ids.masked_fill(mask == 0, -100),
    }
