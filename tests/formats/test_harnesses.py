"""lmms-eval and VLMEvalKit ask our models.

Where a harness is installed, its own classes ask. Else small doubles of its interface ask. They are written after
lmms-eval 0.7.3 (api/model.py, models/simple/llava_hf.py, models/chat/llava_hf.py; commits 19085f3 and 25ce20f make the
same calls) and VLMEvalKit e8e78f0 (vlmeval/vlm/base.py)."""

import abc
import importlib
import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import clients
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import chat as chats
from config import BadSample, Error
from generate import Chat

CASES = ["clip-llama-mlp", "siglip-mistral-mlp", "clip-qwen2-mlp"]     # templates vicuna_v1, mistral, chatml
IMAGES = [Image.effect_noise(size, 90).convert("RGB") for size in ((23, 14), (9, 30))]
DOCUMENTS = [IMAGES[:1], IMAGES, IMAGES[1:], []]
QUESTIONS = ["What is this?", "Which is larger?", "<image>\nYes or no?", "Hi"]


def installed(name):
    return importlib.util.find_spec(name) is not None


@pytest.fixture(scope="module")
def folders(tmp_path_factory, bytes_folder):
    root = tmp_path_factory.mktemp("harnesses")
    return {case: clients.write(case, root, bytes_folder) for case in CASES}


def instance(document, text, *rest, many=SimpleNamespace):
    return many(args=(text, *rest, lambda images: images, document, "task", "test"))


# ---- the published folder in lmms-eval's own llava_hf ---------------------------------------------------------------

class LlavaHf:
    """The calls of llava_hf, in its order. device_map: its default "" is not a device for transformers 5"""

    def __init__(self, pretrained, dtype, device_map="cpu", device="cpu"):
        import transformers as T
        assert T.AutoConfig.from_pretrained(pretrained).model_type == "llava"
        self.model = T.LlavaForConditionalGeneration.from_pretrained(
            pretrained, revision="main", torch_dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map, trust_remote_code=False, attn_implementation=None)
        self.processor = T.AutoProcessor.from_pretrained(pretrained, revision="main", trust_remote_code=False)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        self.model.to(device)

    def generate_until(self, requests):
        answers = []
        for text, options, images_of, document, task, split in (r.args for r in requests):
            self.tokenizer.encode(text, add_special_tokens=False)                 # it sorts by length
            eos, images = self.tokenizer.eos_token_id, images_of(self.task_dict[task][split][document])
            assert self.tokenizer.decode(eos)
            if "<image>" not in text:
                text = " ".join(["<image>"] * len(images)) + "\n" + text
            assert self.tokenizer.chat_template is not None                       # else it takes Vicuna's, without BOS
            prompt = self.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                        add_generation_prompt=True)
            inputs = self.processor(images=images, text=prompt, return_tensors="pt").to("cpu", self.model.dtype)
            ids = self.model.generate(**inputs, do_sample=False, temperature=None, top_p=None, num_beams=1,
                                      max_new_tokens=options["max_new_tokens"], use_cache=True, pad_token_id=eos,
                                      eos_token_id=eos)
            answers += self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        return answers


class LlavaHfChat(LlavaHf):
    """The calls of lmms-eval's other llava_hf (models/chat), which gets messages. `--model llava_hf` is this one, and
    with --force_simple the one above."""

    def generate_until(self, requests):
        answers = []
        for _, messages_of, options, document, task, split in (r.args for r in requests):
            eos, messages = self.tokenizer.eos_token_id, messages_of(self.task_dict[task][split][document])
            prompt = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            images = [part["url"] for part in messages[0]["content"] if part["type"] == "image"]
            inputs = self.processor(images=images, videos=None, text=prompt, return_tensors="pt")
            ids = self.model.generate(**inputs.to("cpu", self.model.dtype), do_sample=False, temperature=None,
                                      top_p=None, num_beams=1, max_new_tokens=options["max_new_tokens"],
                                      use_cache=True, pad_token_id=eos, eos_token_id=eos)
            answers += self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        return answers


def messages_about(question):
    def messages_of(images):
        return [{"role": "user", "content": [*({"type": "image", "url": image} for image in images),
                                             {"type": "text", "text": question}]}]
    return messages_of


def llava_hf_answers(folder, dtype="float32", n=3):
    pytest.importorskip("transformers")
    if installed("lmms_eval"):
        from lmms_eval.models.simple.llava_hf import LlavaHf as Own
        asker = Own(pretrained=str(folder), dtype=dtype, device_map="cpu", device="cpu")
    else:
        asker = LlavaHf(str(folder), dtype)
    asker.task_dict = {"task": {"test": DOCUMENTS}}
    return asker, asker.generate_until([instance(i, q, {"max_new_tokens": 8}) for i, q in enumerate(QUESTIONS[:n])])


def our_answers(chat, n=3):
    texts = [q if i != 1 else f"<image> <image>\n{q}" for i, q in enumerate(QUESTIONS[:n])]      # as llava_hf writes it
    return [chat.ask(images, text, 8) for images, text in zip(DOCUMENTS, texts)]


@pytest.mark.parametrize("case", CASES)
def test_llava_hf_answers_as_we_do(case, folders):
    chat = Chat(folders[case], "cpu", "fp32")
    asker, answers = llava_hf_answers(folders[case])
    assert [a.strip() for a in answers] == our_answers(chat) and len(set(answers)) == 3
    assert {asker.tokenizer.eos_token_id} == chat.stop_ids


@pytest.mark.parametrize("case", CASES)
def test_llava_hf_of_messages_answers_as_we_do(case, folders):
    pytest.importorskip("transformers")
    how = dict(pretrained=str(folders[case]), dtype="float32", device_map="cpu", device="cpu")
    if installed("lmms_eval"):
        from lmms_eval.models.chat.llava_hf import LlavaHf as Own
        asker = Own(**how)
    else:
        asker = LlavaHfChat(**how)
    asker.task_dict, chat = {"task": {"test": DOCUMENTS}}, Chat(folders[case], "cpu", "fp32")
    answers = asker.generate_until([SimpleNamespace(args=(
        "", messages_about(q.removeprefix("<image>\n")), {"max_new_tokens": 8}, i, "task", "test"))
        for i, q in enumerate(QUESTIONS[:3])])            # a question without an image: its answer is "", for any model
    answers = [getattr(a, "text", a).strip() for a in answers]
    assert answers == [chat.ask(images, q, 8) for images, q in zip(DOCUMENTS, QUESTIONS[:3])]


def test_llava_hf_stops_where_we_stop(folders, tmp_path, bytes_folder):
    """The weights are changed so that another token of the first answer is the token that ends answers."""
    folder = clients.write("clip-llama-mlp", tmp_path, bytes_folder)
    chat = Chat(folder, "cpu", "fp32")
    tiles, blocks = chat.look(DOCUMENTS[0])
    seen, prompt = [], chat.prompt([(f"<image>\n{QUESTIONS[0]}", None)], blocks)
    chat.answers([prompt], tiles, 8, each=lambda answers: seen.append(answers[0][-1]))
    token = next(i for i in seen if i != seen[0])
    file = folder / "model.safetensors"
    weights, (end,) = load_file(file), chat.stop_ids
    head = weights["language_model.lm_head.weight"]
    head[[end, token]] = head[[token, end]]
    save_file(weights, file, metadata={"format": "pt"})
    before, after = our_answers(chat, 1)[0], our_answers(Chat(folder, "cpu", "fp32"), 1)[0]
    assert before.startswith(after) and 0 < len(after) < len(before)
    assert llava_hf_answers(folder, n=1)[1][0].strip() == after


def test_llava_hf_reads_the_published_precision(folders):
    for folder in folders.values():
        published = next(iter(load_file(next(folder.glob("model*.safetensors"))).values())).dtype
        assert llava_hf_answers(folder, "auto", n=1)[0].model.dtype == published


def test_another_chat_template_would_be_noticed(folders, tmp_path, bytes_folder):
    folder = clients.write("clip-llama-mlp", tmp_path, bytes_folder)
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("USER: ", "HUMAN: "))
    assert llava_hf_answers(folder)[1] != llava_hf_answers(folders["clip-llama-mlp"])[1]


# ---- our class in lmms-eval -----------------------------------------------------------------------------------------

class Lmms(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, text, more=None):
        given = dict(pair.split("=", 1) for pair in text.split(","))
        return cls(**given, **{k: v for k, v in (more or {}).items() if v is not None})


class Registry(dict):
    def register_manifest(self, manifest, overwrite):
        self[manifest.model_id] = manifest.simple_class_path


def double(monkeypatch, package, **modules):
    """Put modules of a harness that is not installed into sys.modules."""
    for name, contents in {package: {}, **modules}.items():
        module = ModuleType(name)
        vars(module).update(contents, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)


def load(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    del sys.modules[name]
    return importlib.import_module(name)


@pytest.fixture
def lmms_tool(monkeypatch):
    if not installed("lmms_eval"):
        registry = Registry()
        double(monkeypatch, "lmms_eval", **{
            "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": Lmms},
            "lmms_eval.models": {
                "MODEL_REGISTRY_V2": registry,
                "ModelManifest": lambda name, simple_class_path: SimpleNamespace(
                    model_id=name, simple_class_path=simple_class_path),
                "get_model": lambda name: getattr(importlib.import_module(registry[name].rpartition(".")[0]),
                                                  registry[name].rpartition(".")[2])}})
    return load(monkeypatch, "tools.harness_lmms")


def lmms_model(tool, folder, **more):
    from lmms_eval.models import get_model
    tool.register()
    assert get_model("pumice") is tool.Pumice
    model = get_model("pumice").create_from_arg_string(
        f"model={folder},dtype=fp32", {"batch_size": 1, "max_batch_size": None, "device": "cpu"} | more)
    model.task_dict = {"task": {"test": DOCUMENTS}}
    return model


def requests(**options):
    return [instance(i, q, {"max_new_tokens": 8, "until": ["\n\n"], **options}) for i, q in enumerate(QUESTIONS)]


@pytest.mark.parametrize("case", CASES)
def test_lmms_eval_gets_the_answers_of_chat(case, folders, lmms_tool):
    model = lmms_model(lmms_tool, folders[case], batch_size=3)
    chat = Chat(folders[case], "cpu", "fp32")
    want = [chat.ask(images, text, 8) for images, text in zip(DOCUMENTS, QUESTIONS)]
    assert model.generate_until(requests()) == want
    mixed = requests()
    mixed[1].args[1]["max_new_tokens"] = 3                 # another group: the order of the answers stays
    assert model.generate_until(mixed) == [want[0], chat.ask(IMAGES, QUESTIONS[1], 3), *want[2:]]


def test_stop_texts_end_an_answer(folders, lmms_tool):
    model = lmms_model(lmms_tool, folders[CASES[0]])
    whole = model.generate_until(requests())
    for until in ([whole[0][4], "never"], whole[0][4]):
        assert model.generate_until(requests(until=until))[0] == whole[0][:4][:whole[0].index(whole[0][4])].strip()
    assert model.generate_until(requests(until=[""])) == whole


def test_temperature_and_do_sample_are_honoured(folders, lmms_tool):
    model = lmms_model(lmms_tool, folders[CASES[0]], batch_size=4)
    greedy, warm = model.generate_until(requests()), model.generate_until(requests(temperature=5.0, do_sample=True))
    assert warm != greedy and warm == model.generate_until(requests(temperature=5.0))
    assert greedy == model.generate_until(requests(temperature=5.0, do_sample=False, top_p=0.5, num_beams=1))
    repeats = [requests(temperature=5.0)[0] for _ in range(2)]
    model.batch_size = 1
    assert len(set(model.generate_until(repeats))) == 2    # two draws, not one draw twice


def test_loglikelihood_is_the_loss_of_training(folders, lmms_tool, monkeypatch):
    model, chat = lmms_model(lmms_tool, folders[CASES[0]]), Chat(folders[CASES[0]], "cpu", "fp32")
    answer = our_answers(chat, 1)[0]
    results = model.loglikelihood([instance(i, QUESTIONS[i], answer) for i in range(4)])
    tiles, blocks = chat.look(DOCUMENTS[0])
    ids, labels = chats.encode(chat.tok, chat.template, [(f"<image>\n{QUESTIONS[0]}", answer)], blocks, chat.system)
    import transformers as T
    theirs = T.LlavaForConditionalGeneration.from_pretrained(folders[CASES[0]], torch_dtype=torch.float32)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (chat.cfg.vision.image_mean, chat.cfg.vision.image_std))
    loss = theirs(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                  pixel_values=(tiles[0] / 255 - mean) / std, labels=torch.tensor([labels])).loss.item()
    assert results[0][0] == pytest.approx(loss, rel=1e-5) and not any(greedy for _, greedy in results)
    monkeypatch.setattr(lmms_tool, "logits_head", lambda hidden, weight, labels, weights=None:
                        torch.nn.functional.one_hot(labels, 512) * 50.0)           # it is sure, and right
    (loss, greedy), = model.loglikelihood([instance(0, QUESTIONS[0], lambda document: "a cat")])
    assert greedy and loss < 1e-12


@pytest.mark.parametrize("ask, complaint", [
    (lambda m: m.generate_until(requests(num_beams=4)), "num_beams=4"),
    (lambda m: m.generate_until(requests(top_p=0.9, temperature=1)), "top_p=0.9"),
    (lambda m: m.generate_until(requests(stop_sequences=["x"])), "stop_sequences"),
    (lambda m: m.generate_until(requests(max_new_tokens=128)), "longer than the model's positions"),
    (lambda m: m.generate_until_multi_round([]), "no answers in several rounds"),
    (lambda m: m.generate_until([instance(1, "<image> and?", {})]), "not as many <image> markers as images"),
    (lambda m: m.images(lambda document: ["film.mp4"], 0, "task", "test"), "only images .*: task task has str"),
    (lambda m: type(m)(str(m), batch_size="auto"), "batch_size=auto"),
])
def test_what_lmms_eval_cannot_have(ask, complaint, folders, lmms_tool):
    with pytest.raises((Error, BadSample), match=complaint) as refused:
        ask(lmms_model(lmms_tool, folders[CASES[0]]))
    assert "\n" not in str(refused.value)


# ---- our class in VLMEvalKit ----------------------------------------------------------------------------------------

class BaseModel:
    """VLMEvalKit's: generate() makes a list of {"type", "value"} of what it is given, and calls generate_inner()"""
    INTERLEAVE, allowed_types = False, ["text", "image", "video"]

    def __init__(self):
        self.dump_image_func = None

    def generate(self, message, dataset=None):
        message = [message] if isinstance(message, (str, dict)) else message
        message = [m if isinstance(m, dict) else
                   {"type": "image" if m.endswith(".png") else "text", "value": m} for m in message]
        assert all(m["type"] in self.allowed_types for m in message), f"Invalid input type: {message}"
        return self.generate_inner(message, dataset)


@pytest.fixture
def vlmeval_tool(monkeypatch):
    if not installed("vlmeval"):
        double(monkeypatch, "vlmeval", **{"vlmeval.vlm": {}, "vlmeval.vlm.base": {"BaseModel": BaseModel},
                                          "vlmeval.config": {"supported_VLM": {}}})
    return load(monkeypatch, "tools.harness_vlmeval")


@pytest.fixture
def pictures(tmp_path):
    for i, image in enumerate(IMAGES):
        image.save(tmp_path / f"{i}.png")
    return [{"type": "image", "value": str(tmp_path / f"{i}.png")} for i in range(2)]


def text(value):
    return {"type": "text", "value": value}


@pytest.mark.parametrize("case", CASES)
def test_vlmevalkit_gets_the_answers_of_chat(case, folders, vlmeval_tool, pictures):
    model, chat = vlmeval_tool.VLMEvalPumice(folders[case], 8), Chat(folders[case], "cpu", "fp32")
    one, two = pictures
    for message, images, prompt in [
            ([one, text("What is this?")], IMAGES[:1], "<image>\nWhat is this?"),
            ([text("What is this?"), one], IMAGES[:1], "<image>\nWhat is this?"),
            ([one, two, text("Which?")], IMAGES, "<image>\n<image>\nWhich?"),
            ([text("A: "), one, text("B: "), two, text("Which?")], IMAGES, "A: <image>\nB: <image>\nWhich?"),
            ([one["value"], "What is this?"], IMAGES[:1], "<image>\nWhat is this?"),
            ("Hi", [], "Hi")]:
        assert model.generate(message, dataset="MMStar") == chat.ask(images, prompt, 8), message


def test_vlmevalkit_options_are_honoured(folders, vlmeval_tool, pictures, tmp_path):
    message, folder = [pictures[0], text("What is this?")], folders[CASES[0]]
    whole = vlmeval_tool.VLMEvalPumice(folder, 8).generate(message)
    stopped = vlmeval_tool.VLMEvalPumice(folder, 8, stops=[whole[4]])
    assert stopped.generate(message) == whole[:whole.index(whole[4])].strip()
    assert vlmeval_tool.VLMEvalPumice(folder, 8, temperature=9.0).generate(message) != whole
    assert whole.startswith(vlmeval_tool.VLMEvalPumice(folder, 2).generate(message))
    with pytest.raises(BadSample, match="not as many <image> markers"):
        vlmeval_tool.VLMEvalPumice(folder, 8).generate([pictures[0], text("what does <image> mean?")])
    (tmp_path / "film.mp4").touch()
    with pytest.raises(AssertionError, match="Invalid input type"):
        vlmeval_tool.VLMEvalPumice(folder, 8).generate([{"type": "video", "value": str(tmp_path / "film.mp4")}])


def test_vlmevalkits_program_gets_the_model(folders, vlmeval_tool, monkeypatch, tmp_path, pictures, capsys):
    script = tmp_path / "run.py"
    script.write_text("import json, sys\nfrom vlmeval.config import supported_VLM\nname = sys.argv[2]\n"
                      f"answer = supported_VLM[name]().generate(['{pictures[0]['value']}', 'What is this?'])\n"
                      "print(json.dumps([sys.argv[1:], answer]))\n")
    monkeypatch.setattr(sys, "argv", [])
    vlmeval_tool.main([f"--model={folders[CASES[0]]}", f"--run={script}", "--max_new_tokens=8",
                       "--", "--data", "MMStar"])
    argv, answer = json.loads(capsys.readouterr().out)
    assert argv == ["--model", f"pumice-{CASES[0]}", "--data", "MMStar"]
    assert answer == our_answers(Chat(folders[CASES[0]], "cpu", "fp32"), 1)[0]
    with pytest.raises(Error, match="a folder, and run.py of VLMEvalKit"):
        vlmeval_tool.main([f"--model={folders[CASES[0]]}", "--run=none.py"])


@pytest.mark.parametrize("tool, module", [("harness_lmms", "lmms_eval.api.model"),
                                          ("harness_vlmeval", "vlmeval.vlm.base")])
def test_a_missing_harness_is_one_line(tool, module, monkeypatch):
    for name in (module.partition(".")[0], module):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=f"error: tools.{tool} needs .*: pip install") as ended:
        load(monkeypatch, f"tools.{tool}")
    assert "\n" not in str(ended.value)
