"""The toy world, and the vision tower and LLM trained on it: see demo/README.md."""
