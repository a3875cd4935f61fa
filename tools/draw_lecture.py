"""Draw the pictures of the lecture: docs/lecture/*.svg, explained in docs/teaching.md.

    python -m tools.draw_lecture

    sample    the path of one sample: row, ids and labels, stream, loss. The tokens are those of the toy's tokenizer
    stream    one packed sequence and the spans lo, hi of its tokens, for three masks
    stages    which parts train in which stage, as the scripts choose them

What a picture shows is computed by the functions that training calls. A picture has its own background, and colours for
light and dark pages.
"""

import fnmatch
import sys
from html import escape
from pathlib import Path

import torch

import train_align
import train_dpo
import train_sft
from chat import encode
from config import one_line_errors, stop
from data import pack
from formats.tokenizer import Tokenizer
from kernels.cross_entropy import IGNORE
from model import VLM, TextConfig, VisionConfig, VLMConfig
from parts.spans import SPANS
from run.arguments import positional

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 700
STYLE = """<style>
text { font-family: Helvetica, Arial, sans-serif; font-size: 13px; fill: #1f2328 }
.mono { font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 12px }
.title { font-size: 16px; font-weight: bold } .soft { fill: #59636e } .in { fill: #fff } .end { text-anchor: end }
.mid { text-anchor: middle } .page { fill: #fff } .line { stroke: #59636e; fill: none } .none { fill: #e4e7eb }
.image { fill: #2f74c0 } .text { fill: #a4670a } .answer { fill: #22804a } .other { fill: #6e7781 }
.trains { fill: #b63a22 } .box { fill: #f3f4f6; stroke: #59636e }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .soft { fill: #9aa4ae } .in { fill: #fff }
.page { fill: #15191f } .line { stroke: #9aa4ae } .none { fill: #2b323b } .box { fill: #20262e; stroke: #9aa4ae } }
</style>"""


def words(x, y, s, kind=""):
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" xml:space="preserve">{escape(s)}</text>'


def rect(x, y, w, h, kind, radius=2):
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius}" class="{kind}"/>'


def arrow_down(x, y, h=22):
    return (f'<path d="M{x} {y} v{h}" class="line" stroke-width="2"/>'
            f'<path d="M{x - 5} {y + h - 6} l5 7 l5 -7" class="line" stroke-width="2"/>')


def picture(height, parts):
    """-> SVG text"""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}">\n{STYLE}')
    return "\n".join([head, rect(0, 0, WIDTH, height, "page", 0), *parts, "</svg>"]) + "\n"


# ---- the packed sequence --------------------------------------------------------------------------------------------

# two samples: b BOS, i image token, q question, a answer
SAMPLES = ("biiiqqaa", "bqqaaa")
NAMES = {"b": "other", "i": "image", "q": "text", "a": "answer"}
MASKS = (("causal", "causal (LLaVA)"), ("prefix", "prefix (PaliGemma)"), ("image", "image sees itself"))
IMAGE = 3


def masked_stream():
    """-> the samples as one data.Batch, {mask: hi (N,)}"""
    samples = [([IMAGE if c == "i" else 1 for c in s], [1 if c == "a" else IGNORE for c in s], []) for s in SAMPLES]
    b = pack(samples, 1)
    return b, {name: SPANS[name](b.ids, b.labels, b.pos, b.lo.long(), IMAGE) for name, _ in MASKS}


def draw_stream():
    letters, (b, ends) = "".join(SAMPLES), masked_stream()
    N, cell, x0 = len(letters), 40, 122
    out = [words(16, 28, "One packed sequence, its spans, and three masks", "title")]
    rows = [("token", [*letters]), ("index n", range(N)), ("position", b.pos.tolist()), ("lo", b.lo.tolist())]
    rows += [(f"hi, {name}", ends[name].tolist()) for name, _ in MASKS]
    for r, (name, values) in enumerate(rows):
        y = 62 + 26 * r
        out.append(words(16, y, name, "soft" if r in (1, 2) else ""))
        for n, value in enumerate(values):
            x = x0 + cell * n + (6 if n >= len(SAMPLES[0]) else 0)
            if r == 0:
                out += [rect(x, y - 17, cell - 3, 24, NAMES[letters[n]]), words(x + 18, y, value, "in mid")]
            else:
                out.append(words(x + 18, y, str(value), "mid soft" if r in (1, 2) else "mid"))
    size, top = 14, 290
    for m, (name, title) in enumerate(MASKS):
        left = 22 + 228 * m
        out.append(words(left, top - 24, title))
        seen = (torch.arange(N) >= b.lo[:, None]) & (torch.arange(N) < ends[name][:, None])
        for n in range(N):
            out += [rect(left + size * n, top - 14, size - 2, 10, NAMES[letters[n]]),
                    rect(left - 14, top + size * n, 10, size - 2, NAMES[letters[n]])]
            out += [rect(left + size * n, top + size * k, size - 2, size - 2,
                         NAMES[letters[n]] if seen[k, n] else "none") for k in range(N)]
    y = top + size * N + 24
    for n, (letter, name) in enumerate((("b", "BOS"), ("i", "image"), ("q", "question"), ("a", "answer"))):
        out += [rect(16 + 110 * n, y - 12, 14, 14, NAMES[letter]), words(36 + 110 * n, y, f"{letter}  {name}")]
    out += [words(16, y + 28, "Row n of a mask: token n attends to the coloured columns lo[n] ... hi[n] - 1."),
            words(16, y + 48, "No token attends to another sample, so packing changes no result.")]
    return picture(y + 64, out)


# ---- the path of one sample -----------------------------------------------------------------------------------------

QUESTION, ANSWER = "What color is the star?", "red"


def one_sample():
    """-> tokenizer, ids, labels of one sample of the toy world, with 3 placeholders in place of 36"""
    tok = Tokenizer(ROOT / "demo/llm")
    return tok, *encode(tok, "vicuna_v1", [(f"<image>\n{QUESTION}", ANSWER)], [[tok.image] * 3], "")


def token_name(tok, i):
    """-> text of a token; a dot stands for a space"""
    special = {n: t for t, n in tok.specials.items()}
    return "img" if i == tok.image else special.get(i) or tok.full.decode([i]).replace("\n", "\\n").replace(" ", "·")


def draw_sample():
    tok, ids, labels = one_sample()
    stream = pack([(ids, labels, [])], 1).labels.tolist()
    row = ['{"image": "star.png", "conversations": [',
           f'   {{"from": "human", "value": "<image>\\n{QUESTION}"}},', f'   {{"from": "gpt", "value": "{ANSWER}"}}]}}']
    out = [words(16, 28, "The path of one sample: row, ids and labels, stream, loss", "title")]
    out += [words(16, 58, "1  A row of the data file (formats/rows)"), rect(16, 68, 668, 62, "box")]
    out += [words(26, 87 + 18 * n, line, "mono") for n, line in enumerate(row)]
    out += [arrow_down(350, 134), words(16, 184, "2  Ids and labels, built together (chat.py). Green: supervised")]
    left, y = 16.0, 196
    names = [token_name(tok, i) for i in ids]
    widths = [max(24, 7.4 * len(name) + 8) for name in names]
    scale = min(1.0, 668 / sum(w + 3 for w in widths))
    kinds = ["image" if i == tok.image else "answer" if y != IGNORE else "other" if i in tok.specials.values()
             else "text" for i, y in zip(ids, labels)]
    places = []
    for name, w, kind in zip(names, widths, kinds):
        places.append((left, w * scale))
        out += [rect(left, y, w * scale, 26, kind), words(left + w * scale / 2, y + 17, name, "mono in mid")]
        left += (w + 3) * scale
    out += [words(16, 242, "An image is 3 placeholders here, and 36 in the toy world. A dot is a space. "
                           "<s> is BOS, </s> is EOS.", "soft"), arrow_down(350, 252),
            words(16, 302, "3  In the stream, position n has the label of token n + 1 (data.py, pack)")]
    for (x, w), kind, name in zip(places, kinds, names):
        out += [rect(x, 314, w, 26, kind), words(x + w / 2, 331, name, "mono in mid")]
    predicted = [(x, w, token_name(tok, label)) for (x, w), label in zip(places, stream) if label != IGNORE]
    for x, w, name in predicted:
        wide = max(w, 7.4 * len(name) + 8)
        out += [rect(x + w - wide, 354, wide, 26, "answer"), words(x + w - wide / 2, 371, name, "mono in mid"),
                f'<path d="M{x + w / 2:g} 342 v10" class="line" stroke-width="2"/>']
    out.append(words(predicted[0][0] - 24, 371, "must predict", "end"))
    out += [arrow_down(350, 392),
            words(16, 442, "4  The loss (loss.py, kernels/cross_entropy.py): a sum, and one division"),
            rect(16, 454, 668, 66, "box"),
            words(26, 477, "sum over the supervised tokens:  " + " ".join(f"- log p({t})" for *_, t in predicted),
                  "mono"),
            words(26, 502, f"divided by their number n in the whole step: {len(predicted)} here + those of all other "
                           "samples", "mono"),
            words(16, 546, "Rows without a label take part in attention. They reach neither the head nor the loss.")]
    return picture(562, out)


# ---- who trains in which stage --------------------------------------------------------------------------------------

PARTS = {"vision tower": "vision_tower.", "connector": "multi_modal_projector.", "language model": "language_model."}


def tiny_model():
    v = VisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=8,
                     patch_size=4)
    t = TextConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                   num_key_value_heads=1, head_dim=8)
    return VLM(VLMConfig(v, t, image_token_index=3))


def stage_rows():
    """-> [(title, command, {part: "trains", "adapters" or "frozen"})], from the tables {name glob: learning rate}"""
    sft, dpo = train_sft.Settings, train_dpo.Settings
    out = []
    for title, command, chosen in (
            ("Stage 1: alignment", "train_align.py", lambda m: {"multi_modal_projector.*": train_align.Settings.lr}),
            ("Stage 2: instructions", "train_sft.py", lambda m: train_sft.who_trains(sft(), m)),
            ("Stage 2, and the tower", "train_sft.py --vision_lr=2e-6",
             lambda m: train_sft.who_trains(sft(vision_lr=2e-6), m)),
            ("Stage 2 with LoRA", "train_sft.py --lora_r=32", lambda m: train_sft.who_trains(sft(lora_r=32), m)),
            ("Preferences, rewards", "train_dpo.py, train_grpo.py", lambda m: train_dpo.who_prefers(dpo(), m))):
        model = tiny_model()
        table = chosen(model)
        who = {}
        for part, prefix in PARTS.items():
            names = [n for n, _ in model.named_parameters() if n.startswith(prefix)]
            on = [n for n in names if any(fnmatch.fnmatchcase(n, glob) and lr for glob, lr in table.items())]
            who[part] = "frozen" if not on else "adapters" if all(".lora_" in n for n in on) else "trains"
        out.append((title, command, who))
    return out


def draw_stages():
    out = [words(16, 28, "Which parts train in which stage", "title")]
    x0, width = 232, 152
    out += [words(x0 + width * n + 71, 62, part, "mid") for n, part in enumerate(PARTS)]
    for r, (title, command, who) in enumerate(stage_rows()):
        y = 76 + 58 * r
        out += [words(16, y + 20, title), words(16, y + 38, command, "soft mono")]
        for n, state in enumerate(who.values()):
            x = x0 + width * n
            out += [rect(x, y, 142, 46, "trains" if state == "trains" else "box", 5),
                    words(x + 71, y + 28, state, "mid in" if state == "trains" else "mid soft")]
            if state == "adapters":
                out += [rect(x + 8, y + 8, 14, 30, "trains"), rect(x + 120, y + 8, 14, 30, "trains")]
    y = 76 + 58 * len(stage_rows()) + 22
    out += [words(16, y, "Frozen weights get no gradient. Adapters (LoRA): small matrices beside frozen weights."),
            words(16, y + 20, "--train='GLOB=LEARNING_RATE ...' changes who trains. After the first step, the script "
                               "checks it.")]
    return picture(y + 36, out)


def lecture_pictures():
    """-> {path: text} of all pictures"""
    return {ROOT / f"docs/lecture/{name}.svg": draw() for name, draw in
            (("sample", draw_sample), ("stream", draw_stream), ("stages", draw_stages))}


def main(argv):
    if argv:
        stop("usage: python -m tools.draw_lecture, without settings")
    (ROOT / "docs/lecture").mkdir(exist_ok=True)
    for file, content in lecture_pictures().items():
        file.write_text(content)


if __name__ == "__main__":
    with one_line_errors():
        main(positional(sys.argv[1:], __doc__))
