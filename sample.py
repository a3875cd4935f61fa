"""Ask a model about a picture.

    python sample.py --model=runs/sft --image=FILE --prompt="What is this?"      # one answer on stdout, nothing else
    python sample.py --model=runs/sft --image=FILE                               # a chat; an empty line ends it
"""

import dataclasses
import sys

import config
import generate
from config import BadSample


@dataclasses.dataclass
class Settings:
    model: str = "runs/sft"        # a run, its model/ or adapter/, any LLaVA folder or adapter
    image: str = ""                # picture file; several, separated by commas; none: text alone
    prompt: str = ""               # without one: a chat
    template: str = ""             # empty = what the model was trained with
    system: str | None = None      # system text; none = what the model was trained with
    max_new_tokens: int = 256
    temperature: float = 0.0       # 0 = the likeliest token, always
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    kernels: str = "auto"          # torch, triton; auto = triton on a GPU


def main(s):
    config.within(s, {"max_new_tokens": (1, None), "temperature": (0, 100), "seed": (0, 2**32)})
    speaker = generate.load(s.model, s.device, s.dtype, s.template, s.system, s.kernels)
    turns = []
    try:
        pictures = [speaker.picture(file) for file in s.image.split(",") if file]
        while True:
            text = s.prompt or input("you: " if sys.stdin.isatty() else "").strip()
            if not text:
                return
            turns.append((text if turns else generate.with_marker(text, len(pictures)), None))
            prompt = speaker.prompt(turns, len(pictures))
            said = speaker.say([prompt], pictures, s.max_new_tokens, s.temperature, s.seed)[0]
            print(said, flush=True)
            turns[-1] = (turns[-1][0], said)
            if s.prompt:
                return
    except BadSample as e:
        config.stop(str(e))
    except (EOFError, KeyboardInterrupt):                # the end of the chat
        return


if __name__ == "__main__":
    with config.one_line_errors():
        main(config.parse(Settings, sys.argv[1:], __doc__))
