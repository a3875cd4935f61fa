"""The page of `tools/curate.py filter`: examples of what goes, by reason, with images; a duplicate beside its twin."""

import html

from config import BadSample
from tools.check_page import bad_card, bars, page_head, pictures

EXAMPLES = 8               # rows of each reason


def keep_some(some, record, seen, draw):
    """Reservoir sampling: after the last call, each record had the same chance to be among `some`. seen: how many
    records there were so far, with this one; draw: random.Random"""
    if len(some) < EXAMPLES:
        some.append(record)
    elif (k := draw.randrange(seen)) < EXAMPLES:
        some[k] = record


def filter_page(title, facts, reasons, examples, counts, read, folder):
    """-> html. facts: [(value, what it is)]; reasons: Counter; examples: {reason: [record]}; counts: an array, of
    similarities from -1 to 1; read: number of a row -> the row, names of its images; folder: of the images"""
    out = page_head(title, facts)
    if counts.any():
        a, b = counts.nonzero()[0][[0, -1]]
        ends = (f"{2 * x / len(counts) - 1:.2f}" for x in (a, b + 1))
        out += ["<h2>Cosine of image and caption</h2>", bars(counts[a : b + 1].tolist(), *ends)]
    for reason, count in reasons.most_common():
        out += [f"<h2>Removed: {html.escape(reason)} <small>{count:,}</small></h2><div class=cards>"]
        for record in sorted(examples[reason], key=lambda record: record["index"]):
            said, twin = "" if record["value"] is None else f"{record['value']}", record["twin"]
            row, shown = with_pictures(record["index"], read, folder)
            if twin is not None:
                said += f" like sample {twin:,}, whose images are the second ones"
                shown += with_pictures(twin, read, folder)[1]
            out.append(bad_card(record["index"], row, said.strip() or reason, shown))
        out.append("</div>")
    return "\n".join(out) + "</main></html>\n"


def with_pictures(i, read, folder):
    """-> row i, html of its images"""
    try:
        row, names = read(i)
    except BadSample as e:
        return {"unreadable": str(e)}, ""
    return row, pictures(names, folder)
