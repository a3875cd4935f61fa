"""Find a model in a folder, in the local cache of the Hugging Face hub, or on the hub, from which it is downloaded."""

import os
import re
from pathlib import Path

from config import stop

STEMS = ("model", "mm_projector", "non_lora_trainables")  # a model folder has a weights file with one of these names


def find_folder(name):
    """Find the folder of a model or adapter on this machine -> its Path. name: a path, or `org/name` on the hub. If the
    local cache does not have it, it is downloaded from the hub."""
    if Path(name).exists():
        return Path(name)
    # ./out, /out, runs/sft and any name that begins with an existing folder are paths, not hub names
    if not re.fullmatch(r"(?!runs/)[\w.-]*\w/[\w.-]+", str(name)) or Path(name).parent.exists():
        stop(f"{name} holds no model: there is no such folder")
    env = os.environ
    home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"))
    cache = Path(env.get("HF_HUB_CACHE") or home / "hub").expanduser()
    at = cache / f"models--{str(name).replace('/', '--')}"
    main = at / "refs" / "main"
    for snapshot in [at / "snapshots" / main.read_text("utf-8").strip()] if main.is_file() else at.glob("snapshots/*"):
        if (snapshot / "config.json").is_file() and model_in(snapshot) or (
                is_adapter(snapshot) and weights_file(snapshot, "adapter_model")):
            return snapshot
    absent = f"{name}: there is no such folder, and no such model in {cache}"
    if env.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "true", "yes"):
        stop(f"{absent}; HF_HUB_OFFLINE forbids a download")
    try:
        import huggingface_hub as hub  # imported here, because only a download needs this package

        # without a network, model_info fails at once; list_repo_files would retry six times in half a minute
        names = [f.rfilename for f in hub.HfApi().model_info(name).siblings]
        kind = "*.safetensors" if any(re.fullmatch(r"[^/]+\.safetensors", n) for n in names) else "*.bin"
        wanted = ["*.json", "*.jinja", "*.model", "mm_projector.bin", "non_lora_trainables.bin", kind]
        return Path(hub.snapshot_download(name, allow_patterns=wanted,
                                          ignore_patterns=["*/*", "consolidated*"]))   # skip copies of the weights
    except ImportError:
        stop(f"{absent}; pip install huggingface_hub would let it be downloaded")
    except Exception as e:  # network errors have many types
        stop(f"{absent}, and the download failed: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}")


def weights_file(folder, stem="model"):
    """Find the file that holds a folder's tensors, or the index file of its shards -> Path, or None if neither exists.
    stem: the beginning of the file's name"""
    other = "pytorch_model" if stem == "model" else stem
    names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{other}.bin", f"{other}.bin.index.json")
    return next((folder / n for n in names if (folder / n).is_file()), None)


def model_in(path):
    """Find the folder with the weights of a model -> Path, or None. path: a run folder, its subfolder model/, or any
    LLaVA folder"""
    return next((p for p in (path / "model", path) if any(weights_file(p, stem) for stem in STEMS)), None)


def is_adapter(path):
    """Does this folder hold a PEFT adapter and no model?"""
    return (Path(path) / "adapter_config.json").is_file() and not model_in(Path(path))


def find_model(path):
    """Find the folder with the weights of a model -> Path. Stop if there is none. path: a run folder, its subfolder
    model/, a LLaVA folder, or a name on the hub"""
    path = find_folder(path)
    if is_adapter(path):
        stop(f"{path} holds an adapter, where a whole model is wanted: merged, it is the model/ of its run")
    return model_in(path) or stop(f"{path} holds no model: no model.safetensors in it or in {path / 'model'}")
