"""Write files and folders completely or not at all. A folder is written under a temporary name, synced to disk, given
a manifest with a SHA-256 for each file, and renamed. A file is written under a temporary name and renamed."""

import contextlib
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


def file_digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def commit(folder, fill):
    """Write all of `folder` or nothing: fill(path) writes into a temporary folder, which then replaces `folder`."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp, old = (folder.parent / f".{kind}-{folder.name}" for kind in ("tmp", "old"))
    remove(tmp)
    try:
        # mkdir also fails if `tmp` is a link. That is wanted, because fill() would follow the link
        tmp.mkdir()
        fill(tmp)
        files = sorted(p for p in tmp.rglob("*") if p.is_file())
        for p in files:
            os.chmod(p, tmp.stat().st_mode & 0o666)              # safetensors makes files that only the owner can read
            sync(p)
        (tmp / MANIFEST).write_text(json.dumps({str(p.relative_to(tmp)): file_digest(p) for p in files}, indent=1))
        sync(tmp / MANIFEST)
        sync(tmp)
    except (OSError, SafetensorError) as e:                      # on a full disk save_file raises SafetensorError
        remove(tmp)
        why, free = getattr(e, "strerror", None) or e, shutil.disk_usage(folder.parent).free
        raise OSError(f"{folder} could not be written: {why} ({free:,} bytes free)") from None
    remove(old)
    if folder.exists():
        os.rename(folder, old)
    os.rename(tmp, folder)
    sync(folder.parent)
    remove(old)


def write_file(path, content):
    """Write text as it is and anything else as JSON, completely or not at all. A link at `path` is replaced."""
    with whole_file(path) as f:
        f.write(content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def whole_file(path):
    """Open a file for text. It appears at `path` when the block has ended without an error; else nothing is left."""
    tmp = path.with_name(f".tmp-{path.name}")
    remove(tmp)
    try:
        with open(os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w", encoding="utf-8") as f:
            yield f
        os.replace(tmp, path)
    except BaseException:
        remove(tmp)
        raise


def remove(path):
    """Delete a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def whole(folder):
    """Does `folder` hold all files of its manifest, unchanged? -> None if it does, else what is wrong. Only regular
    files inside the folder are opened, because a damaged manifest may name other paths."""
    folder = Path(folder)
    try:
        files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}
        text = files[MANIFEST].read_text() if MANIFEST in files else ""
        manifest = json.loads(text)
        if not manifest or not isinstance(manifest, dict) or text != json.dumps(manifest, indent=1):
            return f"{folder / MANIFEST} is damaged"
        for name, value in manifest.items():
            if name not in files or file_digest(files[name]) != value:
                return f"{folder / name} is damaged"
    except (OSError, ValueError, RecursionError) as e:
        return f"{folder / MANIFEST} cannot be read: {e}"
    return None
