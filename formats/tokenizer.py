"""Tokenizers: every one becomes a tiktoken.Encoding.

Byte-level byte-pair encoding cuts text into pieces with a regular expression (words, numbers, runs of white space) and
then joins the bytes of each piece pair by pair, always the pair whose union is lowest in a list. tiktoken's list is of
tokens: a token's id is its rank. Hugging Face's tokenizer.json lists the pairs (merges) and gives ids apart from them.
Both give the same ids for all text if (1) the ids follow the order of the merges, and (2) joining the bytes of a token
by the merges before its own leaves exactly the pair that its merge joins. Training by byte-pair encoding makes both so;
`ranks_of` checks both, and a file where one is not so is refused.

SentencePiece (Mistral 7B) is another algorithm: its own library runs it, behind the same few methods.
"""

import base64
import hashlib
import json
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken
import tiktoken

from plumbing.errors import UserError

END = "<|endoftext|>"

# Split patterns. Sources: GPT-2's encoder.py; llama-models, llama3/tokenizer.py (cl100k_base has the same); Qwen's
# tokenization_qwen.py
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")
QWEN_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
# GPT2_SPLIT between numerals, each a piece of its own: white space before one ends as at the end of the text
DIGITS_SPLIT = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# Special tokens of rank files, which do not hold them. Sources: llama-models; dashscope, tokenizers/qwen_tokenizer.py
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                  "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
                  "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
                  "<|image|>"]
LLAMA3_SPECIAL += [f"<|reserved_special_token_{2 + i}|>" for i in range(256 - len(LLAMA3_SPECIAL))]
QWEN_SPECIAL = [END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
# The first ids of a tekken.json that does not list its own. Source: mistral-common, tokens/tokenizers/tekken.py
TEKKEN_SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                  "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
                  "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
# rank files that are told by their number of ranks
OTHERS = {50256: "gpt2", 50280: "p50k_base", 100256: "cl100k_base", 199998: "o200k_base"}

# tokenizer.json writes bytes as printable characters: themselves where they print, else those from U+0100 on
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(b): b for b in PRINTED}
BYTE_OF |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTED)}


class Tokenizer:
    """What this repository uses of a tokenizer. `encode` takes ordinary text: special tokens in it stay text.

    name; bos: id that a document begins with as the tokenizer's configuration says, or None; eos: id that ends a
    document, or None; largest: the largest id; specials: {text: id} of special and added control tokens; config:
    tokenizer_config.json as a dict; chat_template: Jinja source, or None; fingerprint: changes whenever ids could.
    """

    def __init__(self, name, encoding, *, bos=None, eos=None, config=None, chat_template=None):
        self.name, self.encoding, self.bos, self.eos = name, encoding, bos, eos
        self.config, self.chat_template = config or {}, chat_template
        self.largest, self.specials = encoding.max_token_value, dict(encoding._special_tokens)
        self.fingerprint = fingerprint(encoding)

    def encode(self, text):
        """Ids of ordinary text, 1-d uint32: no BOS, no EOS. Half of a character (a lone surrogate) counts as U+FFFD."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def encode_batch(self, texts, threads=0):
        """`encode` of each text, as a list, on several threads (0: one per core)."""
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids):
        """The text of ids, with special tokens visible; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode([int(i) for i in ids])

    def decode_bytes(self, token):
        """The bytes of one id in the middle of a text."""
        return self.encoding.decode_single_token_bytes(token)


def get_tokenizer(name):
    """The Tokenizer of "bytes", a tiktoken name, a tokenizer file, or a Hugging Face folder that holds one.

    Files: a rank file (.tiktoken, Llama 3's tokenizer.model, qwen.tiktoken), tokenizer.json, tekken.json, or a
    SentencePiece tokenizer.model.
    Raises UserError for what is unknown, cannot be read, or would not be encoded exactly as its reference does.
    """
    path, config, bos, template = Path(name).expanduser(), {}, None, None
    if name == "bytes":
        # no merges, so cutting into long pieces is as right as into words, and quicker
        encoding = tiktoken.Encoding("bytes", pat_str=r"[^\n]*\n|[^\n]+", special_tokens={END: 256},
                                     mergeable_ranks={bytes([i]): i for i in range(256)})
    elif path.exists():
        if path.is_dir():
            if (path / "tokenizer_config.json").is_file():
                config = read_json(path / "tokenizer_config.json")
            template = read_chat_template(path, config)
            path = find_file(path)
        encoding, bos = read_tokenizer(path, Path(name).expanduser().resolve().name)
        if "add_bos_token" in config:
            bos = config.get("bos_token") if config["add_bos_token"] else None
    elif name in tiktoken.list_encoding_names():
        try:
            encoding = tiktoken.get_encoding(name)
        except OSError as error:  # requests' errors are OSErrors
            raise UserError(f"data.tokenizer={name!r}: tiktoken could not download its vocabulary "
                             f"({type(error).__name__}). Without a network, set TIKTOKEN_CACHE_DIR to a folder that "
                             "holds it, give a tokenizer file, or use data.tokenizer=bytes") from error
    else:
        raise UserError(f"data.tokenizer={name!r} is neither a file, nor a folder, nor one of bytes, "
                         + ", ".join(tiktoken.list_encoding_names()))
    ids = encoding._special_tokens
    bos, eos = (t["content"] if isinstance(t, dict) else t for t in (bos, config.get("eos_token")))
    eos = next((ids[t] for t in (eos, END, "<|end_of_text|>", "</s>") if t in ids), None)
    return Tokenizer(encoding.name, encoding, bos=ids.get(bos), eos=eos, config=config, chat_template=template)


def read_chat_template(folder, config):
    """The Jinja source of a folder's chat template, or None. chat_template.jinja wins, as in transformers.

    tokenizer_config.json holds a string, or a list of named templates, of which the one named "default" is taken.
    """
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def find_file(folder):
    """The tokenizer's file in a Hugging Face folder: tokenizer.json, unless it is of a kind that another one serves."""
    found = [folder / n for n in ("tokenizer.json", "tokenizer.model", "tekken.json") if (folder / n).is_file()]
    if not found:
        raise UserError(f"{folder} holds no tokenizer: expected a tokenizer.json, tokenizer.model or tekken.json. "
                         "Name another: data.tokenizer in train.py, --tokenizer in sample.py and eval.py")
    if len(found) > 1 and found[0].name == "tokenizer.json" and "ByteLevel" not in found[0].read_text(encoding="utf-8"):
        return found[1]  # Mistral 7B: its tokenizer.json is SentencePiece's vocabulary in another form
    return found[0]


def read_tokenizer(path, name):
    """(encoding, the token that its file puts before every text or None) of a tokenizer file, whatever its kind."""
    start = path.open("rb").read(1)
    if start == b"\n":  # the first field of a protocol buffer
        return SentencePiece(path, name), None
    if start != b"{":
        return read_ranks(path, name), None
    spec = read_json(path)
    try:
        if isinstance(spec.get("model"), dict):
            return read_hugging_face(spec, path, name)
        if "vocab" in spec and "config" in spec:
            return read_tekken(spec, name), None
    except KeyError as error:
        raise UserError(f"{path} is incomplete: it has no {error} where its kind of file has one") from error
    raise UserError(f"{path} is neither a tokenizer.json of Hugging Face, which has a 'model', nor a tekken.json of "
                     "Mistral, which has 'vocab' and 'config'")


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, and of UTF-8
        raise UserError(f"{path} is no JSON file: {error}") from error


def fingerprint(encoding):
    """A hash of what ids mean in this encoding: its ranks, split pattern and special tokens."""
    h = hashlib.blake2b(digest_size=16)
    if isinstance(encoding, SentencePiece):
        h.update(encoding.model.serialized_model_proto())
        return h.hexdigest()
    h.update(repr((encoding._pat_str, sorted(encoding._special_tokens.items()))).encode())
    if isinstance(encoding, Encoding):
        h.update(repr((encoding.nfc, sorted(encoding.words))).encode())
    for token, rank in sorted(encoding._mergeable_ranks.items()):
        h.update(token + rank.to_bytes(4, "little"))
    return h.hexdigest()


class Encoding(tiktoken.Encoding):
    """A tiktoken.Encoding with the steps around it that Hugging Face's files ask for.

    nfc: Unicode is normalised first. words: added tokens that are found in ordinary text, where special tokens are
    plain text. Bytes without a token vanish, as in `tokenizers`; tiktoken itself would panic. They are those that no
    UTF-8 holds, and (SmolLM2) those of planes that its training text did not have.
    """

    def __init__(self, name, *, pat_str, mergeable_ranks, special_tokens, nfc=False, words=()):
        super().__init__(name, pat_str=pat_str, mergeable_ranks=mergeable_ranks, special_tokens=special_tokens)
        self.nfc, self.words = nfc, tuple(words)
        self.missing = bytes(b for b in range(256) if bytes([b]) not in mergeable_ranks)
        self.has_missing = re.compile(b"[" + re.escape(self.missing) + b"]") if self.missing else None

    def encode_to_numpy(self, text, *, allowed_special=(), disallowed_special=()):
        """Ids of `text` as uint32. Special tokens are text, whatever disallowed_special says, but for the allowed."""
        words = [*self.words, *(self._special_tokens if allowed_special == "all" else allowed_special)]
        parts, ids = [text], []
        if words:  # cut at the words, the longest first where several begin
            parts = re.split("(" + "|".join(map(re.escape, sorted(words, key=len, reverse=True))) + ")", text)
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(np.array([self._special_tokens[part]], np.uint32))
                continue
            part = unicodedata.normalize("NFC", part) if self.nfc else part
            if self.has_missing and self.has_missing.search(part.encode()):
                found = (match[0] for match in regex.finditer(self._pat_str, part))
                pieces = (piece.encode().translate(None, self.missing) for piece in found)
                ids += [np.array(self._encode_single_piece(p), np.uint32) for p in pieces if p]
            else:
                ids.append(super().encode_to_numpy(part, disallowed_special=()))
        return ids[0] if len(ids) == 1 else np.concatenate([*ids, np.empty(0, np.uint32)])

    def encode(self, text, *, allowed_special=(), disallowed_special=()):
        return self.encode_to_numpy(text, allowed_special=allowed_special).tolist()

    def encode_ordinary(self, text):
        return self.encode_to_numpy(text).tolist()


class SentencePiece:
    """A SentencePiece model behind the methods of tiktoken.Encoding that this repository uses."""

    def __init__(self, path, name):
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError(f"{path} is a SentencePiece model, which needs a package: pip install sentencepiece"
                             ) from error
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise UserError(f"{path} is no SentencePiece model: {error}") from error
        self.name, self.n_vocab = name, self.model.vocab_size()
        self.max_token_value = self.n_vocab - 1
        self._special_tokens = {self.model.id_to_piece(i): i for i in range(self.n_vocab)
                                if self.model.is_control(i) or self.model.is_unknown(i)}

    def encode_ordinary(self, text):
        return self.model.encode(text)

    def encode_to_numpy(self, text, *, disallowed_special=()):
        return np.array(self.model.encode(text), np.uint32)

    def decode(self, tokens):
        return self.model.decode(tokens)

    def decode_single_token_bytes(self, token):
        """The bytes of a token in the middle of a text (decode drops the space before the first)."""
        piece = self.model.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if self.model.is_byte(token) else piece.replace("\u2581", " ").encode()


# ----------------------------------------------------------------------------------------------------------------
# files


def read_ranks(path, name):
    """The encoding of a rank file: lines of base64 token and rank. Llama 3's and Qwen's are told by their length."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise UserError(f"{path} is no tiktoken rank file (lines of base64 token and rank): {error}") from error
    if sorted(ranks.values()) != list(range(len(lines))):
        raise UserError(f"{path} has {len(lines)} ranks, which are not 0 to {len(lines) - 1}, each once")
    if missing := [i for i in range(256) if bytes([i]) not in ranks]:
        raise UserError(f"{path} lacks {len(missing)} of the 256 single bytes, which tiktoken needs")
    if len(ranks) in OTHERS:
        raise UserError(f"{path} has as many ranks as {OTHERS[len(ranks)]}, whose split pattern it does not hold: use "
                         f"data.tokenizer={OTHERS[len(ranks)]}, with TIKTOKEN_CACHE_DIR where there is no network")
    pattern, special = {128000: (LLAMA3_SPLIT, LLAMA3_SPECIAL),
                        151643: (QWEN_SPLIT, QWEN_SPECIAL)}.get(len(ranks), (LLAMA3_SPLIT, [END]))
    return Encoding(name, pat_str=pattern, mergeable_ranks=ranks, nfc=special is QWEN_SPECIAL,
                    special_tokens={token: len(ranks) + i for i, token in enumerate(special)})


def read_tekken(spec, name):
    """The encoding of Mistral's tekken.json: special tokens come first, and the ranks behind them."""
    n_special = spec["config"]["default_num_special_tokens"]
    n_ranks = spec["config"]["default_vocab_size"] - n_special  # the file may hold more
    special = [token["token_str"] for token in spec.get("special_tokens") or []] or TEKKEN_SPECIAL
    special += [f"<SPECIAL_{i}>" for i in range(len(special), n_special)]
    ranks = {base64.b64decode(t["token_bytes"]): t["rank"] + n_special for t in spec["vocab"] if t["rank"] < n_ranks}
    return Encoding(name, pat_str=spec["config"]["pattern"], mergeable_ranks=ranks,
                    special_tokens={token: i for i, token in enumerate(special)})


def read_hugging_face(spec, path, name):
    """(encoding, the token that its template puts before every text or None) of a byte-level tokenizer.json.

    Raises UserError that names each part of the file which this encoding would not follow.
    """
    model, normalizer = spec["model"], spec.get("normalizer")
    pattern, refused = split_pattern(spec.get("pre_tokenizer") or {})
    if model.get("type", "BPE" if "merges" in model else None) != "BPE" or model.get("byte_fallback"):
        raise UserError(f"{path} is no byte-level BPE (its model is {model.get('type')}"
                         + (" with byte_fallback" if model.get("byte_fallback") else "") + "): use a tokenizer.model "
                         "or tekken.json where the model's folder has one")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            refused.append(f"model.{key}={model[key]!r}")
    if normalizer and normalizer["type"] != "NFC":
        refused.append(f"normalizer {normalizer['type']}")
    added = {token["content"]: token for token in spec.get("added_tokens", [])}
    words = [text for text, token in added.items() if not token["special"]]
    for text in words:
        refused += [f"added token {text!r} with {flag}" for flag in ("lstrip", "rstrip", "single_word")
                    if added[text][flag]]
        if normalizer and added[text]["normalized"]:
            refused.append(f"added token {text!r} with normalized")
    if len({added[text]["normalized"] for text in words}) > 1:  # those that are not are found first
        refused.append("added tokens with normalized and without")
    vocab = {text: i for text, i in model["vocab"].items() if text not in added}
    ranks, problem = ranks_of(vocab, model["merges"], model.get("ignore_merges"))
    refused += [problem] if problem else []
    unmade = {text: i for text, i in vocab.items() if to_bytes(text) not in ranks}  # no text is encoded to them
    if unmade and model.get("ignore_merges"):
        refused.append(f"ignore_merges with {len(unmade)} tokens that no merge makes")
    if any(bytes([b]) not in ranks for b in range(256)) and model.get("unk_token"):
        refused.append(f"model.unk_token={model['unk_token']!r} for single bytes without a token")
    if refused:
        raise UserError(f"{path} has parts that would not be followed exactly: " + "; ".join(refused))
    encoding = Encoding(name, pat_str=pattern, mergeable_ranks=ranks, nfc=normalizer is not None, words=words,
                        special_tokens={text: token["id"] for text, token in added.items()} | unmade)
    post = spec.get("post_processor") or {}
    templates = [p for p in post.get("processors", [post]) if p.get("type") == "TemplateProcessing"]
    first = templates[0]["single"][0] if templates else {}
    return encoding, first["SpecialToken"]["id"] if "SpecialToken" in first else None


def to_bytes(text):
    """The bytes of a token of a tokenizer.json, or None if it is not written in the byte alphabet."""
    try:
        return bytes(map(BYTE_OF.__getitem__, text))
    except KeyError:
        return None


def ranks_of(vocab, merges, ignore_merges):
    """(ranks, what keeps them from giving the ids of the merges, or None) of a tokenizer.json's vocabulary."""
    ranks = {to_bytes(text): i for text, i in vocab.items() if len(text) == 1 and text in BYTE_OF}
    pairs, last = {}, -1  # of each token: the pairs that are merged to it (Llama 3 lists all, one of them can happen)
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        union = left + right
        if union not in vocab or to_bytes(union) is None:
            return ranks, f"merge {left!r} {right!r} makes no token of the vocabulary"
        if vocab[union] < last:  # Llama 3's merges to one token stand together, and so have one rank here
            return ranks, f"the ids do not follow the order of the merges (at {union!r})"
        last = vocab[union]
        pairs.setdefault(union, []).append((left, right))
    made, halves = {union: vocab[union] for union in pairs}, {}
    for union, options in pairs.items():
        if pair := next((pair for pair in options if stays_apart(*pair, made, halves)), None):
            halves[union] = pair
            continue
        splits = [(union[:i], union[i:]) for i in range(1, len(union))]
        known = {p for p in splits if all(half in made or len(half) == 1 for half in p)}
        if not (ignore_merges and known <= set(options)):
            return ranks, f"token {union!r} is not what its merge makes of its bytes: other merges come before"
    return ranks | {to_bytes(union): i for union, i in made.items()}, None


def stays_apart(left, right, ranks, halves):
    """Whether byte-pair encoding by all ranks before that of left + right turns it into exactly [left, right].

    It does unless some merge crosses the border. Walk back in time: undo whichever side's last merge came last, and
    look whether the two parts that then meet would have been joined before that merge. Equal ranks go left to right.
    halves: the pair that each token before this one is made of.
    """
    limit = ranks[left + right]
    while True:
        if ranks.get(left + right, limit) < limit:
            return False
        # a merge inside of `right` comes after one across the border of the same rank, one inside of `left` before
        if right in halves and (left not in halves or ranks[right] >= ranks[left]):
            limit, right = min(limit, ranks[right] + 1), halves[right][0]
        elif left in halves:
            limit, left = min(limit, ranks[left]), halves[left][1]
        else:
            return len(left) == len(right) == 1  # else a part that no merge makes


def split_pattern(pre_tokenizer):
    """(a tiktoken pattern that cuts text as a tokenizer.json's pre_tokenizer does, list of what it cannot follow)."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds, last = [step.get("type") for step in steps], steps[-1]
    plain = not last.get("add_prefix_space")
    own_regex = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and plain and own_regex:
        return GPT2_SPLIT, []
    if kinds == ["Digits", "ByteLevel"] and plain and own_regex and steps[0]["individual_digits"]:
        return DIGITS_SPLIT, []
    if kinds == ["Split", "ByteLevel"] and plain and not own_regex and "Regex" in steps[0]["pattern"]:
        pattern, behavior, invert = steps[0]["pattern"]["Regex"], steps[0]["behavior"], steps[0]["invert"]
        # to Oniguruma {m,n}+ repeats, ^ and $ are a line's; to tiktoken {m,n}+ is possessive, ^ and $ are the text's
        if found := re.search(r"\{[\d,]+\}\+|(?<![\\\[])[$^]", pattern):
            return pattern, [f"pre_tokenizer Split with {found[0]} in its pattern"]
        if behavior == "Removed" and invert:  # what does not match is dropped, as tiktoken does
            return pattern, []
        if behavior == "Isolated":  # a run that does not match is a piece
            return f"{pattern}|(?:(?!{pattern})[\\s\\S])+", []
    settings = {k: v for step in steps for k, v in step.items() if k not in ("type", "trim_offsets")}
    return "", [f"pre_tokenizer {' + '.join(map(str, kinds))} with {settings}"]
