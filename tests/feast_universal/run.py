"""Runs Feast's universal tests from a Feast source checkout: the offline ones against our offline store, the online ones
against our online store on a private Redis.

`make feast-universal FEAST_SOURCE=/path/to/feast`. Only the checkout's tests are used, copied to a temporary directory:
the Feast under test is the installed one. Deviations are named in `deviations.txt`, each with its reason.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = "tests/integration/offline_store"
SUITES = (
    f"{FOLDER}/test_universal_historical_retrieval.py",
    f"{FOLDER}/test_universal_materialization.py",
    f"{FOLDER}/test_non_entity_mode.py",
    f"{FOLDER}/test_offline_write.py",
    f"{FOLDER}/test_persist.py",
    f"{FOLDER}/test_push_features_to_offline_store.py",
)
ONLINE_FOLDER = "tests/integration/online_store"
ONLINE_SUITES = (
    f"{ONLINE_FOLDER}/test_universal_online.py",
    f"{ONLINE_FOLDER}/test_universal_e2e.py",
    f"{ONLINE_FOLDER}/test_push_features_to_online_store.py",
)
STORES = {
    "offline": ("predictflow_repo_configuration", "", SUITES),
    "online": ("predictflow_online_configuration", "redis", ONLINE_SUITES),
    "online-types": (
        "predictflow_online_configuration",
        "sqlite",
        (f"{ONLINE_FOLDER}/test_universal_online_types.py",),
    ),
}
"""What to run: the module that names our store, the name that the suite's tests ask for it by, and the test files."""


def main(argv: Sequence[str] | None = None) -> int:
    """pytest's exit code; 2 with one line when `source` is no Feast checkout."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, rest = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="Arguments after `--` are passed on to pytest."
    )
    parser.add_argument("source", type=Path, help="a Feast source checkout, of the installed version or the nearest")
    parser.add_argument("--store", choices=sorted(STORES), help="only the tests of this store")
    parser.add_argument("--suite", action="append", help="a test file below sdk/python instead of the universal ones")
    options = parser.parse_args(own)
    tests = options.source / "sdk/python/tests"
    if not (tests / SUITES[0].removeprefix("tests/")).is_file():
        parser.error(f"no Feast source checkout: {options.source}")
    codes = [run(tests, store, options.suite, rest) for store in ([options.store] if options.store else STORES)]
    return max(codes)


def run(tests: Path, store: str, suites: Sequence[str] | None, arguments: Sequence[str]) -> int:
    """pytest's exit code for one store's suites."""
    module, name, own = STORES[store]
    with tempfile.TemporaryDirectory(prefix="predictflow-feast-") as place:
        shutil.copytree(tests, Path(place) / "tests")
        shutil.copy(HERE / "pytest.ini", place)
        environment = {
            **os.environ,
            "FULL_REPO_CONFIGS_MODULE": module,
            "FEAST_IS_LOCAL_TEST": "True",
            "FEAST_USAGE": "False",
            "IS_TEST": "True",
            "PREDICTFLOW_UNIVERSAL_HOME": place,
            "PREDICTFLOW_UNIVERSAL_NAME": name,
            "PYTHONPATH": f"{place}:{HERE}:{HERE.parents[1]}",
        }
        command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "--integration", *(suites or own)]
        for test, _reason in deviations():
            command += ["--deselect", test]
        return subprocess.run([*command, *arguments], cwd=place, env=environment, check=False).returncode


def deviations() -> list[tuple[str, str]]:
    """(test, reason) of `deviations.txt`: lines `test # reason`; blank lines and lines of comment are left out."""
    lines = (HERE / "deviations.txt").read_text().splitlines()
    found = []
    for line in lines:
        if line.strip() and not line.startswith("#"):
            test, _, reason = line.partition(" # ")
            if not reason:
                raise SystemExit(f"deviations.txt: no reason given: {line}")
            found.append((test.strip(), reason.strip()))
    return found


if __name__ == "__main__":
    sys.exit(main())
