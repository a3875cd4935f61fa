"""The orders of formats/rows/order.py: the property that defines each one, on any rank and from any step."""

import hashlib
import json
import pickle
import shutil
from collections import Counter
from math import ceil, floor

import numpy as np
import pytest
from conftest import error
from test_rows import RED, pq, url, write_lines, write_tar  # noqa: F401  (pq is a fixture)
from tiny_runs import rows, run, state

from config import Common, setting_facts
from data import Encoder, Steps
from formats.rows import ORDERS, conversation, open_rows, token_rates
from formats.rows.order import CYCLE, largest_remainder
from formats.tokenizer import Tokenizer
from images import ImageSpec, Layout
from run.log import short_names

B = 8


class File(list):
    """A file of n rows. Each row that `every` divides has no image; 0: all rows have one."""

    def __init__(self, n, every=0):
        super().__init__(range(n))
        self.file, self.seen = f"{n} rows", np.array([not every or i % every > 0 for i in range(n)])

    def has_images(self):
        return self.seen


def make(name, files, spec="a,b,c", batch=B, seed=0):
    """spec: shares are read from it as open_mixture does -> function of a step, samples of an epoch"""
    shares = [float((part.split(":") + [""])[1] or 0) for part in spec.split(",")]
    total = sum(map(len, files))
    counts = [len(f) for f in files]
    if any(shares):
        counts = np.diff(np.round(np.cumsum([0, *shares]) / sum(shares) * total)).astype(int)
    return ORDERS[name](files, counts, batch, seed, spec)


THREE = [File(100, 3), File(40, 1), File(60)]                  # images and text; text alone; images alone
ALL = {"shuffle": "a,b,c", "by_modality": "a,b,c", "round_robin": "a,b,c", "accumulate_all": "a,b,c",
       "curriculum": "a,b,c", "replay": "a:0.5,b:0.3,c:0.2"}


def draws(order, first, end):
    return [draw for step in range(first, end) for draw in order(step)]


@pytest.mark.parametrize("spec, seed, digest", [
    ("a", 0, "5f434a05bd4ff976"), ("a", 5, "fdf3fd886983fa83"), ("a,b,c", 0, "3fd1e468b923ef05"),
    ("a:0.7,b:0.2,c:0.1", 0, "c8ac6122894cb839"), ("a:0.7,b:0.2,c:0.1", 5, "da5c7ce38d7e2f08"),
    ("c:1,a:0", 0, "613b54a74ac17dbf")])
def test_shuffle_draws_as_before_orders_existed(spec, seed, digest):
    """Digests of 100 steps at revision e9109c2, before this file"""
    sizes = {"a": 100, "b": 37, "c": 3}
    order, total = make("shuffle", [File(sizes[part[0]]) for part in spec.split(",")], spec, 7, seed)
    found = repr([order(step) for step in range(100)])
    assert hashlib.sha256(found.encode()).hexdigest()[:16] == digest
    assert total == sum(sizes[part[0]] for part in spec.split(","))


@pytest.mark.parametrize("name", ALL)
def test_an_order_needs_no_state(name):
    """Resume at any step, in any sequence of steps, from a copy; another seed draws something else"""
    order, _ = make(name, THREE, ALL[name])
    steps = [order(step) for step in range(230)]
    assert all(len(drawn) == B for drawn in steps)
    for step in (0, 1, 24, 25, 26, 99, 100, 101, 229):
        again = pickle.loads(pickle.dumps(make(name, THREE, ALL[name])[0]))
        assert again(step) == steps[step] and order(step) == steps[step]
    assert make(name, THREE, ALL[name], seed=1)[0](3) != steps[3]


def test_rare_samples_are_drawn_as_well():
    files = [File(100, 50), File(900)]                         # two texts of 100; 20 draws of an epoch: 0.4 texts
    order, total = make("by_modality", files, "a:0.02,b:0.98")
    texts = sum(not files[f].seen[i] for f, i in draws(order, 0, 4 * total // B))
    assert 0 < texts <= B
    for shares in ("a:1,b:0", "a:0,b:1"):
        make("by_modality", [File(10, 2), File(10)], shares)
    order, total = make("replay", [File(10), File(1000)], "new:0.999,old:0.001")
    assert total == 11


@pytest.mark.parametrize("name", ["shuffle", "by_modality", "curriculum"])
def test_an_epoch_draws_every_sample_once(name):
    files = [File(100, 4), File(50, 1), File(90)]              # 165 with an image, 75 without: not multiples of B
    order, total = make(name, files)
    for epoch in range(3):
        seen = Counter(draws(order, epoch * total // B, (epoch + 1) * total // B))
        if name == "by_modality":                              # a kind's last step of an epoch begins its next one
            seen = Counter(draws(order, 0, (epoch + 1) * total // B))
            assert set(seen.values()) <= {epoch, epoch + 1, epoch + 2} and len(seen) >= total - B
        else:
            assert len(seen) == total == 240 and set(seen.values()) == {1}


def test_by_modality_never_mixes_a_step():
    order, total = make("by_modality", THREE)
    kinds = [{bool(THREE[f].seen[i]) for f, i in order(step)} for step in range(500)]
    assert all(len(kind) == 1 for kind in kinds)
    with_images = np.cumsum([True in kind for kind in kinds])
    share = sum(f.seen.sum() for f in THREE) / total
    assert abs(with_images - share * np.arange(1, 501)).max() < 1, "spread evenly"
    of_images = [draw for step in range(500) for draw in order(step) if THREE[draw[0]].seen[draw[1]]]
    n = int(share * total + .5)
    assert all(len(set(of_images[k * n : (k + 1) * n])) == n for k in range(10)), "no sample is lost between steps"


@pytest.mark.parametrize("files", [[File(30)], [File(30, 1)], [File(30), File(10)], [File(30, 1), File(10, 1)]])
def test_by_modality_works_with_one_kind(files):
    order, total = make("by_modality", files, ",".join("ab"[: len(files)]))
    assert Counter(draws(order, 0, total)) == {(f, i): B for f, rows in enumerate(files) for i in rows}


def test_round_robin_takes_turns():
    order, _ = make("round_robin", THREE)
    for step in range(90):
        assert {f for f, _ in order(step)} == {step % 3}
    for f, rows in enumerate(THREE):
        drawn = [i for step in range(f, 300, 3) for _, i in order(step)]
        assert all(sorted(drawn[k : k + len(rows)]) == rows for k in range(0, 400, len(rows)))


@pytest.mark.parametrize("spec, batch", [("a:0.5,b:0.3,c:0.2", 8), ("a:0.45,b:0.45,c:0.1", 16),
                                         ("a:0.34,b:0.33,c:0.33", 3), ("a:0.96,b:0.02,c:0.02", 50), ("a,b,c", 7)])
def test_accumulate_all_keeps_its_shares_exactly(spec, batch):
    """In any 100 steps; and a step has the mean of each file, rounded up or down, so never none"""
    if batch == 3:
        assert "times the share of 40 rows is 0.99" in error(make, "accumulate_all", THREE, spec, batch)
        batch = 4
    order, _ = make("accumulate_all", THREE, spec, batch)
    steps = [order(step) for step in range(350)]
    counts = np.array([[sum(f == k for f, _ in drawn) for k in range(3)] for drawn in steps])
    shares = np.array([float(p.split(":")[1]) for p in spec.split(",")]) if ":" in spec else np.array([.5, .2, .3])
    mean = shares * batch
    for first in (0, 1, 57, 249):
        assert (counts[first : first + CYCLE].sum(0) == np.round(CYCLE * mean)).all()
    assert counts.min() >= 1 and (counts.sum(1) == batch).all()
    assert all({floor(m + 1e-9), ceil(m - 1e-9)} >= set(c) for m, c in zip(mean, counts.T.tolist()))
    assert abs(counts.cumsum(0) - mean * np.arange(1, 351)[:, None]).max() < 3, "spread over the cycle"
    for f, rows in enumerate(THREE):                           # no sample is lost between steps
        drawn = [i for step in steps for g, i in step if g == f]
        n = len(rows)
        assert all(sorted(drawn[k : k + n]) == rows for k in range(0, len(drawn) // n * n, n))


def test_curriculum_goes_file_by_file():
    order, total = make("curriculum", THREE)
    for epoch in range(2):
        drawn = draws(order, epoch * total // B, (epoch + 1) * total // B)
        assert [f for f, _ in drawn] == [0] * 100 + [1] * 40 + [2] * 60
        assert [i for f, i in drawn if f == 0] != [*range(100)], "a file is shuffled"


def test_replay_keeps_old_data_in_every_epoch():
    """All new samples once per epoch; the old ones in their shares: shuffle would draw 100 of 200 from the new file"""
    order, total = make("replay", [File(150), File(40), File(10)], "new:0.75,old:0.2,older:0.05")
    assert total == 200 and make("replay", [File(100), File(900)], "new:0.9,old:0.1")[1] == 111
    for epoch in range(3):
        seen = Counter(draws(order, 25 * epoch, 25 * epoch + 25))
        assert [sum(n for (f, _), n in seen.items() if f == k) for k in range(3)] == [150, 40, 10]
        assert all(seen[0, i] == 1 for i in range(150))


@pytest.mark.parametrize("name", ["shuffle", "by_modality", "accumulate_all", "curriculum", "replay"])
@pytest.mark.parametrize("share", [.1, .05, .47])
def test_a_text_share_holds_over_10000_draws(name, share):
    files = [File(333), File(77, 1)]
    order, _ = make(name, files, f"images:{1 - share},text:{share}", 32)
    for first in (0, 1000):
        drawn = draws(order, first, first + 313)
        found = np.mean([not files[f].seen[i] for f, i in drawn])
        assert len(drawn) > 10_000 and abs(found - share) < 0.01


def test_the_remainder_goes_to_the_largest():
    assert largest_remainder([1, 1, 1], 100) == [34, 33, 33] and largest_remainder([7, 2, 1], 8) == [6, 1, 1]
    assert largest_remainder([0, 5], 9) == [0, 9] and sum(largest_remainder([3, 17, 29, 1], 1009)) == 1009


def test_an_order_that_cannot_be_is_refused():
    assert "take turns" in error(make, "round_robin", THREE, "a:0.5,b:0.3,c:0.2")
    assert "every step must have a sample of every file" in error(make, "accumulate_all", THREE, "a,b,c", 2)
    assert "of 40 rows is 0.32" in error(make, "accumulate_all", THREE, "a:0.5,b:0.04,c:0.46")
    for spec, files in (("a,b", 2), ("a", 1), ("a:1", 1), ("a:0,b:1", 2)):
        assert "order=replay needs" in error(make, "replay", THREE[:files], spec)
    assert setting_facts(Common)["order"]["choices"] == tuple(ORDERS)


# ---- which rows have images -----------------------------------------------------------------------------------------

TURNS = [{"from": "human", "value": 'What is "image": 5, or <image> in HTML?'}, {"from": "gpt", "value": "image"}]
LINES = [({"image": "a.png"}, 1), ({}, 0), ({"images": []}, 0), ({"images": ["a"]}, 1), ({"image": None}, 0),
         ({"image": ""}, 0), ({"images": [None]}, 0), ({"images": [""]}, 0), ({"image_bytes": "eA=="}, 1),
         ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}, 1), ({"id": "image"}, 0),
         ({"messages": [{"role": "user", "content": [{"type": "text", "text": "an image: yes"}]}]}, 0),
         ({"images": [{"bytes": None, "path": "x"}]}, 1)]


@pytest.mark.parametrize("indent, separators", [(None, None), (2, None), (None, (",", ":")), (None, (",  ", " :   "))])
def test_json_says_which_rows_have_images(tmp_path, indent, separators):
    table = [{"conversations": TURNS, **row} for row, _ in LINES]
    (tmp_path / "x").write_text(json.dumps(table, indent=indent, separators=separators))
    assert open_rows(tmp_path / "x").has_images().tolist() == [bool(n) for _, n in LINES]
    write_lines(tmp_path / "y", table)
    assert open_rows(tmp_path / "y").has_images().tolist() == [bool(n) for _, n in LINES]


def test_parquet_says_which_rows_have_images(pq, tmp_path):
    some = [{"bytes": RED, "path": None}]
    lists = [{"images": x, "text": "t"} for x in (some, some, some, [], None, [{"bytes": None, "path": "p"}], [], [])]
    pq(tmp_path / "lists.parquet", lists, 2)                   # groups: all, mixed, mixed, none
    found = open_rows(tmp_path / "lists.parquet").has_images()
    assert found.tolist() == [True] * 3 + [False] * 2 + [True] + [False] * 2
    pq(tmp_path / "names.parquet", [{"image": x, "caption": "c"} for x in ("a", "b", "", "c", None, None)], 2)
    assert open_rows(tmp_path / "names.parquet").has_images().tolist() == [True, True, False, True, False, False]
    pq(tmp_path / "texts.parquet", [{"text": "t"}] * 3)
    assert not open_rows(tmp_path / "texts.parquet").has_images().any()
    part = [{"role": "user", "content": [{"type": "image", "path": "x"}]}]
    pq(tmp_path / "parts.parquet", [{"messages": part}, {"messages": [{"role": "user", "content": [
        {"type": "text", "path": None}]}]}])
    assert open_rows(tmp_path / "parts.parquet").has_images().tolist() == [True, False]
    both = open_rows(str(tmp_path / "[ln]*.parquet"))
    assert both.has_images().tolist() == [*open_rows(tmp_path / "lists.parquet").has_images(),
                                          *open_rows(tmp_path / "names.parquet").has_images()]


def test_ratings_and_images_count_the_same_rows(pq, tmp_path):
    ratings = ("relevance_min", "visual_dependency_min", "image_correspondence_min", "formatting_min")
    pq(tmp_path / "x.parquet", [{"images": [{"bytes": RED}] * (i % 2), "texts": [{"user": "q", "assistant": "a"}],
                                 **dict.fromkeys(ratings, 1 + i // 3)} for i in range(9)], 4)
    assert open_rows(tmp_path / "x.parquet", 2).has_images().tolist() == [bool(i % 2) for i in range(3, 9)]


def test_tar_says_which_rows_have_images(tmp_path):
    packed = {"prompts": ["p", "q"], "captions": ["a", "b"], "images": [["2.jpg"], ["2.jpg"]]}
    write_tar(tmp_path / "x.tar", [
        ("0.json", json.dumps({"conversations": TURNS}).encode()), ("1.txt", b"c"), ("1.PNG", RED), ("2.jpg", RED),
        ("2.json", json.dumps(packed).encode()), ("3.txt", b"c"), ("4.json", json.dumps({"image": url(RED)}).encode())])
    found = open_rows(tmp_path / "x.tar")
    assert found.has_images().tolist() == [False, True, True, True, False, True]
    assert [found.guess(i)[1] for i in range(6)] == [0, 1, 1, 1, 0, 1]


def test_a_packed_tar_sample_counts_by_prompt(tmp_path):
    """Each prompt has its own images and its own length: by_modality once took all rows of a sample for one kind."""
    packed = {"prompts": ["p" * 99, "q", ["r", "s" * 50], "t", "\u00e9" * 40], "captions": [
        "a", "b", ["c", "d"], "e", "f"], "images": ["0.jpg", [], ["0.jpg", "1.jpg"], [""], None]}
    members = [("x.0.jpg", RED), (".hidden", b""), ("x.1.jpg", RED), ("x.json", json.dumps(packed).encode()),
               *((f"{i}.txt", b"word " * n) for i, n in enumerate((400, 10, 10, 10)))]
    found = open_rows(write_tar(tmp_path / "x.tar", members))
    images = [len(conversation(found[i])[1]) for i in range(5)]
    assert images == [1, 0, 2, 0, 0] == [found.guess(i)[1] for i in range(5)]
    assert found.has_images().tolist() == [True, False, True] + [False] * 6
    texts = [found.guess(i)[0] for i in range(9)]
    assert texts[1] == texts[3] and texts[0] - texts[1] == 98 and texts[5:] == [2000, 50, 50, 50]
    assert texts[4] - texts[3] == 79, "bytes, not characters"

    class Encode:
        layout, max_len = Layout(3, 4), 10**6

        def __call__(self, row, root):
            (text, answer), = conversation(row)[0]
            return [7] * len(text + answer), [], [], 0
    rates = token_rates(Subset(found, 5), Encode(), "")
    assert rates[0] == pytest.approx(1024, rel=0.05), "a byte is a token here"


class Subset(list):
    """The rows of a file from `first` on"""

    def __init__(self, file, first):
        super().__init__(file[i] for i in range(first, len(file)))
        self.guess = lambda i: file.guess(first + i)


# ---- steps and runs -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mixed(world, tmp_path_factory):
    """train.jsonl of the tiny runs, and a file of text alone -> "FILE,FILE" """
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    write_lines(text, [{"text": f"only text {i}" + "." * i} for i in range(9)])
    return f"{world['data']},{text}"


def steps_of(world, mixed, tok, order, rank=0, size=1):
    spec = "{}:0.7,{}:0.3".format(*mixed.split(",")) if order == "replay" else mixed
    encode = Encoder(Tokenizer(tok), "vicuna_v1", Layout(3, 4), 48, "")
    return Steps(spec, world["images"], encode, ImageSpec(8), 6, 96, 0, rank, size, order=order)


@pytest.mark.parametrize("order", ALL)
def test_three_ranks_draw_what_one_draws(world, mixed, bytes_folder, order):
    one = steps_of(world, mixed, bytes_folder, order)
    three = [steps_of(world, mixed, bytes_folder, order, rank, 3) for rank in range(3)]
    for step in (0, 4, 11):
        whole, parts = one[step], [steps[step] for steps in three]
        names = sorted(name for part in parts for name in part.names)
        assert names == sorted(whole.names) and len(names) == 6
        assert all(part.drawn == whole.drawn for part in parts)
        assert short_names(whole.drawn) == Counter(name.partition("[")[0] for name in names)
        assert sum(len(b.images) for p in parts for b in p.micro) == sum(len(b.images) for b in whole.micro)
        if order == "by_modality":
            assert sum(len(b.images) for b in whole.micro) in (0, 6)


def test_files_of_one_name_are_counted_apart(world, bytes_folder, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "x.jsonl", [{"text": f"{name}{i}"} for i in range(6)])
    drawn = steps_of(world, f"{tmp_path}/a/x.jsonl,{tmp_path}/b/x.jsonl", bytes_folder, "accumulate_all")[0].drawn
    assert short_names(drawn) == drawn == {f"{tmp_path}/a/x.jsonl": 3, f"{tmp_path}/b/x.jsonl": 3}


@pytest.mark.parametrize("order", ["accumulate_all", "by_modality"])
def test_a_resumed_run_counts_its_sources(world, mixed, tmp_path, order):
    """Six steps at once, and killed after four: equal weights, equal counts in log.jsonl"""
    how = {**world, "data": mixed, "order": order, "keep_last": 9}
    run("sft", how, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/checkpoints/step_0000006")
    (tmp_path / "two/finished.json").unlink()
    run("sft", how, tmp_path / "two")
    assert state(tmp_path / "two") == state(tmp_path / "one")
    one, two = ([row["drawn"] for row in rows(tmp_path / f"{name}/log.jsonl")] for name in ("one", "two"))
    assert one == two and [sum(row.values()) for row in one] == [4, 8, 12, 16, 20, 24]
    if order == "accumulate_all":
        assert one[-1] == {"train.jsonl": 24 - one[-1]["text.jsonl"], "text.jsonl": one[-1]["text.jsonl"]}
        assert 6 <= one[-1]["text.jsonl"] <= 8                 # 9 of 31 samples, times 24, is 7


def test_another_order_is_another_run(world, mixed, tmp_path):
    run("sft", {**world, "data": mixed}, tmp_path / "run")
    line = error(run, "sft", {**world, "data": mixed, "order": "curriculum"}, tmp_path / "run")
    assert "order=shuffle, not curriculum" in line
