"""Chat templates as transformers, vLLM and others read them: jinja."""

import json

from chat import template

# around these: contents are strings with markers or lists of parts, and markers stand as Script.user puts them. All in
# one line, for readers differ in what they do with a line break after a tag
_JINJA = (
    "{% macro words(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>\\n' }}{% endfor %}{% endif %}{% endmacro %}"
    "{% set system = @system@ %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = words(messages[0]['content']) %}{% endif %}{% set ns = namespace(first=true) %}@begin@"
    "{% for message in messages %}{% set said = words(message['content']) %}"
    "{% set images = said.split('<image>') | length - 1 %}{% if message['role'] == 'user' %}"
    "{% set user = ('<image>\\n' + (said | replace('<image>', '') | trim) if images == 1 else said) | trim %}@user@"
    "{% set ns.first = false %}{% elif message['role'] == 'assistant' %}{% set answer = said | trim %}@assistant@"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}@prompt@{% endif %}")


def jinja(name, system=None):
    """A template as transformers, vLLM and others read it: it renders to text what `encode` makes ids of. A string does
    not tell what was typed from what was meant, so there, and not here, a control token can be typed."""
    t = template(name)
    out = _JINJA
    for place, part in zip(("@begin@", "@user@", "@assistant@", "@prompt@"), t.jinja):
        out = out.replace(place, part)
    return out.replace("@system@", json.dumps(t.system if system is None else system, ensure_ascii=False))
