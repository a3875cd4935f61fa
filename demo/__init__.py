"""The toy world: scenes, captions, questions with answers that can be computed."""
