"""SwiGLU (Shazeer 2020): silu(gate) * up. Shapes: gate, up (N, F) -> (N, F)."""

import torch.nn.functional as F


def swiglu(gate, up):
    return F.silu(gate) * up
