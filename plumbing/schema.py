"""What a dataclass says of its fields: a type that values must fit, and a comment that tells what the field means.

The config's sections are such dataclasses (configurator.py); a field that is itself one is a section with a prefix.
"""

import ast
import difflib
import inspect
import io
import sys
import tokenize
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Literal


def sections(config, prefix=""):
    """Yield ("", config), ("model.", config.model), ...: the dataclasses in a config by the prefix of their keys."""
    yield prefix, config
    for f in fields(config):
        if is_dataclass(value := getattr(config, f.name)):
            yield from sections(value, f"{prefix}{f.name}.")


def flat(config):
    """{key: value} of a config, sections taken apart: {"seed": 1337, "model.n_layer": 4, ...}."""
    return {prefix + f.name: value for prefix, section in sections(config) for f in fields(section)
            if not is_dataclass(value := getattr(section, f.name))}


def comments(kind):
    """{field: the comment on its line} of a dataclass."""
    source = inspect.getsource(kind)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    notes = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    lines = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: notes.get(node.end_lineno, "") for node in lines}


def closest(name, names):
    """The likeliest of `names`, compared whole and by the part behind the last dot; "" if none looks like it."""
    def score(other):
        pairs = (name, other), (name.split(".")[-1], other.split(".")[-1])
        whole, leaf = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        word = 0.9 * (pairs[1][1].startswith(name) or name in pairs[1][1].split("_"))  # --steps for --max_steps
        return max(whole, leaf, word), whole

    best = max(names, key=score, default="")
    return best if best and score(best)[0] > 0.7 else ""


def suggest(name, names, form="{}"):
    """", did you mean FORM?" with the closest of `names` in the place of {}; "" if none looks like it."""
    near = closest(name, names)
    return f", did you mean {form.format(near)}?" if near else ""


def alternatives(kind):
    """The members of a union; of anything else, itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def fits(value, kind):
    """Whether `value` is of the annotated type. An int is a fine float, a bool is no int, nan and inf are nothing."""
    if len(kinds := alternatives(kind)) > 1:
        return any(fits(value, k) for k in kinds)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin in (list, tuple):
        if not isinstance(value, origin):
            return False
        every = [args[0]] * len(value) if origin is list or args[-1] is ... else args
        return len(value) == len(every) and all(map(fits, value, every))
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def parse(text, kind):
    """The value that a command-line text means for a field of this type, or the text itself if it means none."""
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, TypeError):  # not a literal: text as it stands
        return text
    if isinstance(value, list) and typing.get_origin(kind) is tuple:
        value = tuple(value)
    if isinstance(value, str) or not fits(value, kind):
        return text
    return float(value) if kind is float else value


def type_name(kind):
    if typing.get_origin(kind) is Literal:
        return " | ".join(map(repr, typing.get_args(kind)))
    if len(kinds := alternatives(kind)) > 1:
        return " | ".join(map(type_name, kinds))
    return str(kind) if typing.get_origin(kind) else kind.__name__.replace("NoneType", "None")


def to_python(config):
    """A Config as the text of a Python config file that reads back as an equal one."""
    imports = {}

    def show(value, indent):
        if not is_dataclass(value):
            return repr(value)
        kind, notes, lines = type(value), comments(type(value)), []
        imports.setdefault(kind.__module__, set()).add(kind.__name__)
        for f in fields(value):
            line = f"{indent}    {f.name}={show(getattr(value, f.name), indent + '    ')},"
            noted = f"{line}  # {notes[f.name]}"
            lines.append(line if "\n" in line or len(noted) > 120 else noted)
        return "\n".join([f"{kind.__name__}(", *lines, f"{indent})"])

    body = show(config, "")
    head = "".join(f"from {module} import {', '.join(sorted(names))}\n" for module, names in sorted(imports.items()))
    return f"{head}\nconfig = {body}\n"
