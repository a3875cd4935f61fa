"""The settings that all training stages share, and the errors with which a script reports a mistake of the user.

A script's settings are a dataclass: its defaults, then recipe files and --key=value in the given order. The last value
of a setting counts. run/arguments.py reads recipe files and the command line."""

import contextlib
import dataclasses
import sys


class Error(Exception):
    """A mistake of the user, described in one line. A script prints this line without a traceback and ends."""


class BadSample(ValueError):
    """A sample that cannot be used. `reason` is the same text for all samples with the same mistake, so that mistakes
    can be counted. str() adds `detail` after a colon."""

    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def stop(message):
    raise Error(message)


@contextlib.contextmanager
def one_line_errors():
    """Wraps the main function of a script: an Error ends the process, with its message on stderr and exit code 1."""
    try:
        yield
    except Error as e:
        raise SystemExit(f"error: {e}") from None


# ---- the settings that all training stages share --------------------------------------------------------------------

def setting(default, about, least=None, most=None, choices=(), resume="same", group=""):
    """A field of a settings class.

    about     what the setting is, with its unit      least, most, choices    which values are valid
    resume    may a resumed run have another value? "same": no. "say": yes, and the change is printed. "free": yes, the
              published model does not depend on it (`data`: the path may change, the contents may not).
    group     heading that --help prints above this setting"""
    return dataclasses.field(default=default, metadata=dict(
        about=about, least=least, most=most, choices=choices, resume=resume, group=group))


@dataclasses.dataclass
class Common:
    data: str = setting("toy", "json, jsonl, parquet, tar, 'DIR/*.tar' or toy; a.json:0.7,b.json:0.3 mixes, "
                               "a.json:0.7:0.2 weights a loss", resume="free", group="data")
    min_rating: int = setting(0, "of parquet rows with FineVision's ratings: use those with all ratings this high", 0)
    order: str = setting("shuffle", "which samples make up a step (formats/rows/order.py)", choices=(
        "shuffle", "by_modality", "round_robin", "accumulate_all", "curriculum", "replay"))
    images: str = setting(".", "folder that image names are relative to", resume="say")
    val_data: str = setting("", "validation data in the same form; empty: no validation, no samples", resume="free")
    template: str = setting("", "of chat.py or parts/templates.py: plain, vicuna_v1 ...; empty: as init was trained")
    system: str | None = setting(None, "system text; none: as init was trained, else the template's own")
    augment: str = setting("", "of training images: crop, jitter, flip, with commas between them (parts/augment.py)")
    image_aspect: str = setting("", "pad (LLaVA-1.5), crop (CLIP), squash (SigLIP); empty: as init, else pad")
    max_dropped: float = setting(0.01, "share of the samples that may be unusable", 0, 1, resume="free")

    init: str = setting("", "a run or a LLaVA folder to start from; empty: vision and llm", resume="say", group="model")
    vision: str = setting("", "where init is empty, CLIP, SigLIP or DINOv2: folder or org/name", resume="say")
    llm: str = setting("", "where init is empty, Llama, Mistral or Qwen: folder or org/name", resume="say")
    connector: str = setting("mlp", "of a new model", choices=("mlp", "linear"))
    parts: str = setting("", "of a new model, beyond LLaVA: field=value ... (parts/settings.py); of init: image_size")
    train: str = setting("", "who trains: glob=lr ...; the last glob that fits decides; empty: as the stage says",
                         resume="say")

    batch_size: int = setting(16, "samples per optimizer step, over all processes", 1, 2**20, group="optimisation")
    max_tokens: int = setting(4096, "tokens of one packed sequence; the gradient stays the same", 1, resume="free")
    max_len: int = setting(512, "tokens of one sample; the rest is cut, never inside an image, and counted", 1)
    epochs: float = setting(2.0, "passes over the data, where steps is 0", 0, 1e9, resume="say")
    steps: int = setting(0, "optimizer steps", 0, resume="say")
    loss: str = setting("token", "what counts 1: each supervised token, or each sample", choices=("token", "sample"))
    lr: float = setting(3e-3, "peak learning rate", 0, resume="say")
    warmup: float = setting(0.03, "share of the steps with a rising learning rate", 0, 0.99, resume="say")
    weight_decay: float = setting(0.0, "of matrices, not of norms, biases and embeddings", 0, resume="say")
    grad_clip: float = setting(1.0, "largest gradient norm; 0 = no limit", 0, resume="say")

    device: str = setting("auto", "auto, cpu, cuda, cuda:1", resume="free", group="machine")
    dtype: str = setting("auto", "of the computation; auto: bf16 where the GPU has it, else fp32; fp64 is for tests",
                         choices=("auto", "bf16", "fp32", "fp64"), resume="say")
    parallel: str = setting("auto", "replicas or shards on GPUs", choices=("auto", "ddp", "fsdp"), resume="free")
    recompute: str = setting("none", "block: activations are computed again", choices=("none", "block"), resume="free")
    compile: bool = setting(False, "torch.compile, block by block", resume="free")
    kernels: str = setting("auto", "auto: Triton on a GPU", choices=("auto", "torch", "triton"), resume="free")
    workers: int = setting(0, "loader processes", 0, resume="free")
    seed: int = setting(0, "of new weights, order of the data, dropout", 0, 2**32)

    out: str = setting("", "folder of the run", resume="free", group="the run")
    resume: str = setting("auto", "auto: go on where this folder stopped; none; a checkpoint's path", resume="free")
    save_every: int = setting(200, "steps between checkpoints", 0, resume="free")
    save_dtype: str = setting("auto", "of the published weights; auto: as dtype, but fp16 for fp32",
                              choices=("auto", "bf16", "fp16", "fp32"), resume="say")
    keep_last: int = setting(2, "checkpoints", 1, resume="free")
    log_every: int = setting(10, "steps", 0, resume="free")
    eval_every: int = setting(100, "steps between evaluations on val_data", 0, resume="free")
    eval_questions: int = setting(64, "of val_data, with answers of up to 3 words: exact match", 0, resume="free")
    keep_best: str = setting("", "val_loss, val_exact ...: best/ gets the model of the best step", resume="say")
    patience: int = setting(0, "evaluations without a better one before an early end; 0: no early end", 0, resume="say")
    track: str = setting("none", "beside log.jsonl", choices=("none", "trackio", "wandb", "tensorboard"), resume="free")
    sample_every: int = setting(100, "steps between answers to fixed questions, in samples.jsonl", 0, resume="free")
    dry_run: bool = setting(False, "print the plan and one sample, and stop", resume="free")
    paper: dict | None = setting(None, "of a recipe: facts for a plan of its paper's size (paper.py)", resume="free")
    overfit: bool = setting(False, "train on the first batch only, and check that the model predicts it", resume="free")


def setting_facts(Settings):
    """-> {name: metadata from setting()}. A subclass that only changes a default keeps the metadata of its parent."""
    found = {}
    for cls in reversed(Settings.__mro__):
        for f in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
            if f.metadata or f.name not in found:
                found[f.name] = f.metadata
    return found


def check_ranges(s):
    """Stop if a setting is outside its range, or not one of its choices."""
    for key, fact in setting_facts(type(s)).items():
        value, low, high, choices = getattr(s, key), fact.get("least"), fact.get("most"), fact.get("choices")
        if choices and value not in choices:
            stop(f"{key}={value}: one of {', '.join(map(str, choices))}")
        if low is not None and not low <= value <= (sys.float_info.max if high is None else high):
            stop(f"{key}={value}: expected {'at least' if high is None else 'between'} {low}"
                 + ("" if high is None else f" and {high}") + f" ({fact['about']})")
