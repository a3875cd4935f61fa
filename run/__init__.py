"""A run folder. A stage enters by stage.py: begin -> World, load -> VLM and Folder, prepare -> Run, finish. Its loop uses
of the Run: folder (checkpoints: folder.py, checkpoint.py), log (log.py) and validation (validate.py). plan.py says before
the first step what a run costs, publish.py writes model/ and adapter/ after the last one."""
