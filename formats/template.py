"""Chat templates: from messages to the ids of `transformers`' apply_chat_template, and which of them are targets.

    messages -> Jinja, in its sandbox -> text, with marks -> text, and what is said in it -> ids, targets

Marks are private-use characters. They keep apart who wrote a special token: one of the template gets SPECIAL in front
and becomes its id; one in a message gets a BREAK after each character and stays text. (`transformers` makes it the
special token unless sanitize_control_tokens is set.)

Targets are what the assistant says and the token that ends its turn. A template with {% generation %} says itself where
that is. For the others, one question with its reply shows what begins and ends a turn, and turns are found by that.
"""

import functools
import json
import os.path
import re
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
import numpy as np

from plumbing.errors import UserError

SPECIAL, BREAK, EDGE, REPLY = "\U0010f000", "\U0010f001", "\U0010f002", "\U0010f003"  # EDGE: of what is said
RESERVED = re.compile(f"[{SPECIAL}-{REPLY}]")
QUESTION = {"role": "user", "content": "?"}
CALL = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}  # Mistral: 9 letters, digits
REASONING = ["reasoning_content", "thinking", "reasoning"]  # names of one field, the first one counts
HALVES = re.compile("[\ud800-\udfff]")  # of characters: they count as U+FFFD, as in Tokenizer.encode
OPENS_REASONING = re.compile(rf"{SPECIAL}?[<\[\u25c1][^<\[\u25c1]*(think|thought|reasoning)", re.IGNORECASE)


class Generation(jinja2.ext.Extension):
    """{% generation %}: puts EDGE around what is inside."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller):
        return EDGE + caller() + EDGE


def environment():
    """Jinja as `transformers` sets it up for chat templates (utils/chat_template_utils.py)."""

    def raise_exception(message):
        raise UserError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                       extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    env.globals |= {"raise_exception": raise_exception,
                    "strftime_now": lambda pattern: datetime.now().strftime(pattern)}
    return env


class Template:
    """A chat template of a tokenizer. source: Jinja, or None for the tokenizer's own. name: for messages.

    Raises UserError where there is none, it is no valid Jinja, or the tokenizer is not that of a model folder.
    """

    def __init__(self, tokenizer, source=None, name=""):
        self.tokenizer, self.name = tokenizer, name or f"the chat template of {tokenizer.name}"
        if tokenizer.full is None:
            kind = "a class in Python" if tokenizer.python else "not that of a model folder"
            raise UserError(f"tokenizer {tokenizer.name} is {kind}: a chat template needs another, "
                            "data.tokenizer=FOLDER (sample.py: --tokenizer=FOLDER)")
        found = tokenizer.chat_template or "" if source is None else source
        found = {"default": found} if isinstance(found, str) else {part["name"]: part["template"] for part in found}
        source = found.get("default", "")
        if not source.strip():
            raise UserError(f"{self.name} is missing or empty: name a file with a Jinja template, "
                            "data.chat_template=FILE, or put one beside the tokenizer as chat_template.jinja")
        self.sources, env = (source, found.get("tool_use", source)), environment()
        try:
            self.main, self.tool_use = map(env.from_string, self.sources)
            self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(env.parse(self.sources[1]))
        except jinja2.TemplateError as error:
            raise UserError(f"{self.name} is not valid Jinja: {error}") from error
        # special tokens that ordinary text holds too (<think>) need no care; the longest first where several match
        self.specials = [text for text in sorted(tokenizer.specials, key=len, reverse=True)
                         if tokenizer.encode(text).tolist() != [tokenizer.specials[text]]]
        pattern = "|".join(map(re.escape, self.specials)) or "(?!)"
        self.special = re.compile(f"(?:{pattern})(?!{BREAK})")
        self.marked_special = re.compile(f"({SPECIAL}(?:{pattern}))")
        self.full, self.real_ids = self.with_marked_specials(tokenizer.full)
        self.turn, self.header, self.ending = None, "", ""
        self.find_turn()
        theirs = [self.header.replace(SPECIAL, "").strip(), *self.specials]  # not for messages
        self.own = re.compile("|".join(map(re.escape, filter(None, theirs))) or "(?!)")

    def with_marked_specials(self, full):
        """(a copy of a tokenizers.Tokenizer that finds special tokens behind SPECIAL only, the real id of each id)."""
        copy = type(full).from_str(full.to_str())
        copy.encode_special_tokens = True  # as text, where they are not marked
        tokens = [token for token in full.get_added_tokens_decoder().values() if token.content in self.specials]
        for token in tokens:
            token.content, token.special = SPECIAL + token.content, False
        copy.add_tokens(tokens)
        real_ids = np.arange(max(copy.get_vocab().values()) + 1)
        for text in self.specials:
            real_ids[copy.token_to_id(SPECIAL + text)] = self.tokenizer.specials[text]
        return copy, real_ids

    def find_turn(self):
        """Set turn, a pattern of an assistant's turn or None, and texts that begin and end one: header, ending.

        A turn begins with what asks for it, without the reasoning that this may open; where that is nothing, or not
        what is before a reply, with what is between question and reply. It ends with the special tokens that follow the
        reply whether or not the conversation goes on, else with the first one that follows it. The pattern's groups:
        the beginning; the rest.
        """
        reply = {"role": "assistant", "content": REPLY}
        conversations = [QUESTION], [QUESTION, reply], [QUESTION, reply, QUESTION]
        try:
            unasked, alone, inside = (self.render(messages, None) for messages in conversations)
            asked = self.render([QUESTION], None, prompt=True)
        except UserError:  # encode() will show the reason
            return
        before, _, after = alone.partition(REPLY)

        follows = after, inside.partition(REPLY)[2]
        always = os.path.commonprefix(follows)
        ends = list(self.marked_special.finditer(always))[-1:] or filter(None, map(self.marked_special.search, follows))
        endings = [special.string[: special.end()].lstrip() for special in ends]
        if not endings:
            return

        # for some templates from within a special token on
        header = asked[len(os.path.commonprefix([unasked, asked])) :].lstrip()
        if opening := OPENS_REASONING.search(header, 1):
            header = header[: opening.start()]
        if not header or header not in before:
            header = before.rpartition(QUESTION["content"])[2]
            for ending in endings:
                header = header.rpartition(ending)[2]
        self.header, self.ending = header.strip(" ").lstrip(), endings[0]  # a space before a word is in its token

        first = self.marked_special.match(self.header)
        other = first[0] if first else self.header
        begins = [self.header, *(text for text in self.after_tool() if text not in endings)]
        begin, others, end = ("|".join(map(re.escape, texts)) for texts in (begins, [other, *begins[1:]], endings))
        turn = re.compile(f"({begin})((?:(?!{others}).)*?(?:{end}))", re.DOTALL)  # others begin other turns
        if any(REPLY in said for _, said in turn.findall(inside)):
            self.turn = turn

    def after_tool(self):
        """The special tokens between a tool's answer and a reply, as a list of one; [] where its header is there."""
        messages = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                    {"role": "tool", "name": "f", "content": "{}", "tool_call_id": CALL["id"]},
                    {"role": "assistant", "content": REPLY}]
        try:
            before = self.render(messages, None).partition(REPLY)[0].rstrip(" ")
        except UserError:  # no tools, or only if they are declared
            return []
        found = re.search(rf"(?:{self.marked_special.pattern})+\Z", before)
        return [found[0]] if found and not before.endswith(self.header) else []

    @functools.cached_property
    def takes_parts(self):
        """Whether `content` may be a list of texts: some templates leave it out, or print it as a Python list."""
        text = "?\n?"
        try:
            return text in self.render([{"role": "user", "content": [{"type": "text", "text": text}]}], None)
        except UserError:
            return False

    def reads(self, key):
        """Whether the template reads this key of a message."""
        keys = {key, *REASONING[:2]} if key in REASONING else {key}  # as name_reasoning() does
        return any(key in source for key in keys for source in self.sources)

    def render(self, messages, tools, prompt=False):
        """The text of messages, with marks."""
        template = self.tool_use if tools else self.main
        try:
            text = template.render(messages=messages, tools=tools or None, documents=None,
                                   add_generation_prompt=prompt, **self.tokenizer.named_tokens)
        except (jinja2.TemplateError, UserError) as error:  # UserError: its own raise_exception
            raise UserError(f"{self.name} refuses it: {error}") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UserError(f"{self.name} fails on it: {type(error).__name__}: {error}") from error
        return self.special.sub(rf"{SPECIAL}\g<0>", text)

    def targets(self, text, n_replies):
        """A rendered text with an EDGE at both ends of what is trained on."""
        if EDGE in text:
            return text
        text, n_turns = self.turn.subn(rf"\1{EDGE}\2{EDGE}", text) if self.turn else (text, 0)
        if n_turns != n_replies:
            raise UserError(f"{self.name} does not show where the assistant's words are: put {{% generation %}} around "
                            "them in it (data.chat_template=FILE), or set data.train_on=all")
        return text

    def encode(self, messages, tools=None, train_on="assistant", prompt=False):
        """(ids, loss, messages that the template shortens or leaves out) of a conversation: int64 (n,), bool (n,), int.

        messages: dicts with `role`, `content`, and what else the template takes; no None. loss: whether an id is a
        target, which it is if any of its characters is to be trained on. prompt: end with what asks for a reply (only
        with train_on="all"). Raises UserError, without naming the conversation.
        """
        messages, tools = self.protect(list(map(name_reasoning, messages))), self.protect(tools)
        text = self.render(messages, tools, prompt)
        contents = [message.get("content") or "" for message in messages]
        texts = [[content] if isinstance(content, str) else [part["text"] for part in content] for content in contents]
        n_changed = sum(any(words.strip() not in text for words in message) for message in texts)
        if train_on == "all":
            text = EDGE + text.replace(EDGE, "") + EDGE
        else:
            text = self.targets(text, sum(message["role"] == "assistant" for message in messages))
        parts = text.replace(BREAK, "").split(EDGE)  # every second one is a target
        said = np.repeat(np.arange(len(parts)) % 2, [len(part) for part in parts])  # of each character
        n_said = np.append(0, np.cumsum(said))  # before each character
        # a batch of one: unlike `encode` (tokenizers 0.23), it lets other threads run
        encoding = self.full.encode_batch(["".join(parts)], add_special_tokens=False)[0]
        begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        return self.real_ids[encoding.ids], n_said[ends] > n_said[begins], n_changed

    def end_of_reply(self):
        """The id of the special token that follows the assistant's words, or None."""
        special = self.marked_special.search(self.ending)
        return special and self.tokenizer.specials[special[0].removeprefix(SPECIAL)]

    def protect(self, value):
        """A copy of messages or tools in which a BREAK follows each character of a special token's text."""
        if isinstance(value, dict):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.protect(item) for item in value]
        if not isinstance(value, str):
            return value
        if found := RESERVED.search(value):
            raise UserError(f"it has {found[0]!r}, a private-use character that is needed here")
        value = HALVES.sub("\ufffd", value)
        value = self.own.sub(lambda text: "".join(char + BREAK for char in text[0]), value)
        # a template may join two texts, and the next one may complete the special token that this one begins
        begins_special = any(value.endswith(text[:n]) for text in self.specials for n in range(1, len(text)))
        return value + BREAK if begins_special else value


def name_reasoning(message):
    """A message with its reasoning under the names that templates read."""
    named = [message[key] for key in REASONING if key in message]
    return {"thinking": named[0], **message, "reasoning_content": named[0]} if named else message
