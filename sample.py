"""Ask a model about an image.

    python sample.py --model=runs/sft --image=FILE --prompt="What is this?"      # one answer on stdout, nothing else
    python sample.py --model=runs/sft --image=FILE                               # a chat; an empty line ends it

From Python: generate.Chat("runs/sft").ask("FILE", "What is this?")
"""

import dataclasses
import sys

import config
from chat import IMAGE
from config import BadSample, setting
from formats.rows.conversations import at_an_edge
from generate import Chat, with_marker
from run.arguments import parse


@dataclasses.dataclass
class Settings:
    model: str = setting("runs/sft", "a run, its model/ or adapter/, any LLaVA folder or adapter")
    image: str = setting("", "image file; several, separated by commas; empty: text alone")
    prompt: str = setting("", "the question; empty: a chat")
    template: str = setting("", "empty: as the model was trained")
    system: str | None = setting(None, "system text; none: as the model was trained")
    max_new_tokens: int = setting(256, "tokens of an answer, at most", 1)
    temperature: float = setting(0.0, "0 = always the most probable token", 0, 100)
    seed: int = setting(0, "of the random choice of tokens", 0, 2**32)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1")
    dtype: str = setting("auto", "auto, bf16, fp32, fp64; auto: bf16 where the GPU has it, else fp32")
    kernels: str = setting("auto", "auto, torch, triton; auto: Triton on a GPU")


def main(s):
    config.check_ranges(s)
    chat = Chat(s.model, s.device, s.dtype, s.template, s.system, s.kernels)
    turns = []
    try:
        pixels, blocks = chat.look(file for file in s.image.split(",") if file)
        for text in [s.prompt] if s.prompt else iter(lambda: input("you: " * sys.stdin.isatty()).strip(), ""):
            if not blocks and at_an_edge([(text, "")], IMAGE):
                config.stop(f"the prompt has an {IMAGE} marker, but --image= is empty")
            turns.append((text if turns else with_marker(text, len(blocks)), None))
            prompt = chat.prompt(turns, blocks)
            answer = chat.answers([prompt], pixels, s.max_new_tokens, s.temperature, s.seed)[0]
            print(answer, flush=True)
            turns[-1] = (turns[-1][0], answer)
    except BadSample as e:
        config.stop(str(e))
    except (EOFError, KeyboardInterrupt):                # end of input, or Ctrl-C: the chat ends
        return


if __name__ == "__main__":
    with config.one_line_errors():
        main(parse(Settings, sys.argv[1:], __doc__))
