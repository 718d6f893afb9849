"""Compare batch-infer with plain diffusers on the same rows, on this machine, with the built-in model.

    python examples/benchmark.py               whole processes on a mixed table, and the loop alone on a uniform one
    python examples/benchmark.py --rounds 1    quicker

Plain diffusers stands for the best script that one would write by hand: rows grouped by equal parameters, as many to
a call as batch-infer has slots for, one generator a row, the checkpoint's own safety checker, PNG files, a CSV of
results; and for the simplest one, a call for each prompt. All use the same threads. Runs are interleaved, so that a
busy moment of the machine falls on all of them alike; a ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

PROMPTS = Path(__file__).parent / "prompts.csv"
STEPS = range(10, 51, 5)
GUIDANCE = range(1, 10)
SIZES = ((64, 64), (64, 96))
UNIFORM_STEPS, UNIFORM_GUIDANCE, UNIFORM_ROWS = 20, 5.0, 128


def mixed_rows(count: int) -> list[dict[str, Any]]:
    """Rows as several people's tables come together: any step count with any guidance and size."""
    rng = random.Random(7)
    with PROMPTS.open(newline="") as stream:
        prompts = [row["prompt"] for row in csv.DictReader(stream)]
    rows = []
    for number in range(count):
        height, width = rng.choice(SIZES)
        rows.append(
            {
                "id": f"row-{number:05d}",
                "prompt": rng.choice(prompts),
                "seed": number,
                "height": height,
                "width": width,
                "num_inference_steps": rng.choice(STEPS),
                "guidance_scale": rng.choice(GUIDANCE),
            }
        )
    return rows


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# ------------------------------------------------------------------------------------------------ plain diffusers


def plain_diffusers(table: Path, out: Path, slots: int, *, grouped: bool) -> None:
    """The script by hand: the same rows, files and results table."""
    import torch
    from diffusers import StableDiffusionPipeline

    from batch_infer.models import DEMO_MODEL

    pipe = StableDiffusionPipeline.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    (out / "images").mkdir(parents=True)
    with (out / "results.csv").open("w", newline="") as stream:
        results = csv.writer(stream)
        for batch in grouped_rows(rows, slots) if grouped else ([row] for row in rows):
            made = pipe(
                [row["prompt"] for row in batch],
                height=int(batch[0]["height"]),
                width=int(batch[0]["width"]),
                num_inference_steps=int(batch[0]["num_inference_steps"]),
                guidance_scale=float(batch[0]["guidance_scale"]),
                generator=[torch.Generator().manual_seed(int(row["seed"])) for row in batch],
            )
            for row, image, flagged in zip(batch, made.images, made.nsfw_content_detected, strict=True):
                image.save(out / "images" / f"{row['id']}.png")
                results.writerow([row["id"], row["prompt"], flagged])


def grouped_rows(rows: list[dict[str, str]], slots: int) -> Iterator[list[dict[str, str]]]:
    """Rows of equal parameters together, as many as fill the slots (a row with guidance takes two)."""

    def key(row: dict[str, str]) -> tuple[str, ...]:
        return row["height"], row["width"], row["num_inference_steps"], row["guidance_scale"]

    for (*_, guidance), group in itertools.groupby(sorted(rows, key=key), key):
        alike = list(group)
        capacity = slots // 2 if float(guidance) > 1 else slots
        for first in range(0, len(alike), capacity):
            yield alike[first : first + capacity]


# ------------------------------------------------------------------------------------------------ whole processes


def seconds_of(command: list[str], threads: int) -> float:
    """The wall time of a whole process, imports and loading included."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DIFFUSERS_VERBOSITY": "error"}
    started = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def whole_processes(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of batch-infer and of both plain scripts on the mixed table, round by round."""
    slots, threads = str(options.slots), str(options.threads)
    found: dict[str, list[float]] = {"batch-infer": [], "grouped": [], "one by one": []}
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "mixed.csv"
        write_table(mixed_rows(options.rows), table)
        for number in range(options.rounds):
            for name, times in found.items():
                out = str(Path(folder) / f"{name}-{number}")
                ours = ["-m", "batch_infer", "run", str(table), "-o", out, "--slots", slots, "--threads", threads]
                plain = [__file__, "--plain", name, "--table", str(table), "--out", out, "--slots", slots]
                times.append(seconds_of([sys.executable, *(ours if name == "batch-infer" else plain)], options.threads))
                print(f"round {number + 1}: {name:12} {times[-1]:7.1f} s", file=sys.stderr)
    mine = found["batch-infer"]
    return {
        "rows": options.rows,
        "images_per_second": {name: options.rows / statistics.median(times) for name, times in found.items()},
        "ratio": {name: median_ratio(found[name], mine) for name in ("grouped", "one by one")},
    }


def median_ratio(theirs: Iterable[float], mine: Iterable[float]) -> float:
    return statistics.median(their / my for their, my in zip(theirs, mine, strict=True))


# ------------------------------------------------------------------------------------------------ the loop alone


def uniform_table(options: argparse.Namespace) -> dict[str, Any]:
    """The chain against a bare UNet and decoder loop of the same batch, where there is nothing to gain by packing."""
    import torch

    from batch_infer.models import load, read_card
    from batch_infer.settings import ModelSettings

    torch.set_num_threads(options.threads)
    model: Any = load(read_card(ModelSettings()), torch.device("cpu"), torch.float32, with_checker=False)
    batch = options.slots // 2
    rows = batch * max(1, min(UNIFORM_ROWS, options.rows) // batch)  # whole batches: nobody pads
    chain, bare = chain_loop(model, options.slots, rows), bare_loop(model, options.slots, rows)
    times: dict[str, list[float]] = {"chain": [], "bare": []}
    for _ in range(options.rounds + 1):
        for name, loop in (("chain", chain), ("bare", bare)):
            started = time.perf_counter()
            loop()
            times[name].append(time.perf_counter() - started)
    chain_times, bare_times = times["chain"][1:], times["bare"][1:]  # the first round warms up
    return {
        "rows": rows,
        "images_per_second": {name: rows / statistics.median(spent[1:]) for name, spent in times.items()},
        "ratio": {"bare loop": median_ratio(bare_times, chain_times)},
    }


def chain_loop(model: Any, slots: int, rows: int) -> Callable[[], None]:
    from batch_infer.chain import Chain, ChainShape
    from batch_infer.records import PromptRequest, SamplingParams, Source

    params = SamplingParams(64, 64, UNIFORM_STEPS, UNIFORM_GUIDANCE, 0.0)
    requests = [
        PromptRequest(str(k), 0, "a red circle", None, k, params, Source("uniform", k), str(k)) for k in range(rows)
    ]

    def loop() -> None:
        made = sum(1 for _ in Chain(model, ChainShape(slots, max(1, slots // 2)), None).render(requests))
        if made != rows:
            raise RuntimeError(f"{made} of {rows} images")

    return loop


def bare_loop(model: Any, slots: int, rows: int) -> Callable[[], None]:
    """Nothing but the calls that cannot be left out: a UNet call a step, a scheduler step, a decoder call a batch."""
    import torch
    from diffusers import DDIMScheduler

    from batch_infer.models import DEMO_MODEL

    unet, vae = model._unet, model._vae
    scheduler: Any = DDIMScheduler.from_pretrained(DEMO_MODEL, subfolder="scheduler")
    context = torch.randn(slots, 77, unet.config.cross_attention_dim)

    @torch.inference_mode()
    def loop() -> None:
        for _ in range(rows // (slots // 2)):
            latents = torch.randn(slots // 2, 4, 8, 8)
            scheduler.set_timesteps(UNIFORM_STEPS)
            for timestep in scheduler.timesteps:
                without, prompted = unet(torch.cat([latents] * 2), timestep, context, return_dict=False)[0].chunk(2)
                guided = without + UNIFORM_GUIDANCE * (prompted - without)
                latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
            vae.decode(latents / vae.config.scaling_factor, return_dict=False)

    return loop


# ------------------------------------------------------------------------------------------------ the command


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400, help="rows of the mixed table")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=16, help="row-forwards in a UNet call")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--plain", choices=("grouped", "one by one"), help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def show(title: str, figures: dict[str, Any]) -> None:
    print(f"{title} ({figures['rows']} rows)")
    for name, rate in figures["images_per_second"].items():
        ratio = figures["ratio"].get(name if name != "bare" else "bare loop")
        print(f"  {name:12} {rate:7.2f} images/s" + (f"   batch-infer is {ratio:.2f}x as fast" if ratio else ""))


def main() -> None:
    options = parse()
    if options.plain:
        plain_diffusers(options.table, options.out, options.slots, grouped=options.plain == "grouped")
        return
    figures = {"mixed": whole_processes(options), "uniform": uniform_table(options)}
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    show("Mixed table, whole processes", figures["mixed"])
    show("Uniform table, the loop alone", figures["uniform"])


if __name__ == "__main__":
    main()
