"""VLMEvalKit asks and scores; a pumice model answers, with its own template, images and generation.

    python -m tools.harness_vlmeval --model=runs/sft --run=VLMEvalKit/run.py -- --data MMStar --mode infer

Options behind `--` are run.py's, without its --model. Results have the name of the folder, here pumice-sft.

A message of VLMEvalKit (e8e78f0) is a list of {"type": "text" or "image", "value": text or path}.
"""

import functools
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import config
from chat import IMAGE
from generate import Chat
from run.arguments import parse
from tools.harness import answer_batch

with config.one_line_errors():
    try:
        from vlmeval.vlm.base import BaseModel
    except ImportError as e:
        config.stop(f"tools.harness_vlmeval needs VLMEvalKit ({e}): "
                    "pip install git+https://github.com/open-compass/VLMEvalKit")


@dataclass
class Harness:
    model: str = ""                 # a run, its model/ or adapter/, any LLaVA folder, or org/name of the hub
    run: str = ""                   # run.py of VLMEvalKit
    max_new_tokens: int = 512       # longest answer
    temperature: float = 0.0        # 0 = the most probable token
    template: str = ""              # "" = the template that the model was trained with
    stop: str = ""                  # an answer ends before this text; "" = none


class VLMEvalPumice(BaseModel):
    INTERLEAVE = True               # images stay where the message has them; a single one moves to the front
    allowed_types = ["text", "image"]

    def __init__(self, model, max_new_tokens=512, temperature=0.0, template="", stops=()):
        super().__init__()
        device = "cuda:0" if torch.cuda.is_available() else "cpu"      # run.py shows each process its own GPUs only
        self.chat = Chat(model, device, template=template)
        self.options = max_new_tokens, temperature, stops

    def generate_inner(self, message, dataset=None):
        text = "".join(part["value"] if part["type"] == "text" else f"{IMAGE}\n" for part in message)
        images = [part["value"] for part in message if part["type"] == "image"]
        return answer_batch(self.chat, [(images, text)], *self.options)[0]


def main(argv):
    ours, theirs = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    s = parse(Harness, ours, __doc__)
    if not s.model or not Path(s.run).is_file():
        config.stop(f"--model={s.model} --run={s.run}: a folder, and run.py of VLMEvalKit")
    from vlmeval.config import supported_VLM
    name = f"pumice-{Path(s.model).resolve().name}"
    supported_VLM[name] = functools.partial(VLMEvalPumice, s.model, s.max_new_tokens, s.temperature, s.template,
                                            [s.stop] if s.stop else [])
    sys.argv = [s.run, "--model", name, *theirs]
    runpy.run_path(s.run, run_name="__main__")


if __name__ == "__main__":
    with config.one_line_errors():
        main(sys.argv[1:])
