"""Everything around the training loop. The training scripts call begin, load, prepare and finish of run/stage.py, and
every script gets its settings from run/arguments.py."""
