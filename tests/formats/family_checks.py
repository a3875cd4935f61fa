"""What every published family must satisfy beside transformers, as functions for tests/formats/test_families*.py."""

import torch
from safetensors.torch import load_file
from test_model import PARITY, all_logits

from formats import llava
from generate import generate


def check_logits(mine, batch, true):
    """The logits of our model are those of theirs, which are not all alike"""
    with torch.no_grad():
        error = (all_logits(mine, batch) - true).abs().max() / true.abs().max()
    assert error < PARITY and true.std() > 0.05, error


def check_greedy(theirs, mine, ids, images, seen, spelled=None):
    """The two models answer alike. seen: what theirs gets beside its ids; spelled: its ids, where they are others"""
    one = torch.tensor([spelled or ids])
    out = theirs.generate(input_ids=one, attention_mask=torch.ones_like(one), **seen, max_new_tokens=6, do_sample=False,
                          suppress_tokens=[3], eos_token_id=2, pad_token_id=4)
    answer, = generate(mine, [torch.tensor(ids)], images, {2}, 6)
    assert answer == [i for i in out[0, len(ids):].tolist() if i != 2]


def save_folder(mine, folder, out):
    """Write our model as a folder of its family -> the folder"""
    llava.save_model(out, mine.state_dict(), mine.cfg, folder, folder.meta["template"], "", "squash", torch.float32)
    return out


def check_return(at, mine, folder, out):
    """Their folder `at`, loaded and saved in `out`, is the same model. -> tensors of the two folders"""
    state, meta = llava.load_model(init=at, dtype=None)[0].state_dict(), folder.meta
    llava.save_model(out, state, mine.cfg, folder, meta["template"], meta.get("system") or "",
                     meta.get("image_aspect") or "squash", torch.float32)
    again, _ = llava.load_model(init=out, dtype=torch.float64)
    assert again.cfg == mine.cfg
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), mine.state_dict().values(), strict=True))
    return load_file(at / "model.safetensors"), load_file(out / "model.safetensors")
