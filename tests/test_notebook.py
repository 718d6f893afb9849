"""The example notebook is executed in a kernel, and shows its results and images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a kernel that runs this Python. The user's kernels and settings are not used."""
    options = "--prefix", str(tmp_path / "kernels"), "--name", "this-python"
    subprocess.run([sys.executable, "-m", "ipykernel", "install", *options], check=True, capture_output=True)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "kernels" / "share" / "jupyter"))
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return "this-python"


def list_outputs(notebook: Any, name: str, kind: str) -> list[str]:
    """Return the outputs of a cell that have a MIME type, or for `stream` its printed text."""
    (cell,) = (cell for cell in notebook.cells if cell.id == name)
    if kind == "stream":
        return [output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"]
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


@pytest.mark.promises
def test_the_notebook_renders_and_shows_images(kernel: str, tmp_path: Path) -> None:
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not stored in the repository"
    client = NotebookClient(notebook, kernel_name=kernel, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert list_outputs(notebook, "run", "text/plain") == ["3"]
    (html,) = list_outputs(notebook, "results", "text/html")
    assert html.count("<td>ok</td>") == 3
    images = list_outputs(notebook, "images", "image/png")
    assert len(images) == len(set(images)) == 3
    assert "a small blue square" in "".join(list_outputs(notebook, "images", "stream"))
    (html,) = list_outputs(notebook, "frame", "text/html")
    assert "no guidance" in html
    assert "dataframe-00000002" in html
    assert "StableDiffusionPipeline.from_pretrained(" in "".join(list_outputs(notebook, "script", "stream"))
    assert len(list((tmp_path / "notebook-out" / "images").rglob("*.png"))) == 3
