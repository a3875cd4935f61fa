"""Loader processes: they prepare data.StepData ahead of training, and end with the process that trains."""

import atexit
import functools
import multiprocessing
import os
import signal
import threading

import torch


def loader(steps, order, workers):
    """Yield StepData for the steps in `order`. One worker prepares a whole step: results do not depend on `workers`."""
    own = torch.Generator()    # else DataLoader uses the global generator, and dropout differs in a resumed run
    ended, open_end = multiprocessing.Pipe(duplex=False)
    atexit.register(open_end.close)                            # else the loaders never end, and exit waits for them
    try:
        yield from torch.utils.data.DataLoader(
            steps, batch_size=None, sampler=order, num_workers=workers, generator=own,
            pin_memory=torch.cuda.is_initialized(), worker_init_fn=functools.partial(outlive_signals, ended, open_end))
    except (ConnectionError, EOFError) as e:                   # a loader died while it was sending data
        raise RuntimeError(f"DataLoader worker exited unexpectedly, killed for its memory? ({type(e).__name__})") from e


def outlive_signals(ended, open_end, worker):
    """Runs in a loader process. It ignores the signals with which a scheduler or Ctrl-C stops all processes of a job,
    because a step that has begun needs its data. The loader ends when the trainer closes the pipe or dies."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    open_end.close()  # the loader's copy of this end: `ended` reports EOF only when all processes have closed theirs
    threading.Thread(target=lambda: ended.poll(None) and os._exit(0), daemon=True).start()
