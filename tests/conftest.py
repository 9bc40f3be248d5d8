"""The suite imports the package with its shape comments turned into checks, and with a bug if one is planted."""
import importlib.abc
import importlib.machinery
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools"), str(ROOT / "nbs/_ext")]
os.chdir(ROOT)

import planted  # noqa: E402
import shape_comments  # noqa: E402


class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        module, source = fullname.removeprefix("attn_nb."), self.get_data(self.path).decode()
        if planted.MUTANT and planted.MUTANT[0] == module:
            source = planted.MUTANT[1]
        return shape_comments.compiled(source, self.path)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        file = ROOT / (name.replace(".", "/") + ".py")
        if name.startswith("attn_nb.") and file.exists():
            return importlib.util.spec_from_file_location(name, file, loader=Loader(name, str(file)))


sys.meta_path.insert(0, Finder())


def pytest_collection_modifyitems(items):
    """With a bug planted the quick tests go first: most bugs die in a moment."""
    if planted.MUTANT:
        items.sort(key=lambda item: hasattr(getattr(item, "obj", None), "hypothesis"))


def pytest_sessionfinish(session, exitstatus):
    """In CI a skipped test is a failure: nothing may go unchecked in silence."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []      # a worker of xdist has none
    if os.environ.get("CI") and skipped and exitstatus == 0:
        print(f"\nCI: {len(skipped)} skipped tests count as failures")
        session.exitstatus = 1


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def html():
    """The built book."""
    folder = ROOT / "_build/html"
    if not (folder / "index.html").exists():
        pytest.fail("the book is not built: run make book, or make test, which builds it")
    return folder


@pytest.fixture(scope="session")
def browser():
    """Chromium, driven by Playwright; no browser is downloaded."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
             "--disable-component-update", "--disable-quic", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()
