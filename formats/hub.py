"""Where a model lies: a folder, or `org/name` of a hub, found in its cache or downloaded."""

import os
import re
from pathlib import Path

from config import stop

STEMS = ("model", "mm_projector", "non_lora_trainables")  # files whose presence makes a folder one of a model


def find_folder(name):
    """A folder, or `org/name` of a model or an adapter -> Path of it: as it is; in the hub's cache; downloaded."""
    if Path(name).exists():
        return Path(name)
    env = os.environ
    home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"))
    cache = Path(env.get("HF_HUB_CACHE") or home / "hub").expanduser()
    # ./out and /out name no model, nor does runs/sft, nor anything in a folder that there is
    if not re.fullmatch(r"(?!runs/)[\w.-]*\w/[\w.-]+", str(name)) or Path(name).parent.exists():
        stop(f"{name} holds no model: there is no such folder")
    at = cache / f"models--{str(name).replace('/', '--')}"
    main = at / "refs" / "main"
    for snapshot in [at / "snapshots" / main.read_text("utf-8").strip()] if main.is_file() else at.glob("snapshots/*"):
        if (snapshot / "config.json").is_file() and model_in(snapshot) or (
                is_adapter(snapshot) and weights_file(snapshot, "adapter_model")):
            return snapshot
    absent = f"{name}: there is no such folder, and no such model in {cache}"
    if env.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "true", "yes"):
        stop(f"{absent}; HF_HUB_OFFLINE forbids to look further")
    try:
        import huggingface_hub as hub  # only here: everything else works without it and without a network
        files = hub.HfApi().list_repo_files(name)
        kind = "*.safetensors" if any(re.fullmatch(r"[^/]+\.safetensors", f) for f in files) else "*.bin"
        wanted = ["*.json", "*.jinja", "*.model", "mm_projector.bin", "non_lora_trainables.bin", kind]
        return Path(hub.snapshot_download(name, allow_patterns=wanted,       # Mistral's hold it all twice
                                          ignore_patterns=["*/*", "consolidated*"]))
    except ImportError:
        stop(f"{absent}; pip install huggingface_hub would let it be downloaded")
    except Exception as e:  # a network has many
        stop(f"{absent}, and the download failed: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}")


def weights_file(folder, stem="model"):
    """The file of a folder that holds its tensors, or says which shard does; None if there is none"""
    other = "pytorch_model" if stem == "model" else stem
    names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{other}.bin", f"{other}.bin.index.json")
    return next((folder / n for n in names if (folder / n).is_file()), None)


def model_in(path):
    """A run folder, its model/, or any LLaVA folder -> the folder with the tensors of a model, or None"""
    return next((p for p in (path / "model", path) if any(weights_file(p, stem) for stem in STEMS)), None)


def is_adapter(path):
    """Is this the folder of a PEFT adapter, and of no model?"""
    return (Path(path) / "adapter_config.json").is_file() and not model_in(Path(path))


def find_model(path):
    """A run folder, its model/, or any LLaVA folder or name -> the folder with config.json of a model in it."""
    path = find_folder(path)
    if is_adapter(path):
        stop(f"{path} holds an adapter, where a whole model is wanted: merged, it is the model/ of its run")
    return model_in(path) or stop(f"{path} holds no model: no model.safetensors in it or in {path / 'model'}")
