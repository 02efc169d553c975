"""Conversations and instructions as training rows, formatted by the tokenizer's chat template.

    rows of files -> messages -> template.Template: ids, and which are targets -> packed or padded rows

A row has one of `messages` (role, content), `conversations` (from, value), `prompt` and `completion` (strings, or lists
of messages), or `instruction`, `input` and `output`; beside them `tools`, and `system` where it has no messages of its
own. A conversation longer than a row loses its end; one without a target is left out. Both are counted on the screen.
"""

import hashlib
import json
import os
import zipfile
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np

from formats import files
from formats.files import check
from formats.packing import make_rows, split
from formats.template import Template
from formats.text import in_order
from plumbing import disk
from plumbing.errors import UserError
from plumbing.ranks import progress_bar

VERSION = 2  # of what is kept in data.cache_dir
FORMS = [("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output")]
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
         "observation": "tool"}  # of `from`
KNOWN_ROLES = {"user", "assistant", "system", "developer", "tool", "ipython", "function"}


def read_messages(value, name):
    """The messages of a list in either spelling (role, content; from, value), checked."""
    messages = []
    for i, raw in enumerate(check(value, f"`{name}`", list)):
        at = f"{name}[{i}]"
        # a table has null where a field is missing; a template may ask whether `content` is none
        items = check(raw, f"`{at}`", dict).items()
        message = {key: value for key, value in items if value is not None or key == "content"}
        if "role" not in message and "from" in message:
            speaker = check(message.pop("from"), f"`{at}.from`", str)
            message = {"role": ROLES.get(speaker, speaker), "content": message.pop("value", None), **message}
        check(message.get("role"), f"`{at}.role`", str)
        calls = check(message.get("tool_calls") or [], f"`{at}.tool_calls`", list)
        for k, call in enumerate(calls):
            function = check(call, f"`{at}.tool_calls[{k}]`", dict).get("function", call)
            check(function, f"`{at}.tool_calls[{k}].function`", dict)
            check(function.get("name"), f"`{at}.tool_calls[{k}].name`", str)
        content = message.get("content")
        if content is not None or not calls:
            check(content, f"`{at}.content`", str, list)
        for k, part in enumerate(content if isinstance(content, list) else []):
            if check(part, f"`{at}.content[{k}]`", dict).get("type") != "text":
                raise UserError(f"`{at}.content[{k}]` is of type {part.get('type')!r}: only text is trained on")
            check(part.get("text"), f"`{at}.content[{k}].text`", str)
        messages.append(message)
    if not messages:
        raise UserError(f"`{name}` is empty")
    return messages


def read_conversation(row):
    """(messages, tools or None, names of the fields used) of a row. UserError names the field that cannot be used."""
    present = [name for name, value in row.items() if value is not None]
    form = next((form for form in FORMS if set(form) <= set(present)), None)
    if form is None:
        forms = ", ".join(" and ".join(form) for form in FORMS)
        raise UserError(f"it has no conversation ({forms}): it has {', '.join(present) or 'no fields'}")
    used, messages = {*form, "tools"}, []
    for role, name in zip(("user", "assistant"), form, strict=False):
        is_text = len(form) == 2 and isinstance(row[name], str)
        messages += [{"role": role, "content": row[name]}] if is_text else read_messages(row[name], name)
    if row.get("input") and form == ("instruction", "output"):
        messages[0]["content"] = "\n\n".join(check(row[name], f"`{name}`", str) for name in ("instruction", "input"))
        used.add("input")
    if row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": check(row["system"], "`system`", str)})
        used.add("system")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except json.JSONDecodeError as error:
            raise UserError(f"`tools` is a string but not JSON: {error.msg}") from error
    return messages, check(tools or [], "`tools`", list) or None, used


def tokenize(paths, template, cfg, limit):
    """(list of (ids, loss), {what was cut or dropped: number}, remarks for the screen) of files of conversations."""

    def encode(place_and_row):
        place, row = place_and_row
        try:
            messages, tools, used = read_conversation(row)
            if tools and not template.takes_tools:
                raise UserError(f"it has `tools`, which {template.name} does not take")
            if any(isinstance(message.get("content"), list) for message in messages) and not template.takes_parts:
                raise UserError(f"it has `content` in parts, which {template.name} does not take: join their texts")
            if any(message.get("tool_calls") for message in messages) and not template.reads("tool_calls"):
                raise UserError(f"it has `tool_calls`, which {template.name} does not take")
            keys = dict.fromkeys(key for message in messages for key in message if key not in ("role", "content"))
            ignored = [name for name, value in row.items() if name not in used and value not in (None, "", [])]
            ignored += [f"`{key}` of messages" for key in keys if not template.reads(key)]
            return template.encode(messages, tools, cfg.train_on), ignored, [message["role"] for message in messages]
        except UserError as error:
            raise UserError(f"{place}: {error}") from error

    counts, samples, unused, roles = Counter(), [], {}, {}
    rows = progress_bar(files.rows(paths), "conversations", "row")
    for (ids, loss, n_changed), ignored, speakers in in_order(encode, rows, cfg.workers or os.cpu_count()):
        unused |= dict.fromkeys(ignored)
        roles |= dict.fromkeys(role for role in speakers if role not in KNOWN_ROLES)
        counts["messages the template shortens or drops"] += n_changed
        counts["conversations cut at the end"] += len(ids) > limit + 1
        ids, loss = ids[: limit + 1].astype(np.int32), loss[: limit + 1]
        loss[:1] = False  # nothing comes before it
        counts["dropped, having no target"] += not loss.any()
        if loss.any():
            samples.append((ids, loss))
    remarks = [f"fields not used: {', '.join(unused)}"] if unused else []
    if roles:
        remarks.append(f"roles that are not trained on: {', '.join(map(repr, roles))} (a typing error?)")
    if "strftime_now" in "".join(template.sources):
        remarks.append(f"the template's date is {date.today():%d %b %Y}")
    return samples, counts, remarks


def stored(paths, template, cfg, limit):
    """tokenize(), from cfg.cache_dir if it was done there before: ranks share the work, and a resumed run its dates."""
    identity = [VERSION, [files.identity(path) for path in paths], cfg.train_on, limit,
                template.tokenizer.fingerprint, template.sources, template.tokenizer.named_tokens]
    key = hashlib.blake2b(repr(identity).encode(), digest_size=8).hexdigest()
    path = Path(cfg.cache_dir, f"chat-{template.tokenizer.name}-{key}.npz")
    if not zipfile.is_zipfile(path):  # it is not there, or not whole
        samples, *about = tokenize(paths, template, cfg, limit)
        ids, loss = zip((np.empty(0, np.int32), np.empty(0, bool)), *samples, strict=True)
        with disk.replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, sizes=[len(part) for part in ids], ids=np.concatenate(ids), loss=np.concatenate(loss),
                     about=json.dumps(about))
    made = np.load(path)
    ends = np.cumsum(made["sizes"])[:-1]  # the first is the empty one
    ids, loss = (np.split(made[name], ends)[1:] for name in ("ids", "loss"))
    return list(zip(ids, loss, strict=True)), *json.loads(str(made["about"]))


def read_template(cfg, tokenizer):
    """The chat template of a DataConfig: data.chat_template, or the tokenizer's own."""
    if not cfg.chat_template:
        return Template(tokenizer)
    try:
        source = Path(os.path.expanduser(cfg.chat_template)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template={cfg.chat_template}: {error}") from error
    return Template(tokenizer, source, cfg.chat_template)


def prepare(cfg, tokenizer, block_size, seed):
    """(training Samples, validation Samples) of a DataConfig, see data.prepare."""
    template, found = read_template(cfg, tokenizer), files.resolve(cfg, files.ROWS)
    train, counts, remarks = stored(found.train, template, cfg, block_size)
    val, val_counts, val_remarks = stored(found.val, template, cfg, block_size) if found.val else (None, {}, [])
    counts = {what: n + val_counts.get(what, 0) for what, n in counts.items()}
    about = "; ".join([f"tokenizer {tokenizer.name}, {template.name}", *dict.fromkeys(remarks + val_remarks)])
    return make_rows(*split(train, val), cfg, block_size, seed, found=found, counts=counts, about=about)
