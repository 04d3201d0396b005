# SPDX-License-Identifier: MIT
"""Nothing is lost of what the tests in several processes find: failures, skipped tests, and a process that dies."""
import os
import shutil
import subprocess
import sys

import pytest

import parallel
from conftest import ROOT

pytestmark = pytest.mark.skipif(not parallel.CAN_FORK or len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
FILES = {"conftest.py": "from parallel import pytest_runtestloop",
         "torch.py": "class cuda:\n    is_available = staticmethod(lambda: False)",          # torch takes seconds
         "test_a.py": "import pytest, time\ndef test_slow(): time.sleep(0.5)\n"
                      "@pytest.mark.skip\ndef test_skipped(): pass\ndef test_prints(): print('a word'); assert 1 == 2",
         "test_b.py": "import os, time\ndef test_dies(): time.sleep(2); os._exit(7)",
         "test_c.py": "def test_passes(): pass"}


@pytest.mark.parametrize("names, status, found", [
    (["test_a.py", "test_b.py"], 1, ["1 failed, 1 passed, 1 skipped", "assert 1 == 2", "a word",
                                     "a process ended with 7 in test_b.py::test_dies"]),
    (["test_a.py", "test_c.py", "-k", "not prints"], 0, ["2 passed, 1 skipped, 1 deselected"])])
def test_reports(tmp_path, names, status, found):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    shutil.copy(ROOT / "tests" / "parallel.py", tmp_path)
    done = subprocess.run([sys.executable, "-m", "pytest", *names], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert all(text in done.stdout for text in found), done.stdout
