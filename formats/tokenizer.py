"""Tokenizers: from files of every kind to one class whose ids equal those of the library that the file belongs to.

    rank files, tekken.json, tiktoken's names, "bytes"  -> tiktoken
    Hugging Face folders, SentencePiece models          -> tokenizers, set up as transformers 5 does it

tiktoken is several times faster (bench/tokenizer_libraries.py), so it also encodes what it can of a Hugging Face
folder. Both libraries cut text into pieces with a regular expression and join the bytes of a piece pair by pair.
tiktoken joins the pair whose union has the lowest id, a tokenizer.json lists the pairs (merges) in order: `ranks_of`
finds out whether that is the same. A file where it is not, and text with anything unusual in it (an added word,
characters that NFC changes, bytes without a token), go through `tokenizers`.
"""

import base64
import hashlib
import json
import os
import re
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from plumbing.errors import UserError

END = "<|endoftext|>"
SPACE = "\u2581"  # as SentencePiece writes one
BLANKS = 2**16  # characters: tiktoken's regular expressions overflow their stack at a million blanks in a row

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
# rank files whose split pattern is known by their number of ranks
OTHERS = {50256: "gpt2", 50280: "p50k_base", 100256: "cl100k_base", 199998: "o200k_base"}

# tokenizer.json writes bytes as printable characters: themselves where they print, else those from U+0100 on
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(b): b for b in PRINTED}
BYTE_OF |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTED)}


class Tokenizer:
    """Text to ids and back. `encode` takes ordinary text: special tokens in it stay text.

    name; bos: id that a document begins with as the tokenizer's configuration says, or None; eos: id that ends a
    document, or None; largest: the largest id; specials: {text: id} of special and added tokens; config:
    tokenizer_config.json as a dict; chat_template: Jinja source, or None; fingerprint: changes whenever ids could;
    remark: how the folder was read where it could be read in two ways, or ""; blank_cuts: how often `encode` cut a run
    of white space; described: name and both of these, for the screen.

    ranks: a tiktoken.Encoding, or None. full: a tokenizers.Tokenizer, or None; with both, `full` encodes text that
    `ranks` cannot. nfc: Unicode is normalized first.
    """

    def __init__(self, name, ranks=None, full=None, *, nfc=False, bos=None, eos=None, config=None, chat_template=None,
                 remark=""):
        self.name, self.ranks, self.full, self.nfc, self.bos, self.eos = name, ranks, full, nfc, bos, eos
        self.config, self.chat_template, self.remark = config or {}, chat_template, remark
        self.blank_cuts, self.lock, self.prefix = 0, threading.Lock(), False
        if full is None:
            self.largest, self.specials = ranks.max_token_value, dict(ranks._special_tokens)
            meaning = repr((nfc, ranks._pat_str, sorted(self.specials.items()), sorted(ranks._mergeable_ranks.items())))
        else:
            added = full.get_added_tokens_decoder()
            self.largest = max(full.get_vocab().values())
            self.specials = {token.content: i for i, token in sorted(added.items())}
            words = [token.content for token in added.values() if not token.special]
            words += [unicodedata.normalize("NFC", word) for word in words]
            self.words = re.compile("|".join(map(re.escape, words))) if words else None
            self.byte_level = '"ByteLevel"' in (meaning := full.to_str())
            full.encode_special_tokens = True  # as text
        self.fingerprint = hashlib.blake2b(meaning.encode(), digest_size=16).hexdigest()
        # tiktoken panics at a byte without a token (SmolLM2 lacks 21); some bytes no UTF-8 holds
        in_utf8 = {*range(0xC0), *range(0xC2, 0xF5)}
        self.missing = bytes(b for b in in_utf8 if bytes([b]) not in ranks._mergeable_ranks) if ranks else b""
        self.prefix = self.decode(self.encode("a")) == " a"  # the first token's space is not the text's

    @property
    def described(self):
        cuts = f"{self.blank_cuts:,} cuts inside of long runs of white space" if self.blank_cuts else ""
        remarks = "; ".join(filter(None, (self.remark, cuts)))
        return f"{self.name} ({remarks})" if remarks else self.name

    def encode(self, text):
        """Ids of ordinary text, 1-d uint32: no BOS, no EOS. Half of a character (a lone surrogate) counts as U+FFFD.

        A run of white space around 65,536 or more blank characters is cut in the middle, where its ids may differ.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self.full is not None and (self.ranks is None or self.unusual(text)):
            # a batch of one: unlike `encode` (tokenizers 0.23), it lets other threads run
            return np.array(self.full.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.uint32)
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        blank = [i + BLANKS // 2 for i in range(0, len(text) - BLANKS + 1, BLANKS) if text[i : i + BLANKS].isspace()]
        if not blank:
            return self.ranks.encode_to_numpy(text, disallowed_special=())
        with self.lock:
            self.blank_cuts += len(blank)
        parts = [text[i:j] for i, j in zip([0, *blank], [*blank, len(text)], strict=True)]
        return np.concatenate([self.ranks.encode_to_numpy(part, disallowed_special=()) for part in parts])

    def unusual(self, text):
        """Whether text holds anything that `full` treats otherwise than `ranks`."""
        return bool(self.words and self.words.search(text) or self.nfc and not unicodedata.is_normalized("NFC", text)
                    or self.missing and text.encode().translate(None, self.missing) != text.encode())

    def encode_batch(self, texts, threads=0):
        """`encode` of each text, as a list, on several threads (0: one per core)."""
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids):
        """The text of ids, with special tokens visible; bytes that are not UTF-8 become U+FFFD."""
        ids = list(map(int, ids))
        parts = {i: self.decode_bytes(i) for i in set(ids)}
        text = b"".join(parts[i] for i in ids).decode(errors="replace")
        return text[1:] if self.prefix and text.startswith(" ") else text

    def decode_bytes(self, token):
        """The bytes of one id in the middle of a text, b"" for an id without a token."""
        if self.full is None:
            return self.ranks.decode_single_token_bytes(token)
        text = self.full.id_to_token(token) or ""
        if text in self.specials:
            return text.encode()
        if self.byte_level:
            return to_bytes(text) or text.encode()
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", text):  # byte fallback
            return bytes.fromhex(byte[1])
        return text.replace(SPACE, " ").encode()


def get_tokenizer(name):
    """The Tokenizer of "bytes", a tiktoken name, a tokenizer file, or a Hugging Face folder that holds one.

    Files: a rank file (.tiktoken, Llama 3's tokenizer.model, qwen.tiktoken), tokenizer.json, tekken.json, or a
    SentencePiece tokenizer.model. Raises UserError for what is unknown or cannot be read, and for a missing package.
    """
    path = Path(name).expanduser()
    if name == "bytes":
        # no merges, so cutting into long pieces is as right as into words, and quicker
        ranks = tiktoken.Encoding("bytes", pat_str=r"[^\n]*\n|[^\n]+", special_tokens={END: 256},
                                  mergeable_ranks={bytes([i]): i for i in range(256)})
        return Tokenizer(name, ranks, eos=256)
    if path.is_dir():
        return read_folder(path)
    if path.exists():
        return read_file(path, path.name)
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"data.tokenizer={name!r} is neither a file, nor a folder, nor one of bytes, "
                        + ", ".join(tiktoken.list_encoding_names()))
    try:
        ranks = tiktoken.get_encoding(name)
    except OSError as error:  # requests' errors are OSErrors
        raise UserError(f"data.tokenizer={name!r}: tiktoken could not download its vocabulary "
                        f"({type(error).__name__}). Without a network, set TIKTOKEN_CACHE_DIR to a folder that "
                        "holds it, give a tokenizer file, or use data.tokenizer=bytes") from error
    return Tokenizer(name, ranks, eos=find_eos(ranks._special_tokens))


def find_eos(ids, named=None):
    """The id that ends a document: of the token that a configuration names, else of a usual one, else None."""
    return next((ids[token] for token in (named, END, "<|end_of_text|>", "</s>") if token in ids), None)


def read_folder(folder):
    """The Tokenizer of a Hugging Face folder. tokenizer.json wins over tokenizer.model, as in transformers."""
    config, older = ({} if not (folder / name).is_file() else read_json(folder / name)
                     for name in ("tokenizer_config.json", "special_tokens_map.json"))
    if "added_tokens_decoder" not in config:  # as older versions of transformers saved it
        config |= older
    found = [n for n in ("tokenizer.json", "tokenizer.model", "tekken.json") if (folder / n).is_file()]
    if not found:
        raise UserError(f"{folder} holds no tokenizer: expected a tokenizer.json, tokenizer.model or tekken.json. "
                        "Name another: data.tokenizer in train.py, --tokenizer in sample.py and eval.py")
    tokenizer = read_file(folder / found[0], folder.resolve().name, config, folder)
    tokenizer.config, tokenizer.chat_template = config, read_chat_template(folder, config)
    if found[1:]:
        not_read = f"{found[0]} is read, {' and '.join(found[1:])} beside it not"
        tokenizer.remark = f"{not_read}; {tokenizer.remark}" if tokenizer.remark else not_read
    return tokenizer


def read_file(path, name, config=None, folder=None):
    """The Tokenizer of a file, whatever its kind. config: tokenizer_config.json of the folder that holds it."""
    start = read_bytes(path, 1)
    if start == b"\n":  # the first field of a protocol buffer
        spec = sentencepiece_spec(path, (config or {}).get("legacy", True))
        return read_hugging_face(spec, path, name, config, folder, sentencepiece=True)
    if start != b"{":
        return read_ranks(path, name)
    spec = read_json(path)
    try:
        if isinstance(spec.get("model"), dict):
            return read_hugging_face(spec, path, name, config, folder)
        if "vocab" in spec and "config" in spec:
            return read_tekken(spec, name)
    except KeyError as error:
        raise UserError(f"{path} is incomplete: it has no {error} where its kind of file has one") from error
    raise UserError(f"{path} is neither a tokenizer.json of Hugging Face, which has a 'model', nor a tekken.json of "
                    "Mistral, which has 'vocab' and 'config'")


def read_bytes(path, n=-1):
    """The first n bytes of a file (-1: all). UserError if it is a Git LFS pointer."""
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a Git LFS pointer, not the file that it stands for: run `git lfs pull` in its "
                            "folder, or download the file")
        file.seek(0)
        return file.read(n)


def read_json(path):
    raw = read_bytes(path)
    try:
        return json.loads(raw)
    except ValueError as error:  # of JSON, and of UTF-8
        raise UserError(f"{path} is no JSON file: {error}") from error


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


# ----------------------------------------------------------------------------------------------------------------
# rank files


def read_ranks(path, name):
    """The Tokenizer of a rank file: lines of base64 token and rank. The number of ranks tells Llama 3's and Qwen's."""
    try:
        lines = [line.split() for line in read_bytes(path).splitlines() if line]
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
    known = {128000: (LLAMA3_SPLIT, LLAMA3_SPECIAL), 151643: (QWEN_SPLIT, QWEN_SPECIAL)}
    pattern, special = known.get(len(ranks), (LLAMA3_SPLIT, [END]))
    special = {token: len(ranks) + i for i, token in enumerate(special)}
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(name, encoding, nfc=pattern == QWEN_SPLIT, eos=find_eos(special))


def read_tekken(spec, name):
    """The Tokenizer of Mistral's tekken.json: special tokens come first, and the ranks behind them."""
    n_special = spec["config"]["default_num_special_tokens"]
    n_ranks = spec["config"]["default_vocab_size"] - n_special  # the file may hold more
    special = [token["token_str"] for token in spec.get("special_tokens") or []] or TEKKEN_SPECIAL
    special += [f"<SPECIAL_{i}>" for i in range(len(special), n_special)]
    special = {token: i for i, token in enumerate(special)}
    ranks = {base64.b64decode(t["token_bytes"]): t["rank"] + n_special for t in spec["vocab"] if t["rank"] < n_ranks}
    encoding = tiktoken.Encoding(name, pat_str=spec["config"]["pattern"], mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(name, encoding, eos=find_eos(special))


# ----------------------------------------------------------------------------------------------------------------
# Hugging Face folders, SentencePiece models


DEFAULTS = {"LlamaTokenizer": dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>"),
            **dict.fromkeys(("Qwen2Tokenizer", "GPT2Tokenizer"), dict(unk_token=END, eos_token=END))}


def read_hugging_face(spec, path, name, config, folder, sentencepiece=False):
    """The Tokenizer of a tokenizer.json's content, with what the files beside it add, as transformers 5 reads them."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"{path} needs a package: pip install tokenizers") from error
    config, remark = config or {}, ""
    own_class, own = own_steps(spec, config, folder)
    if own:
        config = {**DEFAULTS[own_class], **config}
        if not sentencepiece and any(spec.get(key) != own[key] for key in ("normalizer", "pre_tokenizer")):
            remark = f"{own_class} replaces {path.name}'s normalizer and pre_tokenizer by its own, as in transformers 5"
        spec = {**spec, **own, "model": {**spec["model"], **own["model"]}}
        if not sentencepiece and "added_tokens_decoder" in config:
            spec["added_tokens"] = []  # it names them all
    elif sentencepiece:  # user-defined pieces are cut out by the pre_tokenizer
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["special"]]
        by_id = config.get("added_tokens_decoder", {})
        config = {**config, "added_tokens_decoder": {i: {**token, "normalized": False} for i, token in by_id.items()}}
    try:
        full = tokenizers.Tokenizer.from_str(json.dumps({**spec, "padding": None, "truncation": None}))
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"tokenizers {tokenizers.__version__} cannot read {path}: {error}") from error
    added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    added |= add_tokens(full, config, folder)
    if moved := [f"{text!r} as {i}" for text, i in added.items() if full.token_to_id(text) != i]:
        raise UserError(f"{path} and the files beside it list {', '.join(moved[:5])}, which transformers gives another "
                        "id (new tokens are numbered without gaps): save the tokenizer with transformers to see which")
    probe = full.encode("a")  # the post-processor puts BOS around it
    n_first = (probe.special_tokens_mask + [0]).index(0)
    if n_first > 1:
        raise UserError(f"{path} puts {probe.tokens[:n_first]} before a text: one token at most can be used")
    bos = probe.ids[0] if n_first else None
    if sentencepiece and config.get("add_bos_token"):
        bos = full.token_to_id(content(config.get("bos_token")) or "<s>")
    ranks, nfc = to_tiktoken(spec, name, added)
    eos = find_eos(full.get_vocab(), content(config.get("eos_token")))
    return Tokenizer(name, ranks, full, nfc=nfc, bos=bos, eos=eos, remark=remark)


def content(token):
    """The text of a token of tokenizer_config.json: a string, a dict with flags, or None."""
    return token["content"] if isinstance(token, dict) else token


def own_steps(spec, config, folder):
    """(class, what transformers 5 puts in the place of a tokenizer.json's parts); {} where it follows the file.

    Some classes bring steps of their own, whatever the file says. Source: transformers 5.24,
    models/auto/tokenization_auto.py, models/{llama,qwen2,gpt2}/tokenization_*.py. UserError for a class not known here.
    """
    has_model = folder and (folder / "config.json").is_file()
    model_type = read_json(folder / "config.json").get("model_type") if has_model else None
    name = (config.get("tokenizer_class") or "").removesuffix("Fast")
    if model_type == "qwen2" or (model_type == "qwen3" and not name):
        name = "Qwen2Tokenizer"
    if model_type in ("mistral", "mistral3", "ministral", "mixtral", "phi3", "granite", "olmo2"):
        return name, {}
    if name in ("CodeLlamaTokenizer", "CohereTokenizer", "GemmaTokenizer", "GPTNeoXTokenizer"):
        raise UserError(f"{folder} has tokenizer_class={name}, whose steps are not known here: save it with "
                        "transformers as a PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)")
    flags = dict(dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=False,
                 byte_fallback=False, ignore_merges=False)
    space = config.get("add_prefix_space")
    level = dict(type="ByteLevel", add_prefix_space=bool(space), trim_offsets=True, use_regex=name == "GPT2Tokenizer")
    if name == "LlamaTokenizer" and "ByteLevel" not in str((spec.get("pre_tokenizer"), spec.get("decoder"))):
        scheme = "never" if space is False else "always" if config.get("legacy") else "first"
        return name, dict(normalizer=None, model={**flags, "fuse_unk": True, "byte_fallback": True}, pre_tokenizer=dict(
            type="Metaspace", replacement=SPACE, prepend_scheme=scheme, split=False))
    if name == "Qwen2Tokenizer":
        split = dict(type="Split", pattern={"Regex": QWEN_SPLIT}, behavior="Isolated", invert=False)
        return name, dict(normalizer={"type": "NFC"}, model=flags,
                          pre_tokenizer=dict(type="Sequence", pretokenizers=[split, level]))
    return name, dict(normalizer=None, model=flags, pre_tokenizer=level) if name == "GPT2Tokenizer" else {}


def add_tokens(full, config, folder):
    """Add the tokens that the files of a folder name to `full`. Returns {text: id} of those named with an id."""
    from tokenizers import AddedToken

    by_id = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    special = [value for key, value in config.items() if key.endswith("_token") and isinstance(value, (str, dict))]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    special += extra.values() if isinstance(extra, dict) else extra
    special = {content(token): None for token in special}  # a set that keeps its order
    if folder and not by_id and (folder / "added_tokens.json").is_file():
        by_id = {i: dict(content=text, normalized=text not in special)
                 for text, i in read_json(folder / "added_tokens.json").items()}
    named = [AddedToken(**{**token, "special": token.get("special", False) or token["content"] in special})
             for _, token in sorted(by_id.items())]
    present = {repr(token) for token in full.get_added_tokens_decoder().values()}
    full.add_tokens([token for token in named if repr(token) not in present])  # new ones, and those with other flags
    present = {token.content for token in full.get_added_tokens_decoder().values()}
    full.add_tokens([AddedToken(text, special=True, normalized=False) for text in special if text not in present])
    return {token["content"]: i for i, token in by_id.items()}


def sentencepiece_spec(path, legacy):
    """A SentencePiece model in the form of a tokenizer.json that encodes as SentencePiece does.

    legacy: a space goes before the text between added tokens, too. Source: transformers 5.24,
    convert_slow_tokenizer.py, build_tokenizer_from_spm_proto.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UserError(f"{path} is a SentencePiece model, which needs: pip install sentencepiece protobuf") from error
    raw, proto = read_bytes(path), sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(raw)
    except Exception as error:  # google.protobuf.message.DecodeError
        raise UserError(f"{path} is no SentencePiece model: {error}") from error
    pieces, trainer, normalizer = proto.pieces, proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE:
        raise UserError(f"{path} is a SentencePiece model of another type than BPE: use a tokenizer.json made of it")
    vocab = {piece.piece: i for i, piece in enumerate(pieces)}
    rank = {piece.piece: (-piece.score, i) for i, piece in enumerate(pieces) if piece.type == piece.NORMAL}
    halves = ((text, text[:i], text[i:]) for text in rank for i in range(1, len(text)))
    merges = sorted((rank[text], left, right) for text, left, right in halves if left in rank and right in rank)
    replaced = [(r"\A +| +\z", ""), (" {2,}", " ")] if normalizer.remove_extra_whitespaces else []
    replaced += [(" ", SPACE)] + [(rf"\A{SPACE}", SPACE * 2)] * (normalizer.add_dummy_prefix and legacy)
    steps = [{"type": "Replace", "pattern": {"Regex": pattern}, "content": text} for pattern, text in replaced]
    if charsmap := normalizer.precompiled_charsmap:
        steps.insert(0, {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [{"id": i, "content": piece.piece, "special": piece.type != piece.USER_DEFINED, **flags}
             for i, piece in enumerate(pieces) if piece.type in (piece.UNKNOWN, piece.CONTROL, piece.USER_DEFINED)]
    whole = sorted((token["content"] for token in added if not token["special"]), key=len, reverse=True)
    split = dict(type="Split", pattern={"Regex": "|".join(map(re.escape, whole))}, behavior="Isolated", invert=False)
    prefix = dict(type="Metaspace", replacement=SPACE, prepend_scheme="always" if legacy else "first", split=False)
    model = dict(type="BPE", vocab=vocab, merges=[pair for _, *pair in merges], unk_token=trainer.unk_piece,
                 fuse_unk=True, byte_fallback=trainer.byte_fallback, ignore_merges=bool(whole))
    return {"model": model, "added_tokens": added, "normalizer": {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [prefix] * normalizer.add_dummy_prefix
                              + [split] * bool(whole)}}


# ----------------------------------------------------------------------------------------------------------------
# from merges to ranks


def to_tiktoken(spec, name, added):
    """(tiktoken.Encoding or None, whether NFC goes first) for ordinary text of a tokenizer.json without added words.

    None where tiktoken would not give the same ids for all such text. added: texts of added tokens.
    """
    model, normalizer = spec["model"], spec.get("normalizer") or {}
    steps = [step["type"] for step in normalizer.get("normalizers", [normalizer] if normalizer else [])]
    settings = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    is_bpe = model.get("type", "BPE") == "BPE" and "merges" in model and not any(model.get(key) for key in settings)
    pattern = split_pattern(spec.get("pre_tokenizer") or {})
    if not is_bpe or not pattern or steps not in ([], ["NFC"]):
        return None, False
    vocab = {text: i for text, i in model["vocab"].items() if text not in added and to_bytes(text)}
    ranks = ranks_of(vocab, model["merges"], model.get("ignore_merges"))
    encoding = ranks and tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return encoding, steps == ["NFC"]


def to_bytes(text):
    """The bytes of a token of a tokenizer.json, or None if it is not written in the byte alphabet."""
    try:
        return bytes(map(BYTE_OF.__getitem__, text))
    except KeyError:
        return None


def ranks_of(vocab, merges, ignore_merges):
    """{bytes: id} of a tokenizer.json's vocabulary, or None if joining by ids is not the same as joining by merges.

    It is the same if ids follow the order of the merges, and each token that has a rank is what the merges make of its
    own bytes. For take the first step where they differ: ids join two parts that no merge joins. What lies between two
    borders that no merge crosses is joined alike in every text, so the merges leave the token's own bytes as these two
    parts, too. A token that merges do not make gets a rank only with ignore_merges, which looks up whole pieces first,
    as tiktoken always does.
    """
    from tokenizers.models import BPE

    pairs, last = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges], 0
    for left, right in pairs:
        if vocab.get(left + right, -1) < last:
            return None
        last = vocab[left + right]
    bpe, ranks = BPE(vocab, pairs), {}
    for text, i in vocab.items():
        parts = [part.id for part in bpe.tokenize(text)]
        if len(parts) == 2 and ignore_merges:
            return None  # by ids, these two would be joined
        if parts == [i] or ignore_merges:
            ranks[to_bytes(text)] = i
    return ranks


def split_pattern(pre_tokenizer):
    """A tiktoken pattern that cuts text as a tokenizer.json's pre_tokenizer does, or None."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds, last = [step.get("type") for step in steps], steps[-1] if steps else {}
    if last.get("add_prefix_space"):
        return None
    own_regex = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and own_regex:
        return GPT2_SPLIT
    if kinds == ["Digits", "ByteLevel"] and own_regex and steps[0]["individual_digits"]:
        return DIGITS_SPLIT
    if kinds == ["Split", "ByteLevel"] and not own_regex and "Regex" in steps[0]["pattern"]:
        pattern, behavior, invert = steps[0]["pattern"]["Regex"], steps[0]["behavior"], steps[0]["invert"]
        # to Oniguruma {m,n}+ repeats, ^ and $ are a line's; to tiktoken {m,n}+ is possessive, ^ and $ are the text's
        if re.search(r"\{[\d,]+\}\+|(?<![\\\[])[$^]", pattern):
            return None
        if behavior == "Removed" and invert:  # what does not match is dropped, as tiktoken does
            return pattern
        if behavior == "Isolated":  # a run that does not match is a piece
            return f"{pattern}|(?:(?!{pattern})[\\s\\S])+"
    return None
