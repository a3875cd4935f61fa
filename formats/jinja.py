"""The chat templates of chat.py, written in Jinja for transformers, vLLM and llama.cpp."""

import json

from chat import template

# these tags show transformers which text is supervised (option return_assistant_tokens_mask)
BEGIN, END = "{% generation %}", "{% endgeneration %}"

_INST = "[INST] {% if system and ns.first %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ user }} [/INST]"
_SYSTEM, _USER, _ASSISTANT = (f"<|start_header_id|>{r}<|end_header_id|>\n\n" for r in ("system", "user", "assistant"))

# name of a template -> its four texts: at the beginning, for a question, for an answer, before a generated answer
JINJA = {
    "plain": ("{{ bos_token }}", "{{ '<image>' * images }}", BEGIN + "{{ answer }}\n" + END, ""),
    "vicuna_v1": (
        "{{ bos_token }}{% if system %}{{ system + ' ' }}{% endif %}", "USER: {{ user }}",
        " ASSISTANT:" + BEGIN + " {{ answer }}{{ eos_token }}" + END, " ASSISTANT:"),
    "llava_llama_2": ("", "{{ bos_token }}" + _INST, BEGIN + " {{ answer }} {{ eos_token }}" + END, ""),
    "llama_3": (
        "<|begin_of_text|>{% if system %}" + _SYSTEM + "{{ system | trim }}<|eot_id|>{% endif %}",
        _USER + "{{ user }}<|eot_id|>", _ASSISTANT + BEGIN + "{{ answer }}<|eot_id|>" + END, _ASSISTANT),
    "chatml": (
        "{% if system %}<|im_start|>system\n{{ system }}<|im_end|>\n{% endif %}",
        "<|im_start|>user\n{{ user }}<|im_end|>\n",
        "<|im_start|>assistant\n" + BEGIN + "{{ answer }}<|im_end|>" + END + "{{ '\\n' }}",
        "<|im_start|>assistant\n"),
    "llava_v0": (
        "{{ bos_token }}{% if system %}{{ system }}{% endif %}", "###Human: {{ user }}",
        "###Assistant:" + BEGIN + " {{ answer }}{{ eos_token }}" + END, "###Assistant:"),
    "mistral": ("{{ bos_token }}", _INST, BEGIN + " {{ answer }} {{ eos_token }}" + END, "")}
JINJA["internvl"] = JINJA["chatml"]
JINJA["idefics3"] = (   # images stay where they are, and the text between them is stripped
    "{{ bos_token }}{% if system %}System: {{ system }}<end_of_utterance>\n{% endif %}",
    "User:{% set pieces = said.split('<image>') %}{{ ' ' if pieces[0] | trim }}{% for piece in pieces %}"
    "{{ '' if loop.first else '<image>' }}{{ piece | trim }}{% endfor %}<end_of_utterance>\n",
    "Assistant:" + BEGIN + " {{ answer }}<end_of_utterance>" + END + "{{ '\\n' }}", "Assistant:")

# _FRAME: the template around the texts of JINJA. A message's content is a string or a list of parts. A single <image>
# moves to the front of its message. _FRAME is one line, because programs treat a line break after a tag differently
CONTENT = "{% set said = words(message['content']) %}"
_FRAME = (
    "{% macro words(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>\\n' }}{% endfor %}{% endif %}{% endmacro %}"
    "{% set system = @system@ %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = words(messages[0]['content']) %}{% endif %}{% set ns = namespace(first=true) %}@begin@"
    "{% for message in messages %}" + CONTENT +
    "{% set images = said.split('<image>') | length - 1 %}{% if message['role'] == 'user' %}"
    "{% set user = ('<image>\\n' + (said | replace('<image>', '') | trim) if images == 1 else said) | trim %}@user@"
    "{% set ns.first = false %}{% elif message['role'] == 'assistant' %}{% set answer = said | trim %}@assistant@"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}@prompt@{% endif %}")


def jinja(name, system=None):
    """Return a template in Jinja. It renders the text that chat.encode tokenises, with one difference: if a user types
    the name of a control token, this text becomes a real control token. system: None = the template's default"""
    out, t = _FRAME, template(name)
    for place, part in zip(("@begin@", "@user@", "@assistant@", "@prompt@"), JINJA[name]):
        out = out.replace(place, part)
    return out.replace("@system@", json.dumps(t.system if system is None else system, ensure_ascii=False))
