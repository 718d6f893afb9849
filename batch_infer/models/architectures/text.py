"""Make tokenizers and random text encoders of released models, at full size or small."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
)

from batch_infer.models.architectures.weights import Sizes
from batch_infer.models.card import DEMO_MODEL

TEXTS = (
    "system",
    "user",
    "assistant",
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial",
    "relationships of the objects and background: Given a user prompt, generate an 'Enhanced prompt' that provides",
    "detailed visual descriptions suitable for image generation. If the prompt is simple, focus on adding specifics",
    "a small red circle on a sandy beach, a large green square on a wooden table, a blue triangle on fresh snow",
    "a yellow star on a plain grey wall, an orange ring, a purple cat, a black dog, a white house with an old tree",
    "a photo of a woman in a busy city street at night, an oil painting of mountains and a lake under warm sun light",
    "- User Prompt: A cat sleeping -> Enhanced: A fluffy cat curled up in a round shape on a windowsill, surrounded by",
)
"""English texts whose words become one token each: the prompts of the benchmark, and fixed texts of the pipelines."""
MAX_VOCABULARY = 2000
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The format of Qwen3's chat template for messages without tools: the model's own thoughts follow unless disabled."""

CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
SMALL: dict[str, Any] = {
    **{"vocab_size": MAX_VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}
CLIP = Sizes(CLIP_L, {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2})
T5_XXL = Sizes(
    {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"},
    {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_heads": 2, "num_layers": 2, "vocab_size": MAX_VOCABULARY},
)
"""T5 v1.1 XXL: t5.1.1.xxl.gin in google-research/text-to-text-transfer-transformer. The other values are defaults."""
QWEN3_4B = Sizes(
    {
        **{"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "tie_word_embeddings": True, "max_position_embeddings": 40960},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    {**SMALL, "num_hidden_layers": 28},  # FLUX.2 reads the outputs of layers 9, 18 and 27
)
"""config.json of Qwen/Qwen3-4B."""
QWEN2_5_VL_7B = Sizes(
    {
        **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
        **{"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 128000},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    {
        **{name: value for name, value in SMALL.items() if name != "head_dim"},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    },
)
"""The language model in config.json of Qwen/Qwen2.5-VL-7B-Instruct."""
QWEN2_5_VISION = Sizes(
    {"hidden_size": 1280, "tokens_per_second": 2},
    {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "depth": 1, "out_hidden_size": 32},
)
"""The vision encoder in the same file. It is in memory, but text-to-image does not call it."""
GEMMA_2_2B = Sizes({}, SMALL)
"""config.json of google/gemma-2-2b-it, which transformers' defaults equal."""


def load_clip_tokenizer() -> CLIPTokenizer:
    """Load the demo model's tokenizer."""
    return CLIPTokenizer.from_pretrained(DEMO_MODEL / "tokenizer", local_files_only=True)


def make_clip_config(tokenizer: CLIPTokenizer, **layers: Any) -> CLIPTextConfig:
    """Return a text encoder's config with the tokenizer's special tokens."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPTextConfig(**special, **layers)


def make_tokenizer(template: str = "$A", chat: str | None = None) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per word of TEXTS and a few for other words, so that lengths are realistic.

    `template` places the special tokens of a text, as in `$A </s>`; `chat` is the chat template.
    """
    names = ["<pad>", "</s>", "<bos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=names,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text + f" {text}\n" for text in TEXTS], trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    wrapped.chat_template = chat
    return wrapped


def make_t5(small: bool) -> T5EncoderModel:
    """Make the encoder of T5 v1.1 XXL."""
    return T5EncoderModel(T5Config(**T5_XXL.at(small), attn_implementation="eager")).eval()


def make_qwen3(kind: Any, small: bool) -> Any:
    """Make a Qwen3-4B of class `kind`."""
    return kind(Qwen3Config(**QWEN3_4B.at(small), attn_implementation="eager")).eval()


def make_qwen2_5_vl(small: bool) -> Qwen2_5_VLForConditionalGeneration:
    """Make a Qwen2.5-VL-7B."""
    config = Qwen2_5_VLConfig(
        text_config=QWEN2_5_VL_7B.at(small),
        vision_config=QWEN2_5_VISION.at(small),
        attn_implementation="eager",
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def make_gemma2(small: bool) -> Gemma2Model:
    """Make a Gemma-2-2B without its language-modelling head."""
    return Gemma2Model(Gemma2Config(**GEMMA_2_2B.at(small), attn_implementation="eager")).eval()
