# SPDX-License-Identifier: MIT
"""Runs the tests in as many processes as there are cores, which nearly halves their time on two.

The processes are forked once the tests are collected, so torch is imported once. Each takes one test file after the
other, the largest first, and sends pytest's reports to the first process, which prints them.
"""
import contextlib
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import wait

import torch

CAN_FORK = sys.platform == "linux" and not torch.cuda.is_available()          # CUDA fails in a forked process


class Sender:
    """Pytest plugin of a forked process: sends (hook, its arguments) for each test to the first process."""

    def __init__(self, config, connection):
        self.config, self.send = config, connection.send

    def pytest_runtest_logstart(self, nodeid, location):
        self.send(("logstart", dict(nodeid=nodeid, location=location)))

    def pytest_runtest_logreport(self, report):
        self.send(("logreport", self.config.hook.pytest_report_to_serializable(config=self.config, report=report)))

    def pytest_runtest_logfinish(self, nodeid, location):
        self.send(("logfinish", dict(nodeid=nodeid, location=location)))


def run_files(session, files, numbers, connection):
    """A forked process. files: a list of tests each. numbers: queue of the indices of those that nobody has taken."""
    config = session.config
    config.workerinput = {}                             # by this, plugins know that it is not this process that reports
    config.pluginmanager.getplugin("capturemanager").start_global_capturing()
    config.get_terminal_writer()._file = open(os.devnull, "w")                # the first process prints
    config.pluginmanager.register(Sender(config, connection))
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):             # the first process has stopped
        try:
            tests = files[numbers.get()]
            while tests:
                test, *tests = tests
                tests = tests or files[numbers.get()]
                test.ihook.pytest_runtest_protocol(item=test, nextitem=tests[0] if tests else None)
        finally:
            config.hook.pytest_sessionfinish(session=session, exitstatus=0)   # ends the fixtures


def pytest_runtestloop(session):
    """A hook of pytest. Where it returns None, pytest's own loop runs the tests: on one core, on a GPU, for one file,
    and where somebody wants to see what they print or to type."""
    config, files = session.config, {}
    for test in session.items:
        files.setdefault(test.path, []).append(test)
    processes = min(len(files), len(os.sched_getaffinity(0)) if CAN_FORK else 1)
    watched = config.getoption("capture") == "no" or config.getoption("usepdb") or config.getoption("trace")
    if processes < 2 or watched or session.testsfailed or config.getoption("collectonly"):
        return None
    files = [files[path] for path in sorted(files, key=lambda path: path.stat().st_size, reverse=True)]
    files += [[]] * processes                                                 # each process ends at an empty one
    context = multiprocessing.get_context("fork")
    numbers, running, current = context.SimpleQueue(), {}, {}
    for number in range(len(files)):
        numbers.put(number)
    config._tmp_path_factory.getbasetemp()                                    # one for all processes
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()                                           # each process has its own
    for _ in range(processes):
        connection, theirs = context.Pipe(duplex=False)
        running[connection] = context.Process(target=run_files, args=(session, files, numbers, theirs))
        running[connection].start()
        theirs.close()
    capture.start_global_capturing()
    try:
        while running:
            for connection in wait(list(running)):
                try:
                    kind, content = connection.recv()
                except EOFError:
                    process = running.pop(connection)
                    process.join()
                    if process.exitcode:
                        session.shouldfail = f"a process ended with {process.exitcode} in {current.get(connection)}"
                    continue
                if kind == "logstart":                                        # printing it would mix the files' lines
                    current[connection] = content["nodeid"]
                elif kind == "logreport":
                    report = config.hook.pytest_report_from_serializable(config=config, data=content)
                    config.hook.pytest_runtest_logreport(report=report)
                else:
                    config.hook.pytest_runtest_logfinish(**content)
            if session.shouldfail:                                            # set by --exitfirst, too
                raise session.Failed(session.shouldfail)
    finally:
        for process in running.values():
            os.kill(process.pid, signal.SIGINT)
        for process in running.values():
            process.join()
    return True
