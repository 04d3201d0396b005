# SPDX-License-Identifier: MIT
"""Programs for tests, in processes that are forked from one that has imported torch, which takes seconds."""
import atexit
import multiprocessing.util
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Program:
    """What `python WORDS` does in a folder: a script, -m module or -c code, with arguments. It is started at once, and
    ends like a `subprocess.Popen`, except that the interpreter is not finalised. stdout, stderr: files, the latter by
    default the former; environment: in addition to this process's."""

    def __init__(self, words, folder, stdout, stderr=None, **environment):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torchvision"])
        environment = {**os.environ, **environment}                           # the server's may be older
        self.process = context.Process(target=run, args=(list(map(str, words)), folder, stdout, stderr, environment))
        self.process.start()
        multiprocessing.util.Finalize(self, self.process.kill, exitpriority=1)          # else its end is waited for
        self.stdout, self.pid, self.kill = Path(stdout), self.process.pid, self.process.kill

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("program", timeout)
        return self.poll()

    def until(self, text, seconds=60):
        """Waits until the text is in stdout."""
        end = time.monotonic() + seconds
        while not self.stdout.exists() or text not in self.stdout.read_text():
            assert self.poll() is None and time.monotonic() < end
            time.sleep(0.02)


def run(words, folder, stdout, stderr, environment):
    multiprocessing.set_start_method(None, force=True)                        # the system's own, for DataLoader
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, path in (1, stdout), (2, stderr):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if path else 1, descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)                     # the server's may be another kind of file
    sys.path[:] = [str(folder), *(path for path in sys.path if path and Path(path) not in (ROOT, ROOT / "tests"))]
    sys.argv = {"-c": ["-c", *words[2:]], "-m": words[1:]}.get(words[0], words)
    try:
        if words[0] == "-c":
            exec(words[1], {"__name__": "__main__"})
        elif words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            script = Path(words[0]).resolve()
            sys.path[0] = str(script.parent)
            runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()                                               # multiprocessing leaves them out
