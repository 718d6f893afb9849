"""`--long-prompts`: embeddings and images equal those of compel, shapes are fixed, and no text stops a run."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType
from compel.embeddings_provider import SplitLongTextMode
from PIL import Image

from batch_infer.errors import ModelError
from batch_infer.models import ModelCard, checkpoint, load_latent_diffusion, load_token_counter, read_card
from batch_infer.models.long_prompts import read_weights
from batch_infer.models.tokens import WINDOWS
from batch_infer.records import PromptRequest
from batch_infer.settings import ModelSettings
from tests.oracle import assert_close, load_pipeline
from tests.rendering import CPU, make_request, max_difference, render
from tests.runs import results, run

LONG = "a small red star on a blue ground and " * 12
OVERLONG = "a small red star on a blue ground and " * 30
TEXTS = {
    "empty": "",
    "short": "a red circle, two stars",
    "long": LONG,
    "overlong": OVERLONG,
    "more of a word": "a (red)1.4 circle on a blue++ ground",
    "less of a word": "a (red circle)0.6 on a blue- ground",
    "weights in a long one": f"{LONG} (purple heart)1.3 {LONG}",
    "less in a long one": f"{LONG} (purple heart)0.5 and a star",
    "weights in each other": "a (large (green)1.2 ring)1.1 here",
    "an escape": r"a ring \(green\)",
    "quotes": 'a "red circle"1.2 here',
    "half of a syntax": "a (red circle on a blue-green ground",
}


def card_of(folder: Path, *, long_prompts: bool = True) -> ModelCard:
    return read_card(ModelSettings(name=str(folder), long_prompts=long_prompts))


def load_model(folder: Path) -> Any:
    return load_latent_diffusion(card_of(folder), CPU, torch.float32, with_checker=False)


@pytest.fixture(scope="module")
def sd1(sd1_folder: Path) -> Any:
    return load_model(sd1_folder)


@pytest.fixture(scope="module")
def sdxl(sdxl_folder: Path) -> Any:
    return load_model(sdxl_folder)


class Reference:
    """diffusers' pipeline with embeddings from compel, which always fill three windows."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        double = hasattr(pipe, "text_encoder_2")
        kind = ReturnedEmbeddingsType
        options = {
            "truncate_long_prompts": False,
            "split_long_text_mode": SplitLongTextMode.BRUTAL,
            "returned_embeddings_type": kind.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
            if double
            else kind.LAST_HIDDEN_STATES_NORMALIZED,
        }
        pairs = [(pipe.tokenizer, pipe.text_encoder)]
        pairs += [(pipe.tokenizer_2, pipe.text_encoder_2)] if double else []
        self._compels = [Compel(*pair, **options) for pair in pairs]

    def embed(self, text: str) -> torch.Tensor:
        """Return an embedding (1, 3 * 77, width), cut off or padded with the empty prompt."""
        embeddings = []
        for compel in self._compels:
            embedding = compel(text)
            full = embedding.new_zeros(1, WINDOWS * 77, embedding.shape[-1])
            embeddings.append(compel.pad_conditioning_tensors_to_same_length([embedding, full])[0][:, : WINDOWS * 77])
        return torch.cat(embeddings, dim=-1)

    def pool(self, text: str) -> torch.Tensor:
        pooled: torch.Tensor = self._compels[1].conditioning_provider.get_pooled_embeddings([text])
        return pooled

    def render(self, request: PromptRequest) -> np.ndarray:
        arguments = {"prompt_embeds": self.embed(request.prompt)}
        negative = request.negative_prompt or ""
        arguments["negative_prompt_embeds"] = self.embed(negative)
        if len(self._compels) > 1:
            arguments["pooled_prompt_embeds"] = self.pool(request.prompt)
            arguments["negative_pooled_prompt_embeds"] = self.pool(negative)
            if request.negative_prompt is None and self.pipe.config.force_zeros_for_empty_prompt:
                arguments |= {
                    name: torch.zeros_like(arguments[name]) for name in arguments if name.startswith("negative")
                }
        output = self.pipe(
            **arguments,
            num_inference_steps=request.params.num_inference_steps,
            guidance_scale=request.params.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="np",
        )
        return np.asarray((output.images[0] * 255).round().astype(np.uint8))


def contexts(model: Any, texts: Sequence[str]) -> list[torch.Tensor]:
    """Return the conditional embeddings of rows with these prompts."""
    conditionings = model.condition([make_request(str(k), text, guidance=1.0) for k, text in enumerate(texts)])
    return [row.context[0]["encoder_hidden_states"] for row in conditionings]


@pytest.mark.parametrize(
    "checkpoint", ["sd1", *(pytest.param(name, marks=pytest.mark.promises) for name in ("sd2", "sdxl"))]
)
def test_embeddings_equal_those_of_compel(checkpoint: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{checkpoint}_folder")
    reference = Reference(load_pipeline(folder))
    for (name, text), actual in zip(TEXTS.items(), contexts(load_model(folder), list(TEXTS.values())), strict=True):
        expected = reference.embed(text)[0]
        assert actual.shape == expected.shape == (WINDOWS * 77, expected.shape[1]), name
        assert torch.allclose(actual, expected, atol=1e-6), name


@pytest.mark.parametrize("checkpoint", ["sd1", pytest.param("sdxl", marks=pytest.mark.promises)])
def test_images_equal_those_of_diffusers_with_compel(checkpoint: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{checkpoint}_folder")
    reference = Reference(load_pipeline(folder))
    rows = [
        make_request("long", LONG, steps=5, seed=1),
        make_request("short", "a red circle", steps=4, negative=LONG, seed=2),
        make_request("unguided", LONG + "purple", steps=6, guidance=1.0, seed=3),
        make_request("weighted", "a (red)1.4 circle", steps=4, negative="a (green)0.5 ring", seed=4),
    ]
    rendered = render(load_model(folder), rows)
    for row in rows:
        assert_close(rendered[row.id].pixels, reference.render(row))


def test_a_row_does_not_depend_on_the_length_of_others(sd1_folder: Path) -> None:
    short = make_request("short", "a red circle", seed=5)
    others = [make_request(str(k), text, steps=3 + k, seed=k) for k, text in enumerate(TEXTS.values())]
    alone = render(load_model(sd1_folder), [short])["short"].pixels
    crowded = render(load_model(sd1_folder), [*others[:4], short, *others[4:]])["short"].pixels
    assert np.array_equal(alone, crowded)


def test_texts_are_encoded_in_one_shape(sd1_folder: Path) -> None:
    model = load_model(sd1_folder)
    shapes = set()
    model.pipeline.text_encoder.register_forward_pre_hook(lambda _, inputs: shapes.add(tuple(inputs[0].shape)))
    contexts(model, list(TEXTS.values()))
    assert shapes == {(1, 77)}


def test_words_beyond_the_last_window_have_no_effect(sd1_folder: Path, tmp_path: Path) -> None:
    """The hundredth word changes the image only with the option, and the three hundredth never."""
    words = ["star"] * 400
    table = tmp_path / "t.csv"
    prompts = [" ".join(words[:index] + ["circle"] + words[index:]) for index in (0, 99, 299, 399)]
    table.write_text("prompt,seed\n" + "".join(f"{prompt},7\n" for prompt in prompts))
    images: dict[str, list[bytes]] = {}
    for name, options in (("plain", ()), ("long", ("--long-prompts",))):
        assert run(table, tmp_path / name, "--model", sd1_folder, *options).code == 0
        rows = results(tmp_path / name)
        images[name] = [Image.open(tmp_path / name / row["generated_image"]).tobytes() for row in rows]
        assert all(row["prompt_truncated"] for row in rows)
    assert len({*images["plain"][1:]}) == 1
    assert images["long"][1] != images["long"][2] == images["long"][3]
    refused = run(table, tmp_path / "plain", "--model", sd1_folder, "--long-prompts")
    assert refused.code == 2
    assert "was made with model sd1" in refused.stderr


def test_tokens_are_counted_without_syntax(sd1: Any, sdxl: Any, sd1_folder: Path) -> None:
    counter = load_token_counter(card_of(sd1_folder))
    assert counter is not None
    token_count = counter.count(["circle"])[0]
    most = WINDOWS * 75 // token_count
    for model in (sd1, sdxl):
        texts = ["", "(circle)1.3", "circle " * most, "circle " * (most + 1)]
        conditionings = model.condition([make_request(str(k), text) for k, text in enumerate(texts)])
        counts = [(row.prompt_tokens, row.prompt_truncated) for row in conditionings]
        assert counts == [
            (0, False),
            (token_count, False),
            (most * token_count, False),
            ((most + 1) * token_count, True),
        ]
    assert counter.max_tokens == WINDOWS * 75, "the limit that `plan` uses"


# Texts in other syntax


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a red circle, well lit", (("a red circle, well lit", 1.0),)),
        ("a (red)1.5 circle", (("a", 1.0), ("red", 1.5), ("circle", 1.0))),
        ("a red+ circle", (("a", 1.0), ("red", 1.1), ("circle", 1.0))),
        ("a well-known (brand)", (("a well-known brand", 1.0),)),
        ("a (red circle", (("a (red circle", 1.0),)),
        ("()", (("()", 1.0),)),
        ('("a", "b").and()', (('("a", "b").and()', 1.0),)),
        ('("a", "b").blend(1, 1)', (('("a", "b").blend(1, 1)', 1.0),)),
        ("a (cat).swap(dog)", (("a (cat).swap(dog)", 1.0),)),
        ("withLora(style, 1) (red)1.2", (("withLora(style, 1) (red)1.2", 1.0),)),
        ("(red)1.2 <|endoftext|>", (("(red)1.2 <|endoftext|>", 1.0),)),
        ("(" * 16 + "red" + ")" * 16, (("red", 1.0),)),
        ("(" * 17 + "red" + ")" * 17, (("(" * 17 + "red" + ")" * 17, 1.0),)),
    ],
)
def test_weights_are_read_from_a_text(text: str, pieces: tuple[tuple[str, float], ...]) -> None:
    actual = read_weights(text)
    assert [piece for piece, _ in actual] == [piece for piece, _ in pieces]
    assert [weight for _, weight in actual] == pytest.approx([weight for _, weight in pieces])


def test_no_text_takes_long_or_raises_an_error(sd1: Any) -> None:
    """compel's parser alone takes minutes for ten parentheses, and fails for an empty pair."""
    random_ = random.Random(0)
    parts = ["a", " b ", "(", ")", "1.2", "+", "-", '"', ", ", ". ", ".and()", ".swap(", " cat", "\\(", "0", "🙂", "!"]
    texts = ["".join(random_.choices(parts, k=random_.randint(1, 40))) for _ in range(60)]
    texts += [
        "(" * 5000,
        "((" * 12 + "a" + "))" * 12,
        '"' * 99,
        "word " * 100_000,
        "\0",
        "(\0)0.5",
        "<|startoftext|>",
        "(!)0.5 !",
    ]
    embeddings = contexts(sd1, texts)
    assert {tuple(context.shape) for context in embeddings} == {(WINDOWS * 77, 32)}
    assert all(torch.isfinite(context).all() for context in embeddings)


# Fingerprint and families


def test_the_option_is_part_of_the_fingerprint(sd1_folder: Path) -> None:
    plain, long = card_of(sd1_folder, long_prompts=False), card_of(sd1_folder)
    assert plain.fingerprint != long.fingerprint
    assert (plain.windows, long.windows) == (1, WINDOWS)


def test_the_first_window_of_a_short_prompt_is_unchanged(sd1: Any, sd1_folder: Path) -> None:
    plain = load_latent_diffusion(card_of(sd1_folder, long_prompts=False), CPU, torch.float32, with_checker=False)
    (long,), (short,) = contexts(sd1, ["a red circle"]), contexts(plain, ["a red circle"])
    assert torch.allclose(long[:77], short, atol=1e-6)


def test_decidiffusion_supports_long_prompts(decidiffusion_folder: Path) -> None:
    rows = [make_request("one", LONG), make_request("other", f"{LONG} purple heart")]
    one, other = (image.pixels for image in render(load_model(decidiffusion_folder), rows).values())
    assert max_difference(one, other) > 0


def test_a_missing_compel_is_named(sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None if name == "compel" else find_spec(name))
    with pytest.raises(ModelError, match=r"--long-prompts needs compel: pip install compel pyparsing"):
        card_of(sd1_folder)
    assert card_of(sd1_folder, long_prompts=False).windows == 1
