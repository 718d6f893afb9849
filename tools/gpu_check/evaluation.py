"""Evaluate which promises of the project the results confirm, with one check for each promise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MAX_DIFFERENCE = 1
"""Maximum difference from diffusers in float32, of 255."""
MIN_PSNR_DB = 40.0
"""Minimum PSNR of half precision against float32, with the built-in model."""


@dataclass(frozen=True)
class Check:
    """The result for one promise. `passed` is None if it was not measured."""

    name: str
    passed: bool | None
    detail: str


def evaluate(results: Mapping[str, Any]) -> list[Check]:
    """Return the checks of all parts in `results`."""
    return [check for name, part in results["parts"].items() for check in _checks_of(name, part)]


def _checks_of(name: str, part: Mapping[str, Any]) -> Iterator[Check]:
    sections = part.get("sections", {})
    if name.startswith("invariance-"):
        yield _batch_invariance(name.removeprefix("invariance-"), part, sections)
    elif name == "parity":
        yield from _parity(part, sections)
    elif name == "command":
        yield from _command(part, sections)
    elif name == "memory":
        yield from _memory(part, sections)


def _batch_invariance(architecture: str, part: Mapping[str, Any], sections: Mapping[str, Any]) -> Check:
    """Check that the output of every network in every mode depends neither on batch position nor on other rows."""
    promised = ("finite", "repeatable", "same_at_other_positions", "same_among_other_rows")
    measured = {section: values for section, values in sections.items() if section != "first images"}
    failures = [
        f"{section}: {promise}" for section, values in measured.items() for promise in promised
        if "error" in values or not values.get(promise, False)
    ]  # fmt: skip
    name = f"batch invariance, {architecture}"
    if failures:
        return Check(name, False, f"violated: {', '.join(failures)}")
    if not measured or part.get("status") != "ok":
        return Check(name, None, "; ".join([_reason(part), *(f"passed: {section}" for section in measured)]))
    if "compiled" in {section.rpartition(", ")[2] for section in measured} and not sections["first images"]["compiled"]:
        return Check(name, False, "torch.compile failed")
    return Check(name, True, "; ".join(measured))


def _parity(part: Mapping[str, Any], sections: Mapping[str, Any]) -> Iterator[Check]:
    exact = sections.get("float32", {}).get("parity_with_diffusers")
    yield _check(
        "parity with diffusers, float32", part, exact,
        lambda counts: counts["largest_difference"] <= MAX_DIFFERENCE,
        lambda counts: f"largest difference {counts['largest_difference']} of 255 in {counts['images']} images",
    )  # fmt: skip
    for dtype, values in sections.items():
        if dtype.startswith("offload"):
            yield _equal(f"images, {dtype}", part, values.get("equal_to_images_without_offload"))
            continue
        for promise in ("equal_in_other_order", "equal_among_other_rows"):
            yield _equal(f"images {promise.replace('_', ' ')}, {dtype}", part, values.get(promise))
        if half := values.get("compared_with_float32"):
            psnr = half["worst_psnr_db"]
            yield Check(f"PSNR to float32, {dtype}", psnr >= MIN_PSNR_DB, f"{psnr} dB at worst")


def _command(part: Mapping[str, Any], sections: Mapping[str, Any]) -> Iterator[Check]:
    killed = sections.get("killed and resumed", {})
    yield _equal("the command, killed and resumed: same bytes", part, killed if "equal" in killed else None)
    if "killed_while_running" in killed:
        before = killed["images_before_the_kill"]
        yield Check("the command was killed while running", killed["killed_while_running"], f"{before} images before")
    reordered = sections.get("other order", {})
    yield _equal("the command, rows in another order: same bytes", part, reordered if "equal" in reordered else None)


def _memory(part: Mapping[str, Any], sections: Mapping[str, Any]) -> Iterator[Check]:
    for section in ("too many slots", "too little memory for the decoder"):
        values = sections.get(section, {})
        name = f"out of memory, {section}"
        if "equal" not in values:
            yield Check(name, False if "error" in values else None, values.get("error", _reason(part))[-200:])
            continue
        is_smaller = values["shape_at_the_end"] != values["shape_at_first"]
        passed = is_smaller and values["equal"] == values["images"] == values["rows"]
        shapes = f"slots and decoder batch {values['shape_at_first']} became {values['shape_at_the_end']}"
        yield Check(name, passed, f"{shapes}; {values['equal']} of {values['rows']} rows with equal images")


def _equal(name: str, part: Mapping[str, Any], counts: Mapping[str, Any] | None) -> Check:
    return _check(
        name, part, counts,
        lambda values: values["equal"] == values["images"] > 0,
        lambda values: f"{values['equal']} of {values['images']}",
    )  # fmt: skip


def _check(name: str, part: Mapping[str, Any], values: Any, passed: Any, detail: Any) -> Check:
    if values is None:
        return Check(name, None, _reason(part))
    return Check(name, bool(passed(values)), detail(values))


def _reason(part: Mapping[str, Any]) -> str:
    if part.get("status") == "ok":
        return "not run on a CPU"
    return str(part.get("skipped") or f"the part's status is {part.get('status')}")
