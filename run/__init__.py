"""A run folder. The scripts enter by stage.py: begin -> World, load -> VLM and Folder, prepare -> Run, finish."""
