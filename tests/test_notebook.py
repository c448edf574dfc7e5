"""The notebook: its cells run from top to bottom in a new folder, with the small configs, and git holds no output."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def test_no_cell_holds_an_output():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs a git repository to clone")
def test_every_cell_runs(tmp_path, monkeypatch):
    reason = "needs nbclient and ipykernel: pip install -r requirements-dev.txt"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    monkeypatch.setenv("REPOSITORY", str(ROOT))
    monkeypatch.setenv("SIZE", "debug")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    assert not [text for text in printed if "error:" in text or "Traceback" in text]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert printed[-1].count("> ") >= 3  # the three questions
    for stage in ("pretrain", "sft", "dpo"):
        assert (tmp_path / "BuddyGPT/outputs/debug" / stage / "model.safetensors").is_file()
