"""The page of tools/check_data.py: samples with images and loss mask, how they are packed, dropped samples by reason.

The page is one file. It holds its images, has no script, and opens without a network.
"""

import html
import itertools
import json
from pathlib import Path

from chat import printable
from config import BadSample
from data import best_fit
from formats.image_files import safe_path
from kernels.cross_entropy import IGNORE
from tools.report import inline

STYLE = Path(__file__).parent / "page"
STREAMS, BINS, PER_REASON, LONGEST_ROW = 12, 32, 4, 600
KEY = ('<p class="key quiet"><i class=image></i>image placeholders<i class=context></i>context'
       '<i class=supervised></i>supervised</p>')


def runs(tok, ids, labels, image_id):
    """Divide a sample into runs of tokens -> [(kind, number of tokens, text)]. kind: image, supervised or context"""
    names, out = {i: t for t, i in tok.specials.items()}, []

    def kind_of(pair):
        i, y = pair
        return "image" if i == image_id or i >> 24 else "supervised" if y != IGNORE else "context"
    for kind, pairs in itertools.groupby(zip(ids, labels), kind_of):
        part = [i for i, _ in pairs]
        text = "" if kind == "image" else "".join(
            name * len(run) if name else tok.full.decode(run)
            for name, run in ((name, [*run]) for name, run in itertools.groupby(part, names.get)))
        out.append((kind, len(part), printable(text)))
    return out


def mask_html(pieces):
    e = html.escape
    return "<div class=mask>" + "".join(
        f"<span class=chip>image, {n:,} tokens</span>" if kind == "image" else
        f'<span class={"supervised" if kind == "supervised" else "plain"}>{e(text)}</span>'
        for kind, n, text in pieces) + "</div>"


def pictures(names, folder):
    out = ""
    for name in names:
        try:
            out += inline(safe_path(folder, name))
        except BadSample as e:
            out += f"<p class=quiet>{html.escape(str(e))}</p>"
    return out


def sample_card(index, row, pieces, names, cut, folder):
    count = {kind: sum(n for k, n, _ in pieces if k == kind) for kind in ("image", "supervised", "context")}
    lost = f"<span class=cut> ... and {cut:,} tokens cut off</span>" if cut else ""
    return (f"<div class=card>{pictures(names, folder)}{mask_html(pieces)}{lost}<footer class=quiet>sample {index:,}, "
            f"id {html.escape(repr(row.get('id'))[:80])}: {sum(count.values()):,} tokens, {count['supervised']:,} "
            f"supervised</footer></div>")


def streams(samples, max_tokens):
    """Show how data.best_fit packs these samples: a bar for each sequence, its documents with a border between them."""
    fit = best_fit(range(len(samples)), [sum(n for _, n, _ in pieces) for pieces in samples], max_tokens)[:STREAMS]
    return "".join("<div class=stream>" + "".join(
        f'<div class=document style="width:{100 * sum(n for _, n, _ in samples[i]) / max_tokens:.3f}%">' + "".join(
            f'<i class={kind} style="flex:{n}"></i>' for kind, n, _ in samples[i]) + "</div>"
        for i in stream) + "</div>" for stream in fit)


def lengths_chart(lengths):
    most, counts = max(lengths), [0] * BINS
    for n in lengths:
        counts[min(BINS - 1, n * BINS // (most + 1))] += 1
    return bars(counts, "0 tokens", f"{most:,}")


def bars(counts, left, right):
    """-> a chart of numbers of samples, with texts below its two ends"""
    drawn = "".join(f'<i style="height:{100 * c / max(counts):.1f}%" title="{c:,} samples"></i>' for c in counts)
    return f"<div class=bars>{drawn}</div><p class='axis quiet'><span>{left}</span><span>{right}</span></p>"


def short_row(row):
    """-> the text of a row, with the sizes of images in the place of their bytes"""
    def other(x):
        return f"<{len(x):,} bytes>" if isinstance(x, bytes) else str(x)
    text = json.dumps(row, ensure_ascii=False, default=other)
    return text if len(text) <= LONGEST_ROW else text[:LONGEST_ROW] + " ..."


def page_head(title, facts):
    """-> the first lines of a page. facts: [(value, what it is)]"""
    e, style = html.escape, (STYLE / "look.css").read_text() + (STYLE / "data.css").read_text()
    return [f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{e(title)}</title><style>{style}</style>"
            f"<main><h1>{e(title)}</h1><div class=facts>",
            *(f"<div class=fact><b>{e(value)}</b><span>{e(what)}</span></div>" for value, what in facts), "</div>"]


def bad_card(index, row, detail, pictures=""):
    """A sample that is left out. pictures: html of its images"""
    e = html.escape
    return (f"<div class='card bad'>{pictures}<p>{e(printable(detail))}</p><div class=mask><span class=plain>"
            f"{e(printable(short_row(row)))}</span></div><footer class=quiet>sample {index:,}</footer></div>")


def data_page(title, facts, lengths, shown, bad, folder, max_tokens):
    """-> html. facts: [(value, what it is)]; lengths: tokens of all good samples; shown: [(index, row, runs, names of
    images, tokens cut)]; bad: {reason: (count, [(index, row, detail)])}"""
    e, out = html.escape, page_head(title, facts)
    if lengths:
        out += ["<h2>Tokens of a sample</h2>", lengths_chart(lengths),
                f"<h2>Packed sequences <small>the samples below, at most {max_tokens:,} tokens in one; a line is "
                "the border of a sample: no token attends beyond it</small></h2>", KEY,
                streams([s[2] for s in shown], max_tokens)]
    for reason, (count, examples) in sorted(bad.items(), key=lambda item: -item[1][0]):
        out += [f"<h2>Dropped: {e(reason)} <small>{count:,}</small></h2><div class=cards>",
                *(bad_card(i, row, detail or reason) for i, row, detail in examples), "</div>"]
    if shown:
        out += [f"<h2>Samples <small>{len(shown)}, spread evenly over the file</small></h2><div class=cards>",
                *(sample_card(*sample, folder) for sample in shown), "</div>"]
    return "\n".join(out) + "</main></html>\n"
