"""Scores against values that the published programs gave."""

import pytest

from metrics.words import CONTRACTIONS, exact, vqa_accuracy, vqa_normalise
from metrics.yes_no import pope, pope_answer, pope_by_type

# answer, the official script's normalisation of it, EvalAI's
STRINGS = [(a, b, b) for a, b in [
    ("Yes.", "yes"), ("a dog", "dog"), ("two", "2"), ("none", "0"), ("1,000.50", "1000.50"), ("100, 200", "100 200"),
    ("U.S.", "us"), ("a.m.", "am"), (".5", ".5"), ("no. 5", "no 5"), ("black-and-white", "black and white"),
    ("black - white", "black white"), ("t-shirt", "t shirt"), ("10:30am", "10:30am"), ("$5", "$5"), ("5%", "5%"),
    ("#1", "#1"), ("the", ""), ("dont", "don't"), ("isnt it", "isn't it"), ("Im", "im"), ("a, b", "b")]]
STRINGS += [("a,b", "b", "ab"), ("it's", "it's", "it 's"), ("john's", "john's", "john 's")]


@pytest.mark.parametrize("answer, official, evalai", STRINGS)
def test_answers_are_normalised_as_published(answer, official, evalai):
    assert vqa_normalise(answer, evalai=False) == official
    assert vqa_normalise(answer) == evalai


def test_the_contractions_are_the_published_ones():
    assert len(CONTRACTIONS) == 120                      # 75 whole forms and 45 that miss one apostrophe
    for answer, meant in [("couldnt", "couldn't"), ("couldn'tve", "couldn't've"), ("couldnt've", "couldn't've"),
                          ("yall", "y'all"), ("y'alld've", "y'all'd've"), ("twas", "'twas"), ("ow's'at", "'ow's'at"),
                          ("somebody'd", "somebodyd"), ("whats", "what's"), ("youve", "you've")]:
        assert vqa_normalise(answer, evalai=False) == meant
    assert vqa_normalise("Ive", evalai=False) == "ive"           # keys with capitals never fire after lower-casing


@pytest.mark.parametrize("k, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1)])
def test_the_score_grows_with_agreeing_humans(k, score):
    assert vqa_accuracy("red", ["red"] * k + [f"other {i}" for i in range(10 - k)]) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize("answer, answers, official, evalai", [
    ("Yes", ["yes"] * 10, 0, 1), ("2", ["two"] * 10, 0, 1), ("Yes.", ["yes"] * 9 + ["no"], 1, 1)])
def test_the_official_script_keeps_unanimous_answers(answer, answers, official, evalai):
    assert vqa_accuracy(answer, answers, evalai=False) == official
    assert vqa_accuracy(answer, answers) == evalai


def test_a_lone_answer_stands_for_ten_annotators():
    assert (vqa_accuracy("Two", ["2"]), vqa_accuracy("three", ["2"])) == (1, 0)


@pytest.mark.parametrize("answer, meant", [
    ("yes", "yes"), ("no", "no"), ("No", "no"), ("No, there is none.", "no"), ("There is not", "no"), ("NO", "yes"),
    ("No!", "yes"), ("", "yes"), ("a cat", "yes"), ("Yes. There is no dog", "yes"), ("nothing", "yes"),
    ("\nno", "yes")])
def test_pope_reads_yes_unless_no_or_not(answer, meant):
    assert pope_answer(answer) == meant


def test_pope_counts_with_yes_as_the_positive():
    answer, truth = ["yes", "Yes.", "no", "no", "dog"], ["yes", "no", "yes", "no", "yes"]
    two_thirds = {k: 2 / 3 for k in ("precision", "recall", "f1")}     # 2 true positives, 1 false one, 1 missed
    assert pope(answer, truth) == pytest.approx({"accuracy": 0.6, "yes_ratio": 0.6, **two_thirds})
    assert pope(["no"], ["no"]) == dict(accuracy=1, precision=0, recall=0, f1=0, yes_ratio=0)


def test_pope_counts_an_unasked_question_as_wrong():
    """yes is true of the first, no of the second and third; each None becomes a false negative or positive."""
    result = pope_by_type([None, None, "no"], ["yes", "no", "no"], {"a": [0], "b": [1, 2]})
    assert (result["accuracy"], result["f1"], result["f1_types"], result["f1_mean"]) == (1 / 3, 0, {"a": 0, "b": 0}, 0)
    result = pope_by_type(["yes", "yes", "yes"], ["yes", "no", "yes"], {"a": [0, 1], "b": [2]})
    assert result["f1"] == 0.8 and result["f1_types"] == {"a": 2 / 3, "b": 1}
    assert result["f1_mean"] == pytest.approx(5 / 6)


def test_popes_f1_has_an_interval():
    """200 questions, f1 0.8. Its deviation by the delta method, where w answers are wrong, is 2 sqrt(tp w (tp + w)) /
    (2 tp + w)^2."""
    answers, truth = ["yes"] * 80 + ["no"] * 20 + ["yes"] * 20 + ["no"] * 80, ["yes"] * 100 + ["no"] * 100
    tp, w = 80, 40
    low, high = (found := pope_by_type(answers, truth, {"a": range(200)}))["f1_ci95"]
    assert found["f1"] == 0.8 and low < 0.8 < high and found["f1_mean_ci95"] == [low, high]
    deviation = 2 * (tp * w * (tp + w)) ** 0.5 / (2 * tp + w) ** 2
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    parts = pope_by_type(answers, truth, {"a": range(0, 200, 2), "b": range(1, 200, 2)})
    assert parts["f1_mean_ci95"][0] < 0.8 < parts["f1_mean_ci95"][1] and parts["f1_mean_ci95"] != parts["f1_ci95"]
    right = pope_by_type(truth, truth, {"a": range(200)})
    assert right["f1_ci95"] == right["f1_mean_ci95"] == [1, 1]


@pytest.mark.parametrize("given, answer, right", [
    ("Red.", "red", 1), (" top  left ", "Top left", 1), ("red circle", "red", 0), ("", "red", 0), ("U.S.", "U.S", 1),
    ("red..", "red", 0)])
def test_exact_match_ignores_case_spaces_one_period(given, answer, right):
    assert exact(given, [answer]) == right


def test_exact_match_takes_any_of_several_answers():
    assert exact("gray", ["grey", "gray"]) == 1
