"""Signals that ask a training process to stop: it saves first."""

import signal


def record_signals():
    """Return a list to which the number of each received signal is appended. From now on SIGTERM, SIGUSR1 (a scheduler
    sends it before it ends a job) and the first Ctrl-C do not end this process. A second Ctrl-C ends it."""
    received = []

    def handler(number, frame):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, handler)
    return received
