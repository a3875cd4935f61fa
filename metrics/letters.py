"""Answers that are the letter of an option: MMStar, MMBench, ScienceQA, AI2D, SEED-Bench. The programs that read a
letter out of an answer differ, and so do their scores. So each program has a function here.

    answer     what the model said            letters    the letters of the options: "ABCD"
    options    {letter: text of the option}   ->         the letter that was read, or ""
"""

import re
import string

# ---- MMStar (Chen et al. 2024, arXiv 2403.20330) -------------------------------------------------------------------

def mmstar_right(answer, truth):
    """MMStar's own rule (eval/vlmeval/evaluate/mmstar.py): the letter is the first character, or it follows "(",
    "option " or "the answer is ". Case is ignored. So "A cat" is A, and "because" is B."""
    answer, truth = (s.lower().strip().replace("\n", " ") for s in (answer, truth))
    return any(answer.startswith(start + truth) for start in ("", "(", "option ", "the answer is "))


# ---- VLMEvalKit: the official rule of MMBench (Liu et al. 2023, arXiv 2307.06281) ----------------------------------

REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")
# the program's error: without a word boundary and without regard to case, "The answer is dog" is D
_STATED = re.compile(r"(?i)answer\s+is\s+\**([ABCD])")


def vlmeval_letter(answer, options):
    """VLMEvalKit's rule without a judge (utils/matching_util.py at e8e78f0).

    1. Punctuation becomes spaces. If exactly one option letter is a word, and its first place is among the last four
       words, it is the answer. 2. Else the first "answer is X". 3. Else, if the text of exactly one option is in the
       answer, and the answer is at most twice as long as all options together, this option. A refusal or a lone Z is
       "Z": never right."""
    if any(s in answer for s in REFUSALS):
        return "Z"
    words = answer.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
    found = [c for c in options if c in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - 5:
        return found[0]
    if not found and "Z" in words:
        return "Z"
    stated = _STATED.search(answer)
    if stated and stated[1].upper() in options:
        return stated[1].upper()
    return named_option(answer, options, 2 * sum(map(len, options.values())))


def named_option(answer, options, longest=float("inf")):
    """-> the letter of the only option whose text is in the answer, or "". longest: most characters of the answer"""
    found = [c for c, text in options.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 and len(answer) <= longest else ""


# ---- lmms-eval ------------------------------------------------------------------------------------------------------

_PHRASES = [f"{the}{what} is" for the in ("the ", "") for what in (
    "answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")]
_PHRASES += ["i choose", "i select", "i pick", "my answer is", "my choice is",
             "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"]


def lmms_letter(answer, letters):
    """lmms-eval's rule (tasks/_task_utils/mcq_extract.py at 75571cf). Each place where a letter may be meant has a
    rank. The highest rank counts, and among equal ranks the last place:

        10  the answer begins with the letter       5  A.       2  A and a space
         9  it ends with the letter                 4  A:       0  anywhere, if no other rank was found
         7  behind "the answer is" and the like     3  A)       6  (A)

    The program's error: for rank 7 any capital letter of an option counts, so "The answer is a Dog" is D."""
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text, found = f" {text} ", []                                                           # [(rank, place, letter)]
    for rank, form in ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} ")):
        found += [(rank, text.rfind(form.format(c)), c) for c in letters if form.format(c) in text]
    for phrase in _PHRASES:
        if phrase in text.lower():
            places = ((text.find(c, text.lower().find(phrase) + len(phrase)), c) for c in letters)
            found += [(7, place, c) for place, c in places if place >= 0]
    bare = text.strip()
    found += [(10, 0, c) for c in letters if bare.startswith(c) and not bare[1:2].isalpha()]
    found += [(9, len(text), c) for c in letters if bare.endswith(c) and not bare[-2:-1].isalpha()]
    found = found or [(0, text.rfind(c), c) for c in letters if c in text]
    return max(found, key=lambda f: f[:2])[2] if found else ""                     # the first of equal ones, as there


def mmbench_lmms_letter(answer, options):
    """lmms-eval's rule for mmbench_en_dev_static. 1. The only word that is a letter; but an A among more than three
    words may be an article. 2. The only letter with punctuation around it: A. A, A: A) A). (A) (A). :A :A, :A. :A)
    :A). 3. The only option whose text is in the answer. 4. lmms_letter. The program's error: steps 1 and 2 look for A
    to E, however many options there are."""
    words = answer.split()
    found = [c for c in "ABCDE" if c in words]
    if len(found) == 1 and not ("A" in words and len(words) > 3):
        return found[0]
    for before, after in (("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""),
                          (":", ","), (":", "."), (":", ")"), (":", ").")):
        found = [c for c in "ABCDE" if before + c + after in words]
        if len(found) == 1:
            return found[0]
    return named_option(answer, options) or lmms_letter(answer, sorted(options))


# ---- ScienceQA (Lu et al. 2022, arXiv 2209.09513), AI2D (Kembhavi et al. 2016), SEED-Bench (arXiv 2307.16125) -------

def scienceqa_letter(answer, letters):
    """LLaVA's rule (llava/eval/eval_science_qa.py): the whole answer is a letter A to E; or it begins with "A. "; or it
    has exactly one "The answer is A" with any character behind it. The program's error: the period is not escaped, so
    that character may be any, but there must be one. A letter without an option is wrong."""
    found = re.findall(r"The answer is ([A-Z]).", answer)
    if answer in [*"ABCDE"]:
        found = [answer]
    elif len(answer) >= 3 and answer[0] in "ABCDE" and answer[1:3] == ". ":
        found = [answer[0]]
    return found[0] if len(found) == 1 and found[0] in letters else ""


def scienceqa_lmms_right(answer, truth):
    """lmms-eval's rule: the whole answer is the letter, in either case; or the answer begins with a capital letter
    and a period, and this is the letter"""
    answer = answer.strip()
    return answer.lower() == truth.lower() or (answer[:1].isupper() and answer[1:2] == "." and answer[0] == truth)


def ai2d_right(answer, truth):
    """lmms-eval's rule; AI2D has no program of its own. A capital and a period at the beginning are the letter. Else
    the whole answer is compared; case and punctuation are ignored, so "(b)" is B, and "B cat" is nothing."""
    start = re.match(r"\s*([A-Z])\.", answer)
    answer = start[1] if start else answer
    return answer.lower().translate(str.maketrans("", "", string.punctuation)) == truth.lower()


def seed_right(answer, truth, rule="lmms"):
    """lmms: the first character is the letter (so "A dog" is A). llava: the answer is the letter and nothing else. The
    benchmark's own program compares the losses of the options and reads no answers."""
    return answer == truth if rule == "llava" else answer.strip()[:1] == truth
