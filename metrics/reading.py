"""Answers that were read from charts, documents and signs: ChartQA, DocVQA, InfoVQA, OCRBench."""


# ---- ChartQA (Masry et al. 2022, arXiv 2203.10244) -----------------------------------------------------------------

def chartqa_right(answer, truth):
    """Relaxed match, as pix2struct's metrics.py has it (lmms-eval and Qwen-VL copy it): a number may differ by 5 % of
    the true one; "12%" is 0.12. Anything else must be the same string; case is ignored. Nothing is stripped: "1,000",
    "$10" and "yes." are strings. A true number of 0 is compared as a string, so "0.0" is not "0"."""
    def number(s):
        try:
            return float(s.rstrip("%")) / 100 if s.endswith("%") else float(s)
        except ValueError:
            return None

    said, true = number(answer), number(truth)
    if said is not None and true:
        return abs(said - true) / abs(true) <= 0.05
    return answer.lower() == truth.lower()


# ---- DocVQA (arXiv 2007.00398) and InfoVQA (arXiv 2104.12756) ------------------------------------------------------

def edits(a, b):
    """Levenshtein distance -> the least number of insertions, deletions and substitutions that turn a into b"""
    row = list(range(len(a) + 1))
    for i, y in enumerate(b):
        left, row = row, [i + 1]
        for j, x in enumerate(a):
            row.append(min(left[j] + (x != y), left[j + 1] + 1, row[j] + 1))
    return row[-1]


def anls(answer, truth, rule="official"):
    """Average normalised Levenshtein similarity of one answer: 1 - edits / length, the best over the true answers; less
    than 0.5 counts as 0.

    official      the challenge's program (infographicsvqa_eval.py; lmms-eval copies it): the edits are counted in small
                  letters with single spaces, but the length is that of the longer string before that
    pix2struct    edits and length of the strings in small letters; spaces count"""
    scores = []
    for t in truth:
        a, b = (s.lower() if rule == "pix2struct" else " ".join(s.lower().split()) for s in (answer, t))
        longest = max(len(a), len(b)) if rule == "pix2struct" else max(len(answer.upper()), len(t.upper()))
        scores.append(1 - edits(a, b) / longest if longest else 1.0)
    return max(scores) if max(scores) >= 0.5 else 0.0


# ---- OCRBench (Liu et al. 2023, arXiv 2305.07895) -------------------------------------------------------------------

def ocrbench_right(answer, truth, dataset, lmms=False):
    """OCRBench's example.py: a true answer is part of the answer. Line breaks become spaces, case is ignored. Formulas
    (dataset HME100k): all spaces are removed, case counts. A true answer "2" is also found in "12".

    lmms    lmms-eval also reads full-width characters as ASCII, but not in formulas"""
    def plain(s):
        if dataset == "HME100k":
            return s.strip().replace("\n", " ").replace(" ", "")
        return (s.translate(WIDE) if lmms else s).lower().strip().replace("\n", " ")
    return any(plain(t) in plain(answer) for t in truth)


WIDE = {i: i - 0xFEE0 for i in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def ocrbench_totals(answers, questions, points):
    """-> dict: the sum of the points, which papers report; of 1000 questions"""
    return {"ocrbench": sum(points)}
