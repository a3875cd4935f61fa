"""Ask a model about an image.

    python sample.py --model=runs/sft --image=FILE --prompt="What is this?"      # one answer on stdout, nothing else
    python sample.py --model=runs/sft --image=FILE                               # a chat; an empty line ends it

From Python: generate.Chat("runs/sft").ask("FILE", "What is this?")
"""

import dataclasses
import sys

import config
from config import BadSample
from generate import Chat, with_marker


@dataclasses.dataclass
class Settings:
    model: str = "runs/sft"        # a run, its model/ or adapter/, any LLaVA folder or adapter
    image: str = ""                # image file; several, separated by commas; empty: text alone
    prompt: str = ""               # empty: a chat
    template: str = ""             # empty = as the model was trained
    system: str | None = None      # system text; none = as the model was trained
    max_new_tokens: int = 256
    temperature: float = 0.0       # 0 = always the most probable token
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    kernels: str = "auto"          # torch, triton; auto = triton on a GPU


def main(s):
    config.within(s, {"max_new_tokens": (1, None), "temperature": (0, 100), "seed": (0, 2**32)})
    chat = Chat(s.model, s.device, s.dtype, s.template, s.system, s.kernels)
    turns = []
    try:
        pixels = [chat.pixels(file) for file in s.image.split(",") if file]
        while True:
            text = s.prompt or input("you: " if sys.stdin.isatty() else "").strip()
            if not text:
                return
            turns.append((text if turns else with_marker(text, len(pixels)), None))
            prompt = chat.prompt(turns, len(pixels))
            answer = chat.answers([prompt], pixels, s.max_new_tokens, s.temperature, s.seed)[0]
            print(answer, flush=True)
            turns[-1] = (turns[-1][0], answer)
            if s.prompt:
                return
    except BadSample as e:
        config.stop(str(e))
    except (EOFError, KeyboardInterrupt):                # the end of the chat
        return


if __name__ == "__main__":
    with config.one_line_errors():
        main(config.parse(Settings, sys.argv[1:], __doc__))
