"""Conversations and instructions as training rows, in the words of the tokenizer's chat template.

    rows of files -> messages -> template.Template: ids, and which are targets -> packed or padded rows

A row has one of `messages` (role, content), `conversations` (from, value), `prompt` and `completion` (strings, or lists
of messages), or `instruction`, `input` and `output`; beside them `tools`, and `system` where it has no messages of its
own. A conversation longer than a row loses its end; one without a target is left out. Both are counted on the screen.
"""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from formats import files
from formats.files import VAL_EVERY, type_of
from formats.packing import make_rows, sample_limit
from formats.template import Template
from formats.tokenizer import get_tokenizer
from plumbing.errors import UserError

FORMS = [("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output")]
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
         "observation": "tool", **{role: role for role in ("user", "assistant", "system", "tool")}}


# ----------------------------------------------------------------------------------------------------------------
# conversations


def check(value, name, *kinds):
    """`value`, which must be of one of these types. UserError names the field."""
    if isinstance(value, kinds):
        return value
    expected = {str: "a string", list: "a list", dict: "an object"}
    raise UserError(f"`{name}` is {type_of(value)}, expected " + " or ".join(expected[kind] for kind in kinds))


def read_messages(value, name):
    """The messages of a list in either spelling (role, content; from, value), checked."""
    messages = []
    for i, raw in enumerate(check(value, name, list)):
        message, at = dict(check(raw, f"{name}[{i}]", dict)), f"{name}[{i}]"
        if "role" not in message and "from" in message:
            speaker = check(message.pop("from"), f"{at}.from", str)
            if speaker not in ROLES:
                raise UserError(f"`{at}.from` is {speaker!r}, expected one of {', '.join(ROLES)}")
            message = {"role": ROLES[speaker], "content": message.pop("value", None), **message}
        check(message.get("role"), f"{at}.role", str)
        calls = message.get("tool_calls")
        for k, call in enumerate(check(calls, f"{at}.tool_calls", list) if calls is not None else []):
            function = check(call, f"{at}.tool_calls[{k}]", dict).get("function", call)
            check(function, f"{at}.tool_calls[{k}].function", dict)
            check(function.get("name"), f"{at}.tool_calls[{k}].name", str)
        content = message.get("content")
        if content is None and calls:
            message.pop("content", None)
        elif isinstance(check(content, f"{at}.content", str, list), list):
            for k, part in enumerate(content):
                if check(part, f"{at}.content[{k}]", dict).get("type") != "text":
                    raise UserError(f"`{at}.content[{k}]` is of type {part.get('type')!r}: only text is trained on")
                check(part.get("text"), f"{at}.content[{k}].text", str)
        messages.append(message)
    if not messages:
        raise UserError(f"`{name}` is empty")
    return messages


def read_conversation(row):
    """(messages, tools or None, names of the fields used) of a row. UserError names the field that cannot be used."""
    form = next((form for form in FORMS if all(row.get(name) is not None for name in form)), None)
    if form is None:
        found = [name for form in FORMS for name in form if name in row]
        if found:
            form = next(form for form in FORMS if found[0] in form)
            missing = [f"`{name}` is null" if name in row else f"it has no `{name}`"
                       for name in form if row.get(name) is None]
            raise UserError(" and ".join(missing))
        raise UserError("it has no conversation (" + ", ".join(" and ".join(form) for form in FORMS)
                        + "): it has " + (", ".join(row) or "no fields"))
    used = set(form)
    if form in FORMS[:2]:
        messages = read_messages(row[form[0]], form[0])
    else:
        asks, says = ([{"role": role, "content": row[name]}] if isinstance(row[name], str) else
                      read_messages(check(row[name], name, str, list) and row[name], name)
                      for role, name in zip(("user", "assistant"), form, strict=True))
        if row.get("input") and form == FORMS[3]:
            asks[0]["content"] += "\n\n" + check(row["input"], "input", str)
            used.add("input")
        messages = asks + says
    if row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": check(row["system"], "system", str)})
        used.add("system")
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None
        except json.JSONDecodeError as error:
            raise UserError(f"`tools` is a string but not JSON: {error.msg}") from error
    if tools is not None:
        for i, tool in enumerate(check(tools, "tools", list)):
            check(tool, f"tools[{i}]", dict)
    return messages, tools, used | {"tools"}


# ----------------------------------------------------------------------------------------------------------------
# samples


class Reader:
    """Turns files of conversations into samples, and counts what is left out on the way."""

    def __init__(self, template, train_on, limit):
        self.template, self.train_on, self.limit = template, train_on, limit
        self.n_cut, self.n_without_target, self.n_left_out, self.unused_fields = 0, 0, 0, {}

    def samples(self, paths):
        """(ids, loss) of each conversation of which something is a target."""
        samples = []
        for path, number, row in tqdm(files.rows(paths), desc="conversations", unit="", leave=False, disable=None):
            try:
                messages, tools, used = read_conversation(row)
                if tools and not self.template.takes_tools:
                    raise UserError(f"it has `tools`, which {self.template.name} does not take")
                ids, loss, n_left_out = self.template.encode(messages, tools, self.train_on)
            except UserError as error:
                raise UserError(f"{files.place(path, number)}: {error}") from error
            self.n_left_out += n_left_out
            self.unused_fields |= dict.fromkeys(name for name in row if name not in used)
            if len(ids) > self.limit + 1:
                self.n_cut += 1
                ids, loss = ids[: self.limit + 1], loss[: self.limit + 1]
            loss[:1] = False  # nothing comes before it
            if loss.any():
                samples.append((ids.astype(np.int32), loss))
            else:
                self.n_without_target += 1
        return samples

    def remarks(self):
        """What was cut, dropped and not used, as text for the screen."""
        found = [(self.n_cut, f"conversations lost their end, being longer than {self.limit} tokens"),
                 (self.n_without_target, "were dropped, having no target"),
                 (self.n_left_out, f"messages are not in the text of {self.template.name}")]
        text = "".join(f"; {n:,} {what}" for n, what in found if n)
        return text + (f"; fields not used: {', '.join(self.unused_fields)}" if self.unused_fields else "")


def prepare(cfg, block_size, seed):
    """(training Samples, validation Samples, tokenizer) of a DataConfig. With several ranks, on rank 0 first."""
    tokenizer, limit = get_tokenizer(cfg.tokenizer), sample_limit(cfg, block_size)
    source = ""
    if cfg.chat_template:
        try:
            source = Path(cfg.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template={cfg.chat_template}: {error}") from error
    template, found = Template(tokenizer, source, cfg.chat_template), files.resolve(cfg, files.ROWS)
    reader = Reader(template, cfg.train_on, limit)
    train = reader.samples(found.train)
    if found.val:
        val = reader.samples(found.val)
    else:
        train, val = [s for i, s in enumerate(train, 1) if i % VAL_EVERY], train[VAL_EVERY - 1 :: VAL_EVERY]
    if not train or not val:
        raise UserError(f"data: {len(train)} conversations for training and {len(val)} for validation are too few "
                        f"(without data.val, one of {VAL_EVERY} is for validation){reader.remarks()}")
    train, val = make_rows(cfg, block_size, seed, train, val)
    train.description = (
        f"chat, {train.n_samples:,} conversations in {train.n_rows:,} rows of {train.block_size} tokens, "
        f"{train.padding:.1%} of them padding, {train.loss.mean():.0%} of the text is trained on, "
        f"{val.n_samples:,} for validation in {val.n_rows:,} rows, tokenizer {tokenizer.name}, {template.name}"
        + found.note + reader.remarks())
    train.counts |= {"cut at the end": reader.n_cut, "dropped, having no target": reader.n_without_target,
                     "messages that the template leaves out": reader.n_left_out, "files not used": len(found.unused)}
    return train, val, tokenizer
