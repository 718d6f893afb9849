"""Test how options are parsed into settings, and the messages for invalid options."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import pytest

from batch_infer.cli.run import run as command
from batch_infer.cli.settings import make_run_settings
from batch_infer.errors import SettingsError
from batch_infer.jobs.run_json import parse_record
from batch_infer.settings import FIELDS, FailureBudget, LoraSpec, RunSettings, SchedulerSpec, TableSettings


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("DDIMScheduler", "DDIMScheduler", {}),
        ("A:", "A", {}),
        ("A:x=true", "A", {"x": True}),
        ("A:x=True,y=None", "A", {"x": True, "y": None}),
        ("A: y = 2 , x = 0.5", "A", {"x": 0.5, "y": 2}),
        ("A:x=trailing", "A", {"x": "trailing"}),
        ('A:x="trailing"', "A", {"x": "trailing"}),
        ("A:x=", "A", {"x": ""}),
        ("A:x=a=b", "A", {"x": "a=b"}),
        ("euler", "EulerDiscreteScheduler", {}),
        ("Euler a", "EulerAncestralDiscreteScheduler", {}),
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        (
            "dpmpp_2m_sde-karras:solver_order=3",
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "use_karras_sigmas": True},
        ),
        ("unipc:solver_type=bh1", "UniPCMultistepScheduler", {"solver_type": "bh1"}),
        ("euler karras:use_karras_sigmas=false", "EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    ],
)
def test_a_scheduler_is_parsed(text: str, name: str, options: dict[str, Any]) -> None:
    spec = SchedulerSpec.parse(text)
    assert (spec.name, dict(spec.options)) == (name, options)
    assert SchedulerSpec.parse(str(spec)) == spec, "its text can be parsed again"


def test_the_order_of_scheduler_options_does_not_matter() -> None:
    assert SchedulerSpec.parse("A:x=1,y=2") == SchedulerSpec.parse("A:y=2,x=1")


def test_a_misspelt_short_name_gets_a_suggestion() -> None:
    with pytest.raises(SettingsError, match="did you mean dpm\\+\\+ 2m karras"):
        SchedulerSpec.parse("dpm++ 2m karas")


@pytest.mark.parametrize("text", ["", ":x=1", "A B", "A:x", "A:=1", "A:x=1,", "A:x y=1", "torch.nn:x=1"])
def test_an_invalid_scheduler_is_named(text: str) -> None:
    with pytest.raises(SettingsError, match="--scheduler "):
        SchedulerSpec.parse(text)


@pytest.mark.parametrize(
    ("text", "file", "weight"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("/a:b/style:2.safetensors:-1e-1", "/a:b/style:2.safetensors", -0.1),
        ("a b.safetensors/c.safetensors:0", "a b.safetensors/c.safetensors", 0.0),
    ],
)
def test_a_lora_is_parsed(text: str, file: str, weight: float) -> None:
    assert LoraSpec.parse(text) == LoraSpec(file, weight)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected FILE.safetensors"),
        ("style", "expected FILE.safetensors"),
        ("style.ckpt:1", "expected FILE.safetensors"),
        ("style.safetensors.bak", "expected FILE.safetensors"),
        ("style.safetensors:", "the weight '' is not a finite number"),
        ("style.safetensors:much", "the weight 'much' is not a finite number"),
        ("style.safetensors:nan", "the weight 'nan' is not a finite number"),
        ("style.safetensors:inf", "the weight 'inf' is not a finite number"),
    ],
)
def test_an_invalid_lora_is_named(text: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=f"--lora {text}: {reason}"):
        LoraSpec.parse(text)


@pytest.mark.parametrize(
    ("text", "rows", "limit"),
    [("0", 100, 0), ("5", 100, 5), ("1%", 100, 1), ("1%", 99, 0), ("2.5 %", 1000, 25), ("100%", 7, 7), ("0%", 7, 0)],
)
def test_max_failed_limits_the_number_of_failed_rows(text: str, rows: int, limit: int) -> None:
    budget = FailureBudget.parse(text)
    assert budget.allows(limit, rows)
    assert not budget.allows(limit + 1, rows)


@pytest.mark.parametrize("text", ["", "-1", "2.5", "ten", "%", "101%", "-1%", "nan%", "inf%"])
def test_an_invalid_max_failed_is_named(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--max-failed .*: expected a number of rows \(5\) or a percentage"):
        FailureBudget.parse(text)


def parse(*arguments: str) -> RunSettings:
    """Return the settings of a command line."""
    with click.Context(command, info_name="run") as context:
        command.parse_args(context, ["t.csv", *arguments])
        return make_run_settings(context.params)


def test_defaults_apply_without_options() -> None:
    assert parse() == RunSettings(TableSettings(("t.csv",)), "batch-infer-out", output=parse().output)
    assert parse().output.results == ()
    assert (parse().safety.mode, parse().safety.policy, parse().max_failed.count) == ("auto", "blank", 0)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--model", "m", "--revision", "r", "--variant", "fp16", "--dtype", "bfloat16", "--quantize", "nf4"),
        ("--lora", "l.safetensors:0.12345678", "--lora", "k.safetensors", "--lora-folder", "loras", "--long-prompts"),
        ("--embedding", "e.safetensors", "--embedding", "f.safetensors:<toy>", "--scheduler", "A:x=1,y=linear"),
    ],
)
def test_the_options_of_a_model_select_it_again(options: tuple[str, ...]) -> None:
    assert parse(*parse(*options).model.as_options()).model == parse(*options).model


def test_every_option_is_a_setting() -> None:
    settings = asdict(
        parse(
            *("--out", "o", "--column", "prompt=caption", "--column", "height=", "--limit", "3", "--model", "m"),
            *("--id-from", "content"),
            *("--revision", "r", "--variant", "fp16", "--dtype", "bfloat16", "--device", "cpu", "--scheduler", "A:x=1"),
            *("--lora", "l.safetensors:0.5", "--lora", "k.safetensors", "--long-prompts", "--quantize", "nf4"),
            *("--lora-folder", "loras", "--embedding", "e.safetensors", "--embedding", "f.safetensors:<toy>"),
            *("--slots", "6", "--threads", "2", "--no-compile", "--steps", "4"),
            *("--engine", "ray", "--ray-address", "head:6379", "--offload", "model"),
            *("--guidance-scale", "2", "--guidance-rescale", "0.5"),
            *("--height", "72", "--width", "80", "--negative-prompt", "n", "--images-per-prompt", "2", "--seed", "9"),
            *("--safety", "checker", "--on-flagged", "drop", "--require-safety", "--image-format", "webp"),
            *("--results", "csv", "--results", "jsonl", "--base64", "--max-failed", "1%", "--overwrite"),
            *("--price-per-hour", "2.5", "--rerender-changed", "--sign-key", "k.pem", "--sink", "parquet"),
            *("--provenance", "c2pa,iptc", "--c2pa-cert", "c.pem", "--c2pa-key", "s.pem", "--no-prompt-metadata"),
        )
    )
    signer = {"certificates": "c.pem", "private_key": "s.pem"}
    assert settings == {
        "table": {
            **{"tables": ("t.csv",), "columns": {"prompt": "caption", "height": ""}, "limit": 3, "folder": Path()},
            "id_from": "content",
        },
        "out": "o",
        "model": {
            "name": "m",
            "revision": "r",
            "variant": "fp16",
            "dtype": "bfloat16",
            "device": "cpu",
            "scheduler": {"name": "A", "options": (("x", 1),)},
            "loras": ({"file": "l.safetensors", "weight": 0.5}, {"file": "k.safetensors", "weight": 1.0}),
            "long_prompts": True,
            "quantize": "nf4",
            "lora_folder": "loras",
            "embeddings": ({"file": "e.safetensors", "token": None}, {"file": "f.safetensors", "token": "<toy>"}),
        },
        "defaults": {
            "num_inference_steps": 4,
            "guidance_scale": 2.0,
            "guidance_rescale": 0.5,
            "height": 72,
            "width": 80,
            "negative_prompt": "n",
            "num_images_per_prompt": 2,
            "seed": 9,
        },
        "safety": {"mode": "checker", "on_flagged": "drop", "required": True, "service": None},
        "output": {
            "image_format": "webp",
            "results": ("csv", "jsonl"),
            "base64": True,
            "sign_key": "k.pem",
            "sink": "parquet",
        }
        | {"provenance": {"marks": ("iptc", "c2pa"), "prompt_metadata": False, "signer": signer}},
        "compute": {
            "slots": 6,
            "threads": 2,
            "compiled": False,
            "processes": None,
            "engine": "ray",
            "ray_address": "head:6379",
            "offload": "model",
        },
        "max_failed": {"count": 0, "percent": 1.0},
        "overwrite": True,
        "rerender_changed": True,
        "price_per_hour": 2.5,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--scheduler", "A:x=1,y=true,z=word", "--results", "csv", "--max-failed", "1%", "--column", "prompt=caption"),
        ("--model", "m.safetensors", "--lora", "a:b.safetensors:-0.5", "--lora", "c.safetensors", "--long-prompts"),
        ("--model", "m", "--quantize", "nf4", "--offload", "sequential"),
        ("--model", "m", "--steps", "3", "--safety", "none", "--slots", "4", "--limit", "2", "--price-per-hour", "1"),
    ],
)
def test_settings_round_trip_through_json(arguments: tuple[str, ...]) -> None:
    settings = parse(*arguments)
    record = json.loads(json.dumps({"settings": asdict(settings)}, default=str))
    assert parse_record(record).settings == settings


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--column", "prompt"], "--column prompt: write FIELD=NAME"),
        (["--column", "colour=x"], f"--column colour=x: .* one of {', '.join(FIELDS)}"),
        (["--base64"], "add --results csv or --results jsonl"),
        (["--base64", "--results", "parquet"], "add --results csv or --results jsonl"),
        (["--scheduler", "A:x"], "'x' is not key=value"),
        (["--lora", "style.pt"], "--lora style.pt: expected FILE.safetensors or FILE.safetensors:WEIGHT"),
        (["--max-failed", "some"], "--max-failed some"),
    ],
)
def test_an_invalid_option_is_named(arguments: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        parse(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [["--slots", "1"], ["--threads", "0"], ["--limit", "0"], ["--steps", "ten"], ["--results", "xml"], ["--no"]],
)
def test_click_refuses_other_invalid_values(arguments: list[str]) -> None:
    with pytest.raises(click.UsageError):
        parse(*arguments)
