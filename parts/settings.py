"""The setting `parts` of a new model: which parts of other systems it has, beyond its vision tower and its LLM.

    --parts="connector=pool tokens=9"
    --parts="mask=prefix vision.feature_layer=-1 vision.feature_norm=true"
    --parts="connector=resampler tokens=36 connector_args.heads=4"

A name is a field of model.VLMConfig; vision. and text. lead to the fields of its parts, connector_args. and layout. to
values of these dicts.
"""

import dataclasses
import json

from config import stop


def apply_parts(cfg, parts, classes, read_second=None):
    """Change a VLMConfig as `parts` says.

    classes        model_type -> config class, where a part needs another class
    read_second    folder of a second vision tower -> its VisionConfig, for second=FOLDER
    """
    for item in parts.split():
        name, equals, text = item.partition("=")
        *path, field = name.split(".")
        owner = cfg
        for step in path:
            owner = getattr(owner, step, None) if dataclasses.is_dataclass(owner) else None
        if field == "model_type" and len(path) == 1:
            if text not in classes:
                stop(f"parts={parts}: model_type {text!r}: {', '.join(classes)}")
            setattr(cfg, path[0], classes[text](**dataclasses.asdict(owner) | {"model_type": text}))
            continue
        if field == "second" and not path:
            cfg.second = read_second(text)
            continue
        try:
            value = tuple(x) if isinstance(x := json.loads(text), list) else x
        except ValueError:
            value = text                                       # a word, such as prefix
        if isinstance(owner, dict) and equals:
            owner[field] = value
            continue
        if not equals or not dataclasses.is_dataclass(owner) or field not in vars(owner):
            stop(f"parts={parts}: {item!r} is not a field=value of the model's config")
        old = getattr(owner, field)
        if old is not None and type(value) is not type(old) and {type(value), type(old)} != {int, tuple}:
            stop(f"parts={parts}: {field} is of type {type(old).__name__}, not {text!r}")
        setattr(owner, field, value)
