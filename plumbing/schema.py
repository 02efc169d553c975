"""Reading a dataclass as a schema: types that values must fit, and comments that are the fields' help texts.

A field that holds another dataclass is a section of its own, with a prefix. A number that has a range is Annotated with
it, as --help shows it, and with a test of its values.
"""

import ast
import difflib
import inspect
import io
import tokenize
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Annotated, Literal

UNIONS = typing.Union, types.UnionType  # Optional[int], int | None
LARGEST = 3.4028234e38  # of float32, in which models and optimizers compute: larger numbers fit no field
PositiveInt = Annotated[int, "int >= 1", lambda value: value >= 1]
Natural = Annotated[int, "int >= 0", lambda value: value >= 0]
PositiveFloat = Annotated[float, "float > 0", lambda value: value > 0]
NonNegativeFloat = Annotated[float, "float >= 0", lambda value: value >= 0]


def sections(config, prefix=""):
    """Yield ("", config), ("model.", config.model), ...: all sections of a config with the prefix of their keys."""
    yield prefix, config
    for f in fields(config):
        if is_dataclass(value := getattr(config, f.name)):
            yield from sections(value, f"{prefix}{f.name}.")


def flat(config):
    """{key: value} of a config and all its sections: {"seed": 1337, "model.n_layer": 4, ...}."""
    return {prefix + f.name: value for prefix, section in sections(config) for f in fields(section)
            if not is_dataclass(value := getattr(section, f.name))}


def comments(kind):
    """Of a dataclass {field: the comment on its last line}, and {field: the comment on a line of its own above it}."""
    source = inspect.getsource(kind)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    notes = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    lines = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    ends = {node.end_lineno for node in lines}
    headings = {node.target.id: notes[node.lineno - 1] for node in lines if node.lineno - 1 in notes.keys() - ends}
    return {node.target.id: notes.get(node.end_lineno, "") for node in lines}, headings


def suggest(name, names, form="{}"):
    """", did you mean FORM?" with the closest of `names` in place of {}; "" if none is similar."""
    def similarity(a, b):
        return difflib.SequenceMatcher(None, a, b).ratio()

    def score(other):
        leaf = other.split(".")[-1]
        is_part = leaf.startswith(name) or name in leaf.split("_")  # --steps for --max_steps
        whole = similarity(name, other)
        return max(whole, similarity(name.split(".")[-1], leaf), 0.9 * is_part), whole

    near = max(names, key=score, default="")
    return f", did you mean {form.format(near)}?" if score(near)[0] > 0.7 else ""


def fits(value, kind):
    """Whether `value` is of a field's type. An int fits float, a bool does not fit int, nan fits nothing."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        kind, _, in_range = args
        return fits(value, kind) and in_range(value)
    if origin in UNIONS:
        return any(fits(value, k) for k in args)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin is list:
        return isinstance(value, list) and all(fits(v, args[0]) for v in value)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(args) and all(map(fits, value, args))
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if kind is float:
        return type(value) in (int, float) and abs(value) <= LARGEST
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def parse(text, kind):
    """A command-line text as a value for a field of this type, or the text itself if it is not one."""
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, TypeError):  # not a literal
        return text
    if isinstance(value, list) and typing.get_origin(kind) is tuple:
        value = tuple(value)
    if isinstance(value, str) or not fits(value, kind):
        return text
    return float(value) if without_range(kind) is float else value


def without_range(kind):
    """The type of a number, whatever its range."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def type_name(kind):
    """A type as it is written in the dataclass, a Literal as its values: 'auto' | 'never', a range as int >= 1."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return args[1]
    if origin is Literal:
        return " | ".join(map(repr, args))
    if origin in UNIONS:
        return " | ".join(map(type_name, args))
    if origin:
        return f"{origin.__name__}[{', '.join(map(type_name, args))}]"
    return kind.__name__.replace("NoneType", "None")


def to_python(config):
    """The text of a Python config file that reads back as an equal Config."""
    imports = {}

    def show(value, indent):
        if not is_dataclass(value):
            return repr(value)
        kind, (notes, _), lines = type(value), comments(type(value)), []
        imports.setdefault(kind.__module__, set()).add(kind.__name__)
        for f in fields(value):
            line = f"{indent}    {f.name}={show(getattr(value, f.name), indent + '    ')},"
            with_comment = f"{line}  # {notes[f.name]}"
            lines.append(line if "\n" in line or len(with_comment) > 120 else with_comment)
        return "\n".join([f"{kind.__name__}(", *lines, f"{indent})"])

    body = show(config, "")
    head = "".join(f"from {module} import {', '.join(sorted(names))}\n" for module, names in sorted(imports.items()))
    return f"{head}\nconfig = {body}\n"
