"""Look at one answer: a page with the probability of each token, and a heat map of attention over the image.

    python -m tools.look --model=runs/sft --image=FILE --prompt="What is this?"      # writes runs/sft/look.html
    python -m tools.look --model=runs/sft --pointing                                 # toy world: is the map right?

The page is one file. It holds its image and script, opens without a network, and can be read on a phone. It shows the
prompt as the model sees it; tokens of the answer, shaded where they were improbable; for one of them the five most
probable tokens and the map, for each decoder layer. tools/attention.py says what exactly a map is.

    R tokens of the answer   L decoder layers   I images   n side of an image's grid of tokens
"""

import base64
import dataclasses
import io
import itertools
import json
import sys
from pathlib import Path

import torch
from PIL import Image

import config
from chat import printable
from config import BadSample, setting, stop
from formats.image_files import image_folder
from formats.whole import write_file
from generate import Chat, with_marker
from run.arguments import parse
from tools.attention import grid_side, image_maps, read_again, why_no_map
from tools.pointing import pointing, table_lines

PAGE = Path(__file__).parent / "page"
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
          "base-uri 'none'; form-action 'none'")               # what the browser may load: nothing from elsewhere


@dataclasses.dataclass
class Settings:
    model: str = setting("runs/sft", "a run, its model/ or adapter/, any LLaVA folder or adapter")
    image: str = setting("", "image file; several, separated by commas; empty: text alone")
    prompt: str = setting("", "the question")
    out: str = setting("", "page to write; empty: look.html in the run")
    layer: int = setting(0, "decoder layer that the page shows first, from 1; 0 = the last", 0)
    neutral: str = setting("", "text of the neutral question, by whose attention the map is divided")
    pointing: bool = setting(False, "measure on the toy world how often the map's largest cell is the asked one")
    data: str = setting("", "for pointing: the toy world's questions; empty: runs/toy, drawn if missing")
    template: str = setting("", "empty: as the model was trained")
    system: str | None = setting(None, "system text; none: as the model was trained")
    max_new_tokens: int = setting(256, "tokens of the answer, at most", 1)
    temperature: float = setting(0.0, "0 = always the most probable token", 0, 100)
    seed: int = setting(0, "of the random choice of tokens", 0, 2**32)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1")
    dtype: str = setting("fp32", "auto, bf16, fp32, fp64")
    kernels: str = setting("auto", "auto, torch, triton; auto: Triton on a GPU")


# ---- texts ----------------------------------------------------------------------------------------------------------

def prompt_parts(tok, ids, image_id):
    """ids (N,) of a prompt -> [(kind, text)]. kind: control, image (adjacent placeholders are folded) or text"""
    names = {i: name for name, i in tok.specials.items()}

    def kind(i):
        return "image" if i == image_id or i >> 24 else "control" if i in names else "text"     # >> 24: parts/tiles.py

    out = []
    for group, run in itertools.groupby(ids, kind):
        run = list(run)
        out.append((group, f"{len(run)} x image" if group == "image" else
                    "".join(names[i] for i in run) if group == "control" else printable(tok.full.decode(run))))
    return out


def piece_text(tok, before, i):
    """The text that token i adds after the ids `before`; a token without text of its own: its name"""
    names, before = {j: name for name, j in tok.specials.items()}, before[-8:]
    head, whole = (tok.decode(ids) for ids in (before, [*before, i]))
    return names.get(i) or printable(whole[len(head):]) or str(tok.full.id_to_token(i))


def png(pixels):
    """(3, S, S) uint8 -> data URL"""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# ---- the record of an answer ----------------------------------------------------------------------------------------

def as_bytes(maps):
    """maps (L, R, I, n, n) -> the largest value of each (layer, token); all values as bytes, 255 is the largest"""
    peak = maps.amax((2, 3, 4))                                                              # (L, R)
    values = (255 * maps / peak[:, :, None, None, None].clamp(min=1e-30)).round().to(torch.uint8)
    return {"peak": peak.tolist(), "values": base64.b64encode(values.numpy().tobytes()).decode()}


def record(chat, prompt, answer, tiles, blocks, neutral=""):
    """A Chat, ids of a prompt and of its answer with the stop token, if there is one; tiles and blocks from chat.look
    -> dict that json can write, as tools/page/look.js reads it"""
    v, layers, maps = chat.cfg.vision, len(chat.model.language_model.model.layers), {}
    reason = why_no_map(chat.cfg) if blocks else "no heat map: no image"
    if not reason:
        p, ratio, a = image_maps(chat, prompt, answer, tiles, blocks, neutral, range(layers))
        maps = {"relative": as_bytes(ratio), "raw": as_bytes(a)}
    elif answer:
        p, _ = read_again(chat, prompt, answer, tiles)
    tokens = []
    for t, i in enumerate(answer):
        best = [(int(j), float(p[t, j])) for j in p[t].topk(min(5, p.shape[1])).indices]
        tokens.append({
            "text": piece_text(chat.tok, answer[:t], i), "p": float(p[t, i]), "end": i in chat.stop_ids,
            "top": [(piece_text(chat.tok, answer[:t], j), share, j == i) for j, share in best if share]})
    return {"prompt": prompt_parts(chat.tok, prompt.tolist(), chat.cfg.image_token_index), "tokens": tokens,
            "layers": layers, "side": grid_side(chat.cfg),
            "covered": v.image_size // v.patch_size * v.patch_size / v.image_size,       # the rest: no whole patch
            "images": [png(tile) for tile in torch.cat(tiles)] if tiles else [], "no_map": reason, **maps}


def ask_and_record(chat, images, text, max_new_tokens=256, temperature=0.0, seed=0, neutral=""):
    """As chat.ask -> the answer, its record"""
    tiles, blocks = chat.look(images)
    prompt, steps = chat.prompt([(with_marker(text, len(blocks)), None)], blocks), []
    answer, = chat.answers([prompt], tiles, max_new_tokens, temperature, seed, each=steps.append)
    return answer, record(chat, prompt, steps[-1][0], tiles, blocks, neutral)


# ---- the page -------------------------------------------------------------------------------------------------------

def safe_json(thing):
    """-> JSON that may stand inside a script element of a page: "<" is escaped, and lone surrogates"""
    return json.dumps(thing).replace("<", "\\u003c")


def look_page(record, question, model, layer):
    """-> the html of a page"""
    style, script = ((PAGE / name).read_text("utf-8") for name in ("look.css", "look.js"))
    data = safe_json({"record": record, "question": question, "model": str(model), "layer": layer})
    return f"""<!doctype html><html lang=en><meta charset=utf-8><title>pumice: one answer</title>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="{POLICY}">
<style>{style}</style>
<main><div class=card id=left></div><div class="card panel" id=panel></div></main>
<script type=application/json id=data>{data}</script>
<script>{script}
const data = JSON.parse(document.getElementById("data").textContent);
const panel = new Panel(document.getElementById("panel"), data.layer), view = answerView(data.record, panel);
document.getElementById("left").append(el("h2", {{}}, "question"), el("div", {{class: "text"}}, data.question),
  el("h2", {{}}, "answer"), view, el("p", {{class: "quiet note"}}, SHADES), promptView(data.record),
  el("p", {{class: "quiet note"}}, data.model));
if (view.firstChild) view.firstChild.click();
</script></html>
"""


def main(s):
    config.check_ranges(s)
    if not s.pointing and not s.prompt:
        stop("--prompt=TEXT is the question; or --pointing")
    chat = Chat(s.model, s.device, s.dtype, s.template, s.system, s.kernels)
    if s.pointing:
        print_pointing(s, chat)
        return
    layers = len(chat.model.language_model.model.layers)
    if s.layer > layers:
        stop(f"layer={s.layer}: this decoder has {layers}")
    try:
        answer, found = ask_and_record(chat, [file for file in s.image.split(",") if file], s.prompt,
                                       s.max_new_tokens, s.temperature, s.seed, s.neutral)
    except BadSample as e:
        stop(str(e))
    run = Path(s.model)
    out = Path(s.out or (run.parent if run.name in ("model", "adapter") else run) / "look.html")
    try:
        write_file(out, look_page(found, s.prompt, s.model, s.layer))
    except OSError as e:
        stop(f"{out} could not be written: {e.strerror}; --out=FILE says where the page may go")
    print(answer)
    print(f"the page: {out}" + (f"; {found['no_map']}" if found["no_map"] else ""), file=sys.stderr)


def print_pointing(s, chat):
    from demo import toy
    if not s.data:
        try:
            toy.write_world("runs/toy", "test")
        except OSError as e:
            stop(f"the toy world cannot be drawn in runs/toy: {e.strerror or e}")
    data = Path(s.data or "runs/toy/questions.jsonl")
    image_folder(data.parent / "images")
    try:
        rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as e:
        stop(f"{data} cannot be read: {e}")
    result = pointing(chat, rows, data.parent / "images", s.neutral)
    print(*table_lines(result), json.dumps({"model": s.model, **result}), sep="\n")


if __name__ == "__main__":
    with config.one_line_errors():
        main(parse(Settings, sys.argv[1:], __doc__))
