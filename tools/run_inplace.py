"""Run notebooks and store their outputs in the .ipynb, for readers on GitHub and in Colab; then clean them.

    python tools/run_inplace.py [nbs/01_single_head.ipynb ...]       # default: all
    BOOK_SKIP_FLAGS= python tools/run_inplace.py ...                 # on a GPU machine: run cuda and slow cells too

Cells flagged slow or cuda keep the outputs they have; `#| volatile` cells (times, ratios) keep none.
"""
import copy
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev_book import convert, split

LANDING = Path("nbs/_static/landing")  # .svg for the README, .png for link previews


def merged(outputs):
    """Outputs without stderr; text printed in one go, however the kernel cut it, in one piece."""
    kept = []
    for out in outputs:
        if out.get("name") == "stderr":
            continue
        if kept and out.get("name") == kept[-1].get("name") == "stdout":
            kept[-1].text += out.text
        else:
            kept.append(out)
    return kept


def run(path):
    nb = nbformat.read(path, 4)
    copied = convert(copy.deepcopy(nb))
    if path.stem == "01_single_head":  # the book's landing picture is a figure of chapter 01
        copied.cells.append(nbformat.v4.new_code_cell(
            f"landing.figure.savefig('_static/{LANDING.name}.png', dpi=200, facecolor='white', bbox_inches='tight')"))
    client = NotebookClient(copied, timeout=600, kernel_name="python3", resources={"metadata": {"path": "nbs"}})
    client.execute()
    for cell, done in zip(nb.cells, copied.cells):
        if cell.cell_type != "code":
            continue
        directives, source = split(cell.source)
        outputs = [] if "volatile" in directives else merged(done.outputs)
        cell.outputs, cell.execution_count = outputs, None
        if "landing = " in source:
            LANDING.with_suffix(".svg").write_text(outputs[-1].data["image/svg+xml"])
    nbformat.write(nb, path)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(map(str, Path("nbs").glob("*.ipynb"))):
        print(name, flush=True)
        run(Path(name))
    subprocess.run(["nbdev_clean"], check=True)
