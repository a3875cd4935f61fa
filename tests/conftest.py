"""What the tests share: one thread, tiny models, tokenizers trained on the spot, two ranks by fork. No network."""

import contextlib
import gc
import json
import os
import signal
import sys
import textwrap
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
FOREVER = 600   # seconds, for what takes a few: a process that hangs is ended, one on a busy machine never is
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / room) for room in ("kernels", "formats", "run"))]
torch.set_num_threads(1)  # two threads on two busy cores ran up to 25 times slower, and in other bits

import torch._dynamo  # noqa: E402,F401  (imported before any fork: a child would need seconds for it)
import torch.distributed.fsdp  # noqa: E402,F401

import chat  # noqa: E402
import engine  # noqa: E402
import parts.templates  # noqa: E402,F401  (adds to chat.TEMPLATES)
from config import Error  # noqa: E402
from loss import supervised, total_weight  # noqa: E402
from model import VLM, TextConfig, VisionConfig, VLMConfig  # noqa: E402

WORDS = """A chat between a curious user and an artificial intelligence assistant. \
USER: What is this? ASSISTANT: It is a black cat.
The red circle is at the top left, 1 2 3 4 5 6 7 8 9 0. [INST] <<SYS>> \
You are a helpful language and vision assistant [/INST]
system user assistant Describe the image briefly. Two dogs, playing in the park; don't know? Yes! No."""
TEMPLATES = {name: chat.TEMPLATES[name] for name in       # LLaVA's; the tests of families compare the others
             ("plain", "vicuna_v1", "llava_llama_2", "llama_3", "chatml", "mistral")}
SPECIALS = ["<unk>", "<s>", "</s>", "<image>", "<pad>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>",
            "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(autouse=True, scope="session")
def nothing_compiled_before(tmp_path_factory):
    """What torch.compile left in /tmp for other instructions of the processor would be run again, and gave NaN; what
    Triton compiles would go to a home that may not be there. bench/gpu.sh says where it goes, for all to share."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))


@pytest.fixture(autouse=True)
def no_graphs_left():
    """torch.compile counts how often a function was compiled, over all tests of a process, and gives up at eight."""
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def signals():
    """The scripts record signals until their process ends; the process of the tests must not."""
    kept = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for s, handler in kept.items():
        signal.signal(s, handler)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Settings that both scripts need for a run of six steps on the tiny data of tiny_runs.py, without validation"""
    from tiny_runs import write_data, write_towers
    folder = write_towers(tmp_path_factory.mktemp("world"))
    return dict(data=str(write_data(folder, "train.jsonl", 22)), images=str(folder / "images"),
                vision=str(folder / "vision"), llm=str(folder / "llm"), system="", device="cpu", batch_size=4,
                max_len=48, max_tokens=96, steps=6, save_every=2, log_every=1)


@pytest.fixture(scope="session")
def validated(world):
    """The same, with a validation loss and answers after steps 3 and 6. Answers take most of the time of a run."""
    from tiny_runs import write_data
    val_data = write_data(Path(world["images"]).parent, "val.jsonl", 5, 100)
    return {**world, "val_data": str(val_data), "eval_every": 3, "sample_every": 3}


@pytest.fixture
def short_answers(monkeypatch):
    """Questions are asked as ever, and answered with two tokens."""
    from generate import Chat
    answers = Chat.answers
    monkeypatch.setattr(Chat, "answers", lambda self, prompts, pixels, *_: answers(self, prompts, pixels, 2))


@pytest.fixture(scope="session")
def aligned(validated, tmp_path_factory):
    """The folder of a finished stage 1, with validation, to be read only"""
    from tiny_runs import run
    out = tmp_path_factory.mktemp("runs") / "align"
    assert run("align", validated, out) is None
    return out


def blocks(n, tokens=4, image=3):
    """For chat.encode: the blocks of n images"""
    return [[image] * tokens] * n


def error(call, *args, **kw):
    """The one line that a user sees"""
    with pytest.raises(Error) as e:
        call(*args, **kw)
    line = str(e.value)
    assert "\n" not in line
    return line


def cpu_world(rank=0, size=1):
    return engine.World(rank, size, torch.device("cpu"), torch.float64)


def step_of_the_loop(script="train_align.py", first="n, = world.sum"):
    """The lines of one optimizer step as they stand in the loop of a script (train_sft.py has the default one)"""
    lines = (ROOT / script).read_text("utf-8").splitlines()
    begin, end = (next(i for i, line in enumerate(lines) if mark in line) for mark in (first, "engine.update("))
    return compile(textwrap.dedent("\n".join(lines[begin : end + 1])), script, "exec")


def train_step(model, optimizer, micro, loss_fn, world, grad_clip=0.0, check=False):
    """One optimizer step by the lines of the script's loop -> what engine.update gives, and the counts"""
    names = dict(model=model, optimizer=optimizer, batch=SimpleNamespace(micro=micro), token_loss=loss_fn, world=world,
                 s=SimpleNamespace(grad_clip=grad_clip), step=0, start=0 if check else 1, engine=engine,
                 total_weight=total_weight)
    exec(step_of_the_loop(), names)
    tokens, labels = world.sum([sum(len(b.ids) for b in micro), sum(supervised(b.labels) for b in micro)])
    return names["result"] | dict(tokens=int(tokens), supervised_tokens=int(labels), n=names["n"])


def make_tokenizer(folder, kind="bytes"):
    """bytes: byte-level BPE as Llama 3's or Qwen's; pieces: dummy prefix and byte fallback, as Llama 2's. -> folder"""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "bytes":
        tok = tokenizers.Tokenizer(models.BPE())
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIALS, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        tok.train_from_iterator([WORDS] * 5, trainer)
        tok.save(str(folder / "tokenizer.json"))
    else:
        fallback = [f"<0x{i:02X}>" for i in range(256)]
        tok = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        words = WORDS.replace("\n", " ")                      # SentencePiece never joins a newline with what follows
        tok.train_from_iterator([words] * 5, trainers.BpeTrainer(
            vocab_size=700, special_tokens=SPECIALS + fallback, show_progress=False))
        spec = json.loads(tok.to_str())
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in fallback]
        spec["model"] |= {"byte_fallback": True, "fuse_unk": True}
        spec["pre_tokenizer"] = None
        spec["normalizer"] = {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
        spec["decoder"] = {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
             "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="session", params=["bytes", "pieces"])
def tok_folder(request, tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tok") / request.param, request.param)


@pytest.fixture(scope="session")
def bytes_folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tok") / "bytes")


def tiny_config(**text):
    """A VLM of 67,000 parameters: 4 patches per image, grouped queries, two decoder layers, two of three ViT blocks"""
    return VLMConfig(
        VisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=8,
                     patch_size=4),
        TextConfig(**{**dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5), **text}),
        image_token_index=3)


def tiny_vlm(seed=0, dtype=torch.float64, **text):
    torch.manual_seed(seed)
    model = VLM(tiny_config(**text))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    for n, p in model.named_parameters():
        if "norm" in n and n.endswith("weight"):
            torch.nn.init.normal_(p, mean=1.0, std=0.1)
    return model.to(dtype)


def example(seed, text=9, answer=4, images=1, model_patches=4, side=8):
    """A random sample as data.pack takes it: BOS, image placeholders, text; the last `answer` tokens are supervised."""
    g = torch.Generator().manual_seed(seed)
    ids = [1] + [3] * (model_patches * images) + torch.randint(5, 500, (text,), generator=g).tolist()
    labels = [-100] * (len(ids) - answer) + ids[len(ids) - answer:]
    return ids, labels, torch.randint(0, 256, (images, 3, side, side), generator=g, dtype=torch.uint8)


def fork(size, fn, folder):
    """Run fn(rank) in `size` forked processes joined by gloo -> its results, which json can write, by rank. Any failure
    fails the test; so does a process that never ends."""
    pids = []
    for rank in range(size):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
                store = dist.FileStore(str(folder / "store"), size)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
                result = fn(rank)
                (folder / f"result_{rank}.json").write_text(json.dumps(result))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                gc.collect()                     # wrappers first: DDP on gloo may abort when it outlives its group
                if code == 0 and dist.is_initialized():
                    dist.destroy_process_group()
                os._exit(code)
        pids.append(pid)
    end, codes = time.monotonic() + FOREVER, {}
    while len(codes) < size:
        for rank, pid in enumerate(pids):
            if rank not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end or any(codes.values()):
            for rank, pid in enumerate(pids):
                if rank not in codes:
                    os.kill(pid, 9)
                    os.waitpid(pid, 0)
            raise AssertionError(f"ranks ended with {codes} (missing ones were stopped)")
        time.sleep(0.005)
    return [json.loads((folder / f"result_{r}.json").read_text()) for r in range(size)]


@contextlib.contextmanager
def in_thread(server, close):
    """A server of http.server answers in a thread -> the server; close() ends it"""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        close()
