"""chat.py, template.py: ids and targets are those of transformers, and what users write stays text."""

import json
import re
import shutil
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import REPO, build, main_here, train_here

import attention
import data
from data import DataConfig
from formats import chat
from formats.template import Template
from formats.tokenizer import get_tokenizer
from model import IGNORE

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<|user|>",
            "<|assistant|>", "<|end|>", "<calls>", "</calls>", "<sep>"]
WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # added, but not special: found in any text

# Chat templates with what published ones do. {% generation %} is around what the assistant says, for transformers' mask
# of it; without these tags the text is the same.
TEMPLATES = {
    "chatml, with a system message of its own": """
        {%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}
        {%- for m in messages %}
            {{- '<|im_start|>' + m.role + '\n' }}
            {%- if m.role == 'assistant' %}
                {%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
            {%- else %}
                {{- m.content + '<|im_end|>' }}
            {%- endif %}
            {{- '\n' }}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "no generation prompt": """
        {%- for m in messages %}
            {{- '<|im_start|>' + m.role + '\n' }}
            {%- if m.role == 'assistant' %}
                {%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
            {%- else %}
                {{- m.content + '<|im_end|>' }}
            {%- endif %}
            {{- '\n' }}
        {%- endfor %}""",
    "llama 3: strips, inserts a date and tools": """
        {{- bos_token + '<|head|>system<|/head|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' }}
        {%- if tools is not none %}{{ tools | tojson(indent=2) + '\n' }}{% endif %}
        {%- if messages[0].role == 'system' %}
            {{- messages[0].content | trim }}
            {%- set messages = messages[1:] %}
        {%- endif %}
        {{- '<|eot|>' }}
        {%- for m in messages %}
            {{- '<|head|>' + m.role + '<|/head|>\n\n' }}
            {%- if m.role == 'assistant' %}
                {%- generation %}
                    {%- if 'tool_calls' in m %}
                        {%- if m.tool_calls | length != 1 %}{{ raise_exception('Only one call.') }}{% endif %}
                        {%- set call = m.tool_calls[0].function %}
                        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
                    {%- else %}
                        {{- m.content | trim }}
                    {%- endif %}
                    {{- '<|eot|>' }}
                {%- endgeneration %}
            {%- else %}
                {{- m.content | trim + '<|eot|>' }}
            {%- endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}""",
    "mistral: no headers, alternates": """
        {{- bos_token }}
        {%- for m in messages %}
            {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
                {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
            {%- endif %}
            {%- if m.role == 'user' %}
                {{- '[INST] ' + m.content + ' [/INST]' }}
            {%- else %}
                {%- generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}
            {%- endif %}
        {%- endfor %}""",
    "gemma: another name for the assistant": """
        {{- bos_token }}
        {%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
        {%- for m in messages %}
            {%- if m.role == 'assistant' %}
                {{- '<|head|>model\n' }}
                {%- generation %}{{ m.content | trim + '<|/head|>' }}{% endgeneration %}
            {%- else %}
                {{- '<|head|>' + m.role + '\n' + m.content | trim + '<|/head|>' }}
            {%- endif %}
            {{- '\n' }}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ '<|head|>model\n' }}{% endif %}""",
    "zephyr: headers are plain text": """
        {%- for m in messages %}
            {{- '## ' + m.role + '\n' }}
            {%- if m.role == 'assistant' %}
                {%- generation %}{{ m.content + eos_token }}{% endgeneration %}
            {%- else %}
                {{- m.content + eos_token }}
            {%- endif %}
            {{- '\n' }}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ '## assistant\n' }}{% endif %}""",
    "alpaca: nothing is special but the end": """
        {%- for m in messages %}
            {%- if m.role == 'assistant' %}
                {{- '### Response:\n' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{{ '\n\n' }}
            {%- else %}
                {{- '### ' + m.role + ':\n' + m.content + '\n\n' }}
            {%- endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}""",
    "phi 3: something else ends the conversation": """
        {%- for m in messages %}
            {%- if m.role == 'assistant' %}
                {{- '<|assistant|>\n' }}
                {%- generation %}{{ m.content + '<|end|>' }}{% endgeneration %}
            {%- else %}
                {{- '<|user|>\n' + m.content + '<|end|>' }}
            {%- endif %}
            {{- '\n' }}
        {%- endfor %}
        {{- '<|assistant|>\n' if add_generation_prompt else eos_token }}""",
    "gpt-oss: the last reply ends with a token of its own": """
        {%- for m in messages %}
            {{- '<|head|>' + m.role + '<|/head|>' }}
            {%- if m.role == 'assistant' %}
                {%- generation %}
                    {{- m.content + (eos_token if loop.last and not add_generation_prompt else '<|end|>') }}
                {%- endgeneration %}
            {%- else %}
                {{- m.content + '<|end|>' }}
            {%- endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>' }}{% endif %}""",
    "qwen 3: drops earlier reasoning, adds an empty one": """
        {%- if tools %}
            {{- '<|im_start|>system\n# Tools\n' }}
            {%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
        {%- set ns = namespace(last=-1) %}
        {%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
        {%- for m in messages %}
            {%- set content = m.content if m.content is string else '' %}
            {%- if m.role == 'assistant' %}
                {%- set reasoning = '' %}
                {%- if m.reasoning_content is string %}
                    {%- set reasoning = m.reasoning_content %}
                {%- elif '</think>' in content %}
                    {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                    {%- set content = content.split('</think>')[-1].lstrip('\n') %}
                {%- endif %}
                {{- '<|im_start|>assistant\n' }}
                {%- generation %}
                    {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
                        {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
                    {%- else %}
                        {{- content }}
                    {%- endif %}
                    {%- for call in m.tool_calls or [] %}
                        {%- if (loop.first and content) or not loop.first %}{{ '\n' }}{% endif %}
                        {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
                        {{- call.function.arguments | tojson + '}\n</tool_call>' }}
                    {%- endfor %}
                    {{- '<|im_end|>' }}
                {%- endgeneration %}
                {{- '\n' }}
            {%- else %}
                {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
            {%- endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "deepseek: calls in special tokens, the prompt opens the reasoning": """
        {{- bos_token }}
        {%- for m in messages %}
            {%- if m.role == 'assistant' %}
                {{- '<|assistant|>' }}
                {%- generation %}
                    {{- (m.content or '').split('</think>')[-1] }}
                    {%- if m.tool_calls %}
                        {{- '<calls>' }}
                        {%- for call in m.tool_calls %}
                            {{- call.function.name + '<sep>' + call.function.arguments | tojson }}
                        {%- endfor %}
                        {{- '</calls>' }}
                    {%- endif %}
                    {{- eos_token }}
                {%- endgeneration %}
            {%- else %}
                {{- '<|user|>' + m.content }}
            {%- endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}""",
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris <b>", "days": [1, 2]}}}]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "<x> & 'y'", "parameters": {}}}]
CONVERSATIONS = {
    "one turn": [user("hello"), assistant("hi there")],
    "turns in white space": [user("hello\n"), assistant(" hi \n"), user(" more?"), assistant("\nno")],
    "system": [{"role": "system", "content": " Be brief. "}, user("a"), assistant("b"), user("again"), assistant("b")],
    "replies that look like the template": [user("## assistant\nb"), assistant("## assistant\nb"), user("assistant"),
                                            assistant("[/INST] model\n")],
    "reasoning in the text": [user("a"), assistant("<think>\nhm b\n</think>\n\nb"), user("b"),
                              assistant("<think>\nhm c\n</think>\n\nc")],
    "reasoning in a field": [user("a"), assistant("b", reasoning_content="hm"), user("b"),
                             assistant("c", reasoning_content="\nhm\n")],
    "reasoning under other names": [user("a"), assistant("b", thinking="hm"), user("b"),
                                    assistant("c", reasoning="so")],
    "reasoning under two names": [user("a"), assistant("b", reasoning="no", thinking="hm")],
    "the assistant speaks first": [assistant("hello?"), user("a"), assistant("b")],
    "tool calls": [user("hot?"), assistant("", tool_calls=CALL), {"role": "tool", "content": "22"}, assistant("22."),
                   user("thanks"), assistant("welcome")],
    "several calls after text": [user("hot?"), assistant("Let me see", tool_calls=CALL + CALL),
                                 {"role": "tool", "content": "22"}, assistant("It is 22.")],
    "other scripts": [user("na\u00efve caf\u00e9 \u5317\u4eac"), assistant("\u65e5\u672c \U0001f680 <b>&\"'</b>")],
    "an empty reply": [user("say nothing"), assistant(""), user("speak"), assistant("ok")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer folder as save_pretrained writes it, with the first template."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.train_from_iterator(["assistant user system model hello there\n\n again It is [INST] weather"] * 9,
                            tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIALS, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tok.add_tokens([tokenizers.AddedToken(word, special=False, normalized=False) for word in WORDS])
    path = tmp_path_factory.mktemp("tokenizer")
    template = strip_tags(TEMPLATES["chatml, with a system message of its own"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>",
                                         chat_template=template).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return get_tokenizer(str(folder))


def strip_tags(template):
    return re.sub(r"{%-? (end)?generation -?%}", lambda tag: "{{- '' }}" if "-" in tag[0] else "", template)


def written(ids, loss, tokenizer):
    """The text of ids with targets between « and »."""
    borders = np.flatnonzero(np.diff(loss)) + 1
    return "".join(f"«{tokenizer.decode(part)}»" if targets[0] else tokenizer.decode(part) for part, targets in zip(
        np.split(ids, borders), np.split(loss, borders), strict=True))


# ----------------------------------------------------------------------------------------------------------------
# ids and targets


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_targets_are_those_of_transformers(name, tokenizer, reference):
    tagged = TEMPLATES[name]
    templates = [Template(tokenizer, tagged, "tagged"), Template(tokenizer, strip_tags(tagged), "plain")]
    compared = 0
    for label, messages in CONVERSATIONS.items():
        tools = TOOLS if label == "tool calls" and templates[0].takes_tools else None
        try:
            expected = reference.apply_chat_template(messages, tools=tools, chat_template=tagged, return_dict=True,
                                                     return_assistant_tokens_mask=True)
        except Exception as refused:  # noqa: BLE001 - whatever the template raises in transformers
            for template in templates:
                with pytest.raises(ValueError, match=re.escape(str(refused))):
                    template.encode(messages, tools)
            continue
        for template in templates:
            ids, loss, _ = template.encode(messages, tools)
            assert ids.tolist() == expected["input_ids"], (template.name, label)
            assert written(ids, loss, tokenizer) == written(ids, np.array(expected["assistant_masks"]), tokenizer)
            assert template.encode(messages, tools, "all")[1].all()
        compared += 1
    assert compared >= 6


# Mistral's and DeepSeek R1's replies to tools have no header, only what ends the tool's answer
@pytest.mark.parametrize("question, call, answer", [
    ("'[INST] ' + m.content + '[/INST]'", "'[TOOL_CALLS] ' + m.tool_calls | tojson",
     "'<calls>{\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}</calls>'"),
    ("'<|user|>' + m.content", "'<|assistant|><calls>' + m.tool_calls | tojson + '</calls>'",
     "'<|end|><sep>' + m.content + '<sep><|end|>'")])
@pytest.mark.parametrize("space", ["", " "])
def test_a_reply_to_a_tool_without_a_header_is_found(question, call, answer, space, tokenizer):
    header = "<|assistant|>" if "user" in question else ""
    source = ("{% for m in messages %}{% if m.role == 'user' %}{{ QUESTION }}"
              "{% elif m.tool_calls %}{{ CALLS + eos_token }}{% elif m.role == 'tool' %}{{ ANSWER }}{% else %}"
              "{{ HEADER if loop.previtem.role == 'user' }}{{ SPACE + m.content + eos_token }}{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}{{ HEADER }}{% endif %}")
    for name, part in (("QUESTION", question), ("CALLS", call), ("ANSWER", answer), ("HEADER", repr(header)),
                       ("SPACE", repr(space))):
        source = source.replace(name, part)
    messages = [user("hot?"), assistant("", tool_calls=[{**CALL[0], "id": "abcdefghi"}]),
                *[{"role": "tool", "content": text, "tool_call_id": "abcdefghi"} for text in ("22", "23")],
                assistant("It is 22."), user("a"), assistant("b")]
    ids, loss, _ = Template(tokenizer, source).encode(messages)
    said = re.findall("«(.*?)»", written(ids, loss, tokenizer))
    assert [text.strip() for text in said][1:] == ["It is 22.</s>", "b</s>"]
    assert '"name": "weather"' in said[0] and said[0].endswith("</s>")


def test_a_reply_is_what_is_said_and_the_token_that_ends_it(tokenizer):
    ids, loss, _ = Template(tokenizer).encode(CONVERSATIONS["system"])
    assert written(ids, loss, tokenizer) == (
        "<|im_start|>system\n Be brief. <|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n"
        "<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n")


@pytest.mark.parametrize("source, messages, expected", [
    # nothing asks for a reply, and its header has two special tokens, the last of which every message has
    ("{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>' + m.content + eos_token }}{% endfor %}",
     [user("a"), user("b"), assistant("c")],
     "<|head|>user<|/head|>a</s><|head|>user<|/head|>b</s><|head|>assistant<|/head|>«c</s>»"),
    # what ends a question begins a reply, but not to a question that is followed by another
    ("{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content + eos_token }}"
     "{% endfor %}", [user("a"), user("b"), assistant("c")], "[INST]a[/INST][INST]b[/INST]«c</s>»"),
    # words that begin a reply are no special token: in messages they begin nothing
    ("{% for m in messages %}{{ m.role + ':\n' + m.content | trim + '\n' }}{{ eos_token if m.role == 'assistant' }}"
     "{% endfor %}", [user("assistant:"), assistant("\nassistant:\n "), user("a assistant:\nb"), assistant("c")],
     "user:\nassistant:\nassistant:\n«assistant:\n</s>»user:\na assistant:\nb\nassistant:\n«c\n</s>»"),
    # what asks for a reply is not what is before one
    ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
     "{% if add_generation_prompt %}{{ '<|assistant|>' }}\n\n{% endif %}", [user("a"), assistant("b")],
     "<|user|>a<|assistant|>«b</s>»"),
    # white space before the end of a reply, but not of a call
    ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + ' ' * (m.content | length) }}"
     "{{ '<|end|>' if m.role == 'assistant' }}{% endfor %}", [user("a"), assistant("")],
     "<|user|>a <|assistant|>«<|end|>»"),
    # two special tokens end a reply
    ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}"
     "{{ eos_token if m.role == 'assistant' }}{% endfor %}", [user("a"), assistant("b")],
     "<|user|>a<|end|><|assistant|>«b<|end|></s>»")])
def test_turns_are_found_by_what_is_around_a_reply(source, messages, expected, tokenizer):
    ids, loss, n_changed = Template(tokenizer, source).encode(messages)
    assert (written(ids, loss, tokenizer), n_changed) == (expected, 0)


@pytest.mark.parametrize("source", [
    # another end, behind which a tool answers, as Llama 3's <|eom_id|>
    "{% for m in messages %}{{ '<|head|>' + m.role + ':' + m.content }}"
    "{{ '<|end|>' if m.content == 'b' else '<|eot|>' }}{% endfor %}",
    # what a tool answers looks like a reply
    "{% for m in messages %}{{ '<|head|>' + ('user:' if m.role == 'user' else 'model:') + m.content + '<|end|>' }}"
    "{% endfor %}",
    # nothing special is between a tool's answer and a reply
    "{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content + eos_token }}"
    "{% endfor %}"])
def test_nothing_but_replies_is_trained_on(source, tokenizer):
    template = Template(tokenizer, source, "odd")
    assert template.encode([user("a"), assistant("d")])[1].any()
    with pytest.raises(ValueError, match="odd does not show where the assistant's words are"):
        template.encode([user("a"), assistant("b"), {"role": "tool", "content": "c"}, assistant("d")])


@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"lstrip": True}], ids=["plain", "rstrip", "lstrip"])
@pytest.mark.parametrize("scheme", ["first", "always"])
def test_spaces_around_special_tokens_are_treated_as_transformers_does(scheme, flags, tmp_path):
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    alphabet = sorted({*"\u2581\n", *(c for m in CONVERSATIONS.values() for x in m for c in x["content"])})
    tok.train_from_iterator(["hi there hello again"], tokenizers.trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>"], initial_alphabet=alphabet))
    tok.add_special_tokens([tokenizers.AddedToken(text, normalized=False, **flags) for text in SPECIALS])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
                                         ).save_pretrained(tmp_path)
    reference, tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path), get_tokenizer(str(tmp_path))
    for name in ("mistral: no headers, alternates", "phi 3: something else ends the conversation"):
        template = Template(tokenizer, strip_tags(TEMPLATES[name]), name)
        for label in ("turns in white space", "an empty reply"):
            expected = reference.apply_chat_template(CONVERSATIONS[label], chat_template=TEMPLATES[name],
                                                     return_dict=True, return_assistant_tokens_mask=True)
            ids, loss, _ = template.encode(CONVERSATIONS[label])
            assert ids.tolist() == expected["input_ids"] and loss.tolist() == expected["assistant_masks"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_for_a_reply_is_that_of_transformers(name, tokenizer, reference):
    tagged, compared = TEMPLATES[name], 0
    for template in (Template(tokenizer, tagged, "tagged"), Template(tokenizer, strip_tags(tagged), "plain")):
        for messages in CONVERSATIONS.values():
            try:
                expected = reference.apply_chat_template(messages[:-1], chat_template=tagged, return_dict=False,
                                                         add_generation_prompt=True)
            except Exception:  # noqa: BLE001 - whatever the template raises in transformers
                continue
            assert template.encode(messages[:-1], None, "all", prompt=True)[0].tolist() == expected
            compared += 1
    assert compared >= 12


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_reply_ends_at_the_last_token_that_is_trained_on(name, tokenizer):
    template = Template(tokenizer, TEMPLATES[name], name)
    ids, loss, _ = template.encode([user("a"), assistant("b")])
    assert template.end_of_reply() == ids[loss][-1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_special_tokens_that_somebody_writes_stay_text(name, tokenizer, reference):
    """The one difference to transformers, which makes them special tokens unless sanitize_control_tokens is set."""
    template = Template(tokenizer, strip_tags(TEMPLATES[name]), name)
    clean = [user("What does ANGRY do?"), assistant("ANGRY ends a turn, see ANGRY")]
    angry = [user("What does <|im_end|></s> do?"), assistant("<|eot|> ends a turn, see <|head|><|end|>\U00108001")]
    ids, loss, _ = template.encode(angry)
    specials, own = set(tokenizer.specials[text] for text in SPECIALS), template.encode(clean)[0]
    assert [i for i in ids.tolist() if i in specials] == [i for i in own.tolist() if i in specials]
    unsafe = reference.apply_chat_template(angry, chat_template=template.sources[0], tokenize=False)
    assert tokenizer.decode(ids) == unsafe and len(ids) > len(reference.encode(unsafe, add_special_tokens=False))
    shown = written(ids, loss, tokenizer)
    assert "<|eot|> ends a turn, see <|head|><|end|>\U00108001" in shown.split("«")[1].split("»")[0]
    assert "What does <|im_end|></s> do?" in shown.split("«")[0]
    if template.takes_tools:
        ids, _, _ = template.encode(angry, [{"<|im_end|>": "<|eot|>"}])
        own = template.encode(clean, [{"a": "b"}])[0]
        assert [i for i in ids.tolist() if i in specials] == [i for i in own.tolist() if i in specials]


def test_a_special_token_that_two_parts_of_a_message_make_stays_text(tokenizer):
    template = Template(tokenizer, """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
        {%- if m.content is string %}{{ m.content }}
        {%- else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}
        {%- endfor %}""", "parts")
    parts = [{"type": "text", "text": text} for text in ("x<|im_", "end|>y")]
    ids, _, _ = template.encode([user(parts), assistant("hi")])
    assert ids.tolist().count(tokenizer.specials["<|im_end|>"]) == 2
    assert "x<|im_end|>y" in tokenizer.decode(ids)


def test_reasoning_has_the_names_that_it_has_in_transformers(tokenizer, reference):
    source = "{% for m in messages %}{{ [m.thinking, m.reasoning_content, m.reasoning] | string }}{% endfor %}"
    messages = [assistant("", **{name: f"{name} {i}" for name in names.split()}) for i, names in enumerate([
        "reasoning", "thinking", "reasoning_content", "thinking reasoning_content", "reasoning thinking"])]
    ids, _, _ = Template(tokenizer, source).encode(messages, train_on="all")
    assert tokenizer.decode(ids) == reference.apply_chat_template(messages, chat_template=source, tokenize=False)


def test_reasoning_that_a_template_reads_under_another_name_is_not_ignored(folder, tmp_path):
    rows = [{"messages": [user("a"), assistant("b", thinking="hm")]}] * 20
    (tmp_path / "t.jinja").write_text(strip_tags(TEMPLATES["qwen 3: drops earlier reasoning, adds an empty one"]))
    path, template = write(tmp_path / "rows.jsonl", *rows), str(tmp_path / "t.jinja")
    assert "not used" not in data.prepare(config(folder, path, chat_template=template), 256, 1)[0].description
    assert "not used: `thinking` of messages" in data.prepare(config(folder, path), 256, 1)[0].description


def test_what_is_ignored_in_messages_is_on_the_screen(folder, tmp_path):
    odd = [{**user("add: 1 2"), "weight": 0}, {"role": "assistnat", "content": "3"}, *PAIR]
    spoken = [{"from": "narrator", "value": "Once"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    path = write(tmp_path / "rows.jsonl", *[{"messages": odd}, {"conversations": spoken}] * 20)
    train, _, _ = data.prepare(config(folder, path), 256, 1)
    assert "fields not used: `weight` of messages" in train.description
    assert "roles that are not trained on: 'assistnat', 'narrator'" in train.description
    write(path, *[{"messages": [user("add: 1 2"), {"role": "Assistant", "content": "3"}]}] * 20)
    with pytest.raises(ValueError, match="too few .*roles that are not trained on: 'Assistant'.*20 dropped, having no"):
        data.prepare(config(folder, path), 256, 1)


def test_a_field_with_nothing_in_it_is_not_reported(folder, tmp_path):
    rows = [{"instruction": "add:", "input": x, "output": "3", "history": [], "system": None} for x in ("1 2", "")]
    null = {"messages": [{**message, "name": None, "weight": None} for message in PAIR], "input": ""}
    path = write(tmp_path / "rows.jsonl", *[*rows, null] * 10)
    train, _, _ = data.prepare(config(folder, path), 256, 1)
    assert "not used" not in train.description
    train, _, _ = data.prepare(config(folder, write(path, *[*rows, {**null, "label": 0}] * 10)), 256, 1)
    assert "fields not used: label" in train.description


@pytest.mark.parametrize("content", ["m.content | trim", "m.content if m.content is string else ''"])
def test_a_list_of_texts_that_a_template_leaves_out_or_prints_as_a_list_is_an_error(content, folder, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ CONTENT }}{{ eos_token }}{% endfor %}"
                        .replace("CONTENT", content))
    path = write(tmp_path / "rows.jsonl", *[{"messages": [*PAIR[:1], assistant([{"type": "text", "text": "3"}])]}] * 20)
    for train_on in ("assistant", "all"):
        with pytest.raises(ValueError, match="line 1: it has `content` in parts, which .* does not take: join"):
            data.prepare(config(folder, path, chat_template=str(template), train_on=train_on), 256, 1)


def test_a_list_of_texts_that_a_template_leaves_out_for_one_role_is_counted(folder, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages if m.role != 'system' %}{{ '<|' + m.role + '|>' }}"
                        "{% for part in m.content %}{{ part.text or part }}{% endfor %}{{ eos_token }}{% endfor %}")
    system = {"role": "system", "content": [{"type": "text", "text": text} for text in ("Be", "brief")]}
    path = write(tmp_path / "rows.jsonl", *[{"messages": [system, *PAIR]}] * 20)
    train, _, _ = data.prepare(config(folder, path, chat_template=str(template)), 256, 1)
    assert "20 messages the template shortens or drops" in train.description


def test_a_token_is_trained_on_if_a_part_of_it_is_said(tokenizer):
    source = "{{ ' hel' }}{% generation %}{{ 'lo th' }}{% endgeneration %}{{ 'ere' }}"
    ids, loss, _ = Template(tokenizer, source).encode([assistant("b")])
    parts = [tokenizer.decode([token]) for token in ids]
    places = np.cumsum([0, *map(len, parts)])
    assert "".join(parts) == " hello there" and len(parts) < 8
    assert loss.tolist() == [end > 4 and begin < 9 for begin, end in zip(places, places[1:], strict=False)]
    assert any(begin < 4 < end for begin, end in zip(places, places[1:], strict=False))  # one that begins before


@pytest.mark.parametrize("shown, n_changed", [("m.content", 0), ("m.content | trim", 0), ("m.content[:2]", 1),
                                              ("''", 2)])
def test_messages_whose_words_a_template_does_not_show_are_counted(tokenizer, shown, n_changed):
    source = f"{{% for m in messages %}}{{{{ {shown} }}}}|{{% endfor %}}"
    messages = [user(" a"), assistant(" bc \n")]
    assert Template(tokenizer, source).encode(messages, train_on="all")[2] == n_changed


def test_an_empty_file_is_no_chat_template(folder, tmp_path):
    (tmp_path / "empty.jinja").write_text("\n")
    path = write(tmp_path / "rows.jsonl", *[{"messages": PAIR}] * 40)
    with pytest.raises(ValueError, match="empty.jinja is missing or empty: name a file"):
        data.prepare(config(folder, path, chat_template=str(tmp_path / "empty.jinja")), 256, 1)


def test_words_that_are_no_special_tokens_are_found_in_replies(tokenizer):
    ids, _, _ = Template(tokenizer).encode([user("a"), assistant("<think>b</think>")])
    assert tokenizer.specials["<think>"] in ids and tokenizer.specials["</think>"] in ids


@pytest.mark.parametrize("source, message", [
    ("{% for m in messages %}{{ m.content | reverse }}{% endfor %}", "does not show where the assistant's words are"),
    ("{% for m in messages %}{{ m.content | length }}{% endfor %}", "does not show where the assistant's words are"),
    ("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", "does not show where"),  # whose words it is
    ("{% for m in messages %}{{ '<|head|>' + m.content + eos_token }}{% endfor %}", "does not show where"),
    ("{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}", "does not show"),
    ("{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}", "does not show where"),  # their end
    ("{% for m in messages if m.content != 'b' %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}",
     "does not show where"),
    ("{% for m in messages %}{% if m.content == 'b' %}yes{% endif %}{% endfor %}", "does not show where"),
    ("{% for m in messages %}{{ m.content[9] }}{{ 1 + m.role }}{% endfor %}", "fails on it: TypeError"),
    ("{{ raise_exception('No.') }}", "odd refuses it: No."),
    ("{% for %}", "odd is not valid Jinja"), ("{{ open('x') }}", "refuses it: 'open' is undefined")])
def test_a_template_that_cannot_be_followed_is_named(source, message, tokenizer):
    with pytest.raises(ValueError, match="odd") as error:
        Template(tokenizer, source, "odd").encode([user("a"), assistant("b")])
    assert message in str(error.value)


def test_without_a_template_or_a_model_folders_tokenizer_there_is_no_chat(folder, tmp_path, tokenizer):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    with pytest.raises(ValueError, match="the chat template of .* is missing or empty.*data.chat_template=FILE"):
        Template(get_tokenizer(str(tmp_path)))
    with pytest.raises(ValueError, match="tokenizer bytes is not that of a model folder"):
        Template(get_tokenizer("bytes"), TEMPLATES["no generation prompt"])


# ----------------------------------------------------------------------------------------------------------------
# rows


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder, *files, **keys):
    return DataConfig(format="chat", train=[str(f) for f in files], tokenizer=str(folder),
                      cache_dir=str(Path(files[0]).parent / "cache"), **keys)


PAIR = [user("add: 1 2"), assistant("3")]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("row, messages", [
    ({"messages": PAIR, "id": 7}, PAIR),
    ({"messages": [{**PAIR[0], "name": None}, {**PAIR[1], "tool_calls": None, "reasoning": None}]}, PAIR),
    ({"conversations": [{"from": "human", "value": "add: 1 2"}, {"from": "gpt", "value": "3"}]}, PAIR),
    ({"conversations": [{"from": "human", "value": "add: 1 2"}, {"from": "gpt", "value": "3"}], "system": "Be brief."},
     [SYSTEM, *PAIR]),
    ({"prompt": "add: 1 2", "completion": "3"}, PAIR), ({"prompt": PAIR[:1], "completion": PAIR[1:]}, PAIR),
    ({"instruction": "add:", "input": "1 2", "output": "3"}, [user("add:\n\n1 2"), assistant("3")]),
    ({"instruction": "add: 1 2", "input": "", "output": "3", "messages": None}, PAIR),
    ({"instruction": "add: 1 2", "output": "3", "system": "Be brief."}, [SYSTEM, *PAIR])])
def test_rows_of_every_kind_are_conversations(row, messages, tokenizer):
    found, tools, _ = chat.read_conversation(row)
    template = Template(tokenizer)
    assert tools is None and template.encode(found)[0].tolist() == template.encode(messages)[0].tolist()


def test_content_that_is_null_is_none_for_a_template_and_other_fields_are_missing(tokenizer):
    source = ("{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ 'none' if m['content'] is none else m.content }}"
              "{{ 'named' if 'name' in m }}{{ eos_token }}{% endfor %}")
    row = {"messages": [user("a"), {"role": "assistant", "content": None, "name": None, "tool_calls": CALL}]}
    messages, tools, _ = chat.read_conversation(row)
    ids, loss, _ = Template(tokenizer, source).encode(messages, tools)
    assert written(ids, loss, tokenizer) == "<|user|>a</s><|assistant|>«none</s>»"


def test_tools_may_be_a_list_or_json(tokenizer):
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert chat.read_conversation({"messages": PAIR, "tools": tools})[1] == TOOLS


@pytest.mark.parametrize("row, message", [
    ({"messages": "hello"}, "`messages` is a string, expected a list"),
    ({"messages": None}, "it has no conversation"), ({"messages": []}, "`messages` is empty"),
    ({"messages": [user("a"), "b"]}, r"`messages[1]` is a string, expected an object"),
    ({"messages": [user("a"), assistant(7)]}, "`messages[1].content` is a number, expected a string or a list"),
    ({"messages": [user("a"), assistant(None)]}, "`messages[1].content` is null or missing"),
    ({"messages": [{"content": "a"}]}, "`messages[0].role` is null or missing, expected a string"),
    ({"messages": [user([{"type": "image"}])]}, "`messages[0].content[0]` is of type 'image': only text"),
    ({"messages": [user("a"), assistant("", tool_calls=[{"function": {}}])]}, "[1].tool_calls[0].name` is null"),
    ({"conversations": [{"from": "human", "value": 1}]}, "`conversations[0].content` is a number"),
    ({"prompt": "a", "completion": 3}, "`completion` is a number, expected a list"),
    ({"prompt": "a"}, "instruction and output): it has prompt"), ({"output": None}, ": it has no fields"),
    ({"instruction": ["a"], "output": "b"}, "`instruction[0]` is a string"),
    ({"text": "a"}, "it has no conversation (messages, conversations, prompt and completion, instruction and output): "
                    "it has text"),
    ({"messages": PAIR, "tools": "nonsense"}, "`tools` is a string but not JSON"),
    ({"messages": PAIR, "tools": 1}, "`tools` is a number, expected a list"),
    ({"instruction": PAIR[:1], "input": "1 2", "output": "3"}, "`instruction` is a list, expected a string"),
    ({"messages": [user([{"type": "text", "text": "a"}]), assistant("b")]}, "it has `content` in parts, which the"),
    ({"messages": PAIR, "tools": TOOLS}, "it has `tools`, which the chat template of"),
    ({"messages": [user("a"), assistant("", tool_calls=CALL)]}, "it has `tool_calls`, which the chat template of"),
    ({"messages": [user("a \U0010f002")]}, "a private-use character that is needed here")])
def test_a_field_that_cannot_be_used_is_named_with_its_file_and_line(row, message, folder, tmp_path):
    path = write(tmp_path / "rows.jsonl", {"messages": PAIR}, row)
    with pytest.raises(ValueError) as error:
        data.prepare(config(folder, path), 256, 1)
    assert str(error.value).startswith(f"{path}, line 2: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_cut_dropped_and_not_used_is_counted(folder, tmp_path):
    long, asks = [user("a"), assistant("hello " * 300)], [user("hello " * 300), assistant("b")]
    rows = [{"messages": PAIR, "source": "x"}, {"messages": long}, {"messages": asks}, {"messages": PAIR[:1]}] * 10
    path = write(tmp_path / "rows.jsonl", *rows)
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "rows.jsonl", *rows)
    (tmp_path / "more" / "notes.txt").write_text("not rows")
    train, val, tokenizer = data.prepare(config(folder, path, tmp_path / "more"), 128, 1)
    # nothing is left to train on where the answer lies behind what fits, or is missing; 1 of 20 is for validation
    assert (train.n_samples, val.n_samples) == (38, 2)
    assert "; 40 conversations cut at the end" in train.description
    assert "; 40 dropped, having no target" in train.description and "fields not used: source" in train.description
    assert f"; 2 files of {path}, {tmp_path / 'more'}, 1 file not used (notes.txt)" in train.description
    assert train.counts["conversations cut at the end"] == train.counts["dropped, having no target"] == 40
    cut = next(ids for ids, loss in map(train.sample, range(train.n_samples)) if len(ids) > 100)
    assert len(cut) == 129 and tokenizer.decode(cut).endswith("hello hello")
    with pytest.raises(ValueError, match="too few .*; 20 dropped, having no target"):
        data.prepare(config(folder, write(tmp_path / "asks.jsonl", *[{"messages": PAIR[:1]}] * 20)), 128, 1)


def test_a_conversation_that_just_fits_is_not_cut_and_those_for_validation_are_counted_too(folder, tmp_path, tokenizer):
    n = len(Template(tokenizer).encode(PAIR)[0])
    train, val = (write(tmp_path / f"{name}.jsonl", *[{"messages": PAIR}] * k) for name, k in (("t", 5), ("v", 3)))
    cfg = config(folder, train, val=[str(val)])
    for limit, cut in ((n - 1, 0), (n - 2, 8)):  # the last id is no input
        rows = data.prepare(cfg, limit, 1)[0]
        assert rows.counts["conversations cut at the end"] == cut and (rows.sample(0)[0].size == n) == (cut == 0)


def test_messages_that_the_template_leaves_out_are_counted(folder, tmp_path, tokenizer):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages if m.role != 'system' %}"
                        "{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}")
    path = write(tmp_path / "rows.jsonl", *[{"messages": [SYSTEM, SYSTEM, *PAIR]}] * 20)
    train, _, _ = data.prepare(config(folder, path, chat_template=str(template)), 128, 1)
    assert f"{template}; 1 file of {path}; 40 messages the template shortens or drops" in train.description
    assert written(*train.sample(0), tokenizer) == "<|user|>add: 1 2</s><|assistant|>«3</s>»"
    everything, _, _ = data.prepare(config(folder, path, chat_template=str(template), train_on="all"), 128, 1)
    # nothing comes before the first token
    assert written(*everything.sample(0), tokenizer) == "<|user|>«add: 1 2</s><|assistant|>3</s>»"
    with pytest.raises(ValueError, match="data.chat_template=nowhere.jinja: "):
        data.prepare(config(folder, path, chat_template="nowhere.jinja"), 128, 1)


def test_conversations_are_tokenized_once_and_again_when_anything_changes(folder, tmp_path, monkeypatch):
    path, n_read = write(tmp_path / "rows.jsonl", *[{"messages": PAIR}] * 40), 0
    read_conversation = chat.read_conversation

    def counting(row):
        nonlocal n_read
        n_read += 1
        return read_conversation(row)

    monkeypatch.setattr(chat, "read_conversation", counting)
    cfg = config(folder, path, packed_sequence_size=128)
    first, again = (data.prepare(cfg, 128, 1)[0] for _ in range(2))
    assert n_read == 40 and first.digest == again.digest and first.description == again.description
    assert all((a == b).all() for a, b in zip(first.row(0), again.row(0), strict=True))
    data.prepare(replace(cfg, train_on="all"), 128, 1)
    data.prepare(cfg, 256, 1)
    assert n_read == 80  # what fits into a row decides what is cut; the model's longest row does not
    for kept in (tmp_path / "cache").glob("chat-*.npz"):  # by a disk that was full when it was copied
        kept.write_bytes(kept.read_bytes()[:1000])
    assert data.prepare(cfg, 128, 1)[0].digest == first.digest and n_read == 120
    write(path, *[{"messages": PAIR}] * 41)
    data.prepare(cfg, 128, 1)
    monkeypatch.setattr(chat, "VERSION", -1)  # a release that tokenizes in another way
    data.prepare(cfg, 128, 1)
    assert n_read == 202 and not list((tmp_path / "cache").glob("*.tmp"))


def test_conversations_are_tokenized_by_as_many_threads_as_data_workers_says(folder, tmp_path, monkeypatch):
    path, in_order, n_threads = write(tmp_path / "rows.jsonl", *[{"messages": PAIR}] * 40), chat.in_order, []
    monkeypatch.setattr(chat, "in_order", lambda function, rows, n: n_threads.append(n) or in_order(function, rows, n))
    data.prepare(config(folder, path, workers=3), 128, 1)
    assert n_threads == [3]


def test_the_date_that_a_template_inserts_is_shown_and_stays(folder, tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", *[{"messages": PAIR}] * 40)
    (tmp_path / "template.jinja").write_text(
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}")
    cfg = config(folder, path, chat_template=str(tmp_path / "template.jinja"))
    first = data.prepare(cfg, 128, 1)[0]
    assert f"the template's date is {date.today():%d %b %Y}" in first.description

    class Later(datetime):
        @classmethod
        def now(cls):
            return cls(2099, 1, 1)

    monkeypatch.setattr("formats.template.datetime", Later)
    again, _, tokenizer = data.prepare(cfg, 128, 1)  # a run that is resumed another day reads the same ids
    assert first.digest == again.digest and tokenizer.decode(again.sample(0)[0]).startswith(f"{date.today():%Y}")
    shutil.rmtree(tmp_path / "cache")
    assert tokenizer.decode(data.prepare(cfg, 128, 1)[0].sample(0)[0]).startswith("2099")


def test_chat_needs_files():
    assert list(DataConfig(format="chat").problems()) == [
        "data.format=chat needs data.train: name files or folders"]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = [{"messages": [message for _ in range(rng.integers(1, 4)) for message in (
        user(" ".join(rng.choice(["hello", "there", "again"], rng.integers(1, 9)))), assistant("It is " * int(
            rng.integers(1, 9))))]} for _ in range(120)]
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", *rows)


def test_a_packed_row_gives_the_loss_of_its_conversations_one_by_one(folder, rows_file):
    rows, _, _ = data.prepare(config(folder, rows_file, packed_sequence_size=512), 512, 1)
    model = build(block_size=512, vocab_size=352)
    x, y, positions = (torch.from_numpy(part)[None] for part in rows.row(0))
    together = model(x, y, 1, positions, attention.document_bounds(positions, rows.longest, rows.most_documents))
    alone = 0.0
    for i in rows.rows[0]:
        ids, loss = (torch.from_numpy(part) for part in rows.sample(i))
        alone += model(ids[None, :-1].long(), ids[None, 1:].long().where(loss[1:], IGNORE)).item()
    assert len(rows.rows[0]) > 4 and together.item() == pytest.approx(alone, rel=1e-5)


def test_a_run_on_conversations_learns_and_data_py_shows_them(folder, rows_file, tiny_run, tmp_path, capsys):
    args = [*tiny_run, "--data.format=chat", f'--data.train=["{rows_file}"]', f"--data.tokenizer={folder}",
            "--model.vocab_size=352", "--model.block_size=256", "--data.packed_sequence_size=256"]
    train_here(*args, "--fp8.enabled=True", "--fp8.emulate=True", '--fp8.filter_fqns=["lm_head"]',
               f"--out_dir={tmp_path / 'run'}")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    out = capsys.readouterr().out
    assert "data: chat, 114 training samples in" in out and f"sample.py --from={tmp_path / 'run'} --chat\n" in out
    status, out, _ = main_here(data.main, *args, "--show=1", f"--out={tmp_path / 'out.jsonl'}")
    assert status == 0 and "<|im_start|>assistant\n{+It is" in out
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(found) == 114 and all(len(row["ids"]) == len(row["loss"]) for row in found)


def test_the_recipe_fine_tunes_a_model_folder_with_two_keys(folder, rows_file, tmp_path, capsys):
    """As on a CPU without a compiler; a model this small has fewer positions than the recipe's rows."""
    shutil.copytree(folder, tmp_path / "model")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=352, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256)).save_pretrained(tmp_path / "model")
    train_here(REPO / "config/chat_fp8.py", f"--init_from={tmp_path / 'model'}", f'--data.train=["{rows_file}"]',
               "--model.block_size=256", "--data.packed_sequence_size=256", "--compile.enabled=False", "--max_steps=2",
               "--device=cpu", f"--data.cache_dir={tmp_path / 'cache'}", "--global_batch_size=8",
               "--checkpoint_interval=0", f"--out_dir={tmp_path / 'out'}")
    out = capsys.readouterr().out
    assert "data: chat, 114 training samples in" in out and "fp8: verified" in out and "done: 2 steps" in out
