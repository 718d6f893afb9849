"""`batch-infer export-recipe`: print a script that reproduces an image with plain diffusers."""

from __future__ import annotations

import click

from batch_infer.cli.options import command, json_option, option, out_argument
from batch_infer.cli.report import NOTHING_KEPT, print_result, stoppable
from batch_infer.cli.values import NONNEGATIVE


@command(
    out_argument,
    click.Argument(["name"], metavar="ID"),
    option(
        "--image-index", type=NONNEGATIVE, default=0, metavar="K", help="Number of the image among those of its row."
    ),
    json_option,
    name="export-recipe",
)
def export_recipe(*, out: str, name: str, image_index: int, as_json: bool, quiet: bool) -> int:
    """Print a script that reproduces an image of OUT with plain diffusers.

    ID is the id of its row. The script needs diffusers and the model, but not batch-infer. It leaves out safety
    checkers.

    In tests on a CPU in float32, its pixel values differed from those of the run by at most 1 of 255. On a GPU or with
    --compile, the difference can be larger.

    Images of DeciDiffusion, --long-prompts and --quantize cannot be reproduced with a few lines of diffusers. If the
    files of the model are no longer those of the run, there is no script.

    Exit codes: 0 success; 2 usage, or OUT has no such image, or diffusers cannot make it; 75 interrupted.
    """
    with stoppable(hint=NOTHING_KEPT):
        from batch_infer.jobs import make_recipe

        recipe = make_recipe(out, name, image_index)
    if not quiet:
        data = {"id": name, "image_index": image_index, "recipe": recipe}
        print_result(recipe.rstrip("\n").split("\n"), data if as_json else None)
    return 0
