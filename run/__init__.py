"""A run folder. A stage calls stage.py: begin -> World, load -> VLM and Folder, prepare -> Run, finish. Its loop uses
three parts of Run: folder (checkpoints: folder.py, checkpoint.py), log (log.py), validation (validate.py). plan.py
estimates the cost of a run before the first step, publish.py writes model/ and adapter/ after the last step."""
