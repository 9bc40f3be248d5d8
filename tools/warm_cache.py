"""Execute the notebooks of _toc.yml in parallel into _build/.jupyter_cache; the (serial) book build then only reads it.

    python tools/warm_cache.py [jobs]

One line per notebook as it ends. Exit code 1 if any notebook failed, with its traceback.
"""
import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import yaml
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import single_nb_execution
from nbdev_book import read

CACHE, TIMEOUT = "_build/.jupyter_cache", 600


def notebooks():
    """The notebooks of the table of contents, in order."""
    toc = yaml.safe_load(Path("_toc.yml").read_text())
    chapters = toc.get("chapters", []) + [c for part in toc.get("parts", []) for c in part["chapters"]]
    files = [Path(c["file"].removesuffix(".ipynb") + ".ipynb") for c in chapters]
    return [f for f in files if f.exists()]


def run(path):
    """Execute one notebook unless the cache holds it: (notebook, seconds, traceback); seconds is None if cached."""
    try:
        nb = read(path.read_text())
    except Exception:
        return None, 0.0, traceback.format_exc()
    try:
        get_cache(CACHE).match_cache_notebook(nb)
        return nb, None, None
    except KeyError:
        done = single_nb_execution(nb, cwd=str(path.parent), allow_errors=False, timeout=TIMEOUT, meta_override=True)
        return nb, done.time or 0.0, done.exc_string


def main():
    Path(CACHE).mkdir(parents=True, exist_ok=True)
    cache = get_cache(CACHE)
    cache.db  # create the database before the workers look at it
    files, failed = notebooks(), 0
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count()
    # kernels that each take all cores slow one another down tenfold
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // jobs)))
    print(f"executing {len(files)} notebooks, {jobs} at a time", flush=True)
    with ProcessPoolExecutor(jobs) as pool:
        runs = {pool.submit(run, path): path for path in reversed(files)}      # later chapters take longer
        for n, future in enumerate(as_completed(runs), 1):
            path, (nb, seconds, error) = runs[future], future.result()
            state = "unchanged" if seconds is None else "FAILED" if error else f"{seconds:.1f} s"
            print(f"  {n}/{len(files)}  {path}  {state}", flush=True)
            if error:
                failed += 1
                print(error, file=sys.stderr, flush=True)
            elif seconds is not None:
                bundle = CacheBundleIn(nb, str(path.resolve()), data={"execution_seconds": seconds})
                cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
