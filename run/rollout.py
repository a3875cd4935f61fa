"""Roll-outs for train_grpo.py: questions, the model's own answers to them, their rewards, and micro-batches of these.

    P questions of a rank in one step   G answers to each (a group)   R tokens of answers in a packed sequence
"""

import contextlib
import math
import time
from typing import NamedTuple

import torch

import chat
from config import BadSample, stop
from data import Batch, Encoder, Steps, best_fit, pack, send
from engine import unwrap
from formats import configs
from formats.rows import conversation
from generate import generate, with_marker
from kernels.cross_entropy import IGNORE, row_losses
from loss import clipped_loss, group_advantages, kl_estimate
from parts import instruct
from parts.build import image_layout
from parts.spans import span_ends
from run import plan, stage
from run.reference import adapters_off
from run.validate import level

FACTS = "reward", "reward_std", "equal_groups", "answer_tokens", "finished"     # of log.jsonl: means over the answers


class Question(list):
    """The ids of a prompt"""
    row = ()               # question, reference, type, name of the image, id


class QuestionEncoder(Encoder):
    """Turns a row into the prompt of a question. A row is one of a file of questions (text, answer), or a conversation,
    whose last answer is the reference."""

    def __call__(self, row, root=""):
        """-> ids (Question), labels (none is supervised), names of the images, 0"""
        if "text" in row and "answer" in row:
            image = row.get("image")
            names, system = [image] if image else [], None
            turns, reference = [(with_marker(row["text"], len(names)), None)], row["answer"]
        else:
            turns, names, system = conversation(row)
            turns, reference = [*turns[:-1], (turns[-1][0], None)], turns[-1][1]
        if not isinstance(reference, str) or not reference.strip():
            raise BadSample("a question without a true answer")
        ids, _ = self.encode(turns, self.blocks(names, root), system)
        if len(ids) > self.max_len:
            raise BadSample("the question is longer than max_len", f"{len(ids)} tokens, max_len={self.max_len}")
        out = Question(ids)
        shown = names[0] if names and isinstance(names[0], str) else None
        out.row = (turns[-1][0].replace(chat.IMAGE, "").strip(), reference, str(row.get("type", "all")), shown,
                   str(row.get("question_id", row.get("id"))))
        return out, [IGNORE] * len(ids), names, 0


class QuestionBatch(NamedTuple):
    """Prompts of a step that fit into one packed sequence"""
    batch: Batch
    prompts: list          # (n,) tensors of ids
    images: list           # (i, 3, S, S) uint8 of each prompt
    rows: list             # Question.row of each prompt

    ids = property(lambda self: self.batch.ids)
    labels = property(lambda self: self.batch.labels)
    lo = property(lambda self: self.batch.lo)


def pack_questions(samples, side, span_ends=None, reader=None, weights=()):
    """As data.pack -> QuestionBatch"""
    none = torch.zeros(0, 3, side, side, dtype=torch.uint8)
    return QuestionBatch(pack(samples, side, span_ends, reader), [torch.tensor(ids) for ids, _, _ in samples],
                         [images if len(images) else none for _, _, images in samples],
                         [list(ids.row) for ids, _, _ in samples])


class QuestionSteps(Steps):
    pack = staticmethod(pack_questions)


class Rolled(NamedTuple):
    """A packed sequence of answers with their prompts"""
    batch: Batch
    advantage: torch.Tensor    # (R,) of each token's answer
    weight: torch.Tensor       # (R,) of each token in the loss
    old: torch.Tensor          # (R,) log p when the answers were generated; (0,) for a single update: as log p is then
    reference: torch.Tensor    # (R,) log p without adapters; (0,) if kl is 0

    ids = property(lambda self: self.batch.ids)
    labels = property(lambda self: self.batch.labels)
    images = property(lambda self: self.batch.images)


def token_log_probs(model, batch, temperature):
    """-> (R,) log p of the tokens of the answers, as they were drawn: logits divided by the temperature"""
    return -model(*batch, head=lambda hidden, weight, labels, _: row_losses(hidden / temperature, weight, labels))


def rolled_loss(s, model, b):
    """-> the sum of the weighted losses of the tokens of b"""
    log_p = token_log_probs(model, b.batch, s.temperature)
    old = b.old if s.updates > 1 else log_p.detach()
    losses = clipped_loss(log_p, old, b.advantage, s.clip_low, s.clip_high)
    if s.kl:
        losses = losses + s.kl * kl_estimate(log_p, b.reference)
    return (losses * b.weight).sum()


@contextlib.contextmanager
def whole_weights(model):
    """In this context each rank holds all weights of a model that FSDP shards, in the dtype of the computation. So
    ranks need not run equally many forward passes: answers have different lengths. Other models stay as they are."""
    parts = [m for m in model.modules() if hasattr(m, "unshard")]          # only FSDP's modules have this method
    try:
        for m in parts:
            m.set_reshard_after_forward(False, recurse=False)
            m.unshard()
        yield
    finally:
        for m in parts:
            m.set_reshard_after_forward(m is not model, recurse=False)     # FSDP2 never reshards the outermost one
            m.reshard()


class Roller:
    """roll(model, micro-batches of questions, step) -> micro-batches of answers, n to divide the loss by, facts"""

    def __init__(self, s, world, cfg, folder, samples, reward):
        self.s, self.world, self.samples, self.reward, self.tok = s, world, samples, reward, folder.tok
        self.stop_ids = chat.stop_ids(folder.tok, s.template)
        self.banned = {cfg.image_token_index, *range(len(folder.tok), cfg.text.vocab_size)}

    def generate(self, model, prompts, images, seed):
        """-> for each prompt the ids of G answers, with their stop tokens if they have them. A prompt passes through
        the model once. torch's random state is kept"""
        kept, s, reader, many = [], self.s, self.samples.encode.reader, max(1, self.s.rollout_size // self.s.group)
        for i in range(0, len(prompts), many):
            some, pixels = prompts[i : i + many], torch.cat(images[i : i + many])
            pixels = reader([(p.tolist(), []) for p in some], pixels) if reader else pixels
            seen = []                                          # generate() adds the list of all answers at each step
            with self.world.autocast(), torch.compiler.set_stance("force_eager"):
                generate(model, some, pixels.to(self.world.device), self.stop_ids, s.max_new_tokens, s.temperature,
                         self.banned, seed + i * s.group, seen.append, s.group)
            kept += seen[-1]
        return kept

    def __call__(self, model, micro, step):
        s, G = self.s, self.s.group
        asked = [[x for b in micro for x in getattr(b, key)] for key in ("prompts", "images", "rows")]
        began = time.time()
        seed = (s.seed * 1_000_003 + step * self.world.size + self.world.rank) * 1_000_003 % 2**62
        with whole_weights(unwrap(model)):
            answers = self.generate(unwrap(model), *asked[:2], seed)
        seconds = time.time() - began
        prompts, images, rows = ([x for x in column for _ in range(G)] for column in asked)
        texts = [self.tok.decode([i for i in ids if i not in self.stop_ids]).strip() for ids in answers]
        rewards = torch.tensor([float(self.reward(row[0], text, row[1])) for row, text in zip(rows, texts)],
                               dtype=torch.float64).view(len(rows) // G, G)
        advantages = group_advantages(rewards, s.normalise != "dr_grpo")                                # (P, G)
        equal = (rewards == rewards[:, :1]).all(1)                                                      # (P,)
        lengths = torch.tensor([len(ids) for ids in answers], dtype=torch.float64).view(len(rows) // G, G)
        used = torch.ones_like(rewards) * (~equal[:, None] if s.normalise == "dapo" else 1)
        weights = used / lengths if s.normalise == "grpo" else used
        n = {"grpo": used.sum(), "dapo": (used * lengths).sum(), "dr_grpo": used.sum() * s.max_new_tokens}[s.normalise]
        finished = [len(ids) > 0 and ids[-1] in self.stop_ids for ids in answers]
        facts = [rewards.sum(), (rewards.std(1) * G).sum(), (equal * G).sum(), lengths.sum(), sum(finished), n,
                 rewards.numel(), seconds * (self.world.rank == 0)]
        *facts, n, count, seconds = self.world.sum([float(x) for x in facts])
        about = {name: x / count for name, x in zip(FACTS, facts)} if count else {}
        about |= {"generate_s": round(seconds, 3), "generated_per_s": round(facts[3] / max(1e-9, seconds), 1)}
        self.last = [dict(question_id=f"{row[4]}_{i % G}", prompt=row[0], text=text, score=float(r), answers=[row[1]],
                          image=row[3], type=row[2])
                     for i, (row, text, r) in enumerate(zip(rows, texts, rewards.flatten().tolist()))]
        return self.packed(model, prompts, images, answers, advantages.flatten(), weights.flatten()), n or 1.0, about

    @torch.no_grad()
    def packed(self, model, prompts, images, answers, advantages, weights):
        """-> [Rolled]; all ranks get equally many"""
        s, x, device = self.s, self.samples, self.world.device
        documents = [(p.tolist() + a, [IGNORE] * len(p) + a, i) for p, a, i in zip(prompts, answers, images)]
        read = [i for i in range(len(documents)) if s.kl or advantages[i]]     # advantage 0: the gradient is 0
        streams = best_fit(read, [len(ids) for ids, _, _ in documents], s.max_tokens) or [[]] * bool(documents)
        most = max(self.world.sum([len(streams) * (r == self.world.rank) for r in range(self.world.size)]))
        out = []
        for stream in streams + [[]] * (int(most) - len(streams)):
            batch = pack([documents[i] for i in stream], x.image_spec.side, x.span_ends, x.encode.reader).to(device)
            sizes = torch.tensor([len(answers[i]) for i in stream], dtype=torch.long)
            old = reference = torch.zeros(0, device=device)
            model.eval()
            with self.world.autocast():
                if s.updates > 1:
                    old = token_log_probs(unwrap(model), batch, s.temperature)
                if s.kl:
                    with adapters_off(model):
                        reference = token_log_probs(unwrap(model), batch, s.temperature)
            model.train()
            dtype = torch.promote_types(torch.float32, self.world.dtype)
            per_token = (send(v[stream].repeat_interleave(sizes).to(dtype), device) for v in (advantages, weights))
            out.append(Rolled(batch, *per_token, old, reference))
        return out


def prepare_rollout(s, world, model, folder, lrs, reward):
    """Open the questions and print the plan. Then do a dry run, or start or resume the run -> stage.Run, Roller"""
    cfg, spec = model.cfg, configs.image_spec(folder.pre, s.image_aspect)
    if s.kl and not all(".lora_" in name for name in lrs):
        stop(f"kl={s.kl} needs lora_r, and adapters alone may train: the reference is the model without them")
    if s.val_data:
        stop(f"val_data={s.val_data} would not be read: eval.py scores the published model")
    if s.overfit:
        stop("overfit: the answers of a step are drawn, so no batch can be fitted; the log shows the reward")
    if s.max_tokens < s.max_len + s.max_new_tokens:
        stop(f"max_tokens={s.max_tokens} is less than max_len + max_new_tokens: one answer must fit into a stream")
    if configs.positions(cfg.text) < s.max_len + s.max_new_tokens:
        stop(f"max_len + max_new_tokens is more than the {configs.positions(cfg.text):,} positions of the model")
    encode = QuestionEncoder(folder.tok, s.template, image_layout(cfg), s.max_len, s.system,
                             instruct.reader(folder, cfg))
    samples = QuestionSteps(s.data, s.images, encode, spec, s.batch_size, s.max_tokens, s.seed, world.rank, world.size,
                            span_ends(cfg), min_rating=s.min_rating, order=s.order, augment=s.augment)
    steps = s.steps or math.ceil(s.epochs * samples.total / s.batch_size)
    first, = level(samples, [samples[0]], world)
    seen = sum(len(b.prompts) for b in first.micro)
    world.print(*folder.notes, *plan.trained_lines(model, lrs),
                f"  {steps} steps of {s.batch_size} questions, {s.group} answers each; the first one, on this rank: "
                f"{seen} questions, {sum(len(b.ids) for b in first.micro):,} tokens of prompts; {world.size} x "
                f"{world.device}, {world.dtype}", sep="\n")
    if s.dry_run:
        return stage.Run(exit_code=stage.rehearse(s, world, samples, first, folder, lambda *_: None)), None
    run = stage.begin_run(s, world, model, folder, lrs, samples, first, steps, {}, lambda: None, ("reward",))
    return run, Roller(s, world, cfg, folder, samples, reward)


def write_answers(roll, step, log):
    """Write the roll-outs of a step, on rank 0, to samples.jsonl: tools/report.py makes a page of them."""
    for row in roll.last:
        log.append({"step": step + 1, **row}, log.file.with_name("samples.jsonl"))
