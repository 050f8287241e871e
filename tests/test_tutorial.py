"""The tutorial runs from top to bottom, as in Jupyter."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

TUTORIAL = Path(__file__).resolve().parent.parent / "docs" / "tutorial.ipynb"


@pytest.mark.slow
def test_the_notebook_leads_to_a_classifier(tmp_path, monkeypatch):
    notebook = nbformat.read(TUTORIAL, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    for cell in notebook.cells:
        cell.source = cell.source.replace("EPOCHS = 30", "EPOCHS = 2")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    nbclient.NotebookClient(
        notebook, timeout=280, resources={"metadata": {"path": tmp_path}}
    ).execute()
    said = [
        out["text"] for cell in notebook.cells for out in cell.get("outputs", ()) if "text" in out
    ]
    (score,) = [float(text.split("%")[0]) for text in said if "others are right" in text]
    assert score > 50  # of ten classes, after two epochs
    assert "\x1b" not in "".join(said)  # no control sequences of a terminal


def test_a_mistake_in_a_notebook_is_one_sentence(capsys):
    shell = InteractiveShell.instance()
    try:
        shell.run_cell("import ssl_samix\nssl_samix.pretrain('nowhere/photos')")
    finally:
        InteractiveShell.clear_instance()
    shown = capsys.readouterr().out.strip()
    assert shown.startswith("UserError: ") or shown.startswith("DataError: "), shown
    assert "nowhere/photos" in shown
    assert "\n" not in shown
