"""Rows of preference data: one question and two answers, or one answer and whether it is good. All published forms
become one form.

    TRL                  prompt, chosen, rejected: texts or lists of messages; or chosen and rejected alone, as whole
                         conversations; images or image
    RLAIF-V, RLHF-V      image, question, chosen, rejected; RLHF-V has the three as json in the field text
    2U1, LLaVA-NeXT      image, prompt, chosen, rejected
    LLaMA-Factory        conversations or messages that end in a question, chosen, rejected: one message each
    ms-swift             messages that end in the chosen answer, rejected_response
    LLaVA-RLHF           conversations, output_1, output_2, preference: 1 or 2
    TRL, unpaired        prompt, completion, label: is the completion desirable?
"""

from chat import IMAGE
from config import BadSample
from formats.rows import ASSISTANT, conversation
from formats.strict_json import strict_json

PROMPT = ("prompt", "question", "conversations", "messages")
OTHERS = ("image", "images", "system", "video", "videos", "audio", "audios")       # fields that conversation() reads


def preference(row):
    """Read a row. Raise BadSample if it is unusable. Return five values:

        [(question, answer)]           one pair of texts for each turn; the last answer is None
        chosen, rejected               two different answers to the last question
        [name]                         the images, each a file name, or the bytes of a file
        the system text, or None"""
    prompt, chosen, rejected = fields(row)
    if prompt is None:                                         # the question is in both
        if not (isinstance(chosen, list) and isinstance(rejected, list)):
            raise BadSample("no question")
        prompt = []
    (turns, names, system), (second, names_2, system_2) = (answered(row, prompt, a) for a in (chosen, rejected))
    if (turns[:-1], turns[-1][0], names, system) != (second[:-1], second[-1][0], names_2, system_2):
        raise BadSample("chosen and rejected differ in more than the last answer")
    chosen, rejected = turns[-1][1], second[-1][1]
    if chosen.strip() == rejected.strip():
        raise BadSample("chosen and rejected are equal")
    return asked(turns, names), chosen, rejected, names, system


def unpaired(row):
    """Read a row with one answer. Raise BadSample if it is unusable. Return the turns of preference(), the answer, is
    the answer desirable?, images and system text as preference()"""
    prompt, label = next((row[key] for key in PROMPT if row.get(key)), None), row.get("label")
    if prompt is None or row.get("completion") is None or label not in (True, False):
        raise BadSample("a prompt, a completion and a label (true or false) are needed")
    turns, names, system = answered(row, prompt, row["completion"])
    answer = turns[-1][1]
    return asked(turns, names), answer, bool(label), names, system


def answered(row, prompt, answer):
    """-> turns, names of the images, system text of the conversation that ends in this answer"""
    others = {key: row[key] for key in OTHERS if key in row}
    return conversation({**others, "messages": [*messages(prompt, "user"), *messages(answer, "assistant")]})


def asked(turns, names):
    """-> the turns without their last answer, with markers for the images"""
    turns = [*turns[:-1], (turns[-1][0], None)]
    if names and not any(IMAGE in question for question, _ in turns):       # most forms have no marker
        turns[0] = (f"{IMAGE}\n" * len(names) + turns[0][0], turns[0][1])
    return turns


def fields(row):
    """-> prompt (None if it is part of both answers), chosen, rejected, each as the row has it"""
    if isinstance(row.get("text"), str) and "chosen" not in row:
        try:
            row = strict_json(row["text"], "text")
        except ValueError as e:
            raise BadSample("no pair of answers", str(e)) from None
        row = row if isinstance(row, dict) else {}
    prompt = next((row[key] for key in PROMPT if row.get(key)), None)
    if "output_1" in row:
        if row.get("preference") not in (1, 2):
            raise BadSample("preference is neither 1 nor 2", f"{row.get('preference')!r:.80}")
        pair = (row["output_1"], row.get("output_2"))
        chosen, rejected = pair if row["preference"] == 1 else pair[::-1]
        prompt = prompt[:-1] if ends_in_answer(prompt) else prompt          # LLaVA-RLHF: the answer of a third model
    elif "rejected_response" in row:
        if not ends_in_answer(prompt):
            raise BadSample("no pair of answers")
        prompt, chosen, rejected = prompt[:-1], prompt[-1:], row["rejected_response"]
    else:
        chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None or rejected is None:
        raise BadSample("no pair of answers")
    return prompt, chosen, rejected


def ends_in_answer(prompt):
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    return isinstance(last, dict) and last.get("from", last.get("role")) in ASSISTANT


def messages(value, role):
    """A text, one message, or a list of messages -> a list of messages. A text is a message of this role. An answer
    keeps its text if its role is a model's name (LLaVA-RLHF)."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        return [{"role": role, "content": value.get("value", value.get("content"))}]
    return value if isinstance(value, list) else [None]
