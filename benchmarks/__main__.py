"""Time this book's layers beside PyTorch's and Hugging Face's: the same weights, outputs checked first, all in one run.

    make bench                                  # everything; writes the table that the book shows
    python -m benchmarks decode-1024 generate   # some of it; prints, writes nothing
    python -m benchmarks --device cuda          # on a GPU, with float16 as well

Nothing is asserted about time: machines differ. Ratios within about 5 % of 1 are noise.
"""
import argparse
import os
import sys
from pathlib import Path

TABLES = Path(__file__).parent.parent / "nbs" / "_generated"


def stop(why: str) -> None:
    """One line, and the exit status of a wrong call."""
    print(f"benchmarks: {why}", file=sys.stderr)
    raise SystemExit(2)


def writable(path: Path) -> bool:
    """Can a file be made there, or an ordinary one be replaced?"""
    try:
        return path.parent.is_dir() and os.access(path.parent, os.W_OK) and not path.is_symlink() and (
            path.is_file() or not path.exists())
    except OSError:                          # a name too long, say
        return False


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help="default: all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, help="runs of each side; default depends on the scenario")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Its times mean nothing")
    parser.add_argument("--out", type=Path, help="where the JSON goes; default, for all scenarios, the book's table")
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")       # the profiler is chatty
    try:
        import torch

        from benchmarks import measure
    except ImportError as error:
        stop(f"{error.name or error} is missing or broken, and the table needs it: make bench installs it")
    unknown = [name for name in options.names if name not in measure.NAMES]
    if unknown:
        stop(f"no scenario {unknown[0]!r}; there are {', '.join(measure.NAMES)}")
    if options.device not in ("cpu", "cuda"):
        stop(f"device must be cpu or cuda, got {options.device!r}")
    if options.device == "cuda" and not torch.cuda.is_available():
        stop("no GPU that PyTorch can use; leave --device out")
    if options.rounds is not None and options.rounds < 1:
        stop(f"rounds must be at least 1, got {options.rounds}")
    out = options.out
    if out is None and not options.names and not options.quick and options.rounds is None:
        out = TABLES / f"bench_{options.device}.json"
    if out is not None and not writable(out):
        stop(f"out must be a file in a folder that can be written, got {str(out)[:200]}")
    rounds = options.rounds or (2 if options.quick else None)
    try:
        found = measure.run(options.names or [*measure.NAMES], options.device, options.quick, rounds)
    except measure.Wrong as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        raise SystemExit(1)
    print("\n".join(measure.lines(found)))
    if out is not None:
        measure.write(found, out)
        print(f"written: {out.name}")


if __name__ == "__main__":
    main()
