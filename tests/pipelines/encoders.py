"""Tiny random text encoders of diffusers' pipelines."""

from __future__ import annotations

from typing import Any

from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaConfig,
    GemmaModel,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from tests.pipelines.parts import VOCABULARY, WIDTH, fill

DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
"""Config of decoder-only language models."""
VISION: dict[str, Any] = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": 16, "num_heads": 2}
LOUD = {"embed": 4.0, "shared": 4.0}
"""Gains of token embeddings, which `fill` makes as small as weights."""


def make_t5(width: int = WIDTH) -> T5EncoderModel:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=width, d_ff=32, d_kv=8, num_heads=2, num_layers=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return fill(T5EncoderModel(config), **LOUD)


def make_umt5() -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_ff=32, d_kv=8, num_heads=2, num_layers=2)
    return fill(UMT5EncoderModel(config), **LOUD)


def make_bert() -> BertModel:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return fill(BertModel(config), **LOUD)


def make_multilingual_clip() -> MultilingualCLIP:
    config = MCLIPConfig(
        transformerDimSize=WIDTH, imageDimSize=32, vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    return fill(MultilingualCLIP(config), **LOUD)


def make_clip(words: CLIPTokenizer, width: int = WIDTH, *, projects: bool = False, positions: int = 77) -> Any:
    """Make a CLIP text encoder, optionally with a projection of the pooled output."""
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, projection_dim=width,
        vocab_size=len(words), bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id, max_position_embeddings=positions,
    )  # fmt: skip
    return fill((CLIPTextModelWithProjection if projects else CLIPTextModel)(config), **LOUD)


def make_gemma() -> GemmaModel:
    return fill(GemmaModel(GemmaConfig(**DECODER)), **LOUD)


def make_gemma2() -> Gemma2Model:
    return fill(Gemma2Model(Gemma2Config(**DECODER, query_pre_attn_scalar=8)), **LOUD)


def make_t5_gemma() -> T5GemmaEncoder:
    settings = {
        **DECODER, "query_pre_attn_scalar": 8, "rms_norm_eps": 1e-6, "layer_types": ["full_attention"] * 2,
        "attn_logit_softcapping": 50.0, "sliding_window": 4096, "max_position_embeddings": 512, "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "is_decoder": False,
        "hidden_activation": "gelu_pytorch_tanh",
    }  # fmt: skip
    encoder = T5GemmaModuleConfig(**settings)
    return fill(T5GemmaEncoder(T5GemmaConfig(encoder=encoder, is_encoder_decoder=False, **settings)), **LOUD)


def make_glm() -> GlmModel:
    return fill(GlmModel(GlmConfig(**DECODER)), **LOUD)


def make_llama() -> LlamaForCausalLM:
    return fill(LlamaForCausalLM(LlamaConfig(**DECODER)), **LOUD)


def make_qwen3(layers: int = 2, *, with_head: bool = False) -> Any:
    config = Qwen3Config(**{**DECODER, "num_hidden_layers": layers})
    return fill((Qwen3ForCausalLM if with_head else Qwen3Model)(config), **LOUD)


def make_qwen_vl(**gains: float) -> Qwen2_5_VLForConditionalGeneration:
    """Make Qwen 2.5 VL, whose vision part is not used."""
    text = {**DECODER, "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"}}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**VISION, "out_hidden_size": WIDTH}, pad_token_id=0)
    return fill(Qwen2_5_VLForConditionalGeneration(config), **LOUD, **gains)


def make_qwen3_vl() -> Qwen3VLModel:
    text = {**DECODER, "rope_scaling": {"mrope_section": [2, 1, 1], "rope_type": "default"}}
    vision = {**VISION, "out_hidden_size": WIDTH, "deepstack_visual_indexes": [0]}
    return fill(Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)), **LOUD)


def make_mistral3(layers: int) -> Mistral3ForConditionalGeneration:
    """Make Mistral Small 3, whose vision part is not used."""
    text = {**DECODER, "model_type": "mistral", "num_hidden_layers": layers, "sliding_window": None}
    vision = {
        "model_type": "pixtral", "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    return fill(Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)), **LOUD)
