"""Each published form of a data file is trained from for five steps. The weights are those of LLaVA's jsonl."""

import base64
import functools
import json
from pathlib import Path

import pytest
from test_rows import pq, write_lines, write_tar  # noqa: F401
from test_train_dpo import run as run_dpo
from test_train_dpo import tiny  # noqa: F401
from tiny_runs import run, state

KEYS = {"human": "user", "gpt": "assistant"}
FIVE = dict(steps=5, save_every=5, batch_size=2)


def messages(row):
    return [{"role": KEYS[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]


def in_parts(row, blob):
    """OpenAI's list of parts, with the image as a data: URL in its place"""
    question, answer = messages(row)
    text = {"type": "text", "text": question["content"].removeprefix("<image>\n")}
    url = "data:image/png;base64," + base64.b64encode(blob or b"").decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{**question, "content": [image] * bool(blob) + [text]}, answer]}


def table(row, blob, **more):
    """FineVision, the Cauldron: markers are in no text"""
    question, answer = (m["content"].removeprefix("<image>\n") for m in messages(row))
    return {"images": [{"bytes": blob, "path": None}] * bool(blob),
            "texts": [{"user": question, "assistant": answer, "source": "x"}], **more}


RATED = {f"{k}_{end}": v for k in ("relevance", "visual_dependency", "image_correspondence", "formatting")
         for end, v in (("ratings", [4]), ("min", 4))}
NAME = {  # form: (kind of file, function of a row and its image -> what the file has)
    "ShareGPT": ("jsonl", lambda row, blob: {"images": [row["image"]] if blob else [], "conversations": messages(row)}),
    "messages": ("jsonl", lambda row, blob: {"images": [row["image"]] if blob else [], "messages": messages(row)}),
    "parts with data: URLs": ("jsonl", in_parts),
    "LLaVA-OneVision": ("parquet", lambda row, blob: {
        **row, "id": str(row["id"]), "image": blob and {"bytes": blob, "path": "x.png"}, "data_source": "x"}),
    "FineVision": ("parquet", functools.partial(table, source="x", **RATED)),
    "the Cauldron": ("parquet", table),
    "minimind-v": ("parquet", lambda row, blob: {"conversations": json.dumps(messages(row)),
                                                 "image_bytes": [blob] if blob else []}),
    "pairs of a tar": ("tar", lambda row, blob: messages(row)),
    "members by name": ("tar", lambda row, blob: {"texts": messages(row), "media": "image",
                                                  "name": ["image_i.0_x.png"] if blob else []}),
}


def prompts(rows):
    """LLaVA-OneVision-1.5: two rows are one sample"""
    for i in range(0, len(rows), 2):
        two = [[m["content"] for m in messages(row)] for row, _ in rows[i : i + 2]]
        names = [f"img{k}.png" if blob else [] for k, (_, blob) in enumerate(rows[i : i + 2])]
        packed = {"prompts": [q.removeprefix("<image>\n") for q, _ in two], "captions": [a for _, a in two],
                  "images": names}
        yield f"ps_{i:03}.json", json.dumps(packed).encode()
        yield from ((f"ps_{i:03}.{name}", blob) for name, (_, blob) in zip(names, rows[i : i + 2]) if blob)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """-> rows with the bytes of their images, the weights after five steps from LLaVA's jsonl"""
    rows = [json.loads(line) for line in Path(world["data"]).read_text().splitlines()]
    out = tmp_path_factory.mktemp("llava") / "run"
    run("sft", world, out, **FIVE)
    images = Path(world["images"])
    return [(row, (images / row["image"]).read_bytes() if "image" in row else None) for row in rows], state(out, 5)


@pytest.mark.parametrize("form", [*NAME, "prompts of a tar"])
def test_five_steps_from_every_published_form(form, world, trained, tmp_path, request):
    rows, expected = trained
    kind, of = NAME.get(form, ("tar", None))
    data = tmp_path / f"train.{kind}"
    if of is None:
        write_tar(data, [*prompts(rows)])
    elif kind == "tar":
        write_tar(data, [(f"{i:02}.{end}", blob) for i, (row, image) in enumerate(rows) for end, blob in (
            ("image_i.0_x.png", image), ("json", json.dumps(of(row, image)).encode())) if blob])
    else:
        write = request.getfixturevalue("pq") if kind == "parquet" else write_lines
        write(data, [of(*pair) for pair in rows])
    run("sft", world, tmp_path / "run", data=str(data), **FIVE)
    assert state(tmp_path / "run", 5) == expected


# ---- pairs of answers -----------------------------------------------------------------------------------------------

def said(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


def rlaif_v(row, blob):
    return {"ds_name": "x", "image": {"bytes": blob, "path": row["image"]}, "chosen": row["chosen"], "idx": row["id"],
            "question": row["prompt"].removeprefix("<image>\n"), "rejected": row["rejected"], "image_path": "x.jpg"}


def trl(row, blob):
    asked = [{"type": "image"}, {"type": "text", "text": row["prompt"].removeprefix("<image>\n")}]
    return {"images": [row["image"]], "prompt": [{"role": "user", "content": asked}],
            **{k: [said("assistant", row[k])] for k in ("chosen", "rejected")}}


def test_five_steps_from_preference_rows(pq, tiny, tmp_path):  # noqa: F811
    """2U1's rows, which LLaVA-NeXT's are like, TRL's and RLAIF-V's"""
    rows = [row for row in map(json.loads, Path(tiny["data"]).read_text().splitlines()) if "image" in row]
    whole = [(row, Path(tiny["images"], row["image"]).read_bytes()) for row in rows]
    how = {**tiny, **FIVE, "val_data": "", "eval_every": 5}
    for name, write, form in (("2u1.jsonl", write_lines, lambda row, blob: row), ("trl.jsonl", write_lines, trl),
                              ("rlaif_v.parquet", pq, rlaif_v)):
        data = write(tmp_path / name, [form(*pair) for pair in whole])
        run_dpo(how, tmp_path / name[:3], data=str(data))
        assert state(tmp_path / name[:3], 5) == state(tmp_path / "2u1", 5), name
