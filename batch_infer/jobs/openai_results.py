"""Write output.jsonl and error.jsonl, the output files of OpenAI's Batch API.

Each line is a batch request output object, https://platform.openai.com/docs/api-reference/batch/request-output. The
body of a response is that of https://platform.openai.com/docs/api-reference/images/object. A request that the API
refuses has a response with status code 400, whose body is the API's error object
(https://platform.openai.com/docs/guides/error-codes), and `error` is null. `error` is for requests without a response.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TextIO

from batch_infer.planning import Item
from batch_infer.records import digest

REFUSALS = {
    "invalid": "invalid_value",
    "blocked": "content_policy_violation",
    "flagged": "content_policy_violation",
}
"""Codes of refused requests by status. The API returns no unsafe image, so a flagged image makes its row an error."""
FAILED, PARTIAL = "server_error", "batch_expired"
"""Codes of requests without a response: one that failed, and one that was not finished when the run ended."""


class BatchFiles:
    """Writes one line per table row, to the output file if all its images are ok, and otherwise to the error file.

    A line depends only on the row's results, so merging again writes the same bytes. As a context manager, writes the
    last row at the end unless there was an exception.
    """

    def __init__(
        self, output: TextIO, errors: TextIO, *, partial_rows: Collection[str] = (), embeds_images: bool = False
    ) -> None:
        """`partial_rows` contains the ids of rows that lack results. It may grow until a row is written."""
        self._output, self._errors = output, errors
        self._partial_rows, self._embeds_images = partial_rows, embeds_images
        self._row: list[Mapping[str, Any]] = []

    def __enter__(self) -> BatchFiles:
        return self

    def __exit__(self, error_class: type[BaseException] | None, *_: object) -> None:
        if error_class is None:
            self._write_row()

    def write(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Write results, one per image. Those of a row are adjacent, but may be in several calls.

        `generated_image` is the path of the image relative to OUT, or its bytes if images are embedded.
        """
        for name, group in groupby(results, key=lambda result: result["id"]):
            if self._row and self._row[0]["id"] != name:
                self._write_row()
            self._row += group

    def _write_row(self) -> None:
        if not self._row:
            return
        row, self._row = self._row, []
        name = row[0]["id"]
        error = self._find_error(row)
        response = None
        if error is None or "type" in error:
            body = {"error": error} if error else self._make_body(row)
            request_id = digest(["request", name, *(result["fingerprint"] for result in row)])
            response = {"status_code": 400 if error else 200, "request_id": request_id, "body": body}
        line = {
            "id": f"batch_req_{digest(['row', name])}",
            "custom_id": name,
            "response": response,
            "error": None if response else error,
        }
        (self._errors if error else self._output).write(json.dumps(line) + "\n")

    def _find_error(self, row: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """Return the first error of a row, or None. A refusal has a `type`, because it is the body of a response."""
        for result in row:
            message = result["error"] or ""
            if len(row) > 1:
                message = f"image {result['image_index']}: {message}"
            if code := REFUSALS.get(result["status"]):
                return {"code": code, "message": message, "param": None, "type": "invalid_request_error"}
            if result["status"] == "failed":
                return {"code": FAILED, "message": message}
            if result["generated_image"] is None:
                return {"code": FAILED, "message": f"the file of image {result['image_index']} is missing"}
        if row[0]["id"] in self._partial_rows or [result["image_index"] for result in row] != list(range(len(row))):
            return {"code": PARTIAL, "message": "some images of this row are not rendered yet"}
        return None

    def _make_body(self, row: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        images = [result["generated_image"] for result in row]
        if self._embeds_images:
            data = [{"b64_json": base64.b64encode(image).decode("ascii")} for image in images]
        else:
            data = [{"url": path} for path in images]
        return {"created": max(int(result["finished_at"].timestamp()) for result in row), "data": data}


def find_partial_rows(
    items: Iterable[Item], has_result: Callable[[Item], bool], partial_rows: set[str]
) -> Iterator[Item]:
    """Yield the items. Before those of a row that lacks some of its results, add its id to `partial_rows`."""
    for name, group in groupby(items, key=lambda item: item.id):
        row = list(group)
        if len(set(map(has_result, row))) > 1:
            partial_rows.add(name)
        yield from row
