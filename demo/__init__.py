"""The toy world and the towers that are trained on it: demo/README.md."""
