"""At its end, a run writes model/ (a llava-hf folder), after LoRA also adapter/, with keep_best the same in best/, and
then finished.json."""

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file

from config import stop
from engine import unwrap, whole_tensor
from formats import card, configs, hub, llava, peft
from formats.whole import whole, write_file
from lora import merge_state, scales
from run.checkpoint import retire
from run.log import lines_until

SAVE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def published_dtype(s, world):
    """Return the dtype of published weights. save_dtype=auto: the dtype of the computation. But if that is fp32, the
    weights are published in fp16, as those of LLaVA."""
    return SAVE_DTYPES.get(s.save_dtype) or (torch.float16 if world.dtype == torch.float32 else world.dtype)


def full_path(name):
    """Return the absolute path of a folder; for a run folder, the path of its model/. A name on Hugging Face stays
    unchanged."""
    return str((hub.model_in(Path(name)) or Path(name)).resolve()) if Path(name).exists() else name


def publish(run, model, folder, log, save=None):
    """Write the trained model. run: RunFolder; folder: formats.llava.Folder. All ranks must call it; rank 0 writes.
    save: function (folder, {name: tensor}, dtype) that writes model/ where the model is not a VLM"""
    s, world, out = run.s, run.world, run.out
    model, state, seen = unwrap(model), {}, log.seen
    dtype, adapted = published_dtype(s, world), scales(model)
    if seen["skipped_updates"] >= log.done:
        stop(f"no update was made in {log.done} steps ({seen['dropped']} of {seen['samples']} samples dropped), so no "
             "model is written")
    if log.start == log.done:
        run.begin(log.start)                                     # no step was left to train, so nothing called begin()
    for k, v in model.state_dict().items():
        v = whole_tensor(v.detach())
        if world.rank == 0:
            state[k] = (v if adapted or v.device.type == "cpu" else v.to(dtype)).cpu()  # adapters are merged in fp32
    if world.rank > 0:
        return
    try:
        kept, early = run.kept_step(log), log.done < run.steps
        retire(out, log.done, s.keep_last, kept)                 # a killed run may have one checkpoint too many
        write_model(run, out, model, state, folder, dtype, save)
        best = out / f"checkpoints/step_{kept:07}"
        if kept and (problem := whole(best)):
            world.print(f"step {kept} was the best one, but best/ is not written: {problem}")
        elif kept:
            write_best(out, kept)
            write_model(run, out / "best", model, state | load_file(best / "trained.safetensors"), folder, dtype, save)
        write_file(out / "finished.json", {"steps": log.done, **({"ended_early": log.best.why()} if early else {}),
                                           **seen, "data": run.data, "base": run.base,
                                           "settings": dataclasses.asdict(s)})
    except OSError as e:
        stop(f"{e}. The last checkpoint is whole, the same command tries again")
    if adapted and not card.peft_reads(base_of(s)):
        world.print(f"{out / 'adapter'} is for sample.py and eval.py: {card.NO_BASE}")
    if early:
        world.print(f"ended early after step {log.done}/{run.steps}: {log.best.why()}")
    if kept:
        world.print(f"best: {out / 'best/model'}, of step {kept} ({s.keep_best})")
    world.print(f"done: {out / 'model'}, in {str(dtype).removeprefix('torch.')}{log.summary()}")


def base_of(s):
    """-> full path of the model that the run started from; None if the run started from a vision tower and an LLM"""
    return full_path(s.init) if s.init else None


def write_best(out, step):
    """Make out/best a run folder, with the settings of the run and its log up to the best step."""
    (out / "best").mkdir(exist_ok=True)
    write_file(out / "best/config.json", (out / "config.json").read_text("utf-8"))
    write_file(out / "best/log.jsonl", "".join(line + "\n" for line in lines_until(out / "log.jsonl", step)))


def write_model(run, out, model, state, folder, dtype, save=None):
    """Write out/model, after LoRA also out/adapter. state: {name: tensor} of the whole model, adapters apart"""
    s, adapted = run.s, scales(model)
    if adapted:
        trained = {n: state[n] for n, p in model.named_parameters() if p.requires_grad}
        about = dict(template=s.template, system=s.system, image_aspect=s.image_aspect, bits=s.bits)
        about |= dict(parts=s.parts) if s.parts or not s.init else {}
        about |= {} if s.init else dict(vision=full_path(s.vision), llm=full_path(s.llm))
        peft.save_adapter(out / "adapter", trained, s.lora_r, s.lora_alpha, s.lora_dropout, base_of(s), run.base, about,
                          card.adapter(out, base_of(s)), folder, configs.positions(model.cfg.text))
        state = merge_state(state, adapted, dtype)
    if save:
        save(out / "model", state, dtype)
    else:
        llava.save_model(out / "model", state, model.cfg, folder, s.template, s.system, s.image_aspect, dtype,
                         card.text(out, model.cfg))
