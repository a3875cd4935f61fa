"""The model card: README.md in model/, made from the settings of a run and of those it started from, its losses, and
what eval.py scored. It says how to use the folder, what that was tried with, and what it cannot do."""

import json
import os
import re
from pathlib import Path

from formats.hub import find_model
from formats.strict_json import read_json
from formats.whole import MANIFEST, digest, listing

SETTINGS = ("data", "batch_size", "lr", "connector_lr", "lora_r", "lora_alpha", "lora_targets", "bits", "warmup",
            "weight_decay", "grad_clip", "max_len", "template", "system", "image_aspect", "seed")

USE = '''\
```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder = "."                                     # where this card lies
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype="auto")
words = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
prompt = processor.apply_chat_template([{"role": "user", "content": words}], add_generation_prompt=True)
inputs = processor(images=Image.open("picture.png"), text=prompt, return_tensors="pt").to(model.dtype)
said = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(said, skip_special_tokens=True))
```'''

ADAPTER = '''\
```python
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

folder = "."                                     # where this card lies
base = json.load(open(f"{folder}/adapter_config.json"))["base_model_name_or_path"]
model = LlavaForConditionalGeneration.from_pretrained(base, torch_dtype="auto")
model = PeftModel.from_pretrained(model, folder)
```'''


def limits(cfg, aspect):
    """What the folder of a model means to those who read it -> lines, the most important one first"""
    out = []
    if cfg.vision.num_register_tokens:
        out.append("transformers reads this folder and refuses pictures, for its LLaVA does not leave register tokens "
                   "behind: only pumice can show this model pictures.")
    elif cfg.vision.model_type == "dinov2":
        out.append("vLLM and llama.cpp know no LLaVA with a DINOv2 tower.")
    if cfg.vision.model_type == "clip_vision_model":
        out.append("SGLang's source takes CLIP only from folders of the LLaVA repository; it was not run.")
    if cfg.connector == "linear":
        out.append("The connector is one matrix. A LLaVA folder always has two, so the second one is the unit matrix, "
                   "with projector_hidden_act `linear` between them, which transformers knows and vLLM does not.")
    if cfg.text.model_type == "qwen3":
        out.append("Qwen3 came to transformers with version 4.51.")
    if aspect == "pad":
        out.append("Pictures are padded to squares by LlavaImageProcessor. Transformers 4.46 has none: it reads the "
                   "weights and the tokenizer, and refuses pictures.")
    S, Q = cfg.vision.image_size, cfg.vision.patches
    return [*out, f"A picture is seen as one square of {S} x {S} pixels ({aspect}) and read as {Q} tokens.",
            "Folders that pumice writes were read by transformers 4.46, 4.57 and 5.23, and GGUF files made of them by "
            "llama.cpp; for vLLM they are written as its source asks, and it was not run.",
            "What it says can be wrong, also about what is not in the picture. Nobody measured its biases."]


def lineage(run):
    """A run and those it started from, oldest first -> [(name, settings)], what the first one was made of"""
    out, base = [], [str(run)]
    while (file := Path(run, "config.json")).is_file() and len(out) < 9 and "settings" in (c := read_json(file)):
        s = c["settings"]
        out.insert(0, (Path(run), s))
        base = [s["init"]] if s["init"] else [s["vision"], s["llm"]]
        run = Path(s["init"]).parent if Path(s["init"]).name == "model" else s["init"]
        if not run:
            break
    return out, base


def known_as(name):
    """A place on this machine is nobody's business: org/name of the hub, or the last part of a path"""
    if found := re.search(r"models--([\w.-]+?)--([\w.-]+)", str(name)):
        return "/".join(found.groups())
    return name if re.fullmatch(r"[\w-]+/[\w.-]+", name) and not Path(name).exists() else Path(name).name


def files(data):
    """a/b.json:0.7,c.json -> b.json:0.7, c.json"""
    return ", ".join(Path(part).name for part in data.split(","))


def table(head, rows):
    cell = {ord("|"): "\\|", ord("\n"): " "}
    rows = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(c).translate(cell) for c in row)} |" for row in rows)


def log(run):
    """-> steps done, the last validation loss or None, from log.jsonl"""
    file, steps, loss = Path(run, "log.jsonl"), 0, None
    for line in file.read_text("utf-8").splitlines() if file.is_file() else ():
        row = json.loads(line)
        steps, loss = max(steps, row.get("step", 0)), row.get("val_loss", loss)
    return steps, loss


def text(run, cfg):
    """The card of a run. cfg: VLMConfig of its model"""
    runs, base = lineage(run)
    settings, origins = runs[-1][1], [known_as(b) for b in base]
    hub = "\n- ".join(["\nbase_model:", *(o for o in origins if "/" in o)]) if any("/" in o for o in origins) else ""
    limited = "".join(f"- {line}\n" for line in limits(cfg, settings["image_aspect"]))
    revision = read_json(Path(run, "config.json"))["versions"].get("revision") or "not known"
    logs = [log(folder) for folder, _ in runs]
    training = [["steps", *[steps for steps, _ in logs]]]
    training += [[key, *["" if s.get(key) is None else files(s[key]) if key == "data" else s[key] for _, s in runs]]
                 for key in SETTINGS if any(s.get(key) for _, s in runs)]
    training += [["validation loss", *["" if loss is None else f"{loss:.4f}" for _, loss in logs]]]
    file = Path(run, "scores.json")
    scores = [[files(r["data"]), r["task"], r["how"], r["n"], f"{r['accuracy']:.1%}",
               ", ".join(f"{k} {x:.0%}" for k, x in r["types"].items())]
              for r in (read_json(file).values() if file.is_file() else ())]
    return f"""\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- llava
- pumice{hub}
---

# {Path(run).resolve().name}

A vision-language model that answers in words about pictures: a `{cfg.vision.model_type}` tower, read at layer
{cfg.vision.feature_layer}, a connector ({cfg.connector}) and a `{cfg.text.model_type}` language model. Made with pumice
(revision {revision}) from {" and ".join(origins)}.

## Use

{USE}

The chat template writes the prompts of training (template `{settings["template"]}`), BOS included.

## Training

{table(["", *[folder.resolve().name for folder, _ in runs]], training)}

## Scores

{table(["questions", "task", "pictures", "n", "score", "by type"], scores) if scores else "None were measured."}

## Limits

{limited}
## Licence

The weights derive from {" and ".join(origins)} and from the data above, whose licences hold for them too.
"""


NO_BASE = ("PEFT would put it on a LLaVA folder of transformers, and it was trained over something else;\n"
           "the model/ beside it has it merged")


def peft_reads(base):
    """Is the base of an adapter, a folder or a name of the hub, a LLaVA as transformers has them?"""
    c = read_json(find_model(base) / "config.json") if base else {}
    return c.get("model_type") == "llava" and "mm_vision_tower" not in c      # which the LLaVA repository's have


def adapter(run, base):
    """The card of the adapter/ of a run, trained on base: a LLaVA, or None where it was two towers"""
    runs, origins = lineage(run)
    s = runs[-1][1]
    at = Path(base or "")
    known = known_as(str(at.parent if at.name == "model" else at)) if base else " and ".join(map(known_as, origins))
    hub = f"base_model: {known}\n" if base and "/" in known else ""
    four = ("The language model was held in four bits while this was trained (NF4, double quantisation).\n"
            "Over the weights themselves it says almost the same; `model/` is merged with what four bits give back.\n"
            "\n" if s["bits"] == 4 else "")
    return f"""\
---
library_name: peft
{hub}tags:
- llava
- lora
- pumice
---

# {Path(run).resolve().name}: adapter

LoRA of rank {s["lora_r"]} with alpha {s["lora_alpha"]:g} in the language model, and the connector trained along with
it, over {known}; the template is `{s["template"]}`. Whole and merged, the model lies in `model/` beside this folder.

## Use

{ADAPTER if peft_reads(base) else NO_BASE + "."}

{four}`python sample.py --model=` and `eval.py --model=` of pumice take this folder as it is.
"""


def remember(run, name, result, cfg):
    """Keep a score of eval.py in a run, and say it in the card of its model/; a folder that is no run is left alone."""
    run = Path(run)
    card, manifest, file = run / "model" / "README.md", run / "model" / MANIFEST, run / "scores.json"
    if not (card.is_file() and manifest.is_file() and lineage(run)[0]):
        return
    scores = (read_json(file) if file.is_file() else {}) | {name: result}
    replace(file, json.dumps(scores, indent=1))
    replace(card, text(run, cfg))
    replace(manifest, listing(read_json(manifest) | {card.name: digest(card)}))


def replace(path, words):
    """Whole or not at all."""
    tmp = path.with_name(f".tmp-{path.name}")
    tmp.write_text(words, "utf-8")
    os.replace(tmp, path)
