"""Conversations and instructions as training rows, in the words of the tokenizer's chat template.

    rows of files -> messages -> template.Template: ids, and which are targets -> packed or padded rows

A row has one of `messages` (role, content), `conversations` (from, value), `prompt` and `completion` (strings, or lists
of messages), or `instruction`, `input` and `output`; beside them `tools`, and `system` where it has no messages of its
own. A conversation longer than a row loses its end; one without a target is left out. Both are counted on the screen.
"""

import hashlib
import json
from datetime import date
from pathlib import Path

import numpy as np
from tqdm import tqdm

from formats import files
from formats.files import VAL_EVERY, type_of
from formats.packing import make_rows, sample_limit
from formats.template import Template
from formats.tokenizer import get_tokenizer
from plumbing import disk
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


def tokenize(paths, template, train_on, limit):
    """(list of (ids, loss), counts) of files of conversations. counts: what was cut, dropped and not used."""
    samples, cut, dropped, left_out, fields = [], 0, 0, 0, {}
    for place, row in tqdm(files.rows(paths), desc="conversations", unit="", leave=False, disable=None):
        try:
            messages, tools, used = read_conversation(row)
            if tools and not template.takes_tools:
                raise UserError(f"it has `tools`, which {template.name} does not take")
            ids, loss, n_left_out = template.encode(messages, tools, train_on)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        left_out += n_left_out
        fields |= dict.fromkeys(name for name in row if name not in used)
        if len(ids) > limit + 1:
            cut += 1
            ids, loss = ids[: limit + 1], loss[: limit + 1]
        loss[:1] = False  # nothing comes before it
        if loss.any():
            samples.append((ids.astype(np.int32), loss))
        else:
            dropped += 1
    return samples, {"cut": cut, "dropped": dropped, "left out": left_out, "fields": list(fields),
                     "date": f"{date.today():%d %b %Y}" if "strftime_now" in "".join(template.sources) else None}


def stored(paths, template, cfg, limit):
    """tokenize(), from cfg.cache_dir if it was done there before: ranks share the work, and a resumed run its dates."""
    identity = [[(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths], cfg.train_on, limit,
                template.tokenizer.fingerprint, template.sources, template.variables]
    key = hashlib.blake2b(repr(identity).encode(), digest_size=8).hexdigest()
    folder = Path(cfg.cache_dir, f"chat-{template.tokenizer.name}-{key}")
    if not folder.is_dir():
        samples, counts = tokenize(paths, template, cfg.train_on, limit)
        with disk.replacing(folder) as made:
            made.mkdir()
            np.save(made / "sizes.npy", np.array([len(ids) for ids, _ in samples], np.int64))
            np.save(made / "ids.npy", np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in samples)]))
            np.save(made / "loss.npy", np.concatenate([np.empty(0, bool), *(loss for _, loss in samples)]))
            (made / "counts.json").write_text(json.dumps(counts))
    sizes = np.load(folder / "sizes.npy")
    if not len(sizes):  # an empty file cannot be mapped
        return [], json.loads((folder / "counts.json").read_text())
    ids, loss = (np.asarray(np.load(folder / name, mmap_mode="r")) for name in ("ids.npy", "loss.npy"))
    ends = np.cumsum(sizes)
    samples = [(ids[end - size : end], loss[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
    return samples, json.loads((folder / "counts.json").read_text())


def remarks(counts, template, limit):
    """What was cut, dropped and not used, as text for the screen."""
    found = [("cut", f"conversations lost their end, being longer than {limit} tokens"),
             ("dropped", "were dropped, having no target"),
             ("left out", f"messages are not in the text of {template.name}")]
    text = "".join(f"; {counts[key]:,} {what}" for key, what in found if counts[key])
    text += f"; fields not used: {', '.join(counts['fields'])}" if counts["fields"] else ""
    return text + (f"; the template's date is {counts['date']}" if counts["date"] else "")


def read_template(cfg, tokenizer):
    """The chat template of a DataConfig: data.chat_template, or the tokenizer's own."""
    source = ""
    if cfg.chat_template:
        try:
            source = Path(cfg.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template={cfg.chat_template}: {error}") from error
    return Template(tokenizer, source, cfg.chat_template)


def prepare(cfg, block_size, seed):
    """(training Samples, validation Samples, tokenizer) of a DataConfig. With several ranks, on rank 0 first."""
    tokenizer, limit = get_tokenizer(cfg.tokenizer), sample_limit(cfg, block_size)
    template, found = read_template(cfg, tokenizer), files.resolve(cfg, files.ROWS)
    train, counts = stored(found.train, template, cfg, limit)
    if found.val:
        val, val_counts = stored(found.val, template, cfg, limit)
        counts = {key: value or val_counts[key] if key in ("fields", "date") else value + val_counts[key]
                  for key, value in counts.items()}
    else:
        train, val = [s for i, s in enumerate(train, 1) if i % VAL_EVERY], train[VAL_EVERY - 1 :: VAL_EVERY]
    if not train or not val:
        raise UserError(f"data: {len(train)} conversations for training and {len(val)} for validation are too few "
                        f"(without data.val, one of {VAL_EVERY} is for validation)" + remarks(counts, template, limit))
    train, val = make_rows(cfg, block_size, seed, train, val)
    train.description = (
        f"chat, {train.n_samples:,} conversations in {train.n_rows:,} rows of {train.block_size} tokens, "
        f"{train.padding:.1%} of them padding, {train.counts['targets'] / train.counts['tokens']:.0%} of the text is "
        f"trained on, {val.n_samples:,} for validation in {val.n_rows:,} rows, tokenizer {tokenizer.described}, "
        f"{template.name}" + found.note + remarks(counts, template, limit))
    train.counts |= {"cut at the end": counts["cut"], "dropped, having no target": counts["dropped"],
                     "messages that the template leaves out": counts["left out"], "files not used": len(found.unused)}
    return train, val, tokenizer
