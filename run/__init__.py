"""A run folder. The scripts call stage.py: begin -> World, load -> VLM and Folder, prepare -> Run, finish."""
