"""Fail if the package is not what the notebooks export, or if a notebook is not clean. Changes nothing.

    python tools/check_export.py
"""
import ast
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbdev_book import split


def syntax_errors(path):
    """nbdev reports a broken export cell without saying where: say it."""
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and {"export", "exporti", "exports"} & split(cell.source)[0].keys():
            try:
                ast.parse(cell.source)
            except SyntaxError as e:
                yield f"{path}, cell {cell.id}, line {e.lineno}: {e.msg}"


def drift(root):
    """Lines that say what differs between `root` and a fresh export and clean of its notebooks."""
    problems = [line for path in sorted((root / "nbs").glob("*.ipynb")) for line in syntax_errors(path)]
    if problems:
        return problems
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch) / root.resolve().name
        (scratch / "attn_nb").mkdir(parents=True)
        shutil.copy(root / "settings.ini", scratch)
        shutil.copytree(root / "nbs", scratch / "nbs", ignore=shutil.ignore_patterns("_*", ".*"))
        shutil.copy(root / "attn_nb/__init__.py", scratch / "attn_nb")
        for command in ("nbdev_export", "nbdev_clean"):
            done = subprocess.run([Path(sys.executable).with_name(command)], cwd=scratch, capture_output=True, text=True)
            if done.returncode:
                return [f"{command} failed: {done.stderr[-2000:]}"]
        want, have = ({str(p.relative_to(top / "attn_nb")): p.read_text() for p in (top / "attn_nb").rglob("*.py")}
                      for top in (scratch, root))
        for name in sorted(want.keys() | have.keys()):
            if name not in want:
                problems.append(f"attn_nb/{name}: no notebook exports it; delete it")
            elif have.get(name) != want[name]:
                problems.append(f"attn_nb/{name}: not what the notebooks export; run nbdev_export")
        for path in sorted((root / "nbs").glob("*.ipynb")):
            if path.read_text() != (scratch / "nbs" / path.name).read_text():
                problems.append(f"nbs/{path.name}: not clean; run nbdev_clean")
    return problems


if __name__ == "__main__":
    found = drift(Path("."))
    print("\n".join(found) or "export: package and notebooks are in sync")
    sys.exit(bool(found))
