"""Format results.json as Markdown tables for docs/gpu.md, and as a short table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tools.gpu_check.evaluation import Check, evaluate

__all__ = ["evaluate", "format_report", "format_summary"]

WORDS = {True: "passed", False: "FAILED", None: "not measured"}
MISSING = "–"


def format_report(results: Mapping[str, Any]) -> str:
    """Return the results section of docs/gpu.md."""
    machine = {name: value for name, value in results.get("machine", {}).items() if value}
    blocks = [
        "## Results",
        f"Started at {results['started_at']} on `{results['device']}`. "
        + ", ".join(f"{name} {value}" for name, value in machine.items()) + ".",
        "### Checks",
        _table(("check", "result", "detail"), [_check_row(check) for check in evaluate(results)]),
        "### Throughput",
        _table(THROUGHPUT_COLUMNS, _throughput_rows(results)),
        *_optional("### Slots (Stable Diffusion 1.5, 512x512, uncompiled)", _slots_table(results)),
        *_optional("### Attention, TFLOP/s in float16", _attention_table(results)),
        *_optional("### Ceilings", _ceilings_table(results)),
        *_optional("### Parts that did not finish", _unfinished_table(results)),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def format_summary(results: Mapping[str, Any]) -> str:
    """Return a short table for the terminal, with a line for each part and each check."""
    lines = ["", f"{'part':26} {'status':10} seconds"]
    for name, part in results["parts"].items():
        lines.append(f"{name:26} {part.get('status', 'skipped'):10} {part.get('seconds', part.get('skipped', ''))}")
    lines += ["", f"{'check':52} result"]
    lines += [f"{check.name:52} {WORDS[check.passed]}: {check.detail}" for check in evaluate(results)]
    for row in _throughput_rows(results):
        lines.append("  ".join(f"{column}: {value}" for column, value in zip(THROUGHPUT_COLUMNS, row, strict=True)))
    return "\n".join(lines)


def _check_row(check: Check) -> tuple[str, str, str]:
    return check.name, WORDS[check.passed], check.detail


THROUGHPUT_COLUMNS = (
    "architecture", "slots", "images/s", "MFU", "MFU of measured matmul", "diffusers, images/s",
    "bare UNet, TFLOP/s", "host, ms a call", "decoder, images/s", "GPU idle",
)  # fmt: skip


def _throughput_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, part in results["parts"].items():
        if not name.startswith("bench-") or not part.get("sections"):
            continue
        sections = part["sections"]
        bench, unet = sections.get("bench", {}), sections.get("bare unet", {})
        contenders = bench.get("contenders", {})
        ours, grouped = contenders.get("batch-infer", {}), contenders.get("grouped", {})
        rows.append((
            name.removeprefix("bench-"), _number(unet.get("slots")), _number(ours.get("images_per_second")),
            _share(ours.get("mfu")), _share(ours.get("mfu_of_matmul")), _number(grouped.get("images_per_second")),
            _number(unet.get("tflops")), _number(unet.get("host_ms")),
            _number(sections.get("decoder", {}).get("images_per_second")),
            _share(sections.get("profile", {}).get("gpu_idle_share")),
        ))  # fmt: skip
    return rows


def _sections(results: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    sections: Mapping[str, Any] = results["parts"].get(part, {}).get("sections", {})
    return sections


def _slots_table(results: Mapping[str, Any]) -> str | None:
    sections = _sections(results, "slots")
    if not sections:
        return None
    measured = {name: values for name, values in sections.get("throughput", {}).items() if isinstance(values, dict)}
    rows = [(name, *map(_number, (values["row_forwards_per_second"], values["tflops"], values["peak_gib"])))
            for name, values in measured.items()]  # fmt: skip
    auto = sections.get("auto", {})
    text = f"`--slots auto` chooses {_number(auto.get('slots'))} slots and decodes {_number(auto.get('decode_batch'))} "
    text += f"images at a time, after {_number(auto.get('seconds'))} s."
    return _table(("slots", "UNet evaluations/s", "TFLOP/s", "peak GiB"), rows) + "\n\n" + text


def _attention_table(results: Mapping[str, Any]) -> str | None:
    sections = _sections(results, "attention")
    columns = ("default", "flash", "cudnn", "efficient")
    rows = [(name, *(_number(values.get(column, {}).get("tflops")) for column in columns))
            for name, values in sections.items()]  # fmt: skip
    return _table(("shape", *columns), rows) if rows else None


def _ceilings_table(results: Mapping[str, Any]) -> str | None:
    measured = [item for section in _sections(results, "ceilings").values() for item in section.items()]
    rows = [(name, *(_number(values.get(figure)) for figure in ("ms", "tflops", "tb_per_s")))
            for name, values in measured if isinstance(values, dict)]  # fmt: skip
    return _table(("operation", "ms", "TFLOP/s", "TB/s"), rows) if rows else None


def _unfinished_table(results: Mapping[str, Any]) -> str | None:
    rows = []
    for name, part in results["parts"].items():
        errors = [
            f"{section}: {values['error'].strip().splitlines()[-1]}"
            for section, values in part.get("sections", {}).items()
            if "error" in values
        ]
        if part.get("status") != "ok":
            rows.append((name, part.get("status", "skipped"), "; ".join(errors) or part.get("skipped", MISSING)))
    return _table(("part", "status", "reason"), rows) if rows else None


def _optional(title: str, table: str | None) -> Iterable[str]:
    return () if table is None else (title, table)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["--"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}" if isinstance(value, float) and value < 1000 else f"{value:.0f}"


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f} %"
