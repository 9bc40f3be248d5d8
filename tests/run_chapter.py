"""Run a chapter's cells in plain Python, with a bug planted in the exported ones: which cell notices?

    python tests/run_chapter.py single_head kv_cache     # without a bug: every cell must pass
"""
import contextlib
import io
import multiprocessing
import sys
import types
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor

import matplotlib
import matplotlib.pyplot as plt
import planted
import torch

matplotlib.use("Agg")


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


def values_after(module, ids):
    """The namespace after running the named cells of a chapter, in the notebook's order."""
    namespace = fresh()
    failed = run([(name, source) for name, source, _ in planted.code_cells(module) if name in ids], namespace)
    assert failed is None, f"cell {failed} of {module} failed"
    return namespace


def killed_in(module, bugs):
    """Name of each bug of one chapter -> id of the cell that fails when it is planted, or "".

    The chapter runs once, without a bug, up to the last cell that noticed one. At a cell that holds bugs it forks: each child
    runs on with one bug until a cell notices."""
    torch.set_num_threads(1)
    cells = [(name, source) for name, source, _ in planted.code_cells(module)]
    killed, namespace, last = {}, fresh(), 0
    for n, (name, source) in enumerate(cells):
        for bug in (b for b in bugs if b.cell == n):
            broken = [(name, bug.plant(source)), *cells[n + 1:]]
            status, said = planted.in_fork(lambda: sys.stdout.write(run(broken, namespace) or "") and 0)  # noqa: B023
            killed[bug.name] = said if status == 0 and said in dict(cells) else ""
            last = max([last] + [k for k, (found, _) in enumerate(cells) if found == said])
        if len(killed) == len(bugs) and n > last:
            break
        failed = run([(name, source)], namespace)
        assert failed is None, f"cell {failed} of {module} fails without a bug: {namespace['_error']!r}"
    return killed


def killing_cells(bugs):
    """The same for all bugs, two chapters at a time."""
    by_module, killed = defaultdict(list), {}
    for bug in bugs:
        by_module[bug.module].append(bug)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(killed_in, by_module, by_module.values()):
            killed |= found
    return killed


def passes(module):
    """The chapter without a bug: (module, cell that fails or None, its error)."""
    namespace = fresh()
    failed = run([(name, source) for name, source, _ in planted.code_cells(module)], namespace)
    return module, failed, repr(namespace.get("_error"))


if __name__ == "__main__":
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        results = [*pool.map(passes, sys.argv[1:])]
    for chapter, failed, error in results:
        print(f"{chapter}: {f'cell {failed} failed: {error}' if failed else 'every cell passed'}")
    sys.exit(any(failed for _, failed, _ in results))
