"""Check a data file: how many samples are good, why the others are not, and what a sample looks like to the model.

    python data.py FILE --images=DIR --model=DIR [--template=NAME --max_len=N --show=N --bad=FILE]

The exit code is 1 if a sample is bad.
"""

import dataclasses
import json
import sys
import time
from collections import Counter
from pathlib import Path

import chat
import config
from config import BadSample, setting, stop
from data import Encoder
from formats import tokenizer
from formats.rows import Rows
from formats.strict_json import read_json
from images import image_folder, load_image, safe_path
from kernels.cross_entropy import IGNORE


@dataclasses.dataclass
class Settings:
    images: str = setting(".", "folder that image names are relative to")
    model: str = setting("", "a run, a LLaVA folder or a language model: whatever has the tokenizer")
    template: str = setting("", "plain, vicuna_v1, llava_llama_2, llama_3, chatml, mistral; empty: as train_sft.py "
                                "goes on from this model")
    max_len: int = setting(0, "tokens of one sample; 0: as the run was trained, else the default of train_sft.py", 0)
    image_tokens: int = setting(576, "tokens of one image, where the model does not say", 1)
    show: int = setting(3, "samples to print", 0)
    bad: str = setting("", "file to write: one line of json for each bad sample, with index, id, reason and detail")


def json_of(file):
    return read_json(file) if file.is_file() else {}


def encoder(s):
    """The settings -> Encoder, the one that training would use."""
    folder = Path(s.model)
    run = folder.parent if folder.name == "model" else folder
    folder = folder / "model" if (folder / "model" / "tokenizer.json").is_file() else folder
    cfg, about = json_of(folder / "config.json"), json_of(folder / "pumice.json")
    tok = tokenizer.Tokenizer(folder, cfg.get("image_token_index", cfg.get("image_token_id")))
    known = about.get("template", "plain")
    template = s.template or (known if known != "plain" else "vicuna_v1")
    trained = json_of(run / "config.json").get("settings", {}).get("max_len")
    max_len = s.max_len or trained or config.Common.max_len
    origin = "as set" if s.max_len else f"as {run} was trained" if trained else "the default of train_sft.py"
    print(f"--- template {template}, max_len={max_len} ({origin})")
    return Encoder(tok, template, tok.image, cfg.get("image_seq_length", s.image_tokens), max_len, about.get("system"))


def progress(i, n, began, last):
    """On stderr, where somebody waits: on a terminal ten times a second, else a line every ten seconds."""
    now, terminal = time.monotonic(), sys.stderr.isatty()
    if now - last < (0.1 if terminal else 10):
        return last
    left = (now - began) / i * (n - i)
    end = "\033[K\r" if terminal else "\n"
    print(f"{i:,} of {n:,} samples, {left:.0f} s left", end=end, file=sys.stderr, flush=True)
    return now


def main(argv):
    files = [a for a in argv if not a.startswith("--")]
    s = config.parse(Settings, [a for a in argv if a.startswith("--")], __doc__)
    if len(files) != 1 or not s.model:
        stop("usage: python data.py FILE --images=DIR --model=DIR [--template=NAME]")
    config.check_ranges(s)
    image_folder(s.images)
    encode, rows = encoder(s), Rows(files[0])
    lengths, bad, supervised, images, truncated, animated = [], [], 0, 0, 0, 0
    began = last = time.monotonic()
    for i in range(len(rows)):
        if i:
            last = progress(i, len(rows), began, last)
        row = {}
        try:
            row = rows[i]
            ids, labels, names, cut = encode(row)
            moving = [load_image(safe_path(s.images, name)).info["animated"] for name in names]
        except BadSample as e:
            bad.append({"index": i, "id": row.get("id"), "reason": e.reason, "detail": str(e)[len(e.reason) + 2 :]})
            continue
        lengths.append(len(ids))
        supervised += sum(y != IGNORE for y in labels)
        images += len(names)
        animated += sum(moving)
        truncated += cut > 0
        if len(lengths) <= s.show:
            print(f"--- sample {i}, id {row.get('id')!r:.80}: {len(ids)} tokens, {len(names)} image(s)")
            chat.show(encode.tok, ids, labels, encode.image_id)
    good = len(lengths)
    print(f"--- {files[0]}: {len(rows)} samples, {good} good, {len(bad)} dropped, {truncated} truncated to "
          f"{encode.max_len} tokens")
    if good:
        print(f"    {sum(lengths):,} tokens ({supervised / sum(lengths):.1%} supervised), longest {max(lengths)}, "
              f"mean {sum(lengths) / good:.0f}, {images} images"
              + (f" ({animated} animated: only the first frame is read)" if animated else ""))
    for reason, count in Counter(b["reason"] for b in bad).most_common():
        first = next(b for b in bad if b["reason"] == reason)
        print(f"    {count} x {reason}; first: sample {first['index']} (counted from 0), id {first['id']!r:.80}"
              + (f": {first['detail']}" if first["detail"] else ""))
    if s.bad:
        try:
            Path(s.bad).write_text("".join(json.dumps(b) + "\n" for b in bad))
        except OSError as e:
            stop(f"bad={s.bad}: {e.strerror}")
        print(f"    all bad samples: {s.bad}")
    elif bad:
        print("    --bad=FILE lists them all")
    return 1 if bad else 0


if __name__ == "__main__":
    with config.one_line_errors():
        sys.exit(main(sys.argv[1:]))
