"""Settings of the whole suite: what must come before NumPy is imported, and kernels compiled before anything is timed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The matrices of the tests are tiny: BLAS threads would wait for each other longer than they compute.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Who starts us in the background may have Ctrl-C ignored or blocked, and what we start would inherit either.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "pthread_sigmask"):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

ROOT = Path(__file__).resolve().parents[1]


OPT_IN = ("slow", "network")  # markers of pyproject.toml


def pytest_addoption(parser: pytest.Parser) -> None:
    for name in OPT_IN:
        parser.addoption(f"--run-{name}", action="store_true", help=f"run the tests marked {name} as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in OPT_IN:
        if not config.getoption(f"--run-{name}"):
            for item in items:
                if name in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"{name}: only with --run-{name}"))


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels() -> None:
    """Every kernel in the cache, once, so that no test waits for a compilation in a terminal or against a deadline."""
    command = [sys.executable, "-m", "lfm2cpp", "warmup"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(autouse=True)
def signal_handlers_as_before() -> Iterator[None]:
    """A command run within the test's process sets handlers for its own life: on failure Ctrl-C is ignored from then on."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def steady_machine() -> Iterator[None]:
    """One on which a drafted token costs a tenth of a step: the drafts of a test depend on nothing else that runs."""
    from lfm2cpp.lookup import PromptLookup

    with pytest.MonkeyPatch.context() as patch:
        took = PromptLookup.took
        patch.setattr(PromptLookup, "took", lambda lookup, n, seconds: took(lookup, n, 0.01 * (1 + 0.1 * n)))
        yield
