"""Everything around the training loop. The training scripts call begin, load, prepare and finish of run/stage.py."""
