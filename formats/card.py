"""Write model cards: README.md for the folders model/ and adapter/ of a run, from the run's settings and log. A value
that cannot be read is left out, so a card never stops a run. Text from users (names, a system text) is escaped."""

import json
import re
from pathlib import Path

from config import Error
from formats.families import family_of, is_llava
from formats.hub import find_model
from formats.strict_json import read_json

SETTINGS = ("data batch_size lr connector_lr vision_lr lora_r lora_alpha lora_targets bits warmup weight_decay "
            "grad_clip max_len template system image_aspect seed").split()

USE = '''\
```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained(".")            # the folder of this card
model = LlavaForConditionalGeneration.from_pretrained(".", torch_dtype="auto")
content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(images=Image.open("image.png"), text=prompt, return_tensors="pt").to(model.dtype)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))
```'''
# families whose processors are used as LLaVA's: model_type -> name in transformers' class
NAMES = {"vipllava": "VipLlava", "llava_next": "LlavaNext", "idefics3": "Idefics3", "smolvlm": "SmolVLM",
         "internvl": "InternVL"}
# packages that a processor of transformers 5.23 needs beside pillow
NEEDS = {"internvl": "torchvision", "fuyu": "torchvision", "smolvlm": "torchvision and num2words"}
ADAPTER = '''\
```python
from peft import PeftConfig, PeftModel
from transformers import LlavaForConditionalGeneration

base = PeftConfig.from_pretrained(".").base_model_name_or_path                 # ".": the folder of this card
model = LlavaForConditionalGeneration.from_pretrained(base, torch_dtype="auto")
model = PeftModel.from_pretrained(model, ".")
```'''
NO_BASE = "PEFT needs a LLaVA folder of transformers as the base, which this adapter has not; model/ has it merged"


def escaped(x):
    """Write a value as one line of Markdown. A character that could start markup or a link becomes its HTML code."""
    return re.sub(r"[^\w .,;/%+=-]|(?<=www)\.", lambda m: f"&#{ord(m[0])};", " ".join(str(x).split()), flags=re.I)


def use(cfg):
    """Return the text that shows how to use the model of a folder: example code."""
    family = family_of(cfg)
    if family is None:
        return USE
    if family.model_type == "pumice":
        return ('No class of transformers holds this model; only pumice reads the folder:\n\n```bash\n'
                'python sample.py --model=. --image=image.png --prompt="What is this?"\n```')
    if kind := NAMES.get(family.model_type):
        return USE.replace("LlavaForConditionalGeneration", f"{kind}ForConditionalGeneration")
    lines = USE.replace("LlavaForConditionalGeneration", "AutoModelForImageTextToText").splitlines()
    marker = "<image>" * (family.model_type == "paligemma")   # the other processors put the image in front of the text
    own = {"prompt =": f'prompt = "{marker}What is this?"'}
    if family.model_type == "idefics":                        # its processor takes a list of texts and images
        own = {"prompt =": 'prompt = ["User:", Image.open("image.png"), "What is this?\\nAssistant:"]',
               "inputs =": 'inputs = processor(text=[prompt], return_tensors="pt").to(model.dtype)'}
    if family.model_type in ("blip-2", "instructblip"):       # their class does not read the folder's suppress_tokens
        own |= {"answer =": 'never = model.generation_config.suppress_tokens\nanswer = model.generate(**inputs, '
                            'max_new_tokens=64, suppress_tokens=never)[0, inputs["input_ids"].shape[1]:]'}
    lines = [line for line in lines if not line.startswith("content =")]
    return "\n".join(next((new for start, new in own.items() if line.startswith(start)), line) for line in lines)


def limits(cfg, aspect):
    """List what the model cannot do, in lines of text; the most important line is the first."""
    v, family = cfg.vision, family_of(cfg)
    needs = NEEDS.get(family.model_type if family else "")
    lines = {
        "transformers loads this folder and refuses images: its LLaVA does not drop register tokens.":
            v.num_register_tokens,
        "vLLM and llama.cpp know no LLaVA with a DINOv2 tower.": v.model_type == "dinov2",
        "The connector is one matrix and the identity behind it, which vLLM does not know.":
            cfg.connector == "linear" and is_llava(cfg),
        f"The processor of transformers 5.23 needs {needs}.": needs,
        "Transformers 4.46 and earlier have no image processor that pads.": aspect == "pad",
        f"An image becomes a square of {v.image_size} x {v.image_size} pixels ({aspect}), {cfg.image_tokens} tokens.":
            not cfg.layout,
        f"An image becomes squares of {v.image_size} x {v.image_size} pixels; each is {cfg.image_tokens} tokens.":
            bool(cfg.layout),
        "Answers can be wrong, also about what is not in the image. Biases were not measured.": True}
    return [line for line, applies in lines.items() if applies]


def facts(run):
    """Read the files of a run -> settings, code revision, number of finished steps, last validation loss (or None)"""
    c, steps, loss = {}, 0, None
    try:
        c = read_json(Path(run, "config.json"))
        for line in Path(run, "log.jsonl").read_text("utf-8", "replace").splitlines():
            row = json.loads(line)                  # fails on an incomplete last line; earlier lines are kept
            steps, loss = max(steps, row.get("step", 0)), row.get("val_loss", loss)
    except (Error, OSError, ValueError):
        pass
    return c.get("settings") or {}, (c.get("versions") or {}).get("revision"), steps, loss


def run_name(run):
    """-> name of a run folder; that of its subfolder best/ has both names"""
    run = Path(run).resolve()
    return f"{run.parent.name} {run.name}" if run.name == "best" else run.name


def head(library, title, more, s, base=None):
    """Return two texts: the first lines of a card, and the names of the models that the run started from. A name on the
    Hugging Face hub is shown in full. Of a local path, only the name of the folder or run is shown."""
    given = next((x for x in ([base], [s.get("init")], [s.get("vision"), s.get("llm")]) if any(x)), ["unknown"])
    names, hub = [], ""
    for name in map(str, given):
        if re.fullmatch(r"[\w-]+/[\w.-]+", name) and not Path(name).exists():
            hub += f"- {name}\n"
        else:                                                                 # runs/sft/model is shown as sft
            name = Path(name).parent.name if Path(name).name == "model" else Path(name).name
        names.append(escaped(name))
    hub = f"base_model:\n{hub}" if hub else ""
    lines = f"---\nlibrary_name: {library}\n{more}{hub}tags:\n- llava\n- pumice\n---\n\n# {escaped(title)}\n"
    return lines, " and ".join(names)


def text(run, cfg):
    """Return the text of README.md for the folder model/ of a run. cfg: VLMConfig"""
    s, revision, steps, loss = facts(run)
    rows = {"steps": steps, "validation loss": loss} | {k: s.get(k) for k in SETTINGS}
    rows["data"] = ", ".join(Path(part).name for part in str(rows["data"] or "").split(","))
    table = "\n".join(f"| {k} | {escaped(x)} |" for k, x in rows.items() if x)
    limited = "\n".join(f"- {line}" for line in limits(cfg, s.get("image_aspect")))
    first, names = head("transformers", run_name(run), "pipeline_tag: image-text-to-text\n", s)
    return f"""\
{first}
A vision-language model: a `{cfg.vision.model_type}` tower read at layer {cfg.vision.feature_layer}, a connector
({cfg.connector}) and a `{cfg.text.model_type}` language model. Trained with pumice (revision {escaped(revision)}),
starting from {names}, whose licences hold for these weights too.

{use(cfg)}

| setting | value |
| --- | --- |
{table}

Limits:

{limited}
"""


def pairs(run, cfg):
    """Return the text of README.md for the folder model/ of a run of train_pairs.py. cfg: PairsConfig"""
    s, revision, steps, loss = facts(run)
    rows = {"steps": steps, "validation loss": loss} | {k: s.get(k) for k in SETTINGS}
    rows["data"] = ", ".join(Path(part).name for part in str(rows["data"] or "").split(","))
    table = "\n".join(f"| {k} | {escaped(x)} |" for k, x in rows.items() if x)
    title, v, length = escaped(run_name(run)), cfg.vision, cfg.text.max_position_embeddings
    padding = '"max_length"' if cfg.kind == "siglip" else True
    return f"""\
---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags:
- {cfg.kind}
- pumice
---

# {title}

An image tower and a text tower with the loss of {cfg.kind}. Trained with pumice (revision {escaped(revision)}).

```python
from PIL import Image
from transformers import AutoModel, AutoProcessor

processor, model = AutoProcessor.from_pretrained("."), AutoModel.from_pretrained(".")     # the folder of this card
inputs = processor(images=Image.open("image.png"), text=["a red circle", "a blue star"], return_tensors="pt",
                   padding={padding}, truncation=True, max_length={length})
print(model(**inputs).logits_per_image)
```

| setting | value |
| --- | --- |
{table}

An image becomes a square of {v.image_size} x {v.image_size} pixels. A text has at most {length} tokens.
"""


def blip2_pairs(run, cfg):
    """Return the text of README.md for a Q-Former after its first stage. cfg: parts.blip2.Blip2Config"""
    s, revision, steps, _ = facts(run)
    return f"""\
---
tags:
- blip2
- pumice
---

# {escaped(run_name(run))}

A vision tower and a Q-Former of {cfg.tokens} queries after the first stage of BLIP-2: {steps} steps of
{escaped(s.get("batch_size"))} pairs. Trained with pumice (revision {escaped(revision)}). `train_align.py --vision=` of
pumice starts from this folder, `python -m tools.retrieval --model=` asks it.
"""


def peft_reads(base):
    """Is the base of an adapter a llava-hf model, which PEFT can load? base: a folder or a name on the hub"""
    try:
        c = read_json(find_model(base) / "config.json") if base else {}
    except Error:
        return False
    return c.get("model_type") == "llava" and "mm_vision_tower" not in c      # only LLaVA's own code writes this key


def adapter(run, base):
    """Return the text of README.md for the folder adapter/ of a run. base: the VLM that the run started from; None if
    it started from a ViT and an LLM"""
    s, *_ = facts(run)
    first, names = head("peft", f"{run_name(run)}: adapter", "", s, base)
    bits = "The language model was in four bits (NF4) while it was trained.\n" if s.get("bits") == 4 else ""
    return f"""\
{first}
LoRA of rank {s.get("lora_r")} with alpha {s.get("lora_alpha")}, and the other trained weights, over {names}.
The template is `{s.get("template")}`. {bits}Merged, the model lies in `model/` beside this folder.
`python sample.py --model=` and `eval.py --model=` of pumice take this folder as it is.

{ADAPTER if peft_reads(base) else NO_BASE + "."}
"""
