"""What the two harnesses share (harness_lmms.py, harness_vlmeval.py): answers to a batch of questions."""

from config import BadSample
from formats.configs import positions
from generate import with_marker
from tools.serve_answer import before_stop


def answer_batch(chat, questions, max_new_tokens, temperature=0.0, stops=(), seed=0):
    """Answer questions [(list of images, text)] in one batch -> list of texts. A text goes through the template of the
    model once, as one turn of a user. An answer ends before the first of the texts `stops`; white space at its
    beginning does not count."""
    prompts, pixels = [], []
    for images, text in questions:
        tiles, blocks = chat.look(images)
        prompts.append(chat.prompt([(with_marker(text, len(blocks)), None)], blocks))
        pixels += tiles
    longest = max(map(len, prompts))
    if longest + max_new_tokens > (most := positions(chat.cfg.text)):
        raise BadSample("a prompt and its answer are longer than the model's positions: a smaller max_new_tokens helps",
                        f"{longest} + {max_new_tokens} tokens, {most} positions")
    texts = chat.answers(prompts, pixels, max_new_tokens, temperature, seed)
    return [before_stop(text, stops)[0].strip() for text in texts]
