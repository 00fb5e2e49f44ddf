"""Signals that ask a job to stop: it ends its step, writes a checkpoint, and leaves."""

import multiprocessing
import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def kill_workers() -> None:
    """At exit, for whatever reason: Python would wait for ever for data workers that block SIGNALS."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for worker in multiprocessing.active_children():
        worker.kill()


def catch_signals() -> list[int]:
    """SIGNALS land in the list, for the loop to see; a second one stops the process at once."""
    caught: list[int] = []

    def handler(number, frame):
        caught.append(number)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    for number in SIGNALS:
        signal.signal(number, handler)
    return caught
