"""lmms-eval asks and scores; a pumice model answers, with its own template, images and generation.

    python -m tools.harness_lmms --model_args model=runs/sft --tasks pope,mme --batch_size 16

All options are lmms-eval's. model_args: those of Pumice below. lmms-eval itself reads a published LLaVA folder, with
`--model llava_hf`. This file is for every other folder, for adapters, and for batches.

What lmms-eval (0.7.3, its interface of "simple" models) gives for each request, in request.args:

    generate_until   text, options, images of a document, number of the document, task, split
    loglikelihood    text, answer, images of a document, number of the document, task, split
"""

import sys

import torch
import torch.nn.functional as F

import config
from chat import encode
from data import pack
from generate import Chat, with_marker
from kernels.cross_entropy import IGNORE
from model import logits_head
from parts.spans import span_ends
from tools.harness import answer_batch

with config.one_line_errors():
    try:
        from lmms_eval.api.model import lmms
    except ImportError as e:
        config.stop(f"tools.harness_lmms needs lmms-eval ({e}): pip install lmms_eval")

UNUSED = {"image_aspect_ratio", "visual_cot"}            # options for other models: ours cuts images as in its training
WITHOUT_EFFECT = {"num_beams": 1, "repetition_penalty": 1, "top_p": 1, "top_k": 0}


class Pumice(lmms):
    """model: a folder that generate.Chat reads. dtype, template: as in Chat"""

    def __init__(self, model, batch_size=1, device="auto", dtype="auto", template="", max_batch_size=None):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            config.stop(f"batch_size={batch_size}: a number of questions, at least 1")
        self.chat, self.batch_size = Chat(model, device, dtype, template), int(batch_size)
        self.device = next(self.chat.model.parameters()).device

    def generate_until(self, requests):
        """-> a text per request. Requests with the same options are answered in batches."""
        answers, groups = [None] * len(requests), {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for group in groups.values():
            options = generation_options(requests[group[0]].args[1])
            for start in range(0, len(group), self.batch_size):
                batch = group[start:start + self.batch_size]
                questions = [(self.images(*requests[i].args[2:]), requests[i].args[0]) for i in batch]
                for i, answer in zip(batch, answer_batch(self.chat, questions, *options, seed=batch[0])):
                    answers[i] = answer
        return answers

    @torch.no_grad()
    def loglikelihood(self, requests):
        """-> (loss, is greedy?) per request: the mean of -log p over the tokens of the answer and of its end. It is not
        the sum of log p, because lmms-eval takes the choice with the smallest number, as its own models give a loss."""
        chat, results = self.chat, []
        chat.model.eval()
        for text, answer, *where in (request.args for request in requests):
            tiles, blocks = chat.look(self.images(*where))
            answer = answer if isinstance(answer, str) else answer(self.document(*where[1:]))
            turns = [(with_marker(text, len(blocks)), answer)]
            ids, labels = encode(chat.tok, chat.template, turns, blocks, chat.system)
            sample = ids, labels, torch.cat(tiles) if tiles else []
            batch = pack([sample], chat.cfg.vision.image_size, span_ends(chat.cfg), chat.reader).to(self.device)
            right = batch.labels[batch.labels != IGNORE]                                               # (R,)
            logits = chat.model(*batch, head=logits_head).float()                                      # (R, V)
            results.append((F.cross_entropy(logits, right).item(), torch.equal(logits.argmax(-1), right)))
        return results

    def generate_until_multi_round(self, requests):
        config.stop("pumice has no answers in several rounds (generate_until_multi_round) in lmms-eval")

    def document(self, number, task, split):
        return self.task_dict[task][split][number]

    def images(self, images_of, *where):
        """-> the list of PIL images of a document"""
        images = list(images_of(self.document(*where)) or [])
        for x in images:
            if not hasattr(x, "convert"):              # the path of a video, or sound
                raise config.BadSample("only images can be asked about", f"task {where[1]} has {type(x).__name__}")
        return images


def generation_options(options):
    """lmms-eval's generation options -> maximum tokens, temperature, stop texts"""
    options = {k: v for k, v in options.items() if v is not None}
    until, most = options.pop("until", []), options.pop("max_new_tokens", 1024)       # 1024: as its own LLaVA
    warm = options.pop("temperature", 0)
    temperature = warm if options.pop("do_sample", True) else 0
    for name, value in options.items():
        greedy = not temperature and name in ("top_p", "top_k")
        if name not in UNUSED and not greedy and WITHOUT_EFFECT.get(name) != value:
            config.stop(f"lmms-eval asks for {name}={value}; pumice's generation has no such option")
    return most, temperature, [text for text in ([until] if isinstance(until, str) else until) if text]


def register():
    """Make lmms-eval know `--model pumice`."""
    from lmms_eval.models import MODEL_REGISTRY_V2, ModelManifest
    MODEL_REGISTRY_V2.register_manifest(ModelManifest("pumice", simple_class_path=f"{__name__}.Pumice"), overwrite=True)


if __name__ == "__main__":
    from lmms_eval.__main__ import cli_evaluate
    register()
    sys.argv += ["--model", "pumice"]
    with config.one_line_errors():
        cli_evaluate()
