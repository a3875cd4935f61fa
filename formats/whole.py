"""A folder that is whole or absent: written beside its place, synced, a manifest with a SHA-256 per file, then renamed."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

MANIFEST = "manifest.json"


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def commit(folder, fill):
    """Make `folder` appear whole: fill(path) writes its files into a directory beside it. An old one is replaced."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp, old = (folder.parent / f".{kind}-{folder.name}" for kind in ("tmp", "old"))
    remove(tmp)
    try:
        tmp.mkdir()
        fill(tmp)
        files = sorted(p for p in tmp.rglob("*") if p.is_file())
        for p in files:
            os.chmod(p, 0o666 & ~umask())                        # safetensors makes files that only the owner can read
            sync(p)
        (tmp / MANIFEST).write_text(listing({str(p.relative_to(tmp)): digest(p) for p in files}))
        sync(tmp / MANIFEST)
        sync(tmp)
    except (OSError, SafetensorError) as e:                      # safetensors has an error of its own for a full disk
        remove(tmp)
        why, free = getattr(e, "strerror", None) or e, shutil.disk_usage(folder.parent).free
        raise OSError(f"{folder} could not be written: {why} ({free:,} bytes free)") from None
    remove(old)
    if folder.exists():
        os.rename(folder, old)
    os.rename(tmp, folder)
    sync(folder.parent)
    remove(old)


def remove(path):
    """A file or folder that may be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def listing(manifest):
    return json.dumps(manifest, indent=1)


def whole(folder):
    """Is every file of the manifest there, unchanged? -> None, or what is wrong."""
    folder = Path(folder)
    try:
        text = (folder / MANIFEST).read_text()
        manifest = json.loads(text)
        if not manifest or not isinstance(manifest, dict) or text != listing(manifest):
            return f"{folder / MANIFEST} is damaged"
        for name, value in manifest.items():
            if digest(folder / name) != value:
                return f"{folder / name} is damaged"
    except (OSError, ValueError) as e:
        return f"{folder}: {e}"
    return None
