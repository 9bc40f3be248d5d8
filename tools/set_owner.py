"""Set the repository's owner in every file that names it.

    python tools/set_owner.py NAME        (or: make owner=NAME)

The owner of record is `user` in settings.ini. Generated files (attn_nb/_modidx.py) are rewritten too.
"""
import re
import subprocess
import sys
from pathlib import Path

# every way in which a file can name the owner: OWNER/attn_nb on GitHub and in Colab, OWNER.github.io/attn_nb
PLACES = re.compile(r"(?P<before>github\.com/|githubusercontent\.com/|/github/|https://)"
                    r"(?P<owner>[A-Za-z0-9-]+)(?P<after>\.github\.io/?(?=attn_nb|['\"\s])|/attn_nb\b)")
SETTING = re.compile(r"^(user = )(\S+)$", re.M)


def files(root):
    """The files of the project: what git tracks or would, or, in a copy without git, what is not built."""
    git = subprocess.run(["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard"], cwd=root,
                         capture_output=True, text=True)
    built = re.compile(r"(^|/)(\.venv|\.git/|_build/|build/|dist/|[^/]*\.egg-info/|__pycache__/|\.[a-z]+_cache/|\.hypothesis/)")
    paths = git.stdout.splitlines() if git.returncode == 0 else [
        p for p in (str(f.relative_to(root)) for f in root.rglob("*")) if not built.search(p)]
    return sorted(root / p for p in paths if (root / p).is_file())


def texts(root):
    """Those of them that can name the owner."""
    return [f for f in files(root) if f.suffix not in (".png", ".woff", ".svg")]


def owners(root):
    """File -> the set of owners that it names."""
    found = {}
    for path in texts(root):
        names = {m["owner"] for m in PLACES.finditer(path.read_text())}
        if names:
            found[str(path.relative_to(root))] = names
    return found


def main(name, root=Path(".")):
    if not re.fullmatch(r"[A-Za-z0-9](?:-?[A-Za-z0-9])*", name):
        sys.exit(f"owner must be a GitHub account name (letters, digits, single hyphens), got {name!r}")
    changed = 0
    for path in texts(root):
        old = path.read_text()
        new = PLACES.sub(lambda m: m["before"] + name + m["after"], old)
        if path.name == "settings.ini":
            new = SETTING.sub(rf"\g<1>{name}", new)
        if new != old:
            path.write_text(new)
            changed += 1
    print(f"owner {name} set in {changed} files")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make owner=NAME")
    main(sys.argv[1])
