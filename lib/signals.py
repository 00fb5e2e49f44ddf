"""Signals that ask a job to stop: it ends its step, writes a checkpoint, and leaves."""

import atexit
import contextlib
import multiprocessing
import os
import signal

from lib.cli import is_rank_0

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def catch_signals() -> list[int]:
    """SIGNALS are collected in the returned list; a second one stops the process at once."""
    caught: list[int] = []

    def handler(number, frame):
        caught.append(number)
        if is_rank_0():
            # Not print: it may be under way, and cannot be entered twice.
            os.write(2, b"\nstopping after this step; a second signal stops at once\n")
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    for number in SIGNALS:
        signal.signal(number, handler)
    return caught


@contextlib.contextmanager
def start_workers_unstoppable():
    """Processes that are started inside the block ignore SIGNALS; they end with this process.

    torchrun and terminals send a signal to all processes of a job, and the step that is under way
    still needs its data workers and those of the compiler.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        atexit.register(kill_workers)


def kill_workers() -> None:
    """Without this, Python would wait at exit for workers that block SIGNALS, for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own handler would raise
    for worker in multiprocessing.active_children():
        worker.kill()
