"""A run folder: checkpoints, resume, log, plan, publish."""
