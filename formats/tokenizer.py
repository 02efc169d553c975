"""Tokenizers: files of every kind behind one class, with the ids of the library that a file belongs to.

Rank files, tekken.json and tiktoken's names belong to tiktoken, Hugging Face folders and SentencePiece models to
transformers. The tokenizer.json of common decoders is set up here, by `tokenizers` alone, as transformers 5.24 does it
(tokenization_utils_*.py); transformers itself reads what is left. tiktoken encodes what it can of a folder, too: it is
four times as fast (bench/tokenizer_libraries.py).
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

END = "<|endoftext|>"
DATA = Path(__file__).with_name("tokenizer_data.json")  # what files do not hold: of rank files, of folders' classes
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's encoder.py
TOKENS = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]  # in order of ids

# tokenizer.json writes bytes as printable characters: themselves where they print, else those from U+0100 on
BYTE_OF = {chr(b): b for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
BYTE_OF |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if chr(b) not in BYTE_OF)}


class Tokenizer:
    """Text to ids and back. `encode` takes ordinary text: special tokens in it stay text.

    bos: list of the ids that begin a document, mostly one or none; eos: the id that ends it, or None; largest: the
    largest id; specials: {text: id} of special and added tokens; fingerprint: changes whenever ids could; named_tokens:
    {"eos_token": text, ...}; chat_template: Jinja, a list of {"name", "template"}, or None. What encodes: ranks, a
    tiktoken.Encoding (of text in NFC where `nfc` says so); or full, a tokenizers.Tokenizer, with `ranks` if tiktoken
    can do the same for all but unusual text; or python, a tokenizer that transformers has in Python only.
    """

    def __init__(self, name, ranks=None, full=None, python=None, *, nfc=False, bos=(), named_tokens=None,
                 chat_template=None):
        if python:
            vocab, self.specials, self.lock = python.get_vocab(), python.get_added_vocab(), threading.Lock()
            names = sorted({*python.vocab_files_names.values(), "tokenizer_config.json"})
            files = [Path(python.name_or_path, name) for name in names]
            meaning = repr((sorted(vocab.items()), [file.read_bytes() for file in files if file.is_file()]))
        elif full:
            ranks, nfc = to_tiktoken(name, full)
            added = full.get_added_tokens_decoder()
            vocab, self.specials = full.get_vocab(), {token.content: i for i, token in sorted(added.items())}
            words = "|".join(re.escape(token.content) for token in added.values() if not token.special) or "(?!)"
            self.words = re.compile(f"{words}|{unicodedata.normalize('NFC', words)}")
            meaning = full.to_str()
            full.encode_special_tokens = True  # as text
        else:
            vocab = self.specials = dict(ranks._special_tokens)
            self.known = {*ranks._mergeable_ranks.values(), *vocab.values()}
            meaning = repr((nfc, ranks._pat_str, sorted(vocab.items()), sorted(ranks._mergeable_ranks.items())))
        self.name, self.ranks, self.full, self.python, self.nfc, self.bos = name, ranks, full, python, nfc, list(bos)
        self.named_tokens, self.chat_template = named_tokens or {}, chat_template
        self.largest = max(vocab.values()) if python or full else ranks.max_token_value
        self.fingerprint = hashlib.blake2b(meaning.encode(), digest_size=16).hexdigest()
        endings = self.named_tokens.get("eos_token"), END, "<|end_of_text|>", "</s>"
        self.eos = next((vocab[text] for text in endings if text in vocab), None)

    def encode(self, text):
        """Ids of ordinary text, 1-d uint32: no BOS, no EOS. Half of a character (a lone surrogate) counts as U+FFFD.

        Raises UserError for text that tiktoken cannot encode, such as a million blanks; text.cut makes shorter pieces.
        """
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self.python:
            with self.lock:
                ids = self.python.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
            return np.array(ids, np.uint32)
        if self.ranks is None or self.full is not None and (
                self.words.search(text) or self.nfc and not unicodedata.is_normalized("NFC", text)):
            # a batch of one: unlike `encode` (tokenizers 0.23), it lets other threads run
            return np.array(self.full.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.uint32)
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        try:
            return self.ranks.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:  # its regular expressions overflow their stack
            raise UserError(f"tokenizer {self.name} cannot encode a text of {len(text):,} characters, which may have "
                            f"too many blanks in a row: {error}") from error

    def decode(self, ids):
        """The text of ids, with special tokens visible; bytes that are not UTF-8 become U+FFFD."""
        whole = self.full or self.python
        if whole:
            return whole.decode([int(i) for i in ids], skip_special_tokens=False)
        return self.ranks.decode([int(i) for i in ids if i in self.known])  # cl100k_base, for one, has gaps


def get_tokenizer(name):
    """The Tokenizer of "bytes", a tiktoken name, a tokenizer file, or a Hugging Face folder that holds one.

    Files: a rank file (.tiktoken, Llama 3's tokenizer.model, qwen.tiktoken), tokenizer.json, tekken.json, or a
    SentencePiece tokenizer.model. Raises UserError for what is unknown or cannot be read, and for a missing package.
    """
    path = Path(name).expanduser()
    if name == "bytes":  # no merges, so cutting into long pieces is as right as into words, and quicker
        return Tokenizer(name, tiktoken.Encoding(name, pat_str=r"[^\n]*\n|[^\n]+", special_tokens={END: 256},
                                                 mergeable_ranks={bytes([i]): i for i in range(256)}))
    if not path.exists():
        if name not in tiktoken.list_encoding_names():
            raise UserError(f"data.tokenizer={name!r} is neither a file, nor a folder, nor one of bytes, "
                            + ", ".join(tiktoken.list_encoding_names()))
        try:
            return Tokenizer(name, tiktoken.get_encoding(name))
        except OSError as error:  # requests' errors are OSErrors
            raise UserError(f"data.tokenizer={name!r}: tiktoken could not download it ({type(error).__name__}). Give a "
                            "file, or set TIKTOKEN_CACHE_DIR to a folder that holds it") from error
    file, name = path, path.name
    if path.is_dir():
        found = [n for n in ("tokenizer.json", "tokenizer.model", "tekken.json") if (path / n).is_file()]
        if not found:
            return read_with_transformers(path, path.resolve().name, path)
        file, name = path / found[0], path.resolve().name  # tokenizer.json wins, as in transformers
    with open_binary(file) as opened:
        start = opened.read(1)
    if start == b"\n":  # the first field of a SentencePiece model
        return read_sentencepiece(file, name, path)
    if start != b"{":
        return read_ranks(file, name)
    spec = read_json(file)
    if isinstance(spec.get("model"), dict):
        return read_hugging_face(file, name, spec, path)
    return read_tekken(file, name, spec)


def read_ranks(path, name):
    """The Tokenizer of a rank file: lines of base64 token and rank. The number of ranks tells Llama 3's and Qwen's."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise UserError(f"{path} is not a tiktoken rank file (lines of base64 token and rank): {error}") from error
    if sorted(ranks.values()) != list(range(len(lines))) or not ranks.keys() >= {bytes([i]) for i in range(256)}:
        raise UserError(f"{path} is not a tiktoken rank file: it has {len(lines)} ranks, expected 0, 1, 2, ..., each "
                        "once, and the 256 single bytes among their tokens")
    known = read_json(DATA)["rank_files"]
    file = known.get(str(len(ranks)), known["other"])
    if tiktoken_name := file.get("tiktoken_name"):
        raise UserError(f"{path} has as many ranks as {tiktoken_name}, but not its split pattern: use "
                        f"data.tokenizer={tiktoken_name}, with TIKTOKEN_CACHE_DIR where there is no network")
    special = file["special_tokens"] + [file["numbered_token"].format(i) for i in range(*file["numbers"])]
    special = {token: len(ranks) + i for i, token in enumerate(special)}
    encoding = tiktoken.Encoding(name, pat_str=file["pattern"], mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(name, encoding, nfc=file["nfc"])


def read_tekken(path, name, spec):
    """The Tokenizer of Mistral's tekken.json: special tokens first, ranks behind them. Source: mistral-common."""
    try:
        n_special, pattern = spec["config"]["default_num_special_tokens"], spec["config"]["pattern"]
        n_ranks = spec["config"]["default_vocab_size"] - n_special  # the file may hold more
        special = [token["token_str"] for token in spec.get("special_tokens") or []] or ["<unk>", "<s>", "</s>"]
        ranks = {base64.b64decode(token["token_bytes"]): token["rank"] + n_special
                 for token in spec["vocab"] if token["rank"] < n_ranks}
    except KeyError as error:
        raise UserError(f"{path} is neither a tokenizer.json of Hugging Face, which has a 'model', nor a tekken.json "
                        f"of Mistral: {error} is missing") from error
    special += [f"<SPECIAL_{i}>" for i in range(len(special), n_special)]
    special = {token: i for i, token in enumerate(special)}
    return Tokenizer(name, tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))


def read_hugging_face(path, name, spec, folder):
    """The Tokenizer of a tokenizer.json that holds `spec`, and of its folder."""
    tokenizers = package("tokenizers", path)
    beside = [folder / f"{n}.json" for n in ("config", "tokenizer_config", "special_tokens_map", "added_tokens")]
    model, config, token_map, words = (read_json(file) if file.is_file() else {} for file in beside)
    listed, replaced = config.get("added_tokens_decoder"), replaced_by_class(spec, config, model)
    if listed is None and (words or any(isinstance(value, list) for value in token_map.values())):
        replaced = None  # as transformers saved tokens before 4.34, more of them than bos_token, eos_token, ...
    if replaced is None or (folder / "additional_chat_templates").is_dir():
        return read_with_transformers(path, name, folder)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []  # the older name
    if listed is None:
        config |= token_map
    elif replaced:
        spec["added_tokens"] = []  # the configuration lists them all
    if replaced:
        config = replaced["tokens"] | config
        follow_class(spec, replaced, config)
    try:
        full = tokenizers.Tokenizer.from_str(json.dumps({**spec, "padding": None, "truncation": None}))
        named = add_tokens(full, config, listed or {}, extra)
        probe = full.encode("a")
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"tokenizers {tokenizers.__version__} cannot read {path}: {error}") from error
    jinja = folder / "chat_template.jinja"  # wins
    template = jinja.read_text(encoding="utf-8") if jinja.is_file() else config.get("chat_template")
    bos = bos_of(probe.ids, probe.special_tokens_mask)
    return Tokenizer(name, full=full, bos=bos, named_tokens=named, chat_template=template)


def read_sentencepiece(path, name, folder):
    """The Tokenizer of a SentencePiece model and of its folder, or of the model alone where `folder` is a file, too."""
    package("sentencepiece", path)
    package("google.protobuf", path, "protobuf")
    if folder.is_dir():
        return read_with_transformers(path, name, folder)
    with tempfile.TemporaryDirectory() as alone:
        Path(alone, "tokenizer.model").symlink_to(path.resolve())
        return read_with_transformers(path, name, Path(alone))


def read_with_transformers(path, name, folder):
    """The Tokenizer of a folder as AutoTokenizer reads it; path: for messages. Code of the folder's own is not run."""
    if not any(file for pattern in ("*token*", "*vocab*", "*.model") for file in folder.glob(pattern)):
        raise UserError(f"{path} holds no tokenizer: expected a tokenizer.json, tokenizer.model or tekken.json. "
                        "Name another: data.tokenizer in train.py, --tokenizer in sample.py and eval.py")
    transformers = package("transformers", path)
    try:
        read = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False,
                                                          mistral_format=False)
        probe = read("a", return_special_tokens_mask=True)
    except Exception as error:  # of whatever class
        reason = " ".join(str(error).split())
        raise UserError(f"transformers {transformers.__version__} cannot read {path}: {reason}") from error
    if len(read) <= len(read.get_added_vocab()):
        raise UserError(f"{path} lacks the vocabulary of its {type(read).__name__}")
    template = read.chat_template
    if isinstance(template, dict):
        template = [{"name": key, "template": source} for key, source in template.items()]
    backend = {"full": read.backend_tokenizer} if read.is_fast else {"python": read}
    bos = bos_of(probe.input_ids, probe.special_tokens_mask)
    return Tokenizer(name, **backend, bos=bos, named_tokens=read.special_tokens_map, chat_template=template)


def bos_of(ids, special_tokens_mask):
    """The special tokens that a tokenizer puts before a text. ids: of a text with what is put around it."""
    return ids[: (special_tokens_mask + [0]).index(0)]


def replaced_by_class(spec, config, model):
    """What a folder's class puts in place of its tokenizer.json's steps: an entry of DATA, or None for other classes.

    Source: tokenization_auto.py.
    """
    table, model_type = read_json(DATA), model.get("model_type") or ""
    classes, types, fixed = table["classes"], table["model_types"], table["fixed_model_types"]
    name = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "").removesuffix("Fast")
    options = any(config.get(option) for option in ("auto_map", "fast_tokenizer_files", "fix_mistral_regex"))
    if options or isinstance(config.get("extra_special_tokens"), dict):
        return None
    if model_type in fixed:
        name = fixed[model_type]
    elif not name:
        name = types.get(model_type)
    elif name == "LlamaTokenizer" and "ByteLevel" in str((spec.get("pre_tokenizer"), spec.get("decoder"))):
        name = "TokenizersBackend"  # Llama 3
    elif model_type not in types and classes.get(name):
        name = None  # transformers may read that type by another class
    replaced = classes.get(name)
    return None if replaced and spec["model"].get("type", "BPE") != "BPE" else replaced


def follow_class(spec, replaced, config):
    """Put the steps and the model's options of a class into `spec`, a tokenizer.json."""
    model = replaced["model"] | {"type": "BPE", **{key: spec["model"].get(key) for key in ("vocab", "merges")}}
    if "unk_token" in model:
        model["unk_token"] = config["unk_token"] and added_token(config["unk_token"]).content
    spec |= {"model": model} | {key: replaced[key] for key in ("normalizer", "pre_tokenizer")}
    space = config.get("add_prefix_space")
    scheme = "always" if config.get("legacy") else "first"
    options = {"add_prefix_space": bool(space), "prepend_scheme": "never" if space is False else scheme}
    for step in spec["pre_tokenizer"].get("pretokenizers", [spec["pre_tokenizer"]]):
        step |= {key: options[key] for key in options.keys() & step.keys()}


def added_token(token):
    """The tokenizers.AddedToken of a token in a configuration: a text, or a dict of text and flags."""
    from tokenizers import AddedToken
    token = {"content": token, "special": True} if isinstance(token, str) else token
    return AddedToken(**{key: value for key, value in token.items() if key != "__type"})


def add_tokens(full, config, listed, extra):
    """Add the tokens of a configuration to a tokenizers.Tokenizer. Returns {"eos_token": text, ...}."""
    named = {key: added_token(config[key]) for key in dict.fromkeys([*TOKENS, *config])
             if key.endswith("_token") and isinstance(config.get(key), str | dict)}
    tokens = [*full.get_added_tokens_decoder().values(), *(added_token(listed[i]) for i in sorted(listed, key=int))]
    known = {token.content for token in tokens}
    tokens += [token for token in [*named.values(), *map(added_token, extra)] if token.content not in known]
    named = {key: token.content for key, token in named.items()}
    for token in tokens:
        token.special = token.special or token.content in named.values()
    full.add_tokens(tokens)
    return named


def to_tiktoken(name, full):
    """(tiktoken.Encoding, whether it takes NFC) for all but unusual text of a tokenizers.Tokenizer, or (None, ...)."""
    spec = json.loads(full.to_str())
    model, normalizer, pattern = spec["model"], spec["normalizer"], split_pattern(spec["pre_tokenizer"])
    nfc = normalizer in ({"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]})
    settings = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if not pattern or "merges" not in model or any(model.get(key) for key in settings) or normalizer and not nfc:
        return None, False
    added = {token.content for token in full.get_added_tokens_decoder().values()}
    ranks = ranks_of({text: i for text, i in model["vocab"].items() if text not in added}, model["merges"], full.model)
    return ranks and tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}), nfc


def ranks_of(vocab, merges, model):
    """{bytes: id} of a tokenizer.json's vocabulary, or None if joining by ids is not the same as joining by merges.

    It is the same if ids follow the order of the merges, and each token with a rank is what the merges make of its
    bytes: where the two first differ, ids join two parts that no merge joins, and since text between borders that no
    merge crosses is joined alike everywhere, the merges leave the token's own bytes as these two parts, too. With
    ignore_merges, whole pieces are looked up first, as tiktoken always does: each token gets a rank. Every byte needs
    one, or tiktoken would panic at it. model: the tokenizers.models.BPE of both.
    """
    joined = [vocab.get("".join(pair), -1) for pair in merges]
    if -1 in joined or joined != sorted(joined) or not vocab.keys() >= BYTE_OF.keys() >= set("".join(vocab)):
        return None
    ignore_merges, model.ignore_merges = model.ignore_merges, False
    parts = {text: [part.id for part in model.tokenize(text)] for text in vocab}
    model.ignore_merges = ignore_merges
    if ignore_merges and any(len(ids) == 2 for ids in parts.values()):
        return None
    return {bytes(map(BYTE_OF.get, text)): i for text, i in vocab.items() if ignore_merges or parts[text] == [i]}


def split_pattern(pre_tokenizer):
    """A tiktoken pattern that cuts text as a tokenizer.json's pre_tokenizer does, or None."""
    match (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_SPLIT
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            # Oniguruma repeats {m,n}+, its ^ and $ are a line's; tiktoken: {m,n}+ is possessive, ^ and $ the text's
            same = not re.search(r"\{[\d,]+\}\+|(?<![\\\[])[$^]", pattern)
            if same and behavior == "Removed" and invert:  # what does not match is dropped, as tiktoken does
                return pattern
            if same and behavior == "Isolated":  # a run that does not match is a piece
                return f"{pattern}|(?:(?!{pattern})[\\s\\S])+"
    return None
