"""Chat templates: from messages to the ids of `transformers`' apply_chat_template, and which of them are targets.

    messages with marks -> Jinja, in its sandbox -> text with marks -> text, and where the marks were -> ids, targets

Marks are private-use characters. They keep apart who wrote a special token: one of the template gets SPECIAL in front
and becomes its id; one in a message gets a BREAK after each character and stays text. (`transformers` makes it the
special token unless sanitize_control_tokens is set.)

Targets are what the assistant says and the token that ends its turn. A template with {% generation %} says itself where
that is. For the others, marks around the words of each message show where they end up, and one question with its reply
shows what is around a turn: it begins after the text that add_generation_prompt adds, and ends with the special tokens
that follow the words whether or not the conversation goes on.
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

SPECIAL, BREAK, OPEN, CLOSE = "\U0010f000", "\U0010f001", "\U0010f002", "\U0010f003"  # the last two: {% generation %}
WORDS = 0x10F010  # + 2 i: where the words of message i begin, + 2 i + 1: where they end
MOST_MESSAGES = 2000
QUESTION = {"role": "user", "content": "?"}
MARK = re.compile("([\U0010f002-\U0010fffd])")
RESERVED = re.compile("[\U0010f000-\U0010fffd]")
HALVES = re.compile("[\ud800-\udfff]")  # of characters: they count as U+FFFD, as in Tokenizer.encode
OPENS_REASONING = re.compile(rf"{SPECIAL}?[<\[\u25c1][^<\[\u25c1]*(think|thought|reasoning)", re.IGNORECASE)
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
            raise UserError(f"tokenizer {tokenizer.name} is not that of a model folder, which a chat template needs: "
                            "name one, data.tokenizer=FOLDER (sample.py: --tokenizer=FOLDER)")
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
        self.headers, self.ending = self.find_turn()

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
        """(texts that may begin a reply, text that ends one), of a conversation of one question.

        A reply begins with what asks for it, or with that up to the reasoning that it opens. It ends with the special
        tokens that follow it whether or not the conversation goes on, else with the first one that follows it.
        """
        reply = {"role": "assistant", "content": CLOSE}
        try:
            unasked, asked = (self.render([QUESTION], None, prompt) for prompt in (False, True))
            alone, inside = (self.render([QUESTION, reply, *more], None).partition(CLOSE)[2]
                             for more in ([], [QUESTION]))
        except UserError:  # encode() will show the reason
            return [], ""
        header = asked[len(os.path.commonprefix([unasked, asked])) :]
        opening = OPENS_REASONING.search(header, 1)
        headers = [header, header[: opening.start()]] if opening else [header]
        always = os.path.commonprefix([alone, inside])
        ends = [special.end() for special in self.marked_special.finditer(always)]
        ends = ends or [special.end() for special in self.marked_special.finditer(alone)][:1]
        return list(filter(None, headers)), alone[: ends[-1]] if ends else ""

    def reads(self, key):
        """Whether the template reads this key of a message."""
        return any(key in source for source in self.sources)

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

    def targets(self, messages, tools):
        """(text, [(begin, end) of what is trained on], number of messages that the template leaves out)."""
        plain, marks = take_out_marks(self.render(messages, tools))
        opened, closed = ([place for char, place in marks if char == which] for which in (OPEN, CLOSE))
        if opened:
            return plain, list(zip(opened, closed, strict=True)), 0
        for roles, how in (("all", "around"), ("all", "within"), ("assistant", "within"), ("assistant", "end")):
            marked = [mark(m, i, how) if roles in ("all", m["role"]) else m for i, m in enumerate(messages)]
            text, marks = take_out_marks(self.render(marked, tools))
            if text == plain:  # else the template strips or compares what a mark changes
                break
        else:
            raise UserError(f"{self.name} does not show where the assistant's words are: {ADVICE}")
        words = {}  # of each message, in the order of the text: (place, whether words end there) of its marks
        for char, place in marks:
            i, is_end = divmod(ord(char) - WORDS, 2)
            words.setdefault(i, []).append((place, is_end))
        starts = [places[0][0] for places in words.values()] + [len(plain)]
        spans, low = [], 0
        for (i, places), high in zip(words.items(), starts[1:], strict=True):
            (first, is_name), (last, is_end) = places[0], places[-1]
            if not is_end:
                raise UserError(f"{self.name} changes the order of the words of a message: {ADVICE}")
            if messages[i]["role"] == "assistant":
                begin = low + self.begin_of_turn(plain[low:first], is_name)
                spans.append((begin, last + self.end_of_turn(plain[last:high])))
            low = max(low, last)
        n_marked = sum(message != original for message, original in zip(marked, messages, strict=True))
        return plain, spans, n_marked - len(words)

    def begin_of_turn(self, text, is_name):
        """Where an assistant's turn begins in the text before its first mark: the end of a name, or the first words."""
        for header in self.headers:
            if header in text:
                return text.rindex(header) + len(header)
        if is_name:
            raise UserError(f"{self.name} does not show where the assistant's turn begins: {ADVICE}")
        return len(text.rstrip(" "))  # a space before a word is in its token

    def end_of_turn(self, text):
        """Where an assistant's turn ends in the text between its last mark and the next words."""
        if self.ending in text:
            return text.index(self.ending) + len(self.ending)
        special = self.marked_special.search(text)  # such as <|eom_id|>
        return special.end() if special else 0

    def encode(self, messages, tools=None, train_on="assistant", prompt=False):
        """(ids, loss, messages that the template leaves out) of a conversation: int64 (n,), bool (n,), int.

        messages: dicts with `role` and `content`, and what else the template takes. loss: whether an id is a target,
        which it is if any of its characters is to be trained on. prompt: end with what asks for a reply (only with
        train_on="all"). Raises UserError, without naming the conversation.
        """
        if len(messages) > MOST_MESSAGES:
            raise UserError(f"it has {len(messages):,} messages, {MOST_MESSAGES:,} are the most")
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        messages, tools = self.protect(messages), self.protect(tools)
        if train_on == "all":
            text, n_left_out = take_out_marks(self.render(messages, tools, prompt))[0], 0
            spans = [(0, len(text))]
        else:
            text, spans, n_left_out = self.targets(messages, tools)
        # a batch of one: unlike `encode` (tokenizers 0.23), it lets other threads run
        encoding = self.full.encode_batch([text], add_special_tokens=False)[0]
        begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        loss = np.zeros(len(begins), bool)
        for begin, end in spans:
            loss |= (ends > begin) & (begins < end)
        return self.real_ids[encoding.ids], loss, n_left_out

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
        value = self.special.sub(lambda text: "".join(char + BREAK for char in text[0]), value)
        # a template may join two texts, and the next one may complete the special token that this one begins
        begins_special = any(value.endswith(text[:n]) for text in self.specials for n in range(1, len(text)))
        return value + BREAK if begins_special else value


def mark(message, i, how):
    """A copy of message i with a mark at the beginning and at the end of each text in it.

    how: "around" the whole text, "within" white space that the text begins or ends with, or only at such an "end".
    """
    begin, end = "" if how == "end" else chr(WORDS + 2 * i), chr(WORDS + 2 * i + 1)

    def around(text):
        words = text if how == "around" else text.strip()
        return text.replace(words, begin + words + end, 1)

    def end_of_name(call):  # a turn does not begin where a name does
        if "function" in call:
            return {**call, "function": end_of_name(call["function"])}
        return {**call, "name": call["name"] + end}

    marked = dict(message)
    for key in ("content", "reasoning_content", "thinking", "reasoning"):
        text = message.get(key)
        if isinstance(text, list):
            marked[key] = [{**part, "text": around(part["text"])} if part.get("text") else part for part in text]
        elif isinstance(text, str) and (text.strip() or how == "around" and message["role"] == "assistant"):
            marked[key] = around(text)
    if calls := message.get("tool_calls"):
        marked["tool_calls"] = [end_of_name(call) for call in calls]
    if marked == message and message["role"] == "assistant":  # an empty reply: only its turn ends
        marked["content"] = around(message["content"])
    return marked


def take_out_marks(text):
    """(text without marks, [(mark, its place in that text)]), without BREAKs in both."""
    parts = MARK.split(text.replace(BREAK, ""))
    places = np.cumsum([len(part) for part in parts[::2]]).tolist()
    return "".join(parts[::2]), list(zip(parts[1::2], places, strict=False))
