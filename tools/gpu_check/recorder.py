"""Record one part's results, section by section, in a file that the orchestrator reads."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_ERROR_CHARACTERS = 3000


@dataclass
class Recorder:
    """The parameters and results of a part.

    `scratch`: a folder that is deleted after the check; `out`: the folder for the output files.
    """

    name: str
    device: str
    architecture: str
    scratch: Path
    out: Path
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        """Whether to use tiny sizes because the device is a CPU."""
        return self.device == "cpu"

    @property
    def failed(self) -> bool:
        return any("error" in results for results in self.sections.values())

    @contextmanager
    def section(self, name: str) -> Iterator[dict[str, Any]]:
        """Record the contents of the dictionary. An exception ends the section, but not the part."""
        results = self.sections[name] = {}
        started = time.monotonic()
        try:
            yield results
        except Exception as error:  # noqa: BLE001  # the other sections continue
            results["error"] = "".join(traceback.format_exception(error))[-MAX_ERROR_CHARACTERS:]
            traceback.print_exception(error)
        except BaseException:
            results["error"] = "stopped before the end of the section"
            raise
        finally:
            results["section_seconds"] = round(time.monotonic() - started, 2)
            write_json(sections_file(self.scratch, self.name), self.sections)
            print(f"{self.name}, {name}: {json.dumps(results, default=str)}", flush=True)


def sections_file(scratch: Path, part: str) -> Path:
    """Return the path of a part's results file."""
    return scratch / f"{part}.json"


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)
