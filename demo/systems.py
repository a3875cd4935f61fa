"""All systems on the toy world with equal data and equal steps: one pass over captions, one over conversations.

    python -m demo.systems                                  # run what demo/systems.jsonl lacks (hours), and print
    python -m demo.systems --only=llava15,fuyu --seeds=1    # some of it
    python -m demo.systems --show                           # print the tables alone

A row of demo/systems.jsonl is one run of one arm with one seed: both stages, held-out questions, and the same questions
with image features set to zero (blind). An arm is a system, or a system with one change. FINDINGS compares arms: each
is a claim of a paper, and the measurement that can refute it here. A difference counts if it is larger than twice the
pooled standard deviation over the seeds.
"""

import dataclasses
import datetime
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev, variance

import config
from config import setting
from demo import toy
from demo.variants import write_variants
from generate import Chat
from run.arguments import parse

SYSTEMS = {"llava15": "LLaVA-1.5", "llava": "LLaVA v1", "pali3": "PaLI-3, an analogue", "paligemma": "PaliGemma",
           "internvl15": "InternVL 1.5", "fuyu": "Fuyu", "mm1": "MM1", "blip2": "BLIP-2",
           "instructblip": "InstructBLIP", "qwen_vl": "Qwen-VL", "flamingo": "Flamingo", "comm": "COMM",
           "visualchat": "DeepSpeed-VisualChat"}


@dataclasses.dataclass
class Settings:
    only: str = setting("", "arms to run, separated by commas; empty: all")
    seeds: int = setting(3, "seeds 0, 1, ...", 1)
    rows: str = setting("demo/systems.jsonl", "measured runs; new ones are appended")
    out: str = setting("runs/systems", "folder of the runs")
    show: bool = setting(False, "print the tables and run nothing")


ONE = ["--data=toy", "--epochs=1", "--eval_every=0", "--sample_every=0", "--save_every=0"]

IMAGES, LARGE = ["--system=", "--images=runs/toy/images"], ["--system=", "--images=runs/toy/large"]   # with a data file
CONNECTOR = "--train=multi_modal_projector.*=3e-3"                           # stage 2 with a frozen language model
QFORMER = CONNECTOR + " multi_modal_projector.layers.*.attention.*=3e-4"
# towers that train_pairs.py trains when an arm first needs them: CLIP's, and that of BLIP-2's first stage
PAIRS = {"--vision=runs/pairs/model": ["--out=runs/pairs"],
         "--vision=runs/blip2_pairs/model": ["recipes/blip2.py", "--out=runs/blip2_pairs"]}
CLIP, STAGE_A = PAIRS


def mm1(connector, tokens, *more):
    return f"--parts=vision.feature_layer=-1 connector={connector} tokens={tokens} {' '.join(more)}"


# arm: (system, changed settings of stage 1, changed settings of stage 2, settings of eval.py)
ARMS = {name: (name, [], [], []) for name in SYSTEMS}
# a recipe's own length; Fuyu learns to see from these samples alone
ARMS |= {f"{name}_full": (name, ["--epochs=3"], ["--epochs=2"], []) for name in SYSTEMS}
ARMS |= {
    "fuyu_full": ("fuyu", ["--epochs=6"], ["--epochs=8"], []),
    **{f"mlp_lr{lr}": ("llava15", [f"--lr={lr}e-3"], [], []) for lr in (2, 10)},
    **{f"linear_lr{lr}": ("llava15", ["--connector=linear", f"--lr={lr}e-3"], [], []) for lr in (2, 5, 10)},
    "mm1_abstractor4": ("mm1", [mm1("abstractor", 4, "connector_args.width=64")], [], []),
    "mm1_abstractor36": ("mm1", [mm1("abstractor", 36, "connector_args.width=64")], [], []),
    "mm1_pool9": ("mm1", [mm1("pool", 9)], [], []), "mm1_pool36": ("mm1", [mm1("pool", 36)], [], []),
    "mm1_resampler9": ("mm1", [mm1("resampler", 9, "connector_args.heads=4")], [], []),
    "pali3_causal": ("pali3", ["--parts=vision.feature_layer=-1 vision.feature_norm=true"], [], []),
    "llava15_frozen_llm": ("llava15", [], [CONNECTOR], []),
    "llava15_trained_vit": ("llava15", [], ["--vision_lr=3e-4"], []),
    "visualchat_frozen": ("visualchat", [], [CONNECTOR + " language_model.model.embed_tokens.*=1e-3"], []),
    "visualchat_frozen_causal": (
        "visualchat", ["--parts=connector=linear_norm tokens=37 vision.feature_layer=-1 vision.keep_class=true"],
        [CONNECTOR + " language_model.model.embed_tokens.*=1e-3"], []),
    "flamingo_no_gate": (
        "flamingo", ["--parts=text.model_type=flamingo text.cross_width=128 text.gate_width=0 connector=perceiver "
                     "tokens=1 connector_args.latents=16 connector_args.depth=2 connector_args.heads=4 "
                     "connector_args.head_dim=32 vision.keep_class=true",
                     "--train=multi_modal_projector.*=2e-3 language_model.gated_layers.*=2e-3"], [], []),
    "clip_one_level": ("llava15", [CLIP], [], []),
    "clip_four_levels": ("llava15", [CLIP, "--parts=connector=norm_mlp vision.feature_layer=[1,2,3,4]"], [], []),
    "clip_second_tower": ("comm", [CLIP], [], []),
    "blip2_stage_a_frozen": ("blip2", [STAGE_A], [QFORMER], []), "blip2_stage_a": ("blip2", [STAGE_A], [], []),
    "blip2_frozen": ("blip2", [], [QFORMER], []), "instructblip_frozen": ("instructblip", [], [QFORMER], []),
    "llava15_no_replay": ("llava15", [], ["--data=runs/toy/sft_images.json", *IMAGES],
                          ["--data=runs/toy/text_questions.jsonl"]),
    "llava15_replay": ("llava15", [], ["--data=runs/toy/sft.json", *IMAGES], ["--data=runs/toy/text_questions.jsonl"])}
ARMS |= {f"internvl15_{n}_tiles": (
    "internvl15", [f'--parts=connector=shuffle tokens=9 vision.feature_layer=-1 layout={{"kind":"grid","most":{n}}}',
                   "--data=runs/toy/align.json", *LARGE], ["--data=runs/toy/sft.json", *LARGE],
    ["--data=runs/toy/questions.jsonl", "--images=runs/toy/large"]) for n in (1, 4)}

MLP, LINEAR = "llava15|mlp_lr2|mlp_lr10", "linear_lr2|linear_lr5|linear_lr10"

# (claim, paper), arm that should win, arm that should lose (or the best of several), questions compared; expected: ">",
# or "=" where no difference is expected
FINDINGS = [
    ("an MLP is no better than one layer, each at its best learning rate (MM1)", MLP, LINEAR, "all", "="),
    ("36 tokens are better than 9, C-Abstractor (MM1)", "mm1_abstractor36", "mm1", "all", ">"),
    ("9 tokens are better than 4, C-Abstractor (MM1)", "mm1", "mm1_abstractor4", "all", ">"),
    ("36 tokens are better than 9, averages (MM1)", "mm1_pool36", "mm1_pool9", "all", ">"),
    ("with 9 tokens, C-Abstractor and averages are equal (MM1)", "mm1", "mm1_pool9", "all", "="),
    ("with 9 tokens, C-Abstractor and resampler are equal (MM1)", "mm1", "mm1_resampler9", "all", "="),
    ("a prefix that sees itself is better than causal attention (PaliGemma)", "pali3", "pali3_causal", "all", ">"),
    ("a frozen language model is worse (PaliGemma)", "llava15", "llava15_frozen_llm", "all", ">"),
    ("a frozen vision tower is not worse (PaliGemma)", "llava15", "llava15_trained_vit", "all", "="),
    ("with a frozen language model, MMCA is better than causal attention (VisualChat)", "visualchat_frozen",
     "visualchat_frozen_causal", "all", ">"),
    ("features of four layers are better than of one, places, tower of train_pairs.py (COMM)", "clip_four_levels",
     "clip_one_level", "place", ">"),
    ("a second tower is better than none, places, tower of train_pairs.py (COMM)", "clip_second_tower",
     "clip_four_levels", "place", ">"),
    ("before a frozen language model, the first stage of the Q-Former is better than none (BLIP-2)",
     "blip2_stage_a_frozen", "blip2_frozen", "all", ">"),
    ("gates are better than none (Flamingo)", "flamingo", "flamingo_no_gate", "all", ">"),
    ("with a frozen language model, queries that read the question are better (InstructBLIP)", "instructblip_frozen",
     "blip2_frozen", "all", ">"),
    ("tiles are better for small digits (InternVL 1.5)", "internvl15_4_tiles", "internvl15_1_tiles", "read", ">"),
    ("tiles change nothing for places (InternVL 1.5)", "internvl15_4_tiles", "internvl15_1_tiles", "place", "="),
    ("a vision tower is better than raw patches (Fuyu), equal steps", "llava15", "fuyu", "all", ">"),
    ("a vision tower is better than raw patches (Fuyu), each recipe's own length", "llava15_full", "fuyu_full", "all",
     ">"),
    ("text samples keep the language model's reading of text (MM1)", "llava15_replay", "llava15_no_replay", "all", ">")]


def command(*args):
    """Run a script of the repository -> its output as lines, CPU seconds of user and system together"""
    def used():
        u = resource.getrusage(resource.RUSAGE_CHILDREN)
        return u.ru_utime + u.ru_stime

    before = used()
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True)
    if done.returncode:
        config.stop(f"{' '.join(args)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout.splitlines(), used() - before


def plan_numbers(lines):
    """Read the plan that a training script prints -> trained parameters, steps"""
    together = next(line.split() for line in lines if line.startswith("  together"))
    steps = next(line.split()[0] for line in lines if " steps of " in line)
    return int(together[1].replace(",", "")), int(steps)


def measure(s, arm, seed):
    """Run both stages of an arm, and its questions -> row for demo/systems.jsonl"""
    system, first, second, asked = ARMS[arm]
    recipe = [] if system == "llava15" else [f"recipes/{system}.py"]
    align, sft = (f"{s.out}/{arm}_{seed}/{stage}" for stage in ("align", "sft"))
    common = [*ONE, f"--seed={seed}"]
    for tower, how in PAIRS.items():
        if tower in first and not Path(tower.partition("=")[2]).exists():
            command("train_pairs.py", *how, "--data=toy")
    lines1, cpu1 = command("train_align.py", *recipe, *common, f"--out={align}", *first)
    lines2, cpu2 = command("train_sft.py", *recipe, *common, f"--init={align}", f"--out={sft}", *second)
    (trained1, steps1), (trained2, steps2) = plan_numbers(lines1), plan_numbers(lines2)
    seeing, blind = (json.loads(command("eval.py", f"--model={sft}", *asked, *how)[0][-1])
                     for how in ([], ["--blind"]))
    tokens = tokens_per_image(sft)
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    shutil.rmtree(f"{s.out}/{arm}_{seed}")
    return {"arm": arm, "seed": seed, "seeing": seeing["accuracy"], "blind": blind["accuracy"],
            "types": seeing["types"], "n": seeing["n"], "tokens": tokens, "trained": [trained1, trained2],
            "steps": [steps1, steps2], "cpu_s": round(cpu1 + cpu2),
            "date": datetime.date.today().isoformat(), "revision": revision}


def tokens_per_image(model):
    """A run of the toy world -> tokens of one image in the packed sequence, row ends included. Flamingo has one marker
    there, and its latents are keys beside the sequence: they are what counts."""
    chat = Chat(model)
    (block,) = chat.look(["runs/toy/images/test_00000.png"])[1]
    return chat.model.cfg.connector_args.get("latents", len(block))


# ---- tables ---------------------------------------------------------------------------------------------------------

def measured(file):
    """-> rows of demo/systems.jsonl. The file is read before each run: several processes may divide the arms."""
    return [json.loads(line) for line in Path(file).read_text().splitlines()] if Path(file).exists() else []


def by_arm(rows):
    """-> {arm: its rows}"""
    out = {}
    for row in rows:
        out.setdefault(row["arm"], []).append(row)
    return out


def spread(values):
    """-> mean and standard deviation as text, in percent; the deviation only of two or more values"""
    return f"{100 * fmean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def percent(rows, what):
    """-> scores of these rows in percent: of all questions, or of the type `what`"""
    return [100 * (r["seeing"] if what == "all" else r["types"][what]) for r in rows]


def findings(rows):
    """{arm: its rows} -> lines of a Markdown table, one line per finding whose arms were all measured"""
    out = ["| finding | first | second | difference | twice the deviation | expected | seen |",
           "|---|--:|--:|--:|--:|---|---|"]
    for claim, more, less, what, sign in FINDINGS:
        first, second = more.split("|"), less.split("|")
        if all(arm in rows for arm in first + second):
            a, b = (max((percent(rows[arm], what) for arm in arms), key=fmean) for arms in (first, second))
            gap, many = fmean(a) - fmean(b), min(len(a), len(b)) > 1
            noise = 2 * ((variance(a) + variance(b)) / 2) ** 0.5 if many else None
            seen = "one seed" if not many else "=" if abs(gap) <= noise else ">" if gap > 0 else "<"
            out.append(f"| {claim} | {fmean(a):.1f} | {fmean(b):.1f} | {gap:+.1f} "
                       f"| {'' if noise is None else f'{noise:.1f}'} | {sign} | {seen} |")
    return out if len(out) > 2 else []


def table(rows):
    """{arm: its rows} -> lines of a Markdown table, one line per system"""
    kinds = sorted(rows["llava15"][0]["types"]) if "llava15" in rows else []
    head = ["system", "seeds", "seeing %", "blind %", *kinds, "tokens", "trained, stage 1 + 2", "CPU s"]
    out = [f"| {' | '.join(head)} |",
           "|---|--:|--:|--:|" + "--:|" * (len(kinds) + 3)]
    for arm in SYSTEMS:
        if of := rows.get(arm):
            types = " | ".join(f"{100 * fmean(r['types'][k] for r in of):.0f}" for k in kinds)
            trained = " + ".join(f"{n / 1e6:.2f} M" for n in of[0]["trained"])
            out.append(f"| {SYSTEMS[arm]} | {len(of)} | {spread([r['seeing'] for r in of])} "
                       f"| {spread([r['blind'] for r in of])} | {types} | {of[0]['tokens']} | {trained} "
                       f"| {fmean(r['cpu_s'] for r in of):.0f} |")
    return out


def full_table(rows):
    """{arm: its rows} -> lines of a Markdown table, one line per system measured at its recipe's own length"""
    out = ["| system, its recipe's own length | seeds | seeing % | blind % | steps, stage 1 + 2 | CPU s |",
           "|---|--:|--:|--:|--:|--:|"]
    for arm in SYSTEMS:
        if of := rows.get(f"{arm}_full"):
            out.append(f"| {SYSTEMS[arm]} | {len(of)} | {spread([r['seeing'] for r in of])} "
                       f"| {spread([r['blind'] for r in of])} | {' + '.join(f'{n:,}' for n in of[0]['steps'])} "
                       f"| {fmean(r['cpu_s'] for r in of):.0f} |")
    return out if len(out) > 2 else []


def main(s):
    config.check_ranges(s)
    wanted = s.only.split(",") if s.only else list(ARMS)
    if unknown := [arm for arm in wanted if arm not in ARMS]:
        config.stop(f"only={unknown[0]}: {', '.join(ARMS)}")
    for seed in range(0 if s.show else s.seeds):
        for arm in wanted:
            if not any(r["arm"] == arm and r["seed"] == seed for r in measured(s.rows)):
                if not Path("runs/toy/text_questions.jsonl").exists():
                    toy.write_world("runs/toy")
                    write_variants(Path("runs/toy"))
                row = measure(s, arm, seed)
                with open(s.rows, "a") as f:
                    f.write(json.dumps(row) + "\n")
                print(row, file=sys.stderr, flush=True)
    rows = by_arm(measured(s.rows))
    print(*table(rows), "", *full_table(rows), "", *findings(rows), sep="\n")


if __name__ == "__main__":
    with config.one_line_errors():
        main(parse(Settings, sys.argv[1:], __doc__))
