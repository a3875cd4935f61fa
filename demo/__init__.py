"""The toy world (a small data set), and the vision tower and LLM trained on it. See demo/README.md."""
