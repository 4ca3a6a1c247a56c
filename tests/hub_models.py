"""Small random models of the transformers library, one per architecture, with a batch each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "build"]

VOCABULARY, WIDTH = 64, 32
_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_GPT = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_IMAGE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def _ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 8))


def _text() -> dict[str, Tensor]:
    ids = _ids()
    return {"input_ids": ids, "labels": ids}


def _images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}


def _sounds() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 800), "labels": torch.tensor([0, 1])}


def _spectrograms() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 32), "labels": _ids()}


def _pairs() -> dict[str, Any]:
    return {"input_ids": _ids(), "pixel_values": torch.randn(2, 3, 32, 32), "return_loss": True}


def _sound_spectrograms() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 32, 16), "labels": torch.tensor([0, 1])}


def _illustrated() -> dict[str, Tensor]:
    ids = torch.cat([torch.ones(2, 16, dtype=torch.long), _ids()], 1)  # 1 stands for a patch of the image
    return {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(2, 3, 32, 32)}


_WAVES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}

Batch = Callable[[], dict[str, Any]]

#: By name: the model's class, its configuration's, the options, the batch.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], Batch]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT, _text),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 8}, _text),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZE, _text),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 64,
            "word_embed_proj_dim": WIDTH,
            "max_position_embeddings": 64,
        },
        _text,
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 2, "n_head": 2},
        _text,
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_SIZE, "num_key_value_heads": 1}, _text),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_SIZE, "num_key_value_heads": 1}, _text),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_SIZE, "num_key_value_heads": 1, "num_local_experts": 4},
        _text,
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_SIZE, "num_key_value_heads": 1}, _text),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_SIZE, "num_key_value_heads": 1, "head_dim": 16},
        _text,
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", _SIZE, _text),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        _text,
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4},
        _text,
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _SIZE, _text),
    "roberta": (
        "RobertaForMaskedLM",
        "RobertaConfig",
        {**_SIZE, "max_position_embeddings": 80, "pad_token_id": 1},
        _text,
    ),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**_SIZE, "embedding_size": 16}, _text),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": WIDTH,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 64,
            "max_position_embeddings": 64,
        },
        _text,
    ),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**_SIZE, "embedding_size": 16}, _text),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**_SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        _text,
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {
            **_SIZE,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        _text,
    ),
    "xlnet": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layer": 2, "n_head": 2, "d_inner": 64},
        _text,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
        },
        _text,
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**_SEQ2SEQ, "max_position_embeddings": 64},
        _text,
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        _spectrograms,
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", _IMAGE, _images),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _IMAGE, _images),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        _images,
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {
            "hidden_sizes": [8, 16],
            "depths": [2, 2],
            "num_stages": 2,
            "patch_size": 2,
            "image_size": 32,
        },
        _images,
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]},
        _images,
    ),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        _WAVES,
        _sounds,
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**_SIZE, "projection_dim": 16},
            "vision_config": _IMAGE,
            "projection_dim": 16,
        },
        _pairs,
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_SIZE,
            "num_key_value_heads": 1,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
        },
        _text,
    ),
    "rwkv": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "attention_hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "context_length": 32,
        },
        _text,
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **_SIZE,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
        _text,
    ),
    "hubert": ("HubertForSequenceClassification", "HubertConfig", _WAVES, _sounds),
    "audio_spectrogram_transformer": (
        "ASTForAudioClassification",
        "ASTConfig",
        {
            **{k: v for k, v in _IMAGE.items() if k != "image_size"},
            "max_length": 32,
            "num_mel_bins": 16,
            "frequency_stride": 8,
            "time_stride": 8,
        },
        _sound_spectrograms,
    ),
    "beit": ("BeitForImageClassification", "BeitConfig", _IMAGE, _images),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_SIZE, "num_key_value_heads": 1},
            "vision_config": {"model_type": "clip_vision_model", **_IMAGE},
            "image_token_index": 1,
            "vision_feature_layer": -1,
        },
        _illustrated,
    ),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """The model, in training mode, and its batch; ``model(**batch).loss`` is the loss."""
    import transformers

    model, config, options, batch = FAMILIES[name]
    torch.manual_seed(seed)
    made = getattr(transformers, model)(getattr(transformers, config)(**options))
    return made.train(), batch()
