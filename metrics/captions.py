"""CIDEr-D (Vedantam, Zitnick, Parikh 2015, arXiv 1411.5726), the score of captions: COCO, NoCaps.

A caption and its references become vectors of n-grams of 1 to 4 words. An n-gram weighs more if fewer images have it
in their references. The score is the mean similarity to the references, times 10. A single image scores 0.

The captions are split into words by `caption_words`. The official program uses the PTB tokenizer of Stanford CoreNLP,
which needs Java. docs/evaluation.md says how far both agree."""

import math
import re
from collections import Counter

SIGMA = 6.0            # of the penalty for a length that differs from the reference's
_SPLIT = {"cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gotta": "got ta", "gimme": "gim me"}
_SPLIT |= {bracket: f" -{name}- " for bracket, name in zip("()[]{}", ("lrb", "rrb", "lsb", "rsb", "lcb", "rcb"))}
_WORD = re.compile(r"-[lr][rsc]b-|n't\b|'(?:s|m|d|re|ve|ll)\b|'\d\ds\b|(?:[a-z]\.){2,}"
                   r"|(?:mr|mrs|ms|dr|st|ft|jr|vs)\.(?=\s)|\d+(?:[.,:/]\d+)+|\w+(?=n't\b)|\w+(?:[-.&@_/]\w+)*"
                   r"|[$%#&*+=<>~^|@°§£€]|[?!]{2,}")


def caption_words(caption):
    """Split a caption into words as the PTB tokenizer does, with a regular expression: small letters, no punctuation;
    "don't" is do n't, "man's" is man 's; brackets become -lrb- and -rrb-, which the official list of punctuation misses
    because it has them in capitals."""
    caption = caption.lower().replace("\u2019", "'")
    caption = re.sub(r"\b(?:cannot|gonna|wanna|gotta|gimme)\b|[][(){}]", lambda m: _SPLIT[m[0]], caption)
    return _WORD.findall(caption)


def ngrams(words):
    """-> Counter of the n-grams of 1 to 4 words"""
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def cider(captions, references, split=caption_words):
    """Score captions -> list of CIDEr-D, 0 to 10. references: for each caption the list of true ones of its image"""
    truth = [[ngrams(split(r)) for r in refs] for refs in references]
    frequency = Counter(g for refs in truth for g in set().union(*refs))         # in the references of how many images
    n_images = math.log(len(references))

    def vector(grams):
        """-> weights of the n-grams for each n, their norms, and the number of bigrams, which stands for the length"""
        weights = [{}, {}, {}, {}]
        for g, k in grams.items():
            weights[len(g) - 1][g] = k * (n_images - math.log(max(1.0, frequency[g])))
        norms = [math.sqrt(sum(w * w for w in ws.values())) for ws in weights]
        return weights, norms, sum(k for g, k in grams.items() if len(g) == 2)

    scores = []
    for caption, refs in zip(captions, truth, strict=True):
        said, said_norms, said_length = vector(ngrams(split(caption)))
        total = 0.0
        for weights, norms, length in map(vector, refs):
            for n in range(4):
                same = sum(min(w, weights[n].get(g, 0.0)) * weights[n].get(g, 0.0) for g, w in said[n].items())
                size = said_norms[n] * norms[n]
                total += (same / size if size else same) * math.exp(-((said_length - length) ** 2) / (2 * SIGMA**2))
        scores.append(10 * total / 4 / len(refs))
    return scores
