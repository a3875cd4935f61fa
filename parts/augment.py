"""Augmentation of training images that keeps their texts true: the setting `augment`, names with commas between them.

    jitter   brightness, contrast and saturation, each times 0.9 to 1.1
    crop     cuts off at most a tenth of width and height, and resizes to the old size
    flip     exchanges left and right, in half of the samples that allow it

Crop and flip depend on all texts of the row, also on the answers. Both need texts that seem to be English: a text with
letters beyond ASCII, or with a frequent word of German, French, Spanish, Italian, Portuguese or Dutch, allows neither.
Neither is made where a text or a key of the row has coordinates, mentions writing, or has a digit. No crop where a
text counts, has a word for a number or a place in a row (three, third, last), or mentions an edge or a whole: a crop
may cut off one of "three boats". A flip needs more: the row must say "letters": false, because an image may have
letters that no text mentions, and no text may mention a side. A word with two meanings counts as the one that matters:
"he left" stops a flip. So a mistake in these rules mostly means less augmentation.

Not known to these rules: other languages in ASCII (Indonesian, Polish without accents, romanised Hindi), a text of
those six languages without any of the frequent words ("Gatti neri."), objects at the very edge that a text names
without a number, and images whose two sides differ in meaning without a word for it (a map). Leave crop and flip out
for such data. Validation and evaluation never augment. PaliGemma found no gain from augmentation (arXiv 2407.07726).

A change depends on (seed, step, number of the sample in its step) alone, not on ranks, workers or `augment`."""

import re
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from config import stop

KINDS = ("crop", "jitter", "flip")
CUT, SHIFT = 0.1, 0.1      # crop cuts off at most this share of a side; jitter changes a factor by at most this
SIDES = re.compile(r"\b(?:left|right|mirror|flip|revers|starboard|east|west|link[se]|rechts|rechte|gauche|droite|"
                   r"izquierd|derech|sinistr|esquerd|direit)\w*|clockwise|\b(?:o'?clock|destr[aeio])\b", re.I)
LETTERS = re.compile(r"\d|\b(?:read|letter|number|digit|word|text|writ|sign|sa(?:y|id)|spell|label|logo|caption|title|"
                     r"brand|plate|name|page|poster|screen|chart|clock|flag)\w*", re.I)
COUNTS = re.compile(r"\b(?:how many|count(?:s|ed|ing)?\b|edge|corner|border|margin|crop|cut off|whole|entire|complete|"
                    r"(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|"
                    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundreds?|thousands?|millions?|zero|single|twice|"
                    r"dozens?|both|pairs?|couples?|twins?|duo|trio|triplets?|quart(?:er|et)s?|"
                    r"half|halves|only|first|second|third|fourth|\w+[fxn]th|eighth|tenth|last|final)\b)", re.I)
FOREIGN = re.compile(r"\b(?:der|das|dem|und|ist|sind|eine?[nmrs]?|auf|mit|nicht|wie|zwei|drei|vier|fuenf|sechs|sieben|"
                     r"le|la|les|une?|des|et|est|dans|sur|avec|que|qui|quel\w*|deux|trois|quatre|cinq|sept|huit|"
                     r"el|los|las|una|es|en|con|del|como|hay|dos|tres|cuatro|cinco|seis|siete|ocho|"
                     r"il|gli|di|che|della?|sono|dove|quale|tre|quattro|cinque|sette|otto|"
                     r"uma?|os|em|com|da|duas|dois|quatro|sete|oito|de|het|een|op|wat|waar|twee|drie|vijf|"
                     r"welche?[mnrs]?|diese?[mnrs]?|est[aeo]s?|qual|quant[aeio]s?|welke|deze|heeft|hoeveel)\b", re.I)
PLACES = re.compile(r"[\[({<]\s*-?\d*\.?\d+\s*,\s*-?\d|<[^<>]{0,9}(?:loc|box|quad|point|ref)", re.I)
PLACE_KEYS = re.compile("box|point|polygon|mask|segment|region|coord", re.I)
NO_TEXT = re.compile(r"\.(?:image\w*|id|path|url|bytes|from|role|type)\b")              # keys of a row


class Change(NamedTuple):
    """What happens to the images of one sample"""
    corner: tuple | None = None    # of a crop: left and top, as shares of what it cuts off
    size: float = 1.0              # of a crop: width and height, as shares of the image's
    factors: tuple = ()            # brightness, contrast, saturation
    flip: bool = False

    def __call__(self, image):
        """An RGB PIL image -> a PIL image of the same size"""
        w, h = image.size
        if self.corner:
            left, top = ((1 - self.size) * at * side for at, side in zip(self.corner, (w, h)))
            image = image.resize((w, h), Image.BICUBIC, (left, top, left + self.size * w, top + self.size * h))
        for kind, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), self.factors):
            image = kind(image).enhance(factor)
        return ImageOps.mirror(image) if self.flip else image


def augment_kinds(names):
    """The setting -> the kinds of changes"""
    kinds = [name.strip() for name in names.split(",")] if names else []
    for kind in kinds:
        if kind not in KINDS:
            stop(f"augment={names}: expected some of {', '.join(KINDS)}, with commas between them")
    return kinds


def draw_change(kinds, row, seed, step, n):
    """kinds: those that are asked for; n: number of the sample in its step -> Change"""
    if not kinds:
        return Change()
    x = np.random.default_rng([seed, step, n, 1, 4]).random(7).tolist()            # all are drawn, whatever is used
    kinds = {*kinds} & allowed(row)
    return Change((x[0], x[1]) if "crop" in kinds else None, 1 - CUT * x[2] if "crop" in kinds else 1.0,
                  tuple(1 - SHIFT + 2 * SHIFT * v for v in x[3:6]) if "jitter" in kinds else (),
                  "flip" in kinds and x[6] < 0.5)


def allowed(row):
    """-> the kinds that keep the texts of a row true"""
    values = [*walk(row)]
    text = "\n".join(x for path, x in values if isinstance(x, str) and not NO_TEXT.search(path))
    places = any(PLACE_KEYS.search(path) for path, x in values if x is not None)
    if places or PLACES.search(text) or LETTERS.search(text):
        return {"jitter"}
    if FOREIGN.search(text) or any(c.isalpha() and not c.isascii() for c in text):
        return {"jitter"}
    kinds = {"jitter"} if COUNTS.search(text) else {"jitter", "crop"}
    return kinds | {"flip"} if row.get("letters") is False and not SIDES.search(text) else kinds


def walk(x, path=""):
    """-> (".key.key", value) for all values in a row, at any depth"""
    if isinstance(x, dict | list):
        for key, y in x.items() if isinstance(x, dict) else (("", y) for y in x):
            yield from walk(y, f"{path}.{key}" if key else path)
    else:
        yield path, x
