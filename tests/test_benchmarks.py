"""The rules of benchmarks. Values that these programs gave for the inputs: MMMU's mmmu/utils/eval_utils.py,
VLMEvalKit's vlmeval/utils/matching_util.py (e8e78f0), lmms-eval (75571cf: mmmu_mcq_utils.py, mcq_extract.py,
mmbench_evals.py, mme/utils.py), pycocoevalcap 1.2 with Java. Values by hand, from reading the source: lmms-eval's
api/metrics.py, MMStar's mmstar.py, LLaVA's eval_science_qa.py and convert_gqa_for_eval.py at c121f04, pix2struct's
metrics.py, MultimodalOCR's example.py."""

import json
import random

import pytest

from metrics import boxes, captions, certainty, letters, mmmu, reading, tasks, words, yes_no

OPTIONS = dict(A="red", B="red circle", C="a dog", D="three cats")
GUESS = "?"
LETTERS = [  # answer; the letter by MMMU, MMMU in lmms-eval, VLMEvalKit, lmms-eval, lmms-eval for MMBench
    ("A", "A", "A", "A", "A", "A"), ("B.", "B", "B", "B", "B", "B"), ("(C)", "C", "C", "C", "C", "C"),
    ("D)", "?", "?", "D", "D", "D"), ("The answer is B", "B", "B", "B", "B", "B"),
    ("The answer is (C).", "C", "C", "C", "C", "C"), ("A dog", "A", "A", "A", "A", "A"),
    ("a dog", "?", "?", "C", "", "C"), ("I see a red circle here, so B", "B", "B", "B", "B", "B"),
    ("Not A but B", "B", "B", "", "B", "B"), ("(A) or (B)", "B", "B", "", "B", "B"),
    ("B or A, who knows", "B", "B", "", "B", "B"), ("answer: C", "C", "C", "C", "C", "C"),
    ("red circle", "?", "?", "", "", ""), ("it shows three cats and nothing more", "D", "D", "D", "", "D"),
    ("the options are red and red circle and a dog of some kind", "C", "C", "", "", ""), ("", "?", "?", "", "", ""),
    ("Z", "?", "?", "Z", "", ""), ("E", "?", "?", "", "", "E"), ("The answer is dog", "?", "?", "D", "", ""),
    ("The answer is cat", "?", "?", "C", "", ""), ("**D**", "?", "?", "D", "D", "D"),
    ("A B C D", "D", "D", "", "A", "A"), ("My DNA is", "?", "A", "", "A", "A"), ("I pick C", "C", "C", "C", "C", "C"),
    ("The best option is that Dog", "?", "?", "", "D", "D"),
    ("B because A is wrong in this long sentence here", "A", "A", "", "B", "B"),
    ("Cannot determine the answer", "?", "?", "Z", "C", "C"), ("Answer:A", "?", "A", "A", "A", "A"),
    ("D: three cats", "?", "?", "D", "D", "D"), ("so a dog, that is clear to see for all", "C", "C", "C", "", "C"),
    ("c", "?", "?", "", "", ""), ("The correct answer is a Dog", "C", "C", "A", "D", "C"),
    ("A: red B: red circle", "?", "?", "", "A", "A"), ("C or so I think", "C", "C", "", "C", "C"),
    ("it has A or D thing, answer is B, ok", "D", "D", "B", "B", "B")]


@pytest.mark.parametrize("answer, official, lmms, vlmeval, extract, mmbench", LETTERS)
def test_letters_are_read_as_the_programs_do(answer, official, lmms, vlmeval, extract, mmbench):
    for letter, as_lmms in ((official, False), (lmms, True)):
        read, guessed = mmmu.mmmu_letter(answer, OPTIONS, random.Random(0), as_lmms)
        assert (GUESS if guessed else read) == letter
    assert letters.vlmeval_letter(answer, OPTIONS) == vlmeval
    assert letters.lmms_letter(answer, "ABCD") == extract
    assert letters.mmbench_lmms_letter(answer, OPTIONS) == mmbench


def test_mmmu_guesses_as_the_official_generator():
    """The first eight of random.seed(42), one for each unreadable answer; a readable one between them draws nothing."""
    rng = random.Random(42)
    read = [mmmu.mmmu_letter(a, OPTIONS, rng)[0] for a in ["?"] * 4 + ["(D)"] + ["?"] * 4]
    assert read == [*"AACB", "D", *"BBAA"]
    questions = [{"options": OPTIONS, "answers": ["A"], "type": "all"}] * 4
    assert mmmu.mmmu_points(["?", "?", None, "?"], questions) == [1, 1, 0, 0]     # None draws nothing: A, A, C
    eight = [{"options": OPTIONS, "answers": [c]} for c in "AACBBBAA"]
    assert mmmu.mmmu_points(["?"] * 8, eight) == [1] * 8
    assert mmmu.mmmu_totals(["?", "(A)", None, "My DNA is"], questions, []) == {"guessed": 2}
    eight = [{"options": OPTIONS, "answers": [c]} for c in "AACBBBAA"]
    assert mmmu.mmmu_points(["?"] * 8, eight) == [1] * 8
    assert mmmu.mmmu_totals(["?", "(A)", None, "My DNA is"], questions, [], lmms=True) == {"guessed": 1}


@pytest.mark.parametrize("answer, truth, right", [
    ("The answer is 42.", ["42"], 1), ("42", ["42.001"], 1), ("42.006", ["42.01"], 1), ("It is 1,234 m", ["1234"], 1),
    ("so x = 3", ["3"], 1), ("x = 3\ny = 4", ["3"], 0), ("x is 3\ny = 4", ["3"], 1), ("red", ["Red"], 1),
    ("a red car", ["red"], 1), ("cat", ["c"], 0), ("b c d", ["c"], 1), ("c", ["c"], 1),
    ("The value is -2.5e3 units", ["-2500"], 1), ("First 5. Therefore 7", ["5"], 0), ("final = ", ["final"], 1),
    ("the result is: ", ["the result is:"], 0), ("", [""], 1), ("12 or 13", ["13"], 1), ("0.5", [".5"], 1),
    ("3.14159", ["3.14"], 1), ("it is 50%", ["50"], 1), ("green", ["blue", "green"], 1),
    ("Thus 5 apples, so 6 pears", ["5"], 0), ("1e3", ["1000"], 1)])
def test_mmmu_open_answers_are_read_officially(answer, truth, right):
    assert mmmu.mmmu_open_right(answer, truth) == right
    open_question = [{"options": {}, "answers": truth}]
    assert mmmu.mmmu_points([answer], open_question) == [right]
    assert mmmu.mmmu_points([answer], open_question, lmms=True) == [0]            # lmms-eval compares characters


@pytest.mark.parametrize("answer, right", [
    ("B", 1), ("b", 1), ("(B) x", 1), ("(b", 1), ("Option B", 1), ("The answer is b.", 1), ("because", 1), (" \nB", 1),
    ("", 0), ("The answer is: B", 0), ("answer is B", 0), ("A", 0), ("((B", 0), ("option  B", 0)])
def test_mmstar_looks_at_four_places(answer, right):
    assert letters.mmstar_right(answer, "B") == right


@pytest.mark.parametrize("answer, llava, lmms", [
    ("B", "B", 1), ("b", "", 1), ("B. cat", "B", 1), ("B.", "", 1), ("B.cat", "", 1), ("The answer is B.", "B", 0),
    ("The answer is B", "", 0), ("The answer is B!", "B", 0), ("The answer is A. The answer is B.", "", 0),
    ("So: The answer is B.", "B", 0), ("E", "", 0), ("E. x", "", 0), (" B", "", 1), ("", "", 0), ("B) x", "", 0)])
def test_scienceqa_reads_letters_as_llava(answer, llava, lmms):
    assert letters.scienceqa_letter(answer, "ABCD") == llava                       # E has no option
    assert letters.scienceqa_lmms_right(answer, "B") == lmms


@pytest.mark.parametrize("answer, right", [
    ("B", 1), ("b", 1), ("(B)", 1), (" B. a cat", 1), ("b. a cat", 0), ("B cat", 0), ("B!", 1), ("", 0), (" B", 0)])
def test_ai2d_compares_letter_or_whole_answer(answer, right):
    assert letters.ai2d_right(answer, "B") == right


@pytest.mark.parametrize("answer, first, whole", [("B", 1, 1), ("B.", 1, 0), ("Bad", 1, 0), (" B", 1, 0), ("b", 0, 0),
                                                  ("", 0, 0), ("(B)", 0, 0)])
def test_seed_takes_the_first_character(answer, first, whole):
    assert (letters.seed_right(answer, "B"), letters.seed_right(answer, "B", "llava")) == (first, whole)


@pytest.mark.parametrize("answer, official, llava, lmms", [
    ("yes", 1, 1, 1), ("Yes", 0, 1, 1), ("yes.", 0, 1, 1), ("Yes...", 0, 1, 1), ("yes!", 0, 0, 1), (" yes", 0, 0, 0)])
def test_gqa_is_exact_and_its_harnesses_not(answer, official, llava, lmms):
    assert [words.gqa(answer, ["yes"], rule) for rule in ("official", "llava", "lmms")] == [official, llava, lmms]


@pytest.mark.parametrize("answer, official, lmms", [
    ("Yes", "yes", "yes"), ("no.", "no", "no"), ("y", "other", "yes"), ("N", "other", "no"), ("  yes", "other", "yes"),
    ("know", "no", "no"), ("is yes", "other", "other"), ("Not sure", "no", "no"), ("none", "no", "no"),
    ("N.o", "other", "no"), ("ye", "other", "other"), ("Y.", "other", "yes"), ("Yes, it is", "yes", "yes"),
    ("The answer is yes", "other", "other"), ("", "other", "other"), ("noyes", "no", "no"), ("no y", "no", "no")])
def test_mme_reads_four_characters(answer, official, lmms):
    assert (yes_no.mme_answer(answer), yes_no.mme_answer(answer, lmms=True)) == (official, lmms)


def test_mme_sums_accuracy_and_accuracy_plus():
    """Two images of one subtask: both right, one of two right: 75 + 50. Another subtask: nothing right."""
    questions = [{"type": k, "group": g, "answers": [a]} for k, g, a in [
        ("OCR", "1", "yes"), ("OCR", "1", "no"), ("OCR", "2", "yes"), ("OCR", "2", "no"),
        ("code_reasoning", "1", "yes"), ("code_reasoning", "1", "no")]]
    points, result = tasks.evaluate("mme", ["Yes", "No", "Yes", "Yes", "maybe", None], questions)
    assert points == [1, 1, 1, 0, 0, 0] and result["accuracy"] == 0.5
    assert result["subtasks"] == {"OCR": 125, "code_reasoning": 0}
    assert (result["mme"], result["perception"], result["cognition"]) == (125, 125, 0)
    low, high = result["mme_ci95"]
    assert 50 <= low <= 125 <= high <= 200 and result["images_without_two_questions"] == 0
    assert result["perception_ci95"] == [low, high] and result["cognition_ci95"] == [0, 0]
    perfect = tasks.evaluate("mme", ["yes", "no"] * 3, questions)[1]
    assert (perfect["mme"], perfect["mme_ci95"]) == (400, [400, 400])
    assert len(yes_no.PERCEPTION) * 200 == 2000 and len(yes_no.COGNITION) * 200 == 800      # the sum of 2800
    assert tasks.evaluate("mme", ["yes"], questions[:1])[1]["images_without_two_questions"] == 1


def test_mmbench_needs_every_rotation():
    def ask(group, truth, options):
        return {"group": group, "answers": [truth], "options": dict(zip("AB", options)), "type": "x" if group else "y"}
    questions = [ask(0, "A", ["cat", "dog"]), ask(1, "A", ["red", "blue"]), ask(0, "B", ["dog", "cat"]),
                 ask(1, "B", ["blue", "red"])]
    points, result = tasks.evaluate("mmbench", ["A", "A", "it is a cat", "A"], questions)
    assert points == [1, 1, 1, 0]
    assert (result["n"], result["groups"], result["accuracy"], result["vanilla"]) == (4, 2, 0.5, 1)
    assert result["types"] == {"x": 0, "y": 1} and result["counts"] == {"x": 1, "y": 1}
    assert result["ci95"] == list(certainty.wilson(1, 2)) and result["vanilla_ci95"] == list(certainty.wilson(2, 2))
    assert tasks.evaluate("mmstar_vlmeval", ["A", "A", "it is a cat", "A"], questions)[1]["accuracy"] == 0.75


def test_mmstar_in_lmms_averages_types():
    questions = [{"type": t, "answers": ["A"], "options": OPTIONS} for t in "xxxy"]
    official, lmms = (tasks.evaluate(t, ["A", "A", "A", "B"], questions)[1] for t in ("mmstar", "mmstar_lmms"))
    assert (official["accuracy"], lmms["accuracy"]) == (0.75, 0.5)
    assert lmms["ci95"] == [0.5, 0.5]                           # each type is resampled by itself, and is constant here


def test_scienceqa_reports_questions_with_image():
    questions = [{"type": "x", "answers": ["A"], "options": OPTIONS, "image": i} for i in (None, "a", "b", None)]
    result = tasks.evaluate("scienceqa", ["A", "A", "B", None], questions)[1]
    assert (result["accuracy"], result["with_image"], result["n_with_image"]) == (0.5, 0.5, 2)
    result = tasks.evaluate("scienceqa", ["B", "A", "A", None], questions)[1]
    assert (result["accuracy"], result["with_image"]) == (0.5, 1)


@pytest.mark.parametrize("answer, truth, right", [
    ("10", "10.5", 1), ("9.5", "10", 1), ("9.49", "10", 0), ("5%", "0.05", 1), ("5", "5%", 0), ("1,000", "1000", 0),
    ("0", "0", 1), ("0.0", "0", 0), ("$10", "10", 0), ("yes.", "yes", 0), ("YES", "yes", 1), ("-10", "-10.4", 1),
    ("-10", "10", 0), ("nan", "5", 0), ("", "5", 0), ("5%%", "0.05", 1), ("0%", "0", 0), ("1e1", "10", 1)])
def test_chartqa_allows_five_percent(answer, truth, right):
    assert reading.chartqa_right(answer, truth) == right


@pytest.mark.parametrize("answer, truth, official, pix2struct", [
    ("199B", ["1998"], 0.75, 0.75), ("The answer is 1998", ["1998"], 0, 0), ("NEWYORK", ["New York"], 0.875, 0.875),
    ("ab", ["cd", "abc"], 2 / 3, 2 / 3), ("a", ["ab"], 0.5, 0.5), ("", [""], 1, 1),
    ("  New   York ", ["new york"], 1, 8 / 13), ("Straße", ["strasse"], 5 / 7, 5 / 7), ("ß", ["s"], 0.5, 0),
    ("abc", ["abd", "xyz"], 2 / 3, 2 / 3), ("abcdef", ["abcxyz"], 0.5, 0.5), ("a b", ["ab"], 2 / 3, 2 / 3)])
def test_anls_is_zero_below_one_half(answer, truth, official, pix2struct):
    assert reading.anls(answer, truth) == pytest.approx(official, abs=1e-12)
    assert reading.anls(answer, truth, "pix2struct") == pytest.approx(pix2struct, abs=1e-12)


def test_edits_are_the_least():
    assert [reading.edits(a, b) for a, b in (("kitten", "sitting"), ("", "abc"), ("abc", ""), ("ab", "ba"),
                                             ("flaw", "lawn"), ("same", "same"))] == [3, 3, 3, 2, 2, 0]


@pytest.mark.parametrize("answer, truth, dataset, official, lmms", [
    ("It says STOP", ["stop"], "IIIT5K", 1, 1), ("12", ["2"], "svt", 1, 1), ("a\nb", ["A B"], "svt", 1, 1),
    ("x", ["y", "X "], "svt", 1, 1), ("ab", ["a b"], "svt", 0, 0), ("\\frac { a } b", ["\\frac{a}b"], "HME100k", 1, 1),
    ("\\frac { A } b", ["\\frac{a}b"], "HME100k", 0, 0), ("ＡＢＣ１", ["abc1"], "svt", 0, 1),
    ("ＡＢＣ", ["ABC"], "HME100k", 0, 0), ("a　b", ["a b"], "svt", 0, 1)])
def test_ocrbench_looks_for_the_answer_inside(answer, truth, dataset, official, lmms):
    assert reading.ocrbench_right(answer, truth, dataset) == official
    assert reading.ocrbench_right(answer, truth, dataset, lmms=True) == lmms
    question = [{"answers": truth, "dataset": dataset, "type": "t"}]
    assert tasks.evaluate("ocrbench", [answer], question)[1]["ocrbench"] == official


# ---- captions -------------------------------------------------------------------------------------------------------

REFERENCES = [["a cat sits on a mat", "the cat is on the mat"],
              ["a dog runs in the park", "dog running through a park"],
              ["two people ride bikes on a street", "people riding bicycles down the street"]]
CAPTIONS = ["a cat on a mat", "a dog in a park", "a bus on the street"]


def test_cider_equals_pycocoevalcap():
    assert captions.cider(CAPTIONS, REFERENCES) == pytest.approx(
        [3.1218646905746237, 2.377441626220262, 1.0584530609594998], abs=1e-12)
    repeated = ["a cat cat cat on a mat mat", "dog dog dog park park", "street"]          # n-grams are clipped
    assert captions.cider(repeated, REFERENCES) == pytest.approx(
        [1.4638731743239246, 0.6885934233761232, 0.729563168412398], abs=1e-12)
    questions = [{"answers": r, "type": "all"} for r in REFERENCES]
    points, result = tasks.evaluate("coco", CAPTIONS, questions)
    assert result["accuracy"] == pytest.approx(2.1859197925847953, abs=1e-12) and points[0] > points[1] > points[2]
    assert tasks.evaluate("coco", [None] + CAPTIONS[1:], questions)[0][0] == 0


def test_cider_of_odd_captions_is_defined():
    assert captions.cider(["a cat"], [["a cat"]]) == [0]         # one image: every n-gram is in all images
    assert captions.cider(["", "a cat sits on a mat"], REFERENCES[:2])[0] == 0
    assert captions.cider([r[0] for r in REFERENCES], [r[:1] for r in REFERENCES]) == pytest.approx([10] * 3, abs=1e-9)
    once, twice = (captions.cider([c, "x"], [["a cat on a mat"], ["y z"]])[0]
                   for c in ("a cat on a mat", "a cat on a mat a cat on a mat"))
    assert twice < once                                          # repeated words do not help: clipped, and longer


@pytest.mark.parametrize("caption, ptb", [
    ("A man's dog doesn't run.", "a man 's dog does n't run"), ("wow!! really?? no!?", "wow !! really ?? no !?"),
    ('A "red" bus (old) at 5:30 p.m. on the U.S. street', "a red bus -lrb- old -rrb- at 5:30 p.m. on the u.s. street"),
    ("Two black-and-white cats, sitting; on a mat!", "two black-and-white cats sitting on a mat"),
    ("The kids' toys are $5 & 50% off...", "the kids toys are $ 5 & 50 % off"),
    ("I can't believe it's 3,000 ft. high", "i ca n't believe it 's 3,000 ft. high"),
    ("They're gonna play; we'd like it, he'll go", "they 're gon na play we 'd like it he 'll go"),
    ("a cat/dog on the and/or sign", "a cat/dog on the and/or sign"), ("a man -- with hat", "a man with hat"),
    ("a woman's 10-year-old son cannot swim", "a woman 's 10-year-old son can not swim"), ("a 3/4 view", "a 3/4 view"),
    ("the '90s car", "the '90s car"), ("dogs [and] cats {too}", "dogs -lsb- and -rsb- cats -lcb- too -rcb-"),
    ("won't, shan't", "wo n't sha n't"), ("10 ft. tall. Mr. Bean", "10 ft. tall mr. bean"), ("", ""),
    ("two men's and women’s shoes", "two men 's and women 's shoes"), ("Café façade", "café façade")])
def test_caption_words_are_those_of_ptb(caption, ptb):
    """What Stanford's PTB tokenizer (Java, in pycocoevalcap 1.2) gave"""
    assert " ".join(captions.caption_words(caption)) == ptb


# ---- boxes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, box", [
    ("<box>(0,333),(999,666)</box>", (0, 1 / 3, 1, 2 / 3)), ("(0,333),(999,666)", (0, 1 / 3, 1, 2 / 3)),
    ("<ref>it</ref><box>(0,0),(999,999)</box><box>(1,1),(2,2)</box>", (0, 0, 1, 1)), ("<box>(0,333),(999</box>", None),
    ("<box>(0,333),(999,6,6)</box>", None), ("<box>(a,b),(c,d)</box>", None),
    ("(0.5 , 3),( 999,666 )", (0.5 / 999, 3 / 999, 1, 2 / 3)),
    ("(0,333), (999,666)", None), ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
    ("[0.1,0.2,0.3,1]", (0.1, 0.2, 0.3, 1)),
    ("It is [ 0.1,  0.2, 0.3, 0.4 ].", (0.1, 0.2, 0.3, 0.4)), ("[0.1, 0.2, 0.3]", None), ("[.1, .2, .3, .4]", None),
    ("[1, 2] [0, 0, 1, 1] [0, 0, 0, 0]", (0, 0, 1, 1)), ("[-0.1, 0, 1, 1]", (-0.1, 0, 1, 1)),
    ("<loc0256><loc0128><loc0768><loc0512> cat", (0.125, 0.25, 0.5, 0.75)), ("<loc256><loc128><loc768><loc512>", None),
    ("<loc0256><loc0128><loc0768>", None), ("<loc0256> <loc0128><loc0768><loc0512>", None), ("", None), ("no", None)])
def test_boxes_are_read_in_three_forms(text, box):
    assert boxes.read_box(text) == (box and pytest.approx(box, abs=1e-12))


@pytest.mark.parametrize("a, b, overlap", [
    ((0, 0, 1, 1), (0, 0, 1, 1), 1), ((0, 0, 1, 1), (0, 0, 1, 0.5), 0.5), ((0, 0, 1, 1), (1, 0, 2, 1), 0),
    ((0, 0, 0.5, 1), (0.25, 0, 0.75, 1), 1 / 3), ((0, 0, 0, 0), (0, 0, 0, 0), 0), ((1, 1, 0, 0), (0, 0, 1, 1), 0),
    ((0.2, 0.2, 0.4, 0.4), (0, 0, 1, 1), 0.04)])
def test_iou_is_intersection_over_union(a, b, overlap):
    assert boxes.iou(a, b) == boxes.iou(b, a) == pytest.approx(overlap, abs=1e-12)


def test_refcoco_counts_half_an_overlap():
    questions = [{"answers": ["[0.0, 0.0, 1.0, 1.0]"], "type": "all"}] * 4
    answers = ["[0, 0, 1, 0.5]", "[0, 0, 1, 0.49]", "nowhere", None]
    points, result = tasks.evaluate("refcoco", answers, questions)
    assert points == [1, 0, 0, 0] and result["accuracy"] == 0.25 and result["without_box"] == 2
    assert result["iou"] == pytest.approx(0.99 / 4, abs=1e-12)
    assert result["iou_ci95"] == list(certainty.bootstrap([.5, .49, 0, 0])) and 0 <= result["iou_ci95"][0] < 0.24


def test_padded_boxes_are_moved_to_the_image():
    """An image of 100 x 51 on a square of 100: 24 rows above it, as LLaVA pads. Another of 50 x 100."""
    assert boxes.without_padding((0, 0.24, 1, 0.75), (100, 51)) == pytest.approx((0, 0, 1, 1), abs=1e-12)
    assert boxes.without_padding((0.25, 0, 0.75, 1), (50, 100)) == pytest.approx((0, 0, 1, 1), abs=1e-12)
    question = [{"answers": ["[0.0, 0.0, 1.0, 1.0]"], "type": "all", "size": [100, 20]}]
    assert tasks.evaluate("refcoco_padded", ["[0, 0.4, 1, 0.6]"], question)[1]["iou"] == pytest.approx(1, abs=1e-12)
    assert tasks.evaluate("refcoco", ["[0, 0.4, 1, 0.6]"], question)[1]["iou"] == pytest.approx(0.2, abs=1e-12)


def test_qwen_boxes_are_read_back():
    for box in ((0, 0, 1, 1), (0.1, 0.25, 0.333, 0.999), (-0.5, 0.2, 1.5, 0.3)):
        inside = [min(1, max(0, v)) for v in box]
        assert boxes.read_box(boxes.qwen_box(box)) == pytest.approx(inside, abs=0.5 / 999 + 1e-12)
    assert boxes.qwen_box((0, 0.5, 0.9999, 1)) == "<box>(0,500),(999,999)</box>"


# ---- certainty ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("right, n, low, high", [(81, 263, 0.2553, 0.3662), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1)])
def test_wilson_interval_equals_published_values(right, n, low, high):
    """81 of 263: Newcombe 1998, table I, method 3. None of n: from 0 to z^2 / (n + z^2)"""
    assert certainty.wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    assert certainty.wilson(0, n)[1] == pytest.approx(certainty.Z**2 / (n + certainty.Z**2), abs=1e-15)


def test_bootstrap_is_fixed_and_covers_the_mean():
    rng = random.Random(0)
    scores = [rng.random() for _ in range(400)]
    low, high = certainty.bootstrap(scores)
    assert (low, high) == certainty.bootstrap(scores) == certainty.interval(scores)
    assert low < sum(scores) / 400 < high
    assert high - low == pytest.approx(2 * 1.96 * (1 / 12 / 400) ** 0.5, rel=0.1)          # a uniform's variance: 1/12
    assert certainty.interval([0.0, 1.0, 1.0]) == certainty.wilson(2, 3)
    assert certainty.bootstrap([0.5] * 9) == (0.5, 0.5)


@pytest.mark.parametrize("b, c, p", [(0, 0, 1), (1, 0, 1), (5, 0, 0.0625), (10, 2, 79 / 2048),
                                     (2, 10, 79 / 2048), (6, 6, 1)])
def test_mcnemar_is_the_exact_sign_test(b, c, p):
    """10 of 12: 2 * (1 + 12 + 66) / 4096"""
    assert certainty.mcnemar(b, c) == pytest.approx(p, abs=1e-15)


def test_paired_tests_see_what_means_hide():
    same = certainty.paired([1.0, 0.0] * 50, [1.0, 0.0] * 50)
    assert (same["p"], same["difference"], same["better"], same["worse"]) == (1, 0, 0, 0)
    binary = certainty.paired([1.0] * 60 + [0.0] * 40, [1.0] * 50 + [0.0] * 50)
    assert binary["test"].startswith("McNemar") and binary["p"] == certainty.mcnemar(10, 0) < 0.01
    assert binary["difference"] == pytest.approx(0.1) and binary["ci95"][0] > 0
    graded = certainty.paired([0.6 + i / 500 for i in range(50)], [0.5 + i / 500 for i in range(50)])
    assert graded["test"] == "paired bootstrap" and graded["p"] == pytest.approx(1 / 1001)
    noise = [random.Random(i).random() for i in range(80)]
    assert certainty.paired(noise[:40], noise[40:])["p"] > 0.05


def test_without_true_answers_there_are_no_scores():
    points, result = tasks.evaluate("mmmu", ["A", None], [{"answers": [], "options": OPTIONS, "type": "x"}] * 2)
    assert points == [None, None] and result["accuracy"] is None and result["n"] == 2


def test_every_task_scores_and_compares():
    """A right answer scores 1 (captions: more than 0), none scores 0, and the result is JSON."""
    truth = {"text": "7", "letter": "B", "yes or no": "yes", "box": "[0.0, 0.0, 1.0, 1.0]", "captions": "a cat sits"}
    for name, task in tasks.TASKS.items():
        answer = truth[task.kind]
        other = "a dog runs" if task.kind == "captions" else answer
        questions = [{"answers": [a], "type": "t", "options": OPTIONS, "group": g, "dataset": "svt", "size": [9, 9],
                      "image": "i"} for a, g in ((answer, 1), (other, 2))]
        points, result = tasks.evaluate(name, [answer, None], questions)
        assert points[0] >= 1 and points[1] == 0 and result["ci95"][0] <= result["accuracy"] <= result["ci95"][1], name
        json.dumps(result | tasks.compare(name, [answer, None], [None, answer], questions), allow_nan=False)
