"""Answers of a word or a phrase: exact match, GQA, VQA accuracy (VQAv2, TextVQA, VizWiz).

The VQA rules are those of the VQA evaluation script (GT-Vision-Lab/VQA, vqaEval.py) and of its EvalAI variant (mmf,
m4c_evaluators.py), including the errors in these programs."""

import re
import string

# ---- exact match ----------------------------------------------------------------------------------------------------

def exact(answer, truth):
    """Return 1.0 if the answer is in the list `truth`, else 0.0. Case, extra spaces and a final period are ignored."""
    def bare(s):
        return " ".join(s.lower().split()).removesuffix(".").rstrip()
    return float(bare(answer) in {bare(t) for t in truth})


# ---- VQA accuracy ---------------------------------------------------------------------------------------------------

_FULL = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
you've""".split()
_DOUBLE = """couldn't've hadn't've mightn't've shouldn't've wouldn't've he'd've I'd've it'd've she'd've somebody'd've
someone'd've something'd've there'd've they'd've we'd've who'd've you'd've y'all'll y'all'd've 'ow's'at""".split()
CONTRACTIONS = {w.replace("'", ""): w for w in _FULL}
for _w in _DOUBLE:                                             # add the spellings that lack one apostrophe
    CONTRACTIONS |= {_w[:i] + _w[i + 1 :]: _w for i, c in enumerate(_w) if c == "'"}
CONTRACTIONS |= {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}
_NUMBERS = {"none": "0"}
_NUMBERS |= {w: str(i) for i, w in enumerate("zero one two three four five six seven eight nine ten".split())}
_PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"


def vqa_normalise(s, evalai=True):
    """Normalise an answer: remove punctuation and articles, write number words as digits, and add missing apostrophes
    (dont -> don't).

    evalai    True: as EvalAI's VQA scorer does it, also used for LLaVA. False: as the official VQA script does it"""
    if evalai:
        s = s.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    out = s = s.replace("\n", " ").replace("\t", " ").strip()
    for p in _PUNCTUATION:
        if p + " " in s or " " + p in s or re.search(r"(\d)(,)(\d)", s):
            out = out.replace(p, "")
        else:
            out = out.replace(p, " ")
    # this line repeats two errors of the official script, so that the scores are equal: `(?!<=` should be `(?<!`, and
    # 32 should be a flag (re.UNICODE), not the count
    out = re.sub(r"(?!<=\d)(\.)(?!\d)", "", out, count=32)
    words = [_NUMBERS.get(w, w) for w in out.lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def vqa_accuracy(answer, truth, evalai=True):
    """Score an answer. truth: the answers of the annotators, usually ten; a single one counts as ten equal ones.

    An answer is compared with all annotators but one: if k of them gave it, it gets min(1, k / 3). Each annotator is
    left out once, and the score is the mean. So it is 0.3, 0.6, 0.9 or 1 if 1, 2, 3 or 4 of ten gave the answer.
    The official script does not normalise answers if all annotators agree."""
    truth = truth * 10 if len(truth) == 1 else truth
    if evalai or len(set(truth)) > 1:
        answer, truth = vqa_normalise(answer, evalai), [vqa_normalise(t, evalai) for t in truth]
    else:
        answer = answer.replace("\n", " ").replace("\t", " ").strip()
    same = sum(t == answer for t in truth)
    return sum(min(1.0, (same - (t == answer)) / 3) for t in truth) / len(truth)


# ---- GQA -------------------------------------------------------------------------------------------------------------

def gqa(answer, truth, rule="official"):
    """Compare an answer with the true one -> is it right?

    official    the same string: Stanford's eval.py normalises nothing. If "yes" is true, "Yes" and "yes." are wrong
    llava       LLaVA removes final periods and writes small letters before it (scripts/convert_gqa_for_eval.py)
    lmms        lmms-eval ignores case and punctuation, as the tasks do that use its metric exact_match"""
    if rule == "llava":
        return answer.rstrip(".").lower() in truth
    if rule == "lmms":
        return bare_of_punctuation(answer) in map(bare_of_punctuation, truth)
    return answer in truth


def bare_of_punctuation(s):
    """Write small letters, and remove ASCII punctuation. Spaces stay: "t-shirt" becomes "tshirt"."""
    return s.lower().translate(str.maketrans("", "", string.punctuation))
