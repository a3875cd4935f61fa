# %% [markdown]
# # A tour of pumice: from an image to an answer
#
# A vision-language model turns an image into tokens, and a language model reads them together with text. This
# notebook follows one sample through the code of this repository: image, patches, tokens, loss mask, packed sequence,
# attention, loss, training, answer. It needs one CPU core and less than a minute, no GPU and no network.
#
# `docs/tour.ipynb` is written from `docs/tour.py`: `python -m tools.notebook docs/tour.py`. The tests run every cell.

# %%
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "train_align.py").exists())
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image, ImageDraw

torch.manual_seed(0)
torch.set_num_threads(1);

# %% [markdown]
# ## 1. Data: a world that draws itself
#
# A scene has coloured shapes on a grid of 3 x 3 cells. `demo/toy.py` draws it and writes captions, questions and
# answers, in the JSON form of LLaVA. We draw 48 scenes. A row of the file is an ordinary object:

# %%
from demo import toy

world = Path(tempfile.mkdtemp())
toy.write_world(world, "align", align=48, val_align=2, test=2)
rows = json.loads((world / "align.json").read_text())
print(json.dumps(rows[0], indent=1))
picture = Image.open(world / "images" / rows[0]["image"])
picture.resize((288, 288), Image.NEAREST)

# %% [markdown]
# ## 2. An image becomes patches
#
# The vision transformer (ViT) does not see pixels one by one. It cuts the image into patches of 12 x 12 pixels, so an
# image of 72 x 72 pixels has 36 patches. One linear layer turns the 12 * 12 * 3 numbers of a patch into one vector
# (`model.ViTEmbeddings`). So the image becomes 36 vectors: a sequence, like text.

# %%
from formats import llava

model, folder = llava.load_model("demo/vit", "demo/llm")
side, patch = model.cfg.vision.image_size, model.cfg.vision.patch_size
n, zoom = side // patch, 44
patches = Image.new("RGB", (n * (zoom + 4), n * (zoom + 4)), "white")
for row in range(n):
    for column in range(n):
        box = (column * patch, row * patch, (column + 1) * patch, (row + 1) * patch)
        patches.paste(picture.crop(box).resize((zoom, zoom), Image.NEAREST), (column * (zoom + 4), row * (zoom + 4)))
print(f"{side} x {side} pixels -> {n} x {n} patches of {patch} x {patch} pixels")
patches

# %% [markdown]
# ## 3. Text and image become ids and labels
#
# A tokenizer turns text into ids. The image gets 36 placeholders: later, the features of the patches take their
# places. The labels are built together with the ids (`chat.py`): a label is an id where the loss counts the token
# (supervised), and -100 elsewhere. Below, supervised tokens are green. The model is trained to write the caption and
# the newline after it, and nothing else.

# %%
from data import Encoder
from kernels.cross_entropy import IGNORE
from parts.build import image_layout

tok = folder.tok
encode = Encoder(tok, "plain", image_layout(model.cfg), max_len=512, system="")
ids, labels, names, cut = encode(rows[0])
for i, label in zip(ids, labels):
    text = "<image>" if i == tok.image else repr(tok.full.decode([i], skip_special_tokens=False))
    print(f"\033[{32 if label != IGNORE else 90}m{text}\033[0m", end=" ")
print(f"\n{len(ids)} ids: {ids.count(tok.image)} of the image, {sum(y != IGNORE for y in labels)} supervised")

# %% [markdown]
# ## 4. Samples are packed into one sequence
#
# Samples have different lengths. Many programs pad them to one length and compute on the padding. Here they stand one
# after the other in one sequence (stream) without padding (`data.pack`). Positions begin again at 0 in every sample.
# The labels are shifted by one: position n must predict token n + 1. The last position of a sample predicts nothing.

# %%
from data import pack
from formats.configs import image_spec
from formats.image_files import load_image
from images import preprocess

spec = image_spec(folder.pre, "pad")


def sample(row):
    """A row of the file -> what pack() takes: ids, labels, pixels"""
    ids, labels, names, _ = encode(row)
    return ids, labels, torch.stack([preprocess(load_image(str(world / "images" / name)), spec) for name in names])


stream = pack([sample(row) for row in rows[:3]], side)
for name, values in stream._asdict().items():
    print(f"{name:8}{tuple(values.shape)!s:18}{values.dtype}")
begins = [n for n, position in enumerate(stream.pos.tolist()) if position == 0]
print(f"samples begin at {begins} of {len(stream.ids)} tokens: there, positions begin again at 0")

# %% [markdown]
# ## 5. Attention reads spans
#
# Token n attends to the keys lo[n] <= j < hi[n] of the stream. This is the only mask in this repository
# (`kernels/attention.py`). For a causal mask, lo[n] is the beginning of the sample and hi[n] is n + 1. In the
# picture, row n shows in colour what token n attends to. Blue columns are image tokens. There are three triangles: no
# sample sees another one.

# %%
N = len(stream.ids)
keys = torch.arange(N)
seen = (keys >= stream.lo[:, None]) & (keys < stream.hi[:, None])                            # (N, N)
colours = torch.full((N, N, 3), 235, dtype=torch.uint8)
colours[seen] = torch.tensor([217, 154, 28], dtype=torch.uint8)
colours[seen & (stream.ids == tok.image)] = torch.tensor([47, 127, 209], dtype=torch.uint8)
Image.fromarray(colours.numpy()).resize((3 * N, 3 * N), Image.NEAREST)

# %% [markdown]
# ## 6. Forward: image features take the places of the placeholders
#
# Three parts: the ViT gives 36 features per image. The connector (here: linear, GELU, linear) maps each to the width
# of the language model. The language model reads features and token embeddings as one sequence. Vision tower and
# language model of the toy world are trained already, and the connector is new: so the loss begins high.

# %%
from loss import supervised, token_loss

with torch.no_grad():
    features = model.vision_tower(stream.images)
    embedded = model.multi_modal_projector(features)
    first_loss = token_loss(model, stream).item() / supervised(stream.labels)
print(f"images {tuple(stream.images.shape)} -> features {tuple(features.shape)} -> embeddings {tuple(embedded.shape)}")
print(f"loss: a sum over {supervised(stream.labels)} supervised tokens, divided by their number: {first_loss:.2f}")

# %% [markdown]
# ## 7. Stage 1: train the connector
#
# Stage 1 (alignment) trains the connector alone. The lines of a step are those of the loop in `train_align.py`: count
# the supervised tokens, forward, backward, update. We take thirty steps of 8 samples. Most of the fall comes at once:
# the model begins to write captions of the right form. What is in the image takes many more steps.

# %%
import engine

machine = engine.start("cpu", "fp32")
rates = engine.choose(model, {"multi_modal_projector.*": 5e-3}, machine.dtype, machine.device)
optimizer, losses, steps = engine.adamw(model, rates, weight_decay=0.0), [], 30
samples = [sample(row) for row in rows]
for step in range(steps):
    engine.set_lr(optimizer, step, steps, warmup=0.1)
    batch = pack([samples[(8 * step + k) % len(samples)] for k in range(8)], side)
    n = supervised(batch.labels)
    loss = token_loss(model, batch)
    (loss / n).backward()
    losses.append(engine.update(model, optimizer, loss.detach(), n, machine, grad_clip=1.0)["loss"])
print("trained:", sum(p.numel() for p in model.parameters() if p.requires_grad), "of",
      sum(p.numel() for p in model.parameters()), "weights")
print("loss of every fifth step:", " ".join(f"{value:.2f}" for value in losses[::5]), f"... {losses[-1]:.2f}")

# %%
curve = Image.new("RGB", (460, 200), "white")
draw = ImageDraw.Draw(curve)
points = [(30 + 14 * step, 180 - 160 * value / max(losses)) for step, value in enumerate(losses)]
draw.line([(30, 10), (30, 180), (450, 180)], fill="black")
draw.line(points, fill=(194, 69, 45), width=2)
draw.text((36, 8), f"loss {max(losses):.2f}", fill="black")
draw.text((400, 184), f"step {steps}", fill="black")
curve

# %% [markdown]
# ## 8. Ask the model
#
# Generation predicts one token after the other, and keeps keys and values of earlier tokens in a cache
# (`generate.py`). After thirty steps the model has learned the form of a caption, and little of what is in the image.
# The whole of stage 1 is 750 steps of 16 samples; then stage 2 trains on conversations.

# %%
from generate import Chat

chat = Chat.of(model, folder, "plain", "", "pad")
answer = chat.ask(picture, "", max_new_tokens=24)
print("model:  ", answer)
print("caption:", rows[0]["conversations"][1]["value"])

# %% [markdown]
# ## Where to go on
#
# `torchrun train_align.py` and `torchrun train_sft.py` run both stages of the toy world in a few minutes. Then:
#
# ```python
# from generate import Chat
# Chat("runs/sft").ask("runs/toy/images/test_00000.png", "How many shapes are there?")
# ```
#
# `docs/teaching.md` has an order of reading, the exercises (`python -m exercises`), pictures, and the records of the
# toy world.
