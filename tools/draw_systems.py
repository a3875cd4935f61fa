"""Draw every system, and write the sections of docs/systems.md about them and the scores in the recipes' docstrings.

    python -m tools.draw_systems     # writes docs/systems/NAME.svg, the second half of docs/systems.md, recipes/NAME.py

The numbers in a picture come from the recipe: sizes from `paper`, who trains from `train`. The attention masks are
computed by the functions that training calls, on a short sequence. The ten lines of code are copied from their files,
and the scores from demo/systems.jsonl.
"""

import ast
import fnmatch
import re
import sys
from html import escape
from pathlib import Path

import torch

import config
from demo import systems
from kernels.cross_entropy import IGNORE
from model import VisionConfig, VLMConfig
from parts import mmca
from parts.cross_attention import last_image
from parts.spans import span_ends
from run.arguments import positional, run_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGE, BEGIN = ROOT / "docs/systems.md", "<!-- The rest of this page is written by `python -m tools.draw_systems`. -->\n"

# the ten lines: file, function or class, or class.function
CODE = {"llava15": ("model.py", "MLPConnector"), "llava": ("model.py", "LinearConnector"),
        "pali3": ("parts/spans.py", "prefix"), "paligemma": ("parts/gemma.py", "Gemma.embed"),
        "internvl15": ("parts/shuffle.py", "pixel_shuffle"), "fuyu": ("parts/patches.py", "Patches.forward"),
        "mm1": ("parts/pool.py", "Abstractor.forward"), "blip2": ("parts/qformer.py", "QFormer.forward"),
        "instructblip": ("parts/instruct.py", "InstructLayer.forward"),
        "qwen_vl": ("parts/resampler.py", "Resampler.forward"),
        "flamingo": ("parts/cross_attention.py", "GatedBlock.forward"),
        "comm": ("parts/two_towers.py", "Levels.forward"), "visualchat": ("parts/mmca.py", "MMCAAttention.forward")}

# a short sequence: b BOS, i image token, r end of a row, w wrapper of an image, q question, a answer
SEQUENCES = {"pali3": "iiiibqqqaaa", "paligemma": "iiiibqqqaaa", "fuyu": "iiriirbqqaaa", "internvl15": "bwiiiiwqqaaa",
             "flamingo": "biqqaaiqqaa", "visualchat": "biiqqaaiiqqaa"}
COLORS = {"i": "#2f7fd1", "z": "#2f7fd1", "q": "#d99a1c", "a": "#2e9e5b"} | dict.fromkeys("brw", "#8a8a8a")
TOWERS = {"clip_vision_model": "CLIP ViT", "siglip_vision_model": "SigLIP ViT", "dinov2": "DINOv2 ViT",
          "internvl_vision": "InternViT", "qwen_vl_vision": "OpenCLIP ViT", "blip_2_vision_model": "EVA ViT"}
CELL = 12


# ---- facts of a recipe ----------------------------------------------------------------------------------------------

def paper_size(name):
    """-> VLMConfig at the size of the paper, [who trains in stage 1, in stage 2] as sets of parts"""
    if name == "llava15":
        vision = VisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                              image_size=336, patch_size=14)
        return VLMConfig(vision), [{"connector"}, {"connector", "llm"}]
    found = [run_recipe(ROOT / f"recipes/{name}.py", {"stage": stage, "toy": False})
             for stage in ("align", "sft")]
    samples = {"tower": "vision_tower.x", "connector": "multi_modal_projector.x", "llm": "language_model.model.x",
               "embeddings": "language_model.model.embed_tokens.x", "gated": "language_model.gated_layers.x"}
    who = [{part for part, weight in samples.items() for item in s["train"].split()
            if fnmatch.fnmatchcase(weight, item.rpartition("=")[0])} for s in found]
    cfg = found[1]["paper"]["model"]
    cfg.layout = cfg.layout or {"kind": "grid"} if '"grid"' in found[0].get("parts", "") else cfg.layout
    return cfg, who


def mask(name, cfg):
    """-> letters of the sequence, letters of the keys, (queries, keys) bool: who attends to whom"""
    letters = SEQUENCES.get(name, "biiiiqqqaaa")
    image = cfg.image_token_index
    ids = torch.tensor([image if c == "i" else 1 for c in letters])
    answer = torch.tensor([c == "a" for c in letters])
    labels = torch.where(answer, 1, IGNORE)[1:].tolist() + [IGNORE]
    pos, lo = torch.arange(len(ids)), torch.zeros(len(ids), dtype=torch.long)
    hi = span_ends(cfg)(ids, torch.tensor(labels), pos, lo)
    seen = (pos >= lo[:, None]) & (pos < hi[:, None])
    keys = letters
    if name == "visualchat":                     # two lists of keys, each with its spans
        marked = ids == image
        s = mmca.spans(marked, marked, lo, hi, None)
        seen = torch.diag(marked)
        for listed, (a, b) in zip(s.keys, s.every.ends):
            n = torch.arange(len(listed))
            part = (n >= a[:, None]) & (n < b[:, None])
            for row, q in enumerate(s.every.at.tolist()):
                seen[q, listed] |= part[row]
    if name == "flamingo":                       # the latents of two images are keys beside the sequence
        first, end = last_image(ids == image, pos, 3)
        n = torch.arange(6)
        seen, keys = torch.cat([(n >= first[:, None]) & (n < end[:, None]), seen], 1), "zzzzzz" + letters
    return letters, keys, seen


# ---- drawing --------------------------------------------------------------------------------------------------------

def label(x, y, s, size=12, weight="normal", anchor="start", fill="#222"):
    return (f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{fill}">'
            f"{escape(s)}</text>")


def box(x, w, title, lines, trains):
    """A part of the model. trains: for each stage, whether the part trains: a filled circle"""
    out = [f'<rect x="{x}" y="46" width="{w}" height="112" rx="6" fill="#f5f5f2" stroke="#666"/>',
           label(x + w / 2, 68, title, 14 if len(title) < 18 else 12, "bold", "middle")]
    out += [label(x + w / 2, 90 + 17 * i, line, 12, anchor="middle") for i, line in enumerate(lines)]
    for i, on in enumerate(trains):
        cx = x + w / 2 + (i - 0.5) * 26
        out += [f'<circle cx="{cx}" cy="172" r="9" fill="{"#c2452d" if on else "#fff"}" stroke="#c2452d"/>',
                label(cx, 176, str(i + 1), 11, anchor="middle", fill="#fff" if on else "#c2452d")]
    return out


def arrow(x, w=24):
    return [f'<path d="M{x} 102 h{w - 6}" stroke="#666" stroke-width="2"/>',
            f'<path d="M{x + w - 8} 97 l8 5 l-8 5 z" fill="#666"/>']


def cell(x, y, color, opacity=1, radius=0):
    return (f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" rx="{radius}" fill="{color}" '
            f'opacity="{opacity}"/>')


def tower_lines(v):
    if v.model_type == "patches":
        return "no vision tower", [f"patch {v.patch_size} x {v.patch_size} px", f"{v.hidden_size} numbers each"]
    layer = v.feature_layer if isinstance(v.feature_layer, tuple) else (v.feature_layer,)
    which = (f"layers {layer[0]} to {layer[-1]}" if len(layer) > 1 else
             f"layer {layer[0]}" if layer[0] != -1 else "last layer")
    return TOWERS[v.model_type], [f"{v.image_size} px, {v.num_hidden_layers} x {v.hidden_size}",
                                  f"{v.patches + (v.class_token and v.keep_class)} features, {which}"]


def draw(name):
    """-> SVG text"""
    cfg, who = paper_size(name)
    letters, keys, seen = mask(name, cfg)
    v, t = cfg.vision, cfg.text
    title, lines = tower_lines(v)
    if cfg.second:
        more = tower_lines(cfg.second)
        title, lines = f"{title} + {more[0]}", [f"each {lines[0]}", lines[1], more[1][1]]
    tokens = cfg.connector_args.get("latents", 64) if t.model_type == "flamingo" else cfg.image_tokens
    kind = cfg.layout.get("kind")
    per = f"{tokens} {'latents' if t.model_type == 'flamingo' else 'token' + 's' * (tokens > 1)} per " + (
        "patch" if kind == "rows" else "tile" if kind else "image")
    decoder = [f"{t.num_hidden_layers} x {t.hidden_size}", f"mask: {cfg.mask}"]
    if t.model_type == "flamingo":
        decoder.append(f"gated block every {t.cross_every}")
    part, note, below = {
        "flamingo": ("gated", "(only the gated blocks)", "; round: the latents of two images"),
        "visualchat": ("embeddings", "(only the embeddings)", "; images and text: two softmaxes, added")}.get(
            name, ("llm", "", ""))
    out = [label(20, 28, systems.SYSTEMS[name], 18, "bold"),
           label(940, 28, "filled circle: trains in this stage; sizes as in the paper", 11, anchor="end", fill="#666"),
           '<rect x="20" y="78" width="48" height="48" fill="#dfe9f5" stroke="#2f7fd1"/>']
    out += [f'<path d="M{20 + 16 * i} 78 v48 M20 {78 + 16 * i} h48" stroke="#2f7fd1"/>' for i in (1, 2)]
    out += [label(44, 142, {"grid": "tiles", "rows": "rows"}.get(kind, "image"), 12, anchor="middle"), *arrow(70)]
    out += [*box(96, 176, title, lines, ["tower" in w for w in who] if v.model_type != "patches" else []), *arrow(274)]
    out += [*box(300, 150, "connector", [cfg.connector, per], ["connector" in w for w in who]), *arrow(452)]
    out += box(478, 150, t.model_type, decoder, [part in w for w in who])
    out += [label(553, 196, note, 11, anchor="middle", fill="#666")]
    x0, y0 = 940 - CELL * len(keys), 56
    out += [cell(x0 + j * CELL, y0 - CELL - 2, COLORS[c], radius=6 * (c == "z")) for j, c in enumerate(keys)]
    for i, c in enumerate(letters):
        out.append(cell(x0 - CELL - 2, y0 + i * CELL, COLORS[c]))
        out += [cell(x0 + j * CELL, y0 + i * CELL, COLORS[k] if seen[i, j] else "#eee", 0.75 if seen[i, j] else 1)
                for j, k in enumerate(keys)]
    foot = y0 + CELL * len(letters) + 16
    for n, (c, word) in enumerate((("i", "image"), ("q", "question"), ("a", "answer"), ("b", "other"))):
        x = 630 + 80 * n
        out += [f'<rect x="{x}" y="{foot - 9}" width="10" height="10" fill="{COLORS[c]}"/>',
                label(x + 14, foot, word, 11)]
    out.append(label(940, foot + 16, f"a row attends to its coloured columns{below}", 11, anchor="end", fill="#666"))
    head = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 250" width="960" height="250" '
            'font-family="Helvetica, Arial, sans-serif"><rect width="960" height="250" fill="#fff"/>')
    return "\n".join([head, *out, "</svg>"]) + "\n"


# ---- the page -------------------------------------------------------------------------------------------------------

def code(file, name):
    """-> the lines of a function or class, without its docstring"""
    lines = (ROOT / file).read_text().splitlines()
    body = ast.parse("\n".join(lines)).body
    for part in name.split("."):
        node = next(n for n in body if getattr(n, "name", "") == part)
        body = node.body
    first, inside = node.lineno - 1, node.body
    doc = inside[0] if ast.get_docstring(node) else None
    kept = [line for n, line in enumerate(lines[first : node.end_lineno], first + 1)
            if not (doc and doc.lineno <= n <= doc.end_lineno)]
    indent = len(kept[0]) - len(kept[0].lstrip())
    return [line[indent:] for line in kept]


def section(name, rows):
    """-> lines of Markdown about one system"""
    file, what = CODE[name]
    recipe = "the defaults" if name == "llava15" else f"`recipes/{name}.py`"
    table = systems.table({name: rows[name]} | {"llava15": rows["llava15"]}) if name in rows else []
    row = [*table[:2], next(line for line in table[2:] if f"| {systems.SYSTEMS[name]} |" in line), ""] if table else []
    return [f"### {systems.SYSTEMS[name]}", "", f"![{systems.SYSTEMS[name]}](systems/{name}.svg)", "", *row,
            f"Recipe: {recipe}. From `{file}`, `{what}`:", "", "```python", *code(file, what), "```", ""]


def score(rows):
    """Rows of one arm -> its scores and the number of seeds, as text"""
    seeing, blind = (systems.spread([r[k] for r in rows]) for k in ("seeing", "blind"))
    return f"{seeing} % seeing, {blind} % blind, {len(rows)} seed{'s' * (len(rows) > 1)}"


def with_score(text, rows, full):
    """Text of a recipe, rows of its system, rows at its own length -> the text with the toy scores above the commands
    of the docstring"""
    lines = [f"\nToy world, {how}: {score(of)} (demo/systems.jsonl)."
             for how, of in (("one epoch per stage", rows), ("this length", full)) if of]
    first, commands, rest = text.partition("\n\n    python train_sft.py ")
    return re.sub(r"\nToy world.*", "", first) + "".join(lines) + commands + rest


def files():
    """-> {path: text} of the page, of all pictures and recipes"""
    rows = systems.by_arm(systems.measured(ROOT / "demo/systems.jsonl"))
    out = {ROOT / f"docs/systems/{name}.svg": draw(name) for name in systems.SYSTEMS}
    for name in list(systems.SYSTEMS)[1:]:                                           # LLaVA-1.5 is the defaults
        recipe = ROOT / f"recipes/{name}.py"
        out[recipe] = with_score(recipe.read_text(), rows.get(name, []), rows.get(f"{name}_full", []))
    lines = [line for name in systems.SYSTEMS for line in section(name, rows)]
    tables = [*systems.table(rows), "", *systems.full_table(rows), "", *systems.findings(rows), ""]
    head = PAGE.read_text().partition(BEGIN)[0]
    page = [head + BEGIN, "## Measured on the toy world", "", *tables, "## One by one", "", *lines]
    return out | {PAGE: "\n".join(page)}


def main(argv):
    if argv:
        config.stop("usage: python -m tools.draw_systems, without settings")
    (ROOT / "docs/systems").mkdir(exist_ok=True)
    for file, content in files().items():
        file.write_text(content)


if __name__ == "__main__":
    with config.one_line_errors():
        main(positional(sys.argv[1:], __doc__))
