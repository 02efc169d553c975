"""Tokenizers: files of every kind behind one class, with the ids of the library that a file belongs to.

    rank files, tekken.json, tiktoken's names, "bytes"  -> tiktoken
    Hugging Face folders, SentencePiece models          -> tokenizers, set up by transformers' AutoTokenizer

tiktoken is four times as fast (bench/tokenizer_libraries.py), so it also encodes what it can of a Hugging Face folder.
It joins the two tokens whose union has the lowest id, where a tokenizer.json lists the pairs (merges) in order:
`ranks_of` finds out whether that is the same. If not, and for text with anything unusual in it (an added word,
characters that NFC changes, bytes without a token), `tokenizers` encodes.
"""

import base64
import hashlib
import json
import re
import tempfile
import threading
import unicodedata
from pathlib import Path

import numpy as np
import tiktoken

from formats.files import open_binary, package
from formats.hf import read_json
from plumbing.errors import UserError
from plumbing.ranks import process_rank

END = "<|endoftext|>"
BLANKS = 2**16  # characters: tiktoken's regular expressions overflow their stack at a million blanks in a row

# Split patterns. Sources: GPT-2's encoder.py; llama-models, llama3/tokenizer.py (cl100k_base has the same); Qwen's
# tokenization_qwen.py
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")
QWEN_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
# GPT2_SPLIT between numerals, each a piece of its own: white space before one ends as at the end of the text
DIGITS_SPLIT = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# What rank files do not hold, by their number of ranks: split pattern and special tokens of Llama 3 and Qwen, or the
# tiktoken name to use instead. Sources: llama-models; dashscope, tokenizers/qwen_tokenizer.py
RANK_FILES = {
    128000: (LLAMA3_SPLIT, ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
                            "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id",
                            "python_tag", "image", *(f"reserved_special_token_{i}" for i in range(2, 246))]),
    151643: (QWEN_SPLIT, ["endoftext", "im_start", "im_end", *(f"extra_{i}" for i in range(205))])}
TIKTOKEN_NAMES = {50256: "gpt2", 50280: "p50k_base", 100256: "cl100k_base", 199998: "o200k_base"}
# The first ids of a tekken.json that does not list its own. Source: mistral-common, tokens/tokenizers/tekken.py
TEKKEN_SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                  "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
                  "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]

# tokenizer.json writes bytes as printable characters: themselves where they print, else those from U+0100 on
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(b): b for b in PRINTED}
BYTE_OF |= {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*PRINTED}))}


class Tokenizer:
    """Text to ids and back. `encode` takes ordinary text: special tokens in it stay text.

    bos, eos: ids that begin and end a document, or None; largest: the largest id; specials: {text: id} of special and
    added tokens; chat_templates: {"default": Jinja source, ...}; fingerprint: changes whenever ids could; blank_cuts:
    how often `encode` cut a run of white space.

    ranks: a tiktoken.Encoding, or None. full: a tokenizers.Tokenizer, or None; with both, `full` encodes text that
    `ranks` cannot. nfc: `ranks` takes text in NFC. named_tokens: {"eos_token": text, ...} of a folder.
    """

    def __init__(self, name, ranks=None, full=None, *, nfc=False, bos=None, named_tokens=None, chat_templates=None):
        self.name, self.ranks, self.full, self.nfc, self.bos = name, ranks, full, nfc, bos
        self.named_tokens, self.chat_templates = named_tokens or {}, chat_templates or {}
        self.blank_cuts, self.lock = 0, threading.Lock()
        if full is None:
            vocab = self.specials = dict(ranks._special_tokens)
            self.largest = ranks.max_token_value
            meaning = repr((nfc, ranks._pat_str, sorted(vocab.items()), sorted(ranks._mergeable_ranks.items())))
        else:
            added = full.get_added_tokens_decoder()
            vocab, self.specials = full.get_vocab(), {token.content: i for i, token in sorted(added.items())}
            self.largest = max(vocab.values())
            words = [token.content for token in added.values() if not token.special]
            words += [unicodedata.normalize("NFC", word) for word in words]
            self.words = re.compile("|".join(map(re.escape, words)) or "(?!)")
            meaning = full.to_str()
            self.byte_level = '"ByteLevel"' in meaning
            full.encode_special_tokens = True  # as text
        self.fingerprint = hashlib.blake2b(meaning.encode(), digest_size=16).hexdigest()
        endings = self.named_tokens.get("eos_token"), END, "<|end_of_text|>", "</s>"
        self.eos = next((vocab[text] for text in endings if text in vocab), None)
        # tiktoken panics at a byte without a token (SmolLM2 lacks 21)
        self.missing = bytes(b for b in range(256) if bytes([b]) not in ranks._mergeable_ranks) if ranks else b""
        # SentencePiece puts a space before the text
        self.prefix = b"".join(map(self.decode_bytes, self.encode("a").tolist())) == b" a"

    @property
    def described(self):
        """The name, and how often `encode` cut, for the screen."""
        cuts = f" ({self.blank_cuts:,} cuts inside of long runs of white space)" if self.blank_cuts else ""
        return self.name + cuts

    def encode(self, text):
        """Ids of ordinary text, 1-d uint32: no BOS, no EOS. Half of a character (a lone surrogate) counts as U+FFFD.

        A run of white space around 65,536 or more blank characters is cut in the middle, where its ids may differ.
        """
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self.ranks is None or self.full is not None and self.unusual(text):
            # a batch of one: unlike `encode` (tokenizers 0.23), it lets other threads run
            return np.array(self.full.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.uint32)
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        cuts = [i + BLANKS // 2 for i in range(0, len(text) - BLANKS + 1, BLANKS) if text[i : i + BLANKS].isspace()]
        with self.lock:
            self.blank_cuts += len(cuts)
        parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return np.concatenate([self.ranks.encode_to_numpy(part, disallowed_special=()) for part in parts])

    def unusual(self, text):
        """Whether text holds anything that `full` encodes differently from `ranks`."""
        return bool(self.words.search(text) or self.nfc and not unicodedata.is_normalized("NFC", text)
                    or self.missing and text.encode().translate(None, self.missing) != text.encode())

    def decode(self, ids):
        """The text of ids, with special tokens visible; bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(self.decode_bytes(int(i)) for i in ids).decode(errors="replace")
        return text[1:] if self.prefix and text.startswith(" ") else text

    def decode_bytes(self, token):
        """The bytes of one id in the middle of a text, b"" for an id without a token."""
        if self.full is None:
            try:
                return self.ranks.decode_single_token_bytes(token)
            except KeyError:  # cl100k_base, for one, has gaps between its special tokens
                return b""
        text = self.full.id_to_token(token) or ""
        if text in self.specials:
            return text.encode()
        if self.byte_level:
            return bytes(BYTE_OF[c] for c in text) if BYTE_OF.keys() >= set(text) else text.encode()
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", text):  # byte fallback
            return bytes.fromhex(byte[1])
        return text.replace("\u2581", " ").encode()  # SentencePiece writes a space so


def get_tokenizer(name):
    """The Tokenizer of "bytes", a tiktoken name, a tokenizer file, or a Hugging Face folder that holds one.

    Files: a rank file (.tiktoken, Llama 3's tokenizer.model, qwen.tiktoken), tokenizer.json, tekken.json, or a
    SentencePiece tokenizer.model. Raises UserError for what is unknown or cannot be read, and for a missing package.
    """
    path = Path(name).expanduser()
    if name == "bytes":
        # no merges, so cutting into long pieces is as right as into words, and quicker
        return Tokenizer(name, tiktoken.Encoding("bytes", pat_str=r"[^\n]*\n|[^\n]+", special_tokens={END: 256},
                                                 mergeable_ranks={bytes([i]): i for i in range(256)}))
    if path.is_dir():
        found = [n for n in ("tokenizer.json", "tokenizer.model", "tekken.json") if (path / n).is_file()]
        if not found:
            raise UserError(f"{path} holds no tokenizer: expected a tokenizer.json, tokenizer.model or tekken.json. "
                            "Name another: data.tokenizer in train.py, --tokenizer in sample.py and eval.py")
        return read_file(path / found[0], path.resolve().name, path)  # tokenizer.json wins, as in transformers
    if path.exists():
        return read_file(path, path.name)
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"data.tokenizer={name!r} is neither a file, nor a folder, nor one of bytes, "
                        + ", ".join(tiktoken.list_encoding_names()))
    try:
        return Tokenizer(name, tiktoken.get_encoding(name))
    except OSError as error:  # requests' errors are OSErrors
        raise UserError(f"data.tokenizer={name!r}: tiktoken could not download its vocabulary ({type(error).__name__})."
                        " Without a network, set TIKTOKEN_CACHE_DIR to a folder that holds it, or give a tokenizer "
                        "file") from error


def read_file(path, name, folder=None):
    """The Tokenizer of a file, whatever its kind. folder: whose other files count, None for a file by itself."""
    with open_binary(path) as file:
        start = file.read(1)
    if start not in (b"{", b"\n"):
        return read_ranks(path, name)
    if start == b"{":
        spec = read_json(path)
        if "vocab" in spec and "config" in spec:
            return read_tekken(spec, path, name)
        if not isinstance(spec.get("model"), dict):
            raise UserError(f"{path} is neither a tokenizer.json of Hugging Face, which has a 'model', nor a "
                            "tekken.json of Mistral, which has 'vocab' and 'config'")
    else:
        try:
            import sentencepiece  # noqa: F401
            from google import protobuf  # noqa: F401
        except ImportError as error:
            raise UserError(f"{path} is of SentencePiece, which needs: pip install sentencepiece protobuf") from error
    if folder:
        return read_hugging_face(path, name, folder)
    with tempfile.TemporaryDirectory() as alone:
        Path(alone, "tokenizer.json" if start == b"{" else "tokenizer.model").symlink_to(path.resolve())
        return read_hugging_face(path, name, alone)


def read_ranks(path, name):
    """The Tokenizer of a rank file: lines of base64 token and rank. The number of ranks tells Llama 3's and Qwen's."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise UserError(f"{path} is not a tiktoken rank file (lines of base64 token and rank): {error}") from error
    if sorted(ranks.values()) != list(range(len(lines))):
        raise UserError(f"{path} has {len(lines)} ranks, which are not 0 to {len(lines) - 1}, each once")
    if missing := [i for i in range(256) if bytes([i]) not in ranks]:
        raise UserError(f"{path} lacks {len(missing)} of the 256 single bytes, which tiktoken needs")
    if tiktoken_name := TIKTOKEN_NAMES.get(len(ranks)):
        raise UserError(f"{path} has as many ranks as {tiktoken_name}, but not its split pattern: use "
                        f"data.tokenizer={tiktoken_name}, with TIKTOKEN_CACHE_DIR where there is no network")
    pattern, special = RANK_FILES.get(len(ranks), (LLAMA3_SPLIT, ["endoftext"]))
    special = {f"<|{token}|>": len(ranks) + i for i, token in enumerate(special)}
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(name, encoding, nfc=pattern == QWEN_SPLIT)


def read_tekken(spec, path, name):
    """The Tokenizer of Mistral's tekken.json: special tokens come first, and the ranks behind them."""
    try:
        n_special, pattern = spec["config"]["default_num_special_tokens"], spec["config"]["pattern"]
        n_ranks = spec["config"]["default_vocab_size"] - n_special  # the file may hold more
        special = [token["token_str"] for token in spec.get("special_tokens") or []] or TEKKEN_SPECIAL
        ranks = {base64.b64decode(token["token_bytes"]): token["rank"] + n_special
                 for token in spec["vocab"] if token["rank"] < n_ranks}
    except KeyError as error:
        raise UserError(f"{path} is incomplete: it has no {error} where a tekken.json has one") from error
    special += [f"<SPECIAL_{i}>" for i in range(len(special), n_special)]
    special = {token: i for i, token in enumerate(special)}
    return Tokenizer(name, tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))


def read_hugging_face(path, name, folder):
    """The Tokenizer that transformers makes of a folder, whose tokenizer.json or SentencePiece model is `path`."""
    transformers = package("transformers", path)
    if process_rank() != 0:
        transformers.logging.set_verbosity_error()  # what it warns of, rank 0 prints
    try:
        # mistral-common would read the folder in its own way; the folder's own Python code is not run
        read = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, mistral_format=False,
                                                          trust_remote_code=False)
        full = read.backend_tokenizer
        full.no_padding()
        full.no_truncation()
        probe = full.encode("a")  # the post-processor puts BOS around it
    except Exception as error:  # the libraries raise no narrower class
        reason = " ".join(str(error).split())
        raise UserError(f"transformers {transformers.__version__} cannot read {path}: {reason}") from error
    n_first = (probe.special_tokens_mask + [0]).index(0)
    if n_first > 1:
        raise UserError(f"{path} puts {probe.tokens[:n_first]} before a text: one token at most can be used")
    ranks, nfc = to_tiktoken(name, full)
    templates = {"default": read.chat_template} if isinstance(read.chat_template, str) else read.chat_template
    return Tokenizer(name, ranks, full, nfc=nfc, bos=probe.ids[0] if n_first else None,
                     named_tokens=read.special_tokens_map, chat_templates=templates)


# ----------------------------------------------------------------------------------------------------------------
# from merges to ranks


def to_tiktoken(name, full):
    """(tiktoken.Encoding or None, whether it takes text in NFC) of a tokenizers.Tokenizer.

    None where tiktoken would not give the same ids for all text that is not unusual (Tokenizer.unusual).
    """
    spec = json.loads(full.to_str())
    model, normalizer = spec["model"], spec["normalizer"]
    nfc = normalizer in ({"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]})
    settings = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    pattern = split_pattern(spec["pre_tokenizer"] or {})
    if not pattern or "merges" not in model or any(model.get(key) for key in settings) or normalizer and not nfc:
        return None, False
    added = {token.content for token in full.get_added_tokens_decoder().values()}
    ranks = ranks_of({text: i for text, i in model["vocab"].items() if text not in added}, model["merges"], full.model)
    return ranks and tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}), nfc


def ranks_of(vocab, merges, model):
    """{bytes: id} of a tokenizer.json's vocabulary, or None if joining by ids is not the same as joining by merges.

    It is the same if ids follow the order of the merges, and each token that has a rank is what the merges make of its
    own bytes. For take the first step where they differ: ids join two parts that no merge joins. What lies between two
    borders that no merge crosses is joined alike in every text, so the merges leave the token's own bytes as these two
    parts, too. A token that merges do not make gets a rank only with ignore_merges, which looks up whole pieces first,
    as tiktoken always does. model: the tokenizers.models.BPE of both.
    """
    joined = [vocab.get("".join(pair), -1) for pair in merges]
    if -1 in joined or joined != sorted(joined) or not BYTE_OF.keys() >= set("".join(vocab)):
        return None
    ignore_merges, model.ignore_merges = model.ignore_merges, False
    ranks, joins_of_ids = {}, 0
    for text, i in vocab.items():
        parts = [part.id for part in model.tokenize(text)]
        joins_of_ids += len(parts) == 2
        if ignore_merges or parts == [i]:
            ranks[bytes(map(BYTE_OF.get, text))] = i
    model.ignore_merges = ignore_merges
    return None if ignore_merges and joins_of_ids else ranks


def split_pattern(pre_tokenizer):
    """A tiktoken pattern that cuts text as a tokenizer.json's pre_tokenizer does, or None."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds, last = [step.get("type") for step in steps], steps[-1] if steps else {}
    own_regex = last.get("use_regex", True)
    if last.get("add_prefix_space"):
        return None
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
