"""The output files: results.json, gpu.md and log.txt.gz, written anew after every change."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.gpu_check.recorder import sections_file, write_json
from tools.gpu_check.report import format_report

LONGEST_LOG = 200_000
"""Characters kept of each part's log: its end."""


@dataclass
class Outputs:
    """All results so far. `scratch` has the parts' own files, `out` gets the output files."""

    scratch: Path
    out: Path
    results: dict[str, Any]
    _sizes: dict[Path, tuple[int, int]] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = self.results["parts"]
        return parts

    def log_file(self, part: str) -> Path:
        """Return the path of a part's log."""
        return self.scratch / f"{part}.log"

    def update(self, part: str, **values: Any) -> None:
        """Record how a part went, and save."""
        self.parts.setdefault(part, {}).update(values)
        self.collect()
        self.save()

    def refresh(self) -> None:
        """Save where a part has recorded a section since the last time."""
        if self.collect():
            self.save()

    def collect(self) -> bool:
        """Read what the parts have recorded; return whether anything changed."""
        changed = False
        for name, part in self.parts.items():
            path = sections_file(self.scratch, name)
            if not path.exists():
                continue
            stat = path.stat()
            state = (stat.st_ino, stat.st_mtime_ns)
            if self._sizes.get(path) != state:
                self._sizes[path], changed = state, True
                part["sections"] = json.loads(path.read_text(encoding="utf-8"))
        return changed

    def save(self) -> None:
        """Write all output files."""
        write_json(self.out / "results.json", self.results)
        (self.out / "gpu.md").write_text(format_report(self.results), encoding="utf-8")
        with gzip.open(self.out / "log.txt.gz", "wt", encoding="utf-8") as archive:
            for name in self.parts:
                if (path := self.log_file(name)).exists():
                    archive.write(f"==== {name}\n{path.read_text(errors='replace')[-LONGEST_LOG:]}\n")
