"""Model cards: README.md of model/ and adapter/, from the settings and the log of a run. A card never ends a run: what
cannot be read is left out. Text that others wrote (names, a system text) is escaped."""

import json
import re
from pathlib import Path

from config import Error
from formats.hub import find_model
from formats.strict_json import read_json

SETTINGS = ("data", "batch_size", "lr", "connector_lr", "vision_lr", "lora_r", "lora_alpha", "lora_targets", "bits",
            "warmup", "weight_decay", "grad_clip", "max_len", "template", "system", "image_aspect", "seed")

USE = '''\
```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder = "."                                     # where this card lies
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype="auto")
content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(images=Image.open("image.png"), text=prompt, return_tensors="pt").to(model.dtype)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))
```'''
ADAPTER = '''\
```python
import json
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

folder = "."                                     # where this card lies
base = json.load(open(f"{folder}/adapter_config.json"))["base_model_name_or_path"]
model = LlavaForConditionalGeneration.from_pretrained(base, torch_dtype="auto")
model = PeftModel.from_pretrained(model, folder)
```'''
NO_BASE = ("PEFT needs a LLaVA folder of transformers as the base, and this adapter has none;\n"
           "the model/ beside it has it merged")


def escaped(x):
    """Anything -> one line of Markdown. What could be markup, HTML or a link is written as &#N;"""
    return re.sub(r"[^\w .,;/%+=-]|(?<=www)\.", lambda m: f"&#{ord(m[0])};", " ".join(str(x).split()), flags=re.I)


def limits(cfg, aspect):
    """What cannot be done with the folder of a model -> lines, the most important one first"""
    v = cfg.vision
    lines = {
        "transformers reads this folder and refuses images, because its LLaVA does not drop register tokens: only "
        "pumice can show this model images.": v.num_register_tokens,
        "vLLM and llama.cpp know no LLaVA with a DINOv2 tower.": v.model_type == "dinov2",
        "SGLang's source takes CLIP only from folders of the LLaVA repository; it was not run.":
            v.model_type == "clip_vision_model",
        "The connector is one matrix. A LLaVA folder always has two, so the second one is the identity, with "
        "projector_hidden_act `linear` between them, which transformers knows and vLLM does not.":
            cfg.connector == "linear",
        "Qwen3 came to transformers with version 4.51.": cfg.text.model_type == "qwen3",
        "Images are padded to squares by LlavaImageProcessor. Transformers 4.46 has none: it reads the weights and the "
        "tokenizer, and refuses images.": aspect == "pad",
        f"An image becomes a square of {v.image_size} x {v.image_size} pixels ({aspect}), {v.patches} tokens.": True,
        "Folders that pumice writes were read by transformers 4.46, 4.57 and 5.23, and GGUF files made of them by "
        "llama.cpp; for vLLM they are written as its source asks, and it was not run.": True,
        "Answers can be wrong, also about what is not in the image. Biases were not measured.": True}
    return [line for line, applies in lines.items() if applies]


def facts(run):
    """A run folder -> its settings, its code revision, steps done, the last validation loss or None"""
    c, steps, loss = {}, 0, None
    try:
        c = read_json(Path(run, "config.json"))
        for line in Path(run, "log.jsonl").read_text("utf-8", "replace").splitlines():
            row = json.loads(line)                                            # a killed run leaves a torn last line
            steps, loss = max(steps, row.get("step", 0)), row.get("val_loss", loss)
    except (Error, OSError, ValueError):
        pass
    return c.get("settings", {}), c.get("versions", {}).get("revision"), steps, loss


def known_as(name):
    """org/name of the hub as it is; of a path the last part alone, for a card must not leak paths"""
    if found := re.search(r"models--([\w.-]+?)--([\w.-]+)", name):
        return "/".join(found.groups())
    path = Path(name).parent if Path(name).name == "model" else Path(name)              # of a run its model/
    return name if re.fullmatch(r"[\w-]+/[\w.-]+", name) and not Path(name).exists() else path.name


def origins(s, base=None):
    """What a run started from -> names, lines `base_model:` of a card's head"""
    given = next((x for x in ([base], [s.get("init")], [s.get("vision"), s.get("llm")]) if any(x)), ["unknown"])
    names = [known_as(str(x)) for x in given]
    hub = "".join(f"- {n}\n" for n in names if re.fullmatch(r"[\w.-]+/[\w.-]+", n))
    return " and ".join(map(escaped, names)), f"base_model:\n{hub}" if hub else ""


def text(run, cfg):
    """The card of model/. cfg: VLMConfig"""
    s, revision, steps, loss = facts(run)
    rows = {"steps": steps, "validation loss": loss} | {k: s.get(k) for k in SETTINGS}
    rows["data"] = ", ".join(Path(part).name for part in str(rows["data"]).split(","))
    table = "\n".join(f"| {k} | {escaped(x)} |" for k, x in rows.items() if x)
    limited = "\n".join(f"- {line}" for line in limits(cfg, s.get("image_aspect")))
    names, hub = origins(s)
    return f"""\
---
library_name: transformers
pipeline_tag: image-text-to-text
{hub}tags:
- llava
- pumice
---

# {escaped(Path(run).resolve().name)}

A vision-language model that answers questions about images: a `{cfg.vision.model_type}` tower, read at layer
{cfg.vision.feature_layer}, a connector ({cfg.connector}) and a `{cfg.text.model_type}` language model.
Trained with pumice (revision {escaped(revision)}), starting from {names}.

## Use

{USE}

The chat template writes the prompts of training, BOS included.

## Training

| setting | value |
| --- | --- |
{table}

## Limits

{limited}

## Licence

The weights derive from {names} and from the data above, whose licences hold for them too.
"""


def peft_reads(base):
    """Is the base of an adapter, a folder or a name of the hub, a LLaVA as transformers has them?"""
    try:
        c = read_json(find_model(base) / "config.json") if base else {}
    except Error:
        return False
    return c.get("model_type") == "llava" and "mm_vision_tower" not in c      # a key of the LLaVA repository


def adapter(run, base):
    """The card of adapter/. base: the LLaVA that it was trained on, or None where it was two towers"""
    s, *_ = facts(run)
    names, hub = origins(s, base)
    four = "" if s.get("bits") != 4 else (
        "The language model was in four bits during training (NF4, double quantisation). Over the original weights\n"
        "the answers hardly differ; `model/` is merged with the weights that NF4 gives back.\n\n")
    return f"""\
---
library_name: peft
{hub}tags:
- llava
- lora
- pumice
---

# {escaped(Path(run).resolve().name)}: adapter

LoRA of rank {s.get("lora_r")} with alpha {s.get("lora_alpha")}, and the connector trained along with it, over {names}.
The template is `{s.get("template")}`. Merged, the model lies in `model/` beside this folder.

## Use

{ADAPTER if peft_reads(base) else NO_BASE + "."}

{four}`python sample.py --model=` and `eval.py --model=` of pumice take this folder as it is.
"""
