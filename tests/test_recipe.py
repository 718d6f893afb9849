"""A recipe is executed, and reproduces the image that the run stored: at most 1 of 255 apart."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import batch_infer
from batch_infer.errors import ModelError, UsageError
from batch_infer.models import PlainImage, write_script
from batch_infer.models.script_text import check_name, check_script
from batch_infer.records import SamplingParams
from batch_infer.settings import LoraSpec, ModelSettings, SchedulerSpec
from tests.loras import as_peft, make_layers
from tests.oracle import load_pipeline
from tests.pipelines import SAVE_FUNCTIONS, save_sd3
from tests.rendering import max_difference
from tests.runs import CommandResult, command, results, run
from tests.tables import write_csv

PROMPTS = ("a red circle", 'it\'s a "blue" square', "a green star\nand a hat", "ein grünes Quadrat, 緑の四角")
COLUMNS = ["id", "prompt", "negative_prompt", "seed", "height", "width", "num_inference_steps", "guidance_scale",
           "guidance_rescale", "num_images_per_prompt"]  # fmt: skip


def make_rows(count: int, seed: int, *fixed: str, steps: tuple[int, int] = (2, 6)) -> list[list[str]]:
    """Return random rows. The cells of `fixed` columns are empty."""
    draw = random.Random(seed)
    rows = [COLUMNS]
    for number in range(count):
        cells = {
            "id": f"row {number}",
            "prompt": draw.choice(PROMPTS),
            "negative_prompt": draw.choice(["", "", "blurry", "a dog"]),
            "seed": draw.choice(["", str(draw.randrange(2**40))]),
            "height": draw.choice(["", "64", "80"]),
            "width": draw.choice(["", "48", "64"]),
            "num_inference_steps": str(draw.randint(*steps)),
            "guidance_scale": draw.choice(["", "1", "3.5", "7.123456"]),
            "guidance_rescale": draw.choice(["", "", "0.4"]),
            "num_images_per_prompt": draw.choice(["", "", "2"]),
        }
        rows.append(["" if name in fixed else cells[name] for name in COLUMNS])
    return rows


def render(tmp_path: Path, rows: list[list[str]], model: Path | None, *options: str | Path) -> Path:
    """Run a table, and return OUT."""
    chosen = () if model is None else ("--model", model)
    result = run(write_csv(tmp_path / "t.csv", rows), tmp_path / "out", *chosen, "--guidance-scale", "4.5", *options)
    assert result.code == 0, result.stderr
    return tmp_path / "out"


def export(out: Path, row: Mapping[str, Any], *options: str) -> CommandResult:
    return command("export-recipe", out, row["id"], "--image-index", str(row["image_index"]), *options)


def execute(recipe: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Run a recipe in a folder, and return the image that it saves."""
    folder.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        exec(compile(recipe, "recipe.py", "exec"), {})
    (file,) = folder.glob("*.png")
    image = np.asarray(Image.open(file))
    file.unlink()
    return image


def check_all(out: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Execute the recipe of every result, and compare its image with the stored one. Return how many were compared."""
    rows = results(out)
    first = export(out, rows[0]).stdout
    other = execute(first.replace(f"seed({rows[0]['seed']})", "seed(12345)"), folder, monkeypatch)
    assert max_difference(other, np.asarray(Image.open(out / rows[0]["generated_image"]))) > 2, "any image would do"
    for row in rows:
        exported = export(out, row)
        assert exported.code == 0, exported.stderr
        image = execute(exported.stdout, folder, monkeypatch)
        stored = np.asarray(Image.open(out / row["generated_image"]))
        assert image.shape == stored.shape
        assert max_difference(image, stored) <= 1, exported.stdout
    return len(rows)


def save_lora(model: Path, path: Path, *networks: str) -> Path:
    layers = make_layers(load_pipeline(model), *networks)
    save_file({name: tensor.clone() for name, tensor in as_peft(layers).items()}, path)
    return path


def test_sd1_with_a_lora_an_embedding_and_scheduler_options(
    sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = save_lora(sd1_folder, tmp_path / "style.safetensors", "unet", "text_encoder")
    width = load_pipeline(sd1_folder).text_encoder.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(1)
    save_file({"emb_params": torch.randn(2, width, generator=generator)}, tmp_path / "toy.safetensors")
    rows = make_rows(12, 1, steps=(3, 6))
    rows[1][1] = "a toy next to a toy"
    out = render(tmp_path, rows, sd1_folder, "--lora", f"{lora}:0.7", "--embedding", tmp_path / "toy.safetensors",
                 "--scheduler", "UniPCMultistepScheduler:solver_order=3,use_karras_sigmas=true")  # fmt: skip
    assert check_all(out, tmp_path / "again", monkeypatch) >= 12


def test_rows_with_their_own_loras(sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loras").mkdir()
    both = save_lora(sd1_folder, tmp_path / "base.safetensors", "unet")
    save_lora(sd1_folder, tmp_path / "loras" / "text.safetensors", "text_encoder")
    rows = [["id", "prompt", "lora"], ["a", "a red circle", "text:0.5"], ["b", "a red circle", ""]]
    out = render(tmp_path, rows, sd1_folder, "--lora", both, "--lora-folder", tmp_path / "loras")
    assert check_all(out, tmp_path / "again", monkeypatch) == 2
    (first, second) = results(out)
    assert "text.safetensors" in export(out, first).stdout
    assert "text.safetensors" not in export(out, second).stdout


@pytest.mark.parametrize("scheduler", [None, "euler a"])
def test_sdxl(sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str | None) -> None:
    options = ("--scheduler", scheduler) if scheduler else ()
    out = render(tmp_path, make_rows(6, 2, "height", "width"), sdxl_folder, *options)
    assert check_all(out, tmp_path / "again", monkeypatch) >= 6


def test_sd2(sd2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_all(render(tmp_path, make_rows(4, 3), sd2_folder), tmp_path / "again", monkeypatch) >= 4


def test_latent_consistency(lcm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(3, 4, "negative_prompt", "guidance_rescale")
    assert check_all(render(tmp_path, rows, lcm_folder), tmp_path / "again", monkeypatch) >= 3


def test_stable_diffusion_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_sd3(tmp_path / "sd3")
    out = render(tmp_path, make_rows(3, 5, "guidance_rescale", "height", "width"), model)
    assert check_all(out, tmp_path / "again", monkeypatch) >= 3


def test_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = render(tmp_path, make_rows(4, 6, steps=(5, 9)), None)
    assert check_all(out, tmp_path / "again", monkeypatch) >= 4


@pytest.mark.parametrize(
    "name", ["pixart", *(pytest.param(name, marks=pytest.mark.promises) for name in ("flux", "z_image"))]
)
def test_other_pipelines(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SAVE_FUNCTIONS[name](tmp_path / name)
    fixed = ("negative_prompt", "guidance_rescale", "height", "width")
    out = render(tmp_path, make_rows(2, 7, *fixed), model)
    assert check_all(out, tmp_path / "again", monkeypatch) >= 2


def test_half_precision_is_near(sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers rounds to bfloat16 after each step and draws other noise, so the script passes the initial noise."""
    out = render(tmp_path, [["prompt"], ["a red circle"]], sd1_folder, "--dtype", "bfloat16", "--steps", "4")
    (row,) = results(out)
    recipe = export(out, row).stdout
    again = execute(recipe, tmp_path / "again", monkeypatch)
    stored = np.asarray(Image.open(out / row["generated_image"])).astype(float)
    other = execute(re.sub(r"    latents=.*\n", "", recipe), tmp_path / "again", monkeypatch)
    near, far = (np.abs(image - stored).mean() for image in (again, other))
    assert near < far / 4


def test_the_function_and_json_have_the_same_script(sd1_folder: Path, tmp_path: Path) -> None:
    out = render(tmp_path, [["id", "prompt"], ["a b", "it's \u202e \x1b[31m red"]], sd1_folder)
    (row,) = results(out)
    printed = export(out, row).stdout
    assert printed == batch_infer.recipe(out, "a b")
    assert printed.isascii() or "\u202e" not in printed
    assert "\x1b" not in printed
    data = json.loads(export(out, row, "--json").stdout)
    assert data == {"id": "a b", "image_index": 0, "recipe": printed}


def test_a_row_without_an_image_has_no_recipe(sd1_folder: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [["id", "prompt"], ["a", "a red circle"], ["b", ""]])
    assert run(table, tmp_path / "out", "--model", sd1_folder).code == 3
    for name, index, text in (
        ("b", 0, "image 0 of 'b' has no image: it is invalid (the prompt is empty)"),
        ("c", 0, "has no result with the id 'c' and image index 0"),
        ("a", 1, "has no result with the id 'a' and image index 1"),
    ):
        exported = command("export-recipe", tmp_path / "out", name, "--image-index", str(index))
        assert (exported.code, exported.stdout) == (2, "")
        assert text in exported.stderr
        with pytest.raises(UsageError, match=re.escape(text)):
            batch_infer.recipe(tmp_path / "out", name, index)
    assert "contains no run" in command("export-recipe", tmp_path / "none", "a").stderr


def test_images_that_need_more_than_diffusers_are_refused(decidiffusion_folder: Path, tmp_path: Path) -> None:
    out = render(tmp_path, [["id", "prompt"], ["a", "a red circle"]], decidiffusion_folder)
    exported = command("export-recipe", out, "a")
    assert exported.code == 2
    assert "plain diffusers cannot make this image: diffusers has no DeciDiffusionPipeline" in exported.stderr


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"long_prompts": True}, "--long-prompts"),
        ({"quantize": "int8"}, "quantized by --quantize int8"),
        ({"name": "/nowhere/model"}, "/nowhere/model is neither"),
    ],
)
def test_settings_that_a_script_cannot_express(
    sd1_folder: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    params = SamplingParams(64, 64, 2, 7.5, 0.0)
    model = replace(ModelSettings(name=str(sd1_folder)), **changes)
    image = PlainImage(model, "stable_diffusion", "cpu", "float32", (), "a", None, 1, params, "a.png")
    with pytest.raises(ModelError, match=re.escape(text)):
        write_script(image)


def test_stable_diffusion_3_has_no_guidance_rescale_in_diffusers(tmp_path: Path) -> None:
    model = ModelSettings(name=str(save_sd3(tmp_path / "sd3")))
    params = SamplingParams(64, 64, 2, 7.5, 0.4)
    image = PlainImage(model, "stable_diffusion_3", "cuda", "float32", (), "a", None, 1, params, "a.png")
    with pytest.raises(ModelError, match="does not support guidance_rescale"):
        write_script(image)
    script = write_script(replace(image, params=replace(params, guidance_rescale=0.0)))
    assert "pipe.to('cuda')\n" in script
    assert "torch.backends.cudnn.allow_tf32 = False\n" in script


HOSTILE = "x\nimport os\rprint('executed')\x0c\u2028"


def edit(path: Path, keys: str, value: Any) -> None:
    """Set a value in a JSON file, or remove it if the value is None. Dots separate keys."""
    document = json.loads(path.read_text("utf-8"))
    *outer, last = keys.split(".")
    part = document
    for key in outer:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    path.write_text(json.dumps(document), "utf-8")


@pytest.fixture(scope="module")
def finished_run(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a copy of a model, whose OUT and model tests copy and edit."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(sd1_folder, folder / "model")
    rows = [["id", "prompt"], ["\u7dd1 1", PROMPTS[-1]], ["b", "a red circle"]]
    render(folder, rows, folder / "model", "--scheduler", "UniPCMultistepScheduler:solver_order=3")
    return folder


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the folder with the OUT `out`, which uses the `model` in the copy."""
    folder = tmp_path / "copy"
    shutil.copytree(finished_run, folder)
    edit(folder / "out" / "run.json", "model.path", str(folder / "model"))
    return folder


def test_a_script_compiles_whatever_the_encoding_of_stdout(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row, _) = results(finished_run / "out")
    line = [sys.executable, "-X", "utf8=0", "-m", "batch_infer", "export-recipe", str(finished_run / "out"), row["id"]]
    with (tmp_path / "again.py").open("wb") as file:
        subprocess.run(line, stdout=file, check=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    script = (tmp_path / "again.py").read_bytes().decode("ascii")
    stored = np.asarray(Image.open(finished_run / "out" / row["generated_image"]))
    assert max_difference(execute(script, tmp_path / "again", monkeypatch), stored) <= 1


def test_an_empty_prompt(sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(64, 64, 2, 7.5, 0.0)
    model = ModelSettings(name=str(sd1_folder))
    script = write_script(
        PlainImage(model, "stable_diffusion", "cpu", "float32", (), "", "", 1, params, "a.png"), [HOSTILE]
    )
    assert "    prompt='',\n    negative_prompt='',\n" in script
    assert len(script.splitlines()) == len(script.split("\n")) - 1
    assert execute(script, tmp_path / "again", monkeypatch).shape == (64, 64, 3)


@pytest.mark.parametrize("key", ["versions.torch", "versions.diffusers"])
def test_text_in_a_comment_stays_in_it(run_copy: Path, key: str) -> None:
    edit(run_copy / "out" / "run.json", key, HOSTILE)
    script = batch_infer.recipe(run_copy / "out", "b")
    assert script.isascii()
    (line,) = (line for line in script.splitlines() if "executed" in line)
    assert line.startswith("# image 0 of 'b'")


@pytest.mark.parametrize(
    ("keys", "value", "text"),
    [
        ("identity.dtype", "float32; import os", "the dtype 'float32; import os'"),
        ("identity.dtype", "float32" + HOSTILE, "the dtype"),
        ("identity.dtype", None, "no identity.dtype"),
        ("identity.model", "0", "are not those of the run"),
        ("identity.scheduler", None, "are not those of the run"),
        ("settings.model.scheduler.name", "A import os" + HOSTILE, "diffusers has no scheduler"),
        ("settings.model.scheduler.options", [["solver_order=1)\nimport os#", 1]], "has no option"),
        ("settings.model.scheduler.options", [["solver_order", float("inf")]], "are not those of the run"),
        ("compute.device", "cpu')\nimport os#", "the device"),
        ("compute", None, "no compute.device"),
        ("environments", "x", "environments are not those of runs"),
        ("environments", [{"compute": []}], "no compute.device"),
        ("model", None, "no model.family"),
        ("model.family", None, "no model.family"),
        ("model.family", "x", "the model family 'x'"),
        ("model.loras", [{"path": "x"}], "no loras.fingerprint"),
        ("model.path", 5, "no model.path"),
        ("model.revision", 5, "no model.revision"),
    ],
)
def test_an_edited_run_json_is_refused(run_copy: Path, keys: str, value: Any, text: str) -> None:
    edit(run_copy / "out" / "run.json", keys, value)
    exported = command("export-recipe", run_copy / "out", "b")
    assert (exported.code, exported.stdout) == (2, "")
    assert text in exported.stderr


@pytest.mark.parametrize(
    "value", [None, 5, [], "class", "StableDiffusionPipelin\u0435", "A\nimport os\nB", "A, B", "os;print()"]
)
def test_an_edited_model_index_is_refused(run_copy: Path, value: Any) -> None:
    edit(run_copy / "model" / "model_index.json", "_class_name", value)
    exported = command("export-recipe", run_copy / "out", "b")
    assert (exported.code, exported.stdout) == (2, "")
    assert "a script cannot name the pipeline" in exported.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float64"},
        {"device": "cuda:0"},
        {"seed": True},
        {"seed": "1)\nimport os#"},
        {"prompt": None},
        {"model.scheduler": SchedulerSpec("UniPCMultistepScheduler", (("solver_order", float("inf")),))},
        {"loras": (LoraSpec("a.safetensors", float("nan")),)},
        {"params": SamplingParams(64, 64, 2, float("inf"), 0.0)},
        {"params": SamplingParams(64, 64, 2, float("nan"), 0.0)},
        {"params": SamplingParams(64, "64", 2, 7.5, 0.0)},  # type: ignore[arg-type]
    ],
)
def test_values_that_no_run_records_are_refused(sd1_folder: Path, changes: dict[str, Any]) -> None:
    params = SamplingParams(64, 64, 2, 7.5, 0.0)
    model = ModelSettings(name=str(sd1_folder))
    image = PlainImage(model, "stable_diffusion", "cpu", "float32", (), "a", None, 1, params, "a.png")
    assert write_script(image)
    if scheduler := changes.get("model.scheduler"):
        changes = {"model": replace(model, scheduler=scheduler)}
    with pytest.raises(UsageError, match="a script cannot"):
        write_script(replace(image, **changes))


@pytest.mark.parametrize("name", ["a b", "a\nb", "x=1, y", "class", "\u00e9", "", None, 5])
def test_names_are_ascii_identifiers(name: Any) -> None:
    with pytest.raises(UsageError, match="a script cannot name an option: .* is not an ASCII identifier"):
        check_name(name, "an option")
    assert check_name("solver_order", "an option") == "solver_order"


@pytest.mark.parametrize(
    "script",
    ["import os\n", "import torch, os\n", "from os import path\n", "x\n", "def f(): pass\n", "for x in y: z()\n",
     "f() if x else y\n", "x = \n", "from . import x\n"],
)  # fmt: skip
def test_other_statements_are_refused(script: str) -> None:
    with pytest.raises(UsageError, match="the script would not be"):
        check_script("import torch\nfrom diffusers import A\nx = A()\nx.y = 1\nx()\n" + script)


def test_a_model_that_has_changed_has_no_recipe(run_copy: Path) -> None:
    assert export(run_copy / "out", {"id": "b", "image_index": 0}).code == 0
    weights = next((run_copy / "model" / "unet").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    exported = export(run_copy / "out", {"id": "b", "image_index": 0})
    assert (exported.code, exported.stdout) == (2, "")
    assert "are not those of the run: restore them" in exported.stderr


def test_a_lora_that_has_changed_has_no_recipe(sd1_folder: Path, tmp_path: Path) -> None:
    lora = save_lora(sd1_folder, tmp_path / "style.safetensors", "unet")
    out = render(tmp_path, [["id", "prompt"], ["a", "a red circle"]], sd1_folder, "--lora", lora)
    assert command("export-recipe", out, "a").code == 0
    save_lora(sd1_folder, lora, "unet", "text_encoder")
    exported = command("export-recipe", out, "a")
    assert (exported.code, exported.stdout) == (2, "")
    assert "are not those of the run: restore them" in exported.stderr


def read_comments(out: Path) -> list[str]:
    """Return the comment lines of the recipe for the image with id a."""
    script = export(out, {"id": "a", "image_index": 0}).stdout
    return [line for line in script.splitlines() if line.startswith("# ")]


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        (("--on-flagged", "blank"), "flagged", "# The run flagged this image, and stored a black placeholder instead."),
        (("--on-flagged", "blur"), "flagged", "# The run flagged this image, and stored a blurred one instead."),
        (("--on-flagged", "drop"), "flagged", "# The run flagged this image, and did not store it."),
        (("--on-flagged", "keep"), "flagged", None),
        (("--image-format", "webp", "--safety", "none"), "ok", "# The stored image is compressed"),
    ],
)
def test_comments_on_images_that_are_not_stored_as_rendered(
    tmp_path: Path, options: tuple[str, ...], status: str, text: str | None
) -> None:
    rows = [["id", "prompt"], ["a", "a large red cross on a white ground"]]
    out = render(tmp_path, rows, None, "--steps", "12", "--guidance-scale", "5", *options)
    assert [row["status"] for row in results(out)] == [status]
    comments = read_comments(out)
    assert len(comments) == (1 if text is None else 2)
    assert text is None or comments[1].startswith(text)


def test_a_placeholder_is_mentioned_after_a_rescore_with_another_policy(tmp_path: Path) -> None:
    rows = [["id", "prompt"], ["a", "a large red cross on a white ground"]]
    out = render(tmp_path, rows, None, "--steps", "12", "--guidance-scale", "5", "--on-flagged", "blank")
    for policy in ("keep", "drop"):
        assert command("rescore", out, "--safety", "checker", "--on-flagged", policy).code == 0
        (row,) = results(out)
        assert (row["status"], row["generated_image"] is None) == ("flagged", False)
        assert read_comments(out)[1:] == [
            "# The original image was not kept when it was flagged, before the last rescore."
        ]
