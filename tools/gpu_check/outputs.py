"""Write the output files results.json, gpu.md and log.txt.gz again after every change."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.gpu_check.recorder import sections_file, write_json
from tools.gpu_check.report import format_report

MAX_LOG_CHARACTERS = 200_000
"""Number of characters to keep from the end of each part's log."""


@dataclass
class Outputs:
    """Collects the results. `scratch` has the files that parts write, `out` the output files."""

    scratch: Path
    out: Path
    results: dict[str, Any]
    _file_states: dict[Path, tuple[int, int]] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = self.results["parts"]
        return parts

    def log_file(self, part: str) -> Path:
        """Return the path of a part's log."""
        return self.scratch / f"{part}.log"

    def update(self, part: str, **values: Any) -> None:
        """Record values for a part, and save."""
        self.parts.setdefault(part, {}).update(values)
        self.collect()
        self.save()

    def refresh(self) -> None:
        """Save if a part has recorded a section since the last time."""
        if self.collect():
            self.save()

    def collect(self) -> bool:
        """Read the sections that the parts recorded. Return whether they changed."""
        changed = False
        for name, part in self.parts.items():
            path = sections_file(self.scratch, name)
            if not path.exists():
                continue
            stat = path.stat()
            state = (stat.st_ino, stat.st_mtime_ns)
            if self._file_states.get(path) != state:
                self._file_states[path], changed = state, True
                part["sections"] = json.loads(path.read_text(encoding="utf-8"))
        return changed

    def save(self) -> None:
        """Write all output files."""
        write_json(self.out / "results.json", self.results)
        (self.out / "gpu.md").write_text(format_report(self.results), encoding="utf-8")
        with gzip.open(self.out / "log.txt.gz", "wt", encoding="utf-8") as archive:
            for name in self.parts:
                if (path := self.log_file(name)).exists():
                    archive.write(f"==== {name}\n{path.read_text(errors='replace')[-MAX_LOG_CHARACTERS:]}\n")
