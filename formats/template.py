"""Chat templates: from messages to the ids of `transformers`' apply_chat_template, and which of them are targets.

    messages -> Jinja, in its sandbox -> text -> special tokens and ordinary text -> ids

The template writes the special tokens. One that a message contains is text, and stays text: while the template runs, a
private-use character stands for it. (`transformers` makes it the special token unless sanitize_control_tokens is set.)

Targets are what the assistant says and the token that ends its turn. A template with {% generation %} says itself where
that is. For the others it is found by rendering: invisible markers around the assistant's strings show where they end
up; the text that add_generation_prompt adds is where a turn begins; and what follows the last string whether or not the
conversation goes on, up to its last special token, is how a turn ends.
"""

import itertools
import json
import os.path
import re
import unicodedata
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
import numpy as np

from plumbing.errors import UserError

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}"""
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Characters of the private-use plane 16, none of which is left in what comes out. They stand for special tokens that
# the template wrote, or (HELD) for special tokens' text in messages, or are marks around the words of messages.
SPECIAL, HELD, MARKS = 0x100000, 0x104000, 0x108000
OPEN, CLOSE = "\U0010fff0", "\U0010fff1"  # around what is inside of {% generation %}
PRIVATE = re.compile("[\U00100000-\U0010fffd]")
CODED = re.compile("[\U00100000-\U00103fff]")
MARK = re.compile("[\U00108000-\U0010ffef]")
HALVES = re.compile("[\ud800-\udfff]")
OPENS_REASONING = re.compile(r"[^\w\s]+(think|thought|reasoning)", re.IGNORECASE)
ADVICE = "put {% generation %} around the assistant's words in it (data.chat_template=FILE), or set data.train_on=all"


class Generation(jinja2.ext.Extension):
    """{% generation %}: puts OPEN and CLOSE around what is inside."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller):
        return OPEN + caller() + CLOSE


def environment():
    """Jinja as `transformers` sets it up for chat templates (utils/chat_template_utils.py)."""

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise UserError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                       extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception,
                    "strftime_now": lambda pattern: datetime.now().strftime(pattern)}
    return env


def walk(value, change):
    """A copy of messages or tools with `change` made to each string, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): walk(item, change) for key, item in value.items()}
    return [walk(item, change) for item in value] if isinstance(value, list) else value


class Template:
    """A chat template of a tokenizer. source: Jinja, or "" for the tokenizer's own. name: for messages.

    Raises UserError where there is none, or it is no valid Jinja.
    """

    def __init__(self, tokenizer, source="", name=""):
        self.tokenizer, self.name = tokenizer, name or f"the chat template of {tokenizer.name}"
        named = tokenizer.config.get("chat_template") if not source else None
        source = source or tokenizer.chat_template
        if not source and {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.specials):
            source, self.name = ("{{ bos_token }}" if tokenizer.bos is not None else "") + CHATML, "ChatML"
        if not source:
            raise UserError(f"tokenizer {tokenizer.name} has no chat template, and no <|im_start|> and <|im_end|> for "
                            "ChatML: name a file with a Jinja template, data.chat_template=FILE, or put one there as "
                            "chat_template.jinja")
        tool_use = {t["name"]: t["template"] for t in named}.get("tool_use") if isinstance(named, list) else None
        self.sources, env = (source, tool_use or source), environment()
        try:
            self.main, self.tool_use = map(env.from_string, self.sources)
            names = jinja2.meta.find_undeclared_variables(env.parse(self.sources[1]))
        except jinja2.TemplateError as error:
            raise UserError(f"{self.name} is not valid Jinja: {error}") from error
        self.takes_tools = "tools" in names
        texts = {i: text for text, i in tokenizer.specials.items()}
        self.variables = {"bos_token": texts.get(tokenizer.bos), "eos_token": texts.get(tokenizer.eos)}
        if tokenizer.config:  # then it is what transformers goes by
            self.variables = {key: tokenizer.config.get(key) for key in TOKEN_NAMES}
        self.variables = {key: value["content"] if isinstance(value, dict) else value
                          for key, value in self.variables.items() if value is not None}
        # those that ordinary text holds too (<think>) need no care; the longest first where several match
        self.specials = [text for text in sorted(tokenizer.specials, key=len, reverse=True)
                         if tokenizer.encode(text).tolist() != [tokenizer.specials[text]]]
        pattern = "|".join(map(re.escape, self.specials)) or "(?!)"
        self.special, self.held = re.compile(pattern), re.compile(f"{pattern}|{PRIVATE.pattern}")
        self.code = {text: chr(SPECIAL + k) for k, text in enumerate(self.specials)}
        self.coded, self.sizes = None, np.full(tokenizer.largest + 1, -1)  # bytes of each id; -1: not yet asked for
        if tokenizer.full is not None:
            self.coded, self.real = self.coded_tokenizer(tokenizer.full)
        self.begins, self.ends = {}, {}  # text around a turn: where the turn begins, where it ends

    def coded_tokenizer(self, full):
        """(a copy of a tokenizers.Tokenizer that finds characters for special tokens, and not their text; real ids)."""
        from tokenizers import AddedToken

        copy = type(full).from_str(full.to_str())
        flags = {token.content: token for token in full.get_added_tokens_decoder().values()}
        copy.encode_special_tokens = True
        copy.add_tokens([AddedToken(self.code[text], lstrip=flags[text].lstrip, rstrip=flags[text].rstrip,
                                    single_word=flags[text].single_word, normalized=flags[text].normalized)
                         for text in self.specials])
        real = np.arange(max(copy.get_vocab().values()) + 1)
        for text in self.specials:
            real[copy.token_to_id(self.code[text])] = self.tokenizer.specials[text]
        return copy, real

    # ------------------------------------------------------------------------------------------------------------
    # rendering: special tokens of the template become one character each (SPECIAL), those of messages another (HELD)

    def hold(self, value, held):
        """A copy of messages or tools in which a character stands for each special token's text. held: text -> char."""

        def stand_in(match):
            return held.setdefault(match[0], chr(HELD + len(held)))

        def change(text):
            if CODED.search(text):
                raise UserError(f"it has {CODED.search(text)[0]!r}, a private-use character that is needed here")
            if HALVES.search(text):  # of characters: they count as U+FFFD, as in Tokenizer.encode
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self.held.sub(stand_in, text)

        return walk(value, change)

    def render(self, messages, tools, prompt=False):
        """The text of messages, in which special tokens are one character each."""
        template = self.tool_use if tools else self.main
        try:
            text = template.render(messages=messages, tools=tools or None, documents=None,
                                   add_generation_prompt=prompt, **self.variables)
        except (jinja2.TemplateError, UserError) as error:  # UserError: its own raise_exception
            raise UserError(f"{self.name} refuses it: {error}") from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:  # of an expression in it
            raise UserError(f"{self.name} fails on it: {type(error).__name__}: {error}") from error
        return self.special.sub(lambda match: self.code[match[0]], text)

    # ------------------------------------------------------------------------------------------------------------
    # targets

    def targets(self, messages, tools):
        """(text as render() gives it, [(begin, end) of what is trained on], number of messages it leaves out)."""
        plain = self.render(messages, tools)
        if OPEN in plain:
            return *take_out_generation(plain), 0
        for roles, how in (("all", "around"), ("all", "within"), ("assistant", "within"), ("assistant", "end")):
            marked = [mark(m, i, how) if roles in ("all", m["role"]) else m for i, m in enumerate(messages)]
            rendered = self.render(marked, tools)
            if MARK.sub("", rendered) == plain:  # else the template strips or compares what a mark changes
                break
        else:
            raise UserError(f"{self.name} does not show where the assistant's words are: {ADVICE}")
        marks = {}  # of each message: where its first and last mark are, and whether its words begin at the first
        for n, match in enumerate(MARK.finditer(rendered)):
            i, is_end = divmod(ord(match[0]) - MARKS, 2)
            marks.setdefault(i, [match.start() - n, None, not is_end])[1] = match.start() - n if is_end else None
        spans, low = [], 0
        for i in sorted(marks, key=lambda i: marks[i][0]):
            first, last, words_begin = marks[i]
            if last is None:
                raise UserError(f"{self.name} turns the words of a message around: {ADVICE}")
            if messages[i]["role"] == "assistant":
                high = min([other for other, _, _ in marks.values() if other > last], default=len(plain))
                begin = self.begin_of_turn(messages[:i], tools, plain, low, first, words_begin)
                last = self.end_of_turn(marked, i, tools, plain, last, high)
                spans.append((begin, last))
            low = max(low, last)
        n_marked = sum(message != original for message, original in zip(marked, messages, strict=True))
        return plain, spans, n_marked - len(marks)

    def begin_of_turn(self, earlier, tools, plain, low, first, words_begin):
        """Where an assistant's turn begins in `plain`: after the text that asks for it, between `low` and `first`.

        first: where the turn's first mark is: the begin of its words, or some place in them. earlier: messages.
        """
        key = plain[low:first], words_begin
        if key in self.begins:
            return first - self.begins[key]
        try:
            before, asked = (self.render(earlier, tools, prompt) for prompt in (False, True))
        except UserError:  # no messages, or roles in an order that a template refuses
            before = asked = ""
        header, begin = asked[common(before, asked) :], first if words_begin else None
        if header:
            for text in self.openings(header):
                at = plain.rfind(text, low, first) if words_begin else plain.find(text, low, first)
                if at >= 0:
                    begin = at + len(text)
                    break
        elif plain.startswith(before) and low <= len(before) <= first and not plain[len(before) : first].strip():
            begin = len(before)  # white space before the reply is the reply's, if nothing asks for it
        if begin is None:
            raise UserError(f"{self.name} does not show where the assistant's turn begins: {ADVICE}")
        if len(key[0]) < 200:
            self.begins[key] = first - begin
        return begin

    def openings(self, header):
        """The text that asks for a reply, and what is left of it before a reply without the reasoning that it opens."""
        yield header
        for k in range(1, len(header)):
            if OPENS_REASONING.match(self.as_text(header[k:])):
                yield header[:k]
                return

    def end_of_turn(self, marked, i, tools, plain, last, high):
        """Where turn i ends in `plain`: behind the last special token that comes after it in any conversation.

        marked: messages. last: where its words end. high: where the next message's begin, or the end of the text.
        """
        key = plain[last:high], i + 1 == len(marked)
        if key in self.ends:
            return last + self.ends[key]
        here, is_last = marked[: i + 1], i + 1 == len(marked)
        others = [(here, True), ([*here, {"role": "user", "content": "?"}], False)] if is_last else [(here, False)]
        tail = plain[last:]
        for conversation, prompt in others:
            try:
                other = self.render(conversation, tools, prompt)
            except UserError:  # roles in an order that the template refuses
                continue
            other = MARK.sub("", other[other.rfind(chr(MARKS + 2 * i + 1)) + 1 :])
            if other != tail:
                tail = tail[: common(tail, other)]
                break
        if not is_last and len(tail) == len(plain) - last:
            raise UserError(f"{self.name} does not show where the assistant's turn ends: {ADVICE}")
        specials = [match.end() for match in CODED.finditer(tail)]
        end = specials[-1] if specials else 0
        if len(key[0]) < 200:
            self.ends[key] = end
        return last + end

    def as_text(self, coded):
        return CODED.sub(lambda match: self.specials[ord(match[0]) - SPECIAL], coded)

    # ------------------------------------------------------------------------------------------------------------
    # ids

    def encode(self, messages, tools=None, train_on="assistant", prompt=False):
        """(ids, loss, messages that the template leaves out) of a conversation: int64 (n,), bool (n,), int.

        messages: dicts with `role` and `content`, and what else the template takes. loss: whether an id is a target,
        which it is if any of its characters is to be trained on. prompt: end with what asks for a reply (only with
        train_on="all"). Raises UserError, without naming the conversation.
        """
        held = {}
        messages, tools = self.hold([normalize(m) for m in messages], held), self.hold(tools, held)
        if len(messages) > 1000:
            raise UserError(f"it has {len(messages):,} messages, 1,000 are the most")
        if train_on == "all":
            text, n_left_out = take_out_generation(self.render(messages, tools, prompt))[0], 0
            spans = [(0, len(text))]
        else:
            text, spans, n_left_out = self.targets(messages, tools)
        text, spans = self.put_back(text, spans, {char: original for original, char in held.items()})
        ids, begins, ends = self.encode_coded(text)
        loss = np.zeros(len(ids), bool)
        for begin, end in spans:
            loss |= (ends > begin) & (begins < end)
        return ids, loss, n_left_out

    def end_of_reply(self):
        """The id of the special token that follows the assistant's words, or None."""
        words = "a reply"
        text = self.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": words}], None)
        match = CODED.search(text, text.rfind(words) + 1)
        return match and self.tokenizer.specials[self.as_text(match[0])]

    def put_back(self, text, spans, original):
        """(text with special tokens' text in messages again, spans in it). original: what each character stands for."""
        if not original and not self.tokenizer.nfc:
            return text, spans
        borders = sorted({0, len(text), *(border for span in spans for border in span)})
        parts, moved = [], {0: 0}
        for begin, end in itertools.pairwise(borders):
            part = PRIVATE.sub(lambda match: original.get(match[0], match[0]), text[begin:end])
            parts.append(unicodedata.normalize("NFC", part) if self.tokenizer.nfc else part)
            moved[end] = moved[begin] + len(parts[-1])
        return "".join(parts), [(moved[begin], moved[end]) for begin, end in spans]

    def encode_coded(self, text):
        """(ids, begins, ends) of text whose special tokens are one character each: of ids where in text they are."""
        if self.coded:
            encoding = self.coded.encode(text, add_special_tokens=False)
            begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
            return self.real[encoding.ids], begins, ends
        ids, begins, ends = ([np.empty(0, np.int64)] for _ in range(3))
        for match in re.finditer(f"{CODED.pattern}|[^{CODED.pattern[1:]}+", text):
            if CODED.match(match[0]):
                part, first, last = np.array([self.tokenizer.specials[self.as_text(match[0])]]), [0], [0]
            else:
                part = self.tokenizer.encode(match[0])
                for i in set(part[self.sizes[part] < 0].tolist()):
                    self.sizes[i] = len(self.tokenizer.decode_bytes(i))
                stops = np.cumsum(self.sizes[part])
                in_utf8 = np.frombuffer(match[0].encode(), np.uint8)
                character = np.cumsum(in_utf8 & 0xC0 != 0x80) - 1  # of each byte
                assert stops[-1] == len(character), "ids that do not spell the text"
                first, last = character[stops - self.sizes[part]], character[stops - 1]
            ids.append(part)
            begins.append(np.add(first, match.start()))
            ends.append(np.add(last, match.start() + 1))
        return np.concatenate(ids).astype(np.int64), np.concatenate(begins), np.concatenate(ends)


def normalize(message):
    """A message without fields that are null, and with its reasoning under each name that templates read it by."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def mark(message, i, how):
    """A copy of message i with a mark at the begin and at the end of each text in it.

    how: "around" the whole text, "within" white space that the text begins or ends with, or only at such an "end".
    """

    begin, end = "" if how == "end" else chr(MARKS + 2 * i), chr(MARKS + 2 * i + 1)

    def around(text, begin=begin):
        words = text if how == "around" else text.strip()
        return text.replace(words, begin + words + end, 1)

    def in_name(function):  # where a name begins is not where the turn does
        return {**function, "name": around(function["name"], begin="")}

    marked = dict(message)
    for key in ("content", "reasoning_content", "thinking", "reasoning"):
        text = message.get(key)
        if isinstance(text, str) and (text.strip() or how == "around" and message["role"] == "assistant"):
            marked[key] = around(text)
        elif isinstance(message.get(key), list):
            marked[key] = [{**part, "text": around(part["text"])} if part.get("text") else part
                           for part in message[key]]
    if calls := message.get("tool_calls"):
        marked["tool_calls"] = [{**call, "function": in_name(call["function"])} if "function" in call else in_name(call)
                                for call in calls]
    if marked == message and message["role"] == "assistant":  # it says nothing, and ends its turn
        marked["content"] = around(message["content"])
    return marked


def take_out_generation(text):
    """(text without OPEN and CLOSE, [(begin, end) of what was between them])."""
    parts = re.split(f"([{OPEN}{CLOSE}])", text)
    spans, at, begin = [], 0, 0
    for part in parts:
        if part == OPEN:
            begin = at
        elif part == CLOSE:
            spans.append((begin, at))
        else:
            at += len(part)
    return "".join(part for part in parts if part not in (OPEN, CLOSE)), spans


def common(a, b):
    """The length of what two strings both begin with."""
    return len(os.path.commonprefix([a, b]))
