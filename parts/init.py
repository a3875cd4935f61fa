"""Initial weights of a new model or part."""

import torch

from model import CONNECTORS, RMSNorm


@torch.no_grad()
def init_weights(model, seed=0):
    """Fill every parameter, in the order of the names, from one seed. N(mean, standard deviation):

        norms                weight 1, bias 0       class, register and position tokens    N(0, 0.02)
        matrices             N(0, 1/sqrt(fan in))   o_proj, out_proj, down_proj, fc2       0: a block starts as identity
        connector            as torch.nn.Linear     DINOv2's layer scale                   1
        token embeddings     N(0, 0.02)             other biases                           0
    """
    g = torch.Generator().manual_seed(seed)
    params = dict(sorted(model.named_parameters()))
    for name, p in params.items():
        if "linear_" in name:  # linear_1 and linear_2 of the connector
            fan_in = params[name.replace("bias", "weight")].shape[1]
            value = (2 * torch.rand(p.shape, generator=g) - 1) * fan_in**-0.5
        elif "norm" in name or "layer_scale" in name:
            value = torch.zeros(p.shape) if name.endswith("bias") else torch.ones(p.shape)
        elif name.endswith("bias") or any(s in name for s in ("o_proj", "out_proj", "down_proj", "fc2")):
            value = torch.zeros(p.shape)
        elif "embed" in name and "patch" not in name or "register_tokens" in name:
            value = torch.randn(p.shape, generator=g) * 0.02
        else:  # matrices. The usual 0.02 = 1/sqrt(2,500) suits width 2,500, but is far too small for the toy's 128
            value = torch.randn(p.shape, generator=g) * p[0].numel() ** -0.5
        p.copy_(value)


def init_new(model, names, seed=0):
    """Fill the parameters and buffers `names` of a model; they are on the meta device. A connector of LLaVA begins as
    init_weights says. Another new part begins as its modules do: by their method reset_parameters, or N(0, 0.02)."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        for prefix, module in model.named_modules():
            tensors = {**module._parameters, **module._buffers}
            own = {k: p for k, p in tensors.items() if f"{prefix}.{k}" in names}
            if not own:
                continue
            for k, p in own.items():
                new = torch.empty_like(p, device="cpu", requires_grad=False).normal_(0, 0.02)
                setattr(module, k, torch.nn.Parameter(new) if k in module._parameters else new)
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif isinstance(module, RMSNorm):
                torch.nn.init.ones_(module.weight)
    if names and model.cfg.connector in CONNECTORS:
        init_weights(model.multi_modal_projector, seed)
