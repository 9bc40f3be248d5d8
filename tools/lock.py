"""Rewrite constraints.txt: the exact versions that the book and the tests are run with (needs `uv`).

    python tools/lock.py

torch is resolved by hand: constraints.txt pins one version, and nothing here may pull in another.
"""
import re
import subprocess
import tomllib
from pathlib import Path

TORCH = "torch==2.13.0"
TORCH_NEEDS = ["filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions"]

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
wanted = project["dependencies"] + [r for rs in project["optional-dependencies"].values() for r in rs]
wanted = [r for r in wanted if not re.match(r"(torch|attn_nb)\b", r)] + TORCH_NEEDS + ["setuptools>=77"]
pins = subprocess.run(
    ["uv", "pip", "compile", "-", "--universal", "--python-version", "3.11", "--no-annotate", "--no-header", "-q"],
    input="\n".join(wanted), text=True, capture_output=True, check=True).stdout
Path("constraints.txt").write_text(pins + TORCH + "\n")
print(f"constraints.txt: {len(pins.splitlines()) + 1} pins")
