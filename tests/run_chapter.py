"""Run a chapter's cells in plain Python, with a bug planted in the exported ones: which cell notices?"""
import contextlib
import io
import multiprocessing
import sys
import types
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import torch

matplotlib.use("Agg")
ROOT = Path(__file__).parent.parent


def code_cells(notebook):
    """(id, source) of the code cells that plain Python can run."""
    nb = nbformat.read(notebook, 4)
    return [(c.id, c.source) for c in nb.cells if c.cell_type == "code" and "%pip" not in c.source]


def fresh(values=()):
    """A namespace to run cells in, of a module that can be found by name: torch.compile looks functions up there."""
    module = sys.modules["chapter"] = types.ModuleType("chapter")
    vars(module).update(dict(values), __name__="chapter")
    return vars(module)


def run(cells, namespace):
    """Run cells in order; the id of the first that raises, or None."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
            warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, source in cells:
            try:
                exec(compile(source, f"cell {name}", "exec"), namespace)
            except Exception as e:
                namespace["_error"] = e
                return name
            finally:
                plt.close("all")
    return None


def values_after(notebook, ids):
    """The namespace after running the named cells, in the notebook's order."""
    namespace = fresh()
    failed = run([(name, source) for name, source in code_cells(notebook) if name in ids], namespace)
    assert failed is None, f"cell {failed} of {notebook.name} failed"
    return namespace


def killed_in(notebook, bugs):
    """Name of each bug of one chapter -> id of the cell that fails when it is planted, or None."""
    torch.set_num_threads(1)
    killed, cells = {}, code_cells(notebook)
    spots = {bug: next(n for n, (_, source) in enumerate(cells) if bug.old in source) for bug in bugs}
    first = min(spots.values())
    start = fresh()
    assert run(cells[:first], start) is None
    rng = torch.get_rng_state()
    failed = run(cells[first:], fresh(start))
    assert failed is None, f"cell {failed} of {notebook.name} fails without a bug"
    for bug, spot in spots.items():
        name, source = cells[spot]
        broken = [*cells[first:spot], (name, bug.plant(source)), *cells[spot + 1:]]
        torch.set_rng_state(rng)
        killed[bug.name] = run(broken, fresh(start))
    return killed


def all_killed_by_cells(bugs):
    """The same for all bugs, two chapters at a time."""
    by_notebook, killed = defaultdict(list), {}
    for bug in bugs:
        by_notebook[bug.notebook].append(bug)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(killed_in, by_notebook, by_notebook.values()):
            killed |= found
    return killed
