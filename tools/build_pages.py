"""Build the pages from the executed notebooks; nothing, if nothing changed since the last build without a fault.

    python tools/build_pages.py
"""
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

BUILT = Path("_build/html/.built_from")
COMMAND = ["jupyter-book", "build", ".", "-W", "-n", "--keep-going", "--all", "-q"]


def inputs():
    """A digest of everything that the book is made of."""
    found = hashlib.sha256(sys.version.encode())
    paths = [p for folder in ("nbs", "attn_nb") for p in Path(folder).rglob("*")]
    for path in sorted([*paths, *map(Path, ("README.md", "_config.yml", "_toc.yml", "constraints.txt"))]):
        if path.is_file() and path.suffix != ".pyc" and not {".ipynb_checkpoints", "jupyter_execute"} & {*path.parts}:
            found.update(str(path).encode() + path.read_bytes())
    return found.hexdigest()


def main():
    now = inputs()
    if BUILT.exists() and BUILT.read_text() == now:
        print("pages: nothing changed")
        return 0
    BUILT.unlink(missing_ok=True)
    shutil.rmtree("_build/.doctrees", ignore_errors=True)
    if code := subprocess.run(COMMAND).returncode:
        return code
    BUILT.write_text(now)
    return 0


if __name__ == "__main__":
    sys.exit(main())
