"""The kernels themselves and the GPU tests, interpreted on the CPU: tests/kernels/interpreted/, all in one process."""

from interpret import interpret


def test_kernels_interpreted():
    interpret("attention", "cross_entropy", "norm", "rope", "swiglu", "nf4", "launch", "gpu")
