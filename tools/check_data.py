"""Check a data file: how many samples are good, why the others are not, and what a sample looks like to the model.

    python data.py FILE --images=DIR --model=DIR [--template=NAME --max_len=N --show=N --bad=FILE --html=FILE]

FILE may be a pattern in quotes, such as "shards/*.parquet". Of preference data, the chosen answers are checked. The
exit code is 1 if any sample is bad.
"""

import dataclasses
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import chat
import config
from config import BadSample, setting, stop
from data import Encoder
from formats.configs import one_line
from formats.families import FAMILIES
from formats.family import image_settings, usual_template, with_ids
from formats.image_files import image_folder, load_image, safe_path
from formats.preferences import preference
from formats.rows import open_rows
from formats.strict_json import read_json
from formats.tokenizer import Tokenizer
from images import Layout
from kernels.cross_entropy import IGNORE
from parts.build import image_layout
from run.arguments import parse
from tools.check_page import PER_REASON, data_page, runs

BATCH = 16                 # samples of a padded batch, beside which packing is shown
KINDS = {"rows": "json or jsonl", "parquet": "parquet", "tar": "tar", "shards": "several files"}
FORMS = {"conversations": "conversations (LLaVA, ShareGPT)", "messages": "messages (OpenAI, TRL, ms-swift)",
         "texts": "texts (FineVision, the Cauldron)", "caption": "captions", "text": "documents"}


@dataclasses.dataclass
class Settings:
    images: str = setting(".", "folder that image names are relative to")
    model: str = setting("", "a run, a LLaVA folder or a language model: whatever has the tokenizer")
    template: str = setting("", "of chat.py or parts/templates.py: plain, vicuna_v1 ...; empty: as train_sft.py "
                                "goes on from this model")
    max_len: int = setting(0, "tokens of one sample; 0: as the run was trained, else the default of train_sft.py", 0)
    image_tokens: int = setting(576, "tokens of one image, where the model does not say", 1)
    max_tokens: int = setting(config.Common.max_tokens, "tokens of one packed sequence", 1)
    min_rating: int = setting(0, "of parquet rows with FineVision's ratings: use those with all ratings this high", 0)
    show: int = setting(3, "samples to print", 0)
    html: str = setting("", "file to write: a page of samples with images and loss mask, and of dropped ones")
    cards: int = setting(24, "samples on the page", 1)
    bad: str = setting("", "file to write: one line of json for each bad sample, with index, id, reason and detail")


def encoder(s):
    """Make the Encoder that training with this model would use. It turns a row of a file into token ids and labels."""
    folder = Path(s.model)
    run = folder.parent if folder.name == "model" else folder
    folder = folder / "model" if (folder / "model" / "tokenizer.json").is_file() else folder
    cfg, about = read_json(folder / "config.json", {}), read_json(folder / "pumice.json", {})
    family = FAMILIES.get(cfg.get("model_type"))
    with one_line(f"{folder / 'config.json'}"):
        model = family.config(cfg, image_settings(folder)) if family else None
    if cfg.get("vision_config") and not family and cfg.get("model_type") != "llava":
        stop(f"{folder} holds a {cfg.get('model_type')!r}: llava, {', '.join(FAMILIES)} are supported")
    image_id = model.image_token_index if model else cfg.get("image_token_index", cfg.get("image_token_id"))
    tok = Tokenizer(folder, image_id)
    known = about.get("template", usual_template(family, cfg, tok) if family else "plain")
    template = s.template or (known if known != "plain" else "vicuna_v1")
    trained = read_json(run / "config.json", {}).get("settings", {}).get("max_len")
    max_len = s.max_len or trained or config.Common.max_len
    origin = "as set" if s.max_len else f"as {run} was trained" if trained else "the default of train_sft.py"
    print(f"--- template {template}, max_len={max_len} ({origin})")
    layout = Layout(tok.image, cfg.get("image_seq_length", s.image_tokens))
    if model:
        model.layout = with_ids(model.layout, tok)
        layout = image_layout(model)
    return Encoder(tok, template, layout, max_len, about.get("system"))


def form_of(row):
    """-> name of the form of a row"""
    if "chosen" in row or "rejected_response" in row or "output_1" in row:
        return "preference pairs"
    if isinstance(row.get("conversations"), str):
        return "conversations as a text of json (minimind-v)"
    return next((form for key, form in FORMS.items() if row.get(key) is not None), "unknown")


def as_conversation(row):
    """-> the row; of a preference pair, the conversation that ends in the chosen answer"""
    if form_of(row) != "preference pairs":
        return row
    turns, chosen, _, names, system = preference(row)
    said = [(q, a if a is not None else chosen) for q, a in turns]
    messages = [{"role": role, "content": text} for turn in said for role, text in zip(("user", "assistant"), turn)]
    return {"id": row.get("id"), "images": names, "messages": messages, "system": system}


def main(argv):
    files = [a for a in argv if not a.startswith("--")]
    s = parse(Settings, [a for a in argv if a.startswith("--")], __doc__)
    if len(files) != 1 or not s.model:
        stop("usage: python data.py FILE --images=DIR --model=DIR [--template=NAME]")
    config.check_ranges(s)
    image_folder(s.images)
    encode, rows = encoder(s), open_rows(files[0], s.min_rating)
    # good: for each good sample, its numbers of tokens, supervised tokens, images, animated images; was it truncated?
    good, bad, began = [], [], time.monotonic()
    last, forms, shown, examples = began, Counter(), [], {}
    for i in range(len(rows)):
        row, now = {}, time.monotonic()
        if i and now > last + 10:
            last, left = now, (now - began) / i * (len(rows) - i)
            print(f"{i:,} of {len(rows):,} samples, {left:.0f} s left", file=sys.stderr)
        try:
            row = rows[i]
            forms[form_of(row)] += 1
            ids, labels, names, cut = encode(as_conversation(row), s.images)
            moving = [load_image(safe_path(s.images, name)).info["animated"] for name in names]
        except BadSample as e:
            bad.append({"index": i, "id": row.get("id"), "reason": e.reason, "detail": str(e)[len(e.reason) + 2 :]})
            if len(of := examples.setdefault(e.reason, [])) < PER_REASON:
                of.append((i, row, bad[-1]["detail"]))
            continue
        good.append((len(ids), sum(y != IGNORE for y in labels), len(names), sum(moving), cut > 0))
        if s.html and i * s.cards // len(rows) >= len(shown):
            shown.append((i, row, runs(encode.tok, ids, labels, encode.layout.image_id), names, cut))
        if len(good) <= s.show:
            print(f"--- sample {i}, id {row.get('id')!r:.80}: {len(ids)} tokens, {len(names)} image(s)")
            chat.show(encode.tok, ids, labels, encode.layout.image_id)
    tokens, supervised, images, animated, truncated = map(sum, zip(*good)) if good else [0] * 5
    print(f"--- {files[0]}: {len(rows)} samples, {len(good)} good, {len(bad)} dropped, {truncated} truncated to "
          f"{encode.max_len} tokens")
    kind, lengths = type(rows).__name__.lower(), [n for n, *_ in good]
    print(f"    {KINDS[kind]}: " + ", ".join(f"{n:,} x {form}" for form, n in forms.most_common()))
    facts = [(f"{len(good):,}", "good samples"), (f"{len(bad):,}", "dropped"), (f"{truncated:,}", "truncated")]
    if good:
        p99 = sorted(lengths)[math.ceil(0.99 * len(good)) - 1]
        padded = sum(max(part) * len(part) for part in (lengths[i : i + BATCH] for i in range(0, len(good), BATCH)))
        print(f"    {tokens:,} tokens ({supervised / tokens:.1%} supervised), longest {max(good)[0]}, mean "
              f"{tokens / len(good):.0f}, p99 {p99}, {images} images, {animated} animated (the first frame is read)")
        print(f"    packed sequences have no padding; padded batches of {BATCH} would have {padded / tokens:.2f} times "
              "as many tokens")
        facts += [(f"{tokens / len(good):,.0f}", "tokens of a sample, mean"), (f"{p99:,}", "tokens or fewer in 99 %"),
                  (f"{supervised / tokens:.1%}", "of the tokens are supervised"), (f"{images:,}", "images"),
                  (f"{padded / tokens:.2f}", f"times the tokens, if batches of {BATCH} were padded, not packed")]
    for reason, count in Counter(b["reason"] for b in bad).most_common():
        first = next(b for b in bad if b["reason"] == reason)
        print(f"    {count} x {reason}; first: sample {first['index']} (counted from 0), id {first['id']!r:.80}"
              + (f": {first['detail']}" if first["detail"] else ""))
    if s.bad:
        try:
            Path(s.bad).write_text("".join(json.dumps(b) + "\n" for b in bad))
        except OSError as e:
            stop(f"bad={s.bad}: {e.strerror}")
    if s.html:
        reasons = Counter(b["reason"] for b in bad)
        text = data_page(f"{files[0]}: {KINDS[kind]}, {', '.join(forms)}", facts, lengths, shown,
                    {reason: (reasons[reason], of) for reason, of in examples.items()}, s.images, s.max_tokens)
        try:
            Path(s.html).write_bytes(text.encode("utf-8", "backslashreplace"))
        except OSError as e:
            stop(f"html={s.html}: {e.strerror}")
        print(f"    {s.html}")
    return 1 if bad else 0


if __name__ == "__main__":
    with config.one_line_errors():
        sys.exit(main(sys.argv[1:]))
