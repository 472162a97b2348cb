"""Makes the demo's repository: a small Python package whose median() is wrong, and the test that shows it.

Author, dates and content are fixed, so the commit is the same everywhere, and so are the recorded turns of OpenCode about it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMIT = "66b92b7e0a4cef0ebac5fcb01d7ef787faff3001"
BRANCH = "main"

FILES = {
    "README.md": """\
# tally

Small statistics over lists of numbers: `mean`, `median`, `spread`.

Run the tests with `python -m pytest`.
""",
    "pyproject.toml": """\
[project]
name = "tally"
version = "0.1.0"
requires-python = ">=3.9"

[tool.pytest.ini_options]
pythonpath = ["src"]
testpaths = ["tests"]
""",
    "src/tally/__init__.py": '''\
"""Small statistics over lists of numbers."""

from tally.stats import mean, median, spread

__all__ = ["mean", "median", "spread"]
''',
    "src/tally/stats.py": '''\
"""Mean, median and spread of a list of numbers. Every function raises ValueError for an empty list."""


def mean(values):
    """The arithmetic mean."""
    _check(values)
    return sum(values) / len(values)


def median(values):
    """The middle value; for an even number of values, the mean of the two in the middle."""
    _check(values)
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle]


def spread(values):
    """The largest minus the smallest."""
    _check(values)
    return max(values) - min(values)


def _check(values):
    if not values:
        raise ValueError("no values")
''',
    "tests/test_stats.py": """\
import pytest

from tally import mean, median, spread


def test_mean():
    assert mean([1, 2, 3, 6]) == 3


def test_median_of_an_odd_number_of_values():
    assert median([9, 1, 5]) == 5


def test_median_of_an_even_number_of_values():
    assert median([4, 1, 3, 2]) == 2.5


def test_median_of_two_equal_values():
    assert median([7, 7]) == 7


def test_spread():
    assert spread([3, 10, 4]) == 7


@pytest.mark.parametrize("function", [mean, median, spread])
def test_no_values(function):
    with pytest.raises(ValueError):
        function([])
""",
}


def make(directory: Path) -> str:
    """Write the bare repository `directory` (such as fix-median.git) and return its commit, which is COMMIT."""
    git(directory, "init", "--bare", "--quiet", "--template=", f"--initial-branch={BRANCH}", str(directory))
    stream = [f"commit refs/heads/{BRANCH}", "committer Sisu-Kodo <demo@sisukodo.invalid> 1767225600 +0000"]
    stream += [f"data {len(b'Small statistics')}", "Small statistics"]
    for path, content in FILES.items():
        stream += [f"M 100644 inline {path}", f"data {len(content.encode())}", content]
    git(directory, "fast-import", "--quiet", stdin="\n".join(stream) + "\n")
    commit = git(directory, "rev-parse", f"refs/heads/{BRANCH}").strip()
    if commit != COMMIT:
        raise SystemExit(
            f"the demo's commit is {commit}, but COMMIT says {COMMIT}: change it, and record the turns again"
        )
    return commit


def git(directory: Path, *args: str, stdin: str = "") -> str:
    """Run git without anybody's configuration."""
    environ = {"PATH": os.environ.get("PATH", os.defpath), "HOME": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    environ["GIT_DIR"] = str(directory)
    done = subprocess.run(["git", *args], input=stdin, env=environ, capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/fix-median/make_repo.py FOLDER/fix-median.git")
    print(make(Path(sys.argv[1])))
