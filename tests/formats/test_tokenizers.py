"""tokenizer.py: the ids of every kind of file are those of its own library, those of every folder transformers'."""

import base64
import importlib
import json
import random
import sys
import unicodedata

import pytest
import tiktoken
from conftest import REPO
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import sample
from formats import tokenizer as tokenizer_module
from formats.template import Template
from formats.text import PIECE
from formats.tokenizer import GPT2_SPLIT, get_tokenizer
from plumbing.errors import UserError

BYTES = get_tokenizer("bytes")
TABLE = json.loads(tokenizer_module.DATA.read_text(encoding="utf-8"))
LLAMA3_SPLIT, QWEN_SPLIT = (TABLE["rank_files"][n]["pattern"] for n in ("128000", "151643"))
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>"]


def sample_texts(n=400, seed=0):
    """Texts that tokenizers are known to disagree on: marks, runs of white space, numerals, contractions, emoji."""
    rng = random.Random(seed)
    blocks = [(0x20, 0x7f), (0x80, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xd00),
              (0xe00, 0xe80), (0x1100, 0x1200), (0x2000, 0x2070), (0x2100, 0x2190), (0x2460, 0x2500), (0x3040, 0x3100),
              (0x4e00, 0x5000), (0xac00, 0xad00), (0xfb00, 0xfb50), (0xff00, 0xff60), (0x1d400, 0x1d500),
              (0x1f300, 0x1f650)]
    lines = [line for path in sorted(REPO.glob("*.py")) for line in path.read_text(encoding="utf-8").splitlines(True)]
    fixed = ["don't", "WE'LL", "'S", "it'\u017f", " \u00e9", "e\u0301", "1234567", "\u00bd\u2167", *SPECIAL, "<tool>",
             "<tool_call>", "<|im_", "\r\n", "\n\n\n", "\t", "   ", "\u00a0", "\u3000", "\x85", "\x1c", "\0", "...",
             "!?\n", "\u5317\u4eac", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\uac00", "\u1100\u1161", "\u212b",
             "x" * 50, " " * 33, "aaaa", "\u0338", "\ufffd", "\U0010ffff", "\ue000"]

    def characters():
        low, high = rng.choice(blocks)
        drawn = [chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 8))]
        return "".join(c for c in drawn if unicodedata.category(c) != "Cn")  # whose class differs between versions

    kinds = [characters, lambda: rng.choice(lines), lambda: rng.choice(fixed),
             lambda: str(rng.randrange(10**rng.randrange(9))), lambda: rng.choice(" \n\t\r") * rng.randrange(1, 5)]
    texts = ["", *fixed]
    while len(texts) < n:
        text = "".join(rng.choice(kinds)() for _ in range(rng.randrange(1, 9)))
        texts += [text, unicodedata.normalize(rng.choice(["NFC", "NFD"]), text)]
    return texts


TEXTS = sample_texts()


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert), byte_level(False)])


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)])


def trained(pre_tokenizer, alphabet=ALPHABET, normalizer=None, words=(), texts=None):
    """A Tokenizer of 600 tokens, trained on this repository's sources and on the texts of another seed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet,
                                  show_progress=False, limit_alphabet=len(alphabet))
    sources = [path.read_text(encoding="utf-8") for path in sorted(REPO.glob("*.py"))[:6]]
    tokenizer.train_from_iterator([*sources, *sample_texts(200, 1)] if texts is None else texts, trainer)
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def changed(tokenizer, path, **parts):
    """The file of a Tokenizer with parts of it replaced: a__b=x replaces spec["a"]["b"]."""
    spec = json.loads(tokenizer.to_str())
    for keys, value in parts.items():
        *outer, last = keys.split("__")
        inner = spec
        for key in outer:
            inner = inner[key]
        inner[last] = value
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def small():
    return trained(byte_level(True))


# ----------------------------------------------------------------------------------------------------------------
# bytes, names, rank files


@pytest.mark.parametrize("text", ["", "a", "a\nb\n\n\nc", "\r\n\t  ", "na\u00efve caf\u00e9 \u5317\u4eac \U0001f680",
                                  "<|endoftext|>", "\0\x7f"])
def test_bytes_tokenizer_is_utf8_and_reads_special_text_as_text(text):
    assert BYTES.encode(text).tolist() == list(text.encode())
    assert BYTES.decode(BYTES.encode(text)) == text
    assert (BYTES.eos, BYTES.bos, BYTES.largest, BYTES.specials) == (256, [], 256, {"<|endoftext|>": 256})


def test_half_characters_are_replaced():
    texts = ["a", "", "x \ud800 y", "\ud83d\ude80"]
    assert [BYTES.decode(BYTES.encode(text)) for text in texts] == ["a", "", "x \ufffd y", "\U0001f680"]


def test_unknown_tokenizer_names_the_known_ones():
    with pytest.raises(ValueError, match="'gpt5' is neither a file, nor a folder, nor one of bytes, .*o200k_base"):
        get_tokenizer("gpt5")


def test_tiktoken_name_without_a_network_says_what_to_do(monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="'gpt2'.*could not download.*set TIKTOKEN_CACHE_DIR"):
        get_tokenizer("gpt2")


def rank_file(path, n=256, merges=()):
    """A rank file of n tokens: the single bytes, the merges, and six-digit numbers."""
    tokens = [*(bytes([i]) for i in range(256)), *merges]
    tokens += [b"%06d" % i for i in range(n - len(tokens))]
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return str(path)


def test_rank_file_is_read_and_merges_are_used(tmp_path):
    encoding = get_tokenizer(rank_file(tmp_path / "mine.tiktoken", merges=[b"th", b"the"]))
    assert encoding.encode("the").tolist() == [257]
    assert (encoding.eos, encoding.name) == (258, "mine.tiktoken")
    assert 258 not in encoding.encode("the<|endoftext|>")


# the number of ranks is what tells these files from others; the ids are those of the published tokenizers
@pytest.mark.parametrize("n, ids, eos, n_vocab, pattern, nfc", [
    (128000, {"<|begin_of_text|>": 128000, "<|eot_id|>": 128009, "<|reserved_special_token_245|>": 128255}, 128001,
     128256, LLAMA3_SPLIT, False),
    (151643, {"<|im_start|>": 151644, "<|im_end|>": 151645, "<|extra_204|>": 151850}, 151643, 151851, QWEN_SPLIT,
     True)])
def test_llama3_and_qwen_rank_files_get_their_special_tokens(tmp_path, n, ids, eos, n_vocab, pattern, nfc):
    encoding = get_tokenizer(rank_file(tmp_path / "tokenizer.model", n))
    assert {token: encoding.specials[token] for token in ids} == ids
    assert (encoding.eos, encoding.bos, encoding.largest) == (eos, [], n_vocab - 1)
    assert (encoding.ranks._pat_str, encoding.nfc) == (pattern, nfc)
    assert encoding.decode(encoding.encode("e\u0301")) == ("\u00e9" if nfc else "e\u0301")


@pytest.mark.parametrize("content, told", [(b"not base64 at all\n", "not a tiktoken rank file"),
                                           (b"YQ== 0\n", "it has 1 ranks, expected .* the 256 single bytes"),
                                           (b"YQ== 0\nYg== 2\n", "it has 2 ranks, expected 0, 1, 2, ..., each once"),
                                           (b"YQ== 0\nYQ== 1\n", "it has 2 ranks, expected 0, 1, 2, ..., each once"),
                                           (b"", "it has 0 ranks, expected .* the 256 single bytes"),
                                           (b"YQ==\n", "not a tiktoken rank file"), (b"{nothing", "cannot be read: "),
                                           (b"{}", "neither a tokenizer.json .* nor a tekken.json"),
                                           (b"version https://git-lfs.github.com/spec/v1\noid sha256:37f0\nsize 9\n",
                                            "x.model is a Git LFS pointer.*git lfs pull"),
                                           (b"\nrubbish", "transformers .* cannot read .*x.model: "),
                                           (b'{"model": {"type": "BPE", "vocab": 3}}', "cannot read .*x.model")])
def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path, content, told):
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(ValueError, match=told):
        get_tokenizer(str(tmp_path / "x.model"))


def test_rank_file_of_a_tiktoken_name_is_refused_for_its_pattern(tmp_path):
    with pytest.raises(ValueError, match="as many ranks as gpt2, .*use data.tokenizer=gpt2"):
        get_tokenizer(rank_file(tmp_path / "x.tiktoken", 50256))


def without(spec, key):
    """A copy of nested dicts and lists with every entry of that key left out."""
    if isinstance(spec, dict):
        return {k: without(v, key) for k, v in spec.items() if k != key}
    return [without(part, key) for part in spec] if isinstance(spec, list) else spec


@pytest.mark.parametrize("file, key", [
    *(("tekken.json", key) for key in ("pattern", "default_vocab_size", "default_num_special_tokens", "rank",
                                       "token_bytes", "token_str", "vocab", "config")),
    *(("tokenizer.json", key) for key in ("vocab", "merges", "content", "special", "normalized", "lstrip", "model"))])
def test_a_file_that_lacks_a_part_is_one_line_that_names_file_and_part(tmp_path, small, file, key):
    spec = json.loads(small.to_str())
    if file == "tekken.json":
        spec = {"config": {"pattern": ".", "default_vocab_size": 258, "default_num_special_tokens": 2},
                "vocab": [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)],
                "special_tokens": [{"rank": 0, "token_str": "<s>"}]}
    else:
        spec["added_tokens"] += [spec["added_tokens"][0] | {"content": "<word>", "special": False, "id": 600}]
    (tmp_path / file).write_text(json.dumps(spec))
    get_tokenizer(str(tmp_path / file))
    (tmp_path / file).write_text(json.dumps(without(spec, key)))
    with pytest.raises(ValueError) as caught:
        get_tokenizer(str(tmp_path / file))
    told = str(caught.value)
    assert str(tmp_path / file) in told and "\n" not in told
    assert key in told.replace("'model'", "model") or (file, key) == ("tokenizer.json", "merges")


@pytest.mark.parametrize("listed", [True, False])
def test_tekken_file_has_its_special_tokens_first(tmp_path, listed):
    vocab = [{"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None}
             for i, t in enumerate([*(bytes([b]) for b in range(256)), b"th", b"the", b"beyond"])]
    spec = {"config": {"pattern": GPT2_SPLIT, "default_vocab_size": 288, "default_num_special_tokens": 30},
            "vocab": vocab}
    if listed:
        spec["special_tokens"] = [{"rank": i, "token_str": t} for i, t in enumerate(["<s>", "</s>"])]
    (tmp_path / "tekken.json").write_text(json.dumps(spec))
    encoding = get_tokenizer(str(tmp_path))
    assert encoding.encode("the a").tolist() == [30 + 257, 30 + 32, 30 + 97] and encoding.largest == 287
    assert (encoding.eos, encoding.specials["<SPECIAL_29>"]) == (1 if listed else 2, 29)
    assert encoding.decode(encoding.encode("beyond")) == "beyond"


# ----------------------------------------------------------------------------------------------------------------
# tokenizer.json


WORDS = ["<tool_call>", "<tool>", "<tool"]
KINDS = {
    "gpt2": lambda: trained(byte_level(True)),
    "gpt2 words": lambda: trained(byte_level(True), words=[*WORDS, "aaa", "   "]),
    "smollm2": lambda: trained(DIGITS),
    # the bytes of planes that the training text did not have are no tokens, and vanish
    "smollm2 bytes missing": lambda: trained(DIGITS, ALPHABET[:200], texts=[p.read_text() for p in REPO.glob("*.py")]),
    "llama3": lambda: trained(split(LLAMA3_SPLIT)),
    "qwen": lambda: trained(split(QWEN_SPLIT), normalizer=normalizers.NFC(), words=WORDS),
    "phi4": lambda: trained(split(LLAMA3_SPLIT, "removed", True), words=WORDS[:1]),
    # patterns that leave text out: a piece of its own under Isolated, dropped under Removed
    "isolated gaps": lambda: trained(split(r"\p{L}+|\p{N}")),
    "isolated groups, bytes missing": lambda: trained(split(r"(\p{L})+|(\p{N})"), ALPHABET[:200],
                                                      texts=["this that the"]),
    "removed gaps": lambda: trained(split(r"\p{L}+|\p{N}", "removed", True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_tokenizers_library(tmp_path, kind):
    reference = KINDS[kind]()
    spec = json.loads(reference.to_str())
    spec["model"]["ignore_merges"] = kind == "llama3"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference.encode_special_tokens = True  # as text
    tokenizer = get_tokenizer(str(tmp_path / "tokenizer.json"))
    used = set()
    for text in TEXTS:
        ids = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text).tolist() == ids, repr(text)
        used |= set(ids)
        if "missing" not in kind and "removed" not in kind:
            assert tokenizer.decode(ids) == (unicodedata.normalize("NFC", text) if kind == "qwen" else text)
    assert len(used) > (20 if "groups" in kind else 300) and tokenizer.eos == 0  # the texts use half of the tokens
    slow = "smollm2" in kind or "missing" in kind  # digits of their own, or bytes that tiktoken would panic at
    assert (tokenizer.ranks is None) == slow


def test_merges_as_pairs_of_a_string_and_a_model_without_type_are_read(tmp_path, small):
    spec = json.loads(small.to_str())["model"]
    path = changed(small, tmp_path / "t.json", model__merges=[" ".join(m) for m in spec["merges"]])
    old = json.loads(path.read_text())
    del old["model"]["type"]
    path.write_text(json.dumps(old))
    assert get_tokenizer(str(path)).encode("the function").tolist() == small.encode("the function").ids


def toy(*merges, **keys):
    """Parts of a tokenizer.json whose tokens are the bytes and those of the merges."""
    tokens = dict.fromkeys([*ALPHABET, *("".join(m) for m in merges)])
    return {"model__vocab": {t: 10 + i for i, t in enumerate(tokens)}, "model__merges": [list(m) for m in merges],
            "added_tokens": [], **keys}


def added(**flags):
    word = dict(id=600, content="<w>", single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    return [{**word, **flags}]


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def splits(pattern, **keys):
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False, **keys},
        {**LEVEL, "use_regex": False}]}


@pytest.mark.parametrize("parts, fast", [
    ({}, True),
    (dict(model__type="WordPiece", model__unk_token="a", model__continuing_subword_prefix="##",
          model__max_input_chars_per_word=9), False),
    (dict(model__byte_fallback=True), False),
    (dict(model__end_of_word_suffix="</w>", model__merges=[]), False),
    (dict(normalizer={"type": "Lowercase"}), False),
    (dict(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}), True),
    (dict(added_tokens=added(lstrip=True)), True),
    (dict(added_tokens=added(rstrip=True)), True),
    (dict(added_tokens=added(single_word=True)), True),
    (dict(added_tokens=added(normalized=True), normalizer={"type": "NFC"}), True),
    (dict(added_tokens=added(content="e\u0301", normalized=True), normalizer={"type": "NFC"}), True),
    (dict(added_tokens=[*added(normalized=True), *added(id=601, content="<w")]), True),
    (dict(added_tokens=added(content="the ")), True),
    (toy(("a", "b"), model__unk_token="a"), True),
    (toy(("a", "b"), ("b", "c"), model__vocab={"a": 0, "b": 1, "c": 2, "ab": 4, "bc": 3}), False),  # ids out of order
    (toy(("a", "b"), ("b", "c"), ("a", "bc"), ("c", "d"), ("ab", "c")), False),
    (toy(("a", "b"), ("b", "c"), ("a", "bc")), True),  # no text is encoded to the last, so it has no rank
    (toy(("a", "b"), ("b", "c"), ("a", "bc"), model__ignore_merges=True), False),  # but where it is a whole piece
    (toy(("a", "b"), model__vocab={**{byte: i for i, byte in enumerate(ALPHABET)}, "ab": 300, "ddd": 301},
         model__ignore_merges=True), True),
    (toy(("a", "b"), model__vocab={byte: i for i, byte in enumerate([*ALPHABET[1:], "ab"])}), False),
    (dict(pre_tokenizer=None), False),
    (dict(pre_tokenizer={**LEVEL, "add_prefix_space": True}), False),
    (dict(pre_tokenizer={**LEVEL, "use_regex": False}), False),
    (dict(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, LEVEL]}),
     False),
    (dict(pre_tokenizer=splits({"String": "x"})), False),
    (dict(pre_tokenizer=splits({"Regex": "x"}, behavior="MergedWithNext")), False),
    (dict(pre_tokenizer=splits({"Regex": r"\p{N}{1,3}+"})), False),
    (dict(pre_tokenizer=splits({"Regex": r"\s+$|\s"})), False)])
def test_a_file_that_tiktoken_cannot_follow_goes_through_the_tokenizers_library(tmp_path, small, parts, fast):
    path = changed(small, tmp_path / "tokenizer.json", **parts)
    reference, tokenizer = Tokenizer.from_file(str(path)), get_tokenizer(str(path))
    reference.encode_special_tokens = True
    assert (tokenizer.ranks is not None) == fast
    for text in [*TEXTS[::3], "abcdabcabbcabdddcda", "a<w>b <w> c<ww<w>", "the  <w>.", "E\u0301e\u0301 \u00e9", "ddd"]:
        assert tokenizer.encode(text).tolist() == reference.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_joining_by_ids_is_chosen_only_where_it_is_joining_by_merges(ignore_merges):
    rng, chosen = random.Random(0), 0
    for _ in range(400):
        tokens, merges = list("abc"), []
        for _ in range(rng.randrange(1, 7)):
            pair = rng.choice(tokens), rng.choice(tokens)
            merges.append(pair)
            tokens += [] if "".join(pair) in tokens else ["".join(pair)]
        tokens = dict.fromkeys([*ALPHABET, *tokens, rng.choice(["abcabc", "cab", "bb"])])
        vocab = {token: i for i, token in enumerate(tokens)}
        model = models.BPE(vocab, merges, ignore_merges=ignore_merges)
        ranks = tokenizer_module.ranks_of(vocab, merges, model)
        if ranks is None:
            continue
        chosen += 1
        by_id = tiktoken.Encoding("x", pat_str=r"\S+", mergeable_ranks=ranks, special_tokens={})
        for text in ("".join(rng.choices("abc", k=rng.randrange(1, 12))) for _ in range(40)):
            assert by_id.encode(text) == [part.id for part in model.tokenize(text)], (merges, text)
    assert chosen > 100


def test_a_package_that_is_missing_is_named(tmp_path, small, monkeypatch):
    folder, model = folder_of(tmp_path / "m", small, {"tokenizer_class": "BertTokenizer"}), tmp_path / "x.model"
    model.write_bytes(b"\n")
    for name, path in [("tokenizers", folder / "tokenizer.json"), ("transformers", folder / "tokenizer.json"),
                       ("transformers", model), ("sentencepiece", model), ("google.protobuf", model)]:
        missing = name.removeprefix("google.")
        with monkeypatch.context() as patch, pytest.raises(UserError, match=f"{path} .*: pip install {missing}$"):
            patch.setitem(sys.modules, name, None)
            get_tokenizer(str(path if path == model else folder))


@pytest.mark.parametrize("blank", [" ", "\t"])
@pytest.mark.parametrize("pattern", [GPT2_SPLIT, LLAMA3_SPLIT])
def test_a_million_blanks_are_one_line_and_as_many_as_a_piece_of_text_has_are_encoded(tmp_path, blank, pattern):
    reference = trained(split(pattern))
    tokenizer = get_tokenizer(str(changed(reference, tmp_path / "tokenizer.json")))
    longest = "def f" + blank * 2 * PIECE + " return x"
    assert tokenizer.ranks and tokenizer.encode(longest).tolist() == reference.encode(longest).ids
    with pytest.raises(UserError, match="cannot encode a text of 1,000,002 characters.*too many blanks in a row"):
        tokenizer.encode("a" + blank * 10**6 + "b")


# ----------------------------------------------------------------------------------------------------------------
# folders: as transformers 5 reads them

FLAGS = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FOLDER_TEXTS = [*TEXTS[:120:2], " Hello", "  two", "Hello  world \n x", "\u2581x", "<s>", "</s> a", "x<|im_start|>y",
                "<tool>a", "a <tool> b", "def self(", "a1234 56", "  12", " \t 3", "\u212b", "<0x41>"]


def token(text, special=True, **flags):
    """A token as tokenizer_config.json's added_tokens_decoder lists it."""
    return {**FLAGS, "content": text, "special": special, **flags}


def folder_of(path, tokenizer=None, config=None, model_type=None, **files):
    """A model folder: tokenizer.json, tokenizer_config.json, config.json and other files (name without .json)."""
    path.mkdir(exist_ok=True)
    if tokenizer:
        tokenizer.save(str(path / "tokenizer.json"))
    files |= {} if config is None else {"tokenizer_config": config}
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    if model_type:
        import transformers
        transformers.AutoConfig.for_model(model_type).save_pretrained(path)
    return path


def same_as_transformers(folder, texts=FOLDER_TEXTS):
    """The Tokenizer of a folder, after comparing it with AutoTokenizer's: ids, BOS, special tokens, largest id."""
    import transformers

    reference, tokenizer = transformers.AutoTokenizer.from_pretrained(folder), get_tokenizer(str(folder))
    around = reference("a", split_special_tokens=True).input_ids
    body = tokenizer.encode("a").tolist()
    after = around[len(tokenizer.bos) + len(body) :]  # an EOS of the template; documents get theirs anyway
    for text in texts:
        expected = reference(text, split_special_tokens=True).input_ids
        assert [*tokenizer.bos, *tokenizer.encode(text), *after] == expected, repr(text)
    assert tokenizer.specials == reference.get_added_vocab()
    assert tokenizer.largest == max(reference.get_vocab().values())
    if reference.eos_token_id is not None:
        assert tokenizer.eos == reference.eos_token_id
    assert tokenizer.named_tokens == reference.special_tokens_map
    return tokenizer


def random_folder(path, rng, kinds):
    """A folder with added words of all flags, BOS by the template or not, and a config that names more or less."""
    def flags():
        return {name: rng.random() < 0.3 for name in FLAGS} | {"special": rng.random() < 0.3}

    tokenizer = Tokenizer.from_str(rng.choice(kinds).to_str())
    words = ["<tool>", "self", "  ", "aaa", "def", "<|im_start|>x", "\u00c9", "the ", "\n\n", "123"]
    for word in rng.sample(words, rng.randrange(4)):
        tokenizer.add_tokens([AddedToken(word, **flags())])
    if rng.random() < 0.5:
        tokenizer.post_processor = processors.TemplateProcessing(
            rng.choice(["<|im_start|> $A", "<|im_start|> $A <|im_start|>"]), special_tokens=[("<|im_start|>", 1)])
    listed = {str(i): token(t.content, t.special, lstrip=t.lstrip, rstrip=t.rstrip, single_word=t.single_word,
                            normalized=t.normalized) for i, t in tokenizer.get_added_tokens_decoder().items()}
    listed[str(tokenizer.get_vocab_size())] = token("<new>", rng.random() < 0.5)
    classes = ["PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "Qwen2TokenizerFast", "GPTNeoXTokenizer",
               "CohereTokenizerFast", "CodeGenTokenizer", "Qwen3_5Tokenizer", "Own"]
    config = {"tokenizer_class": rng.choice(classes),
              "eos_token": rng.choice(["<|endoftext|>", {"__type": "AddedToken", **token("<|im_start|>")}]),
              "pad_token": "<pad>", "add_bos_token": rng.random() < 0.5, "bos_token": "<|endoftext|>",
              "added_tokens_decoder": listed, "additional_special_tokens": ["<|im_start|>", "<extra>"]}
    config["eos_token"] = config["eos_token"] if isinstance(config["eos_token"], str) else "<|im_start|>"
    for key in rng.sample(list(config), rng.randrange(5)):
        del config[key]
    return folder_of(path, tokenizer, config, rng.choice([None, None, "llama", "qwen2", "mistral", "gpt_neox"]))


@pytest.fixture(scope="module")
def kinds():
    return [KINDS[kind]() for kind in ("gpt2", "smollm2", "llama3", "qwen", "phi4")]


@pytest.mark.parametrize("seed", range(20))
def test_random_folders_are_read_as_transformers_reads_them(tmp_path, kinds, seed):
    same_as_transformers(random_folder(tmp_path / "m", random.Random(seed), kinds), FOLDER_TEXTS[::2])


# GPT2Tokenizer cuts no digits off, LlamaTokenizer and Qwen 2 models are followed or not by what else the folder says
@pytest.mark.parametrize("class_name, model_type, replaced", [
    ("GPT2Tokenizer", None, True), ("GPT2Tokenizer", "llama", True), ("GPT2Tokenizer", "granite", False),
    ("GPT2Tokenizer", "phi3", False), ("LlamaTokenizerFast", "llama", False), ("LlamaTokenizerFast", "qwen2", True),
    ("Qwen2Tokenizer", "qwen3", True), (None, "qwen3", True), (None, "llama", False), (None, "gpt2", True),
    ("PreTrainedTokenizerFast", "smollm3", False), ("Own", None, False), ("GPT2Tokenizer", "gpt_bigcode", False),
    (None, "starcoder2", True), ("GPTNeoXTokenizerFast", "llama", True), (None, "gpt_neox", True)])
def test_steps_that_a_class_of_transformers_replaces_are_replaced(tmp_path, class_name, model_type, replaced):
    folder = folder_of(tmp_path / "m", trained(DIGITS), class_name and {"tokenizer_class": class_name}, model_type)
    tokenizer = same_as_transformers(folder)
    assert (tokenizer.ranks is not None) == replaced  # tiktoken is not used for digits of their own


# What a class needs to have been trained with: a vocabulary of its kind, and names of tokens that are in it
def metaspace_bpe():
    """A BPE of pieces with SentencePiece's space and byte fallback."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, limit_alphabet=90, special_tokens=[
        "<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])
    tokenizer.train_from_iterator([(REPO / "train.py").read_text(encoding="utf-8")], trainer)
    spec = json.loads(tokenizer.to_str())
    return Tokenizer.from_str(json.dumps(spec | {"added_tokens": spec["added_tokens"][:3]}))


TRAINED = {"LlamaTokenizer": metaspace_bpe, "GemmaTokenizer": metaspace_bpe}
CLASS_TEXTS = [*FOLDER_TEXTS[::2], " ", "\n", "\u212bngstro\u0308m \u00c5", "x </s> y", "\u2581<PRE> x", "a<mask>b",
               "12 345", "\u0928\u092e\u0938\u094d\u0924\u0947"]  # the last has marks, which Qwen 3.5 keeps in a word


@pytest.fixture(scope="module", params=[name for name, replaced in TABLE["classes"].items() if replaced])
def class_folder(request, tmp_path_factory):
    """A folder as transformers saves a tokenizer of a class, with added words and special tokens at odd places."""
    import transformers

    name = request.param
    spec = json.loads(TRAINED.get(name, KINDS["gpt2"])().to_str())
    vocab, merges = spec["model"]["vocab"], [tuple(pair) for pair in spec["model"]["merges"]]
    tokenizer = getattr(transformers, name)(vocab=vocab, merges=merges)
    tokenizer.add_tokens(["<tool>", AddedToken("self", single_word=True), AddedToken("e\u0301", normalized=True)])
    tokenizer.add_special_tokens({"pad_token": "<tool_pad>", "extra_special_tokens": ["<|im_start|>", "<x>"]})
    folder = tmp_path_factory.mktemp("class")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{}, {"add_prefix_space": True, "legacy": True}, {"add_prefix_space": False},
                                     {"add_bos_token": True, "bos_token": "<|im_start|>"}])
def test_each_class_that_is_read_without_transformers_encodes_and_decodes_as_in_transformers(class_folder, options):
    import transformers

    config = json.loads((class_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (class_folder / "tokenizer_config.json").write_text(json.dumps(config | options))
    tokenizer = same_as_transformers(class_folder, CLASS_TEXTS)
    (class_folder / "tokenizer_config.json").write_text(json.dumps(config))
    if options.get("add_prefix_space", True):  # without, transformers strips a space that it did not add
        reference = transformers.AutoTokenizer.from_pretrained(class_folder)
        for text in CLASS_TEXTS:
            ids = tokenizer.encode(text).tolist()
            assert tokenizer.decode(ids) == reference.decode(ids), repr(text)


def test_the_table_of_classes_is_that_of_transformers():
    import transformers
    from transformers.models.auto import tokenization_auto

    for name, replaced in TABLE["classes"].items():
        if replaced:
            made = getattr(transformers, name)(vocab={"<unk>": 0}, merges=[])
            spec = json.loads(made.backend_tokenizer.to_str())
            steps = {key: spec[key] for key in ("normalizer", "pre_tokenizer")}
            assert steps == {key: replaced[key] for key in steps}
            model = {key: value for key, value in spec["model"].items() if value and key not in ("type", "vocab")}
            assert model == replaced["model"]
            assert made.special_tokens_map.items() >= replaced["tokens"].items()
    types = tokenization_auto.TOKENIZER_MAPPING_NAMES
    wrong = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    for key, name in (TABLE["model_types"] | TABLE["fixed_model_types"]).items():
        assert types.get(key, "TokenizersBackend") == name
        fixed = key in wrong or key in types and name == "TokenizersBackend"
        assert fixed == (key in TABLE["fixed_model_types"])
    # else a PreTrainedTokenizerFast would be read as the file says
    assert {key for key in wrong if types[key] != "TokenizersBackend"} <= TABLE["fixed_model_types"].keys()


def test_folders_of_common_decoders_are_read_without_transformers(tmp_path, small, monkeypatch):
    for class_name in ("GPT2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", None):
        folder_of(tmp_path / str(class_name), small, class_name and {"tokenizer_class": class_name})
    for name in [name for name in sys.modules if name.split(".")[0] in ("transformers", "formats")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    fresh = importlib.import_module("formats.tokenizer")
    assert fresh is not tokenizer_module
    for folder in tmp_path.iterdir():
        tokenizer = fresh.get_tokenizer(str(folder))
        assert tokenizer.decode(tokenizer.encode("def f")) == "def f"


@pytest.mark.parametrize("listed", [600, 700])
def test_an_added_token_gets_the_id_that_transformers_gives_it(tmp_path, small, listed):
    config = {"added_tokens_decoder": {str(listed): token("<late>")}}
    assert same_as_transformers(folder_of(tmp_path / "m", small, config)).specials["<late>"] == 600


@pytest.mark.parametrize("config", [
    {"eos_token": "<tool>"}, {"extra_special_tokens": ["<tool>"]}, {"extra_special_tokens": {"image": "<image>"}},
    {"pad_token": "<pad>", "image_token": "<image>", "unk_token": "<unk>", "bos_token": "<b>"}])
@pytest.mark.parametrize("class_name", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_tokens_that_a_folder_names_get_the_ids_and_flags_of_transformers(tmp_path, class_name, config):
    tokenizer = trained(byte_level(True), words=["<tool>"])
    same_as_transformers(folder_of(tmp_path / "m", tokenizer, {**config, "tokenizer_class": class_name}))


def test_a_template_may_put_two_tokens_before_a_text(tmp_path):
    tokenizer = trained(byte_level(True))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> <|endoftext|> $A", special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)])
    assert same_as_transformers(folder_of(tmp_path / "m", tokenizer)).bos == [1, 0]


# ----------------------------------------------------------------------------------------------------------------
# SentencePiece


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """{name: bytes of a SentencePiece model}: as Llama 2's, with SentencePiece's defaults, with user-defined words."""
    library = pytest.importorskip("sentencepiece", reason="pip install sentencepiece")
    pytest.importorskip("google.protobuf", reason="pip install protobuf")
    as_llama = dict(normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
                    allow_whitespace_only_pieces=True)
    lines = "".join(p.read_text(encoding="utf-8") for p in sorted(REPO.glob("*.py"))).splitlines()
    models = {}
    for name, keys in [("llama", as_llama), ("defaults", {}),
                       ("words", {**as_llama, "user_defined_symbols": ["TOOL", "  "]}),
                       ("unigram", {**as_llama, "model_type": "unigram"})]:
        prefix = tmp_path_factory.mktemp("sp") / name
        library.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=str(prefix), vocab_size=700,
                                           byte_fallback=True, minloglevel=2, **{"model_type": "bpe", **keys})
        models[name] = prefix.with_suffix(".model").read_bytes()
    return models


@pytest.mark.parametrize("kind", ["llama", "defaults", "words"])
def test_ids_of_a_sentencepiece_model_are_those_of_its_library(pieces, tmp_path, kind):
    (tmp_path / "x.model").write_bytes(pieces[kind])
    reference = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=pieces[kind])
    tokenizer = get_tokenizer(str(tmp_path / "x.model"))
    for text in [*FOLDER_TEXTS, "TOOL", "a TOOLx  y"]:
        if kind == "defaults" and not unicodedata.is_normalized("NFKC", text):
            continue  # where `tokenizers` and SentencePiece normalize differently now and then
        ids = tokenizer.encode(text).tolist()
        assert ids == reference.encode(text), repr(text)
        assert tokenizer.decode(ids) == reference.decode(ids)
    assert (tokenizer.largest, tokenizer.bos, tokenizer.eos) == (699, [], 2)


ADDED = {"0": token("<unk>"), "1": token("<s>"), "2": token("</s>"), "700": token("<|im_end|>", rstrip=True),
         "701": token("<tool>", False, normalized=True)}


@pytest.mark.parametrize("config, bos", [
    (LLAMA, []), ({**LLAMA, "legacy": True}, []), ({**LLAMA, "add_bos_token": True}, [1]),
    ({**LLAMA, "legacy": False, "pad_token": "<pad>"}, []), ({**LLAMA, "add_prefix_space": False}, []),
    ({**LLAMA, "eos_token": "<|im_end|>", "added_tokens_decoder": ADDED, "add_bos_token": True}, [1])])
@pytest.mark.parametrize("model_type", [None, "mistral"])
@pytest.mark.parametrize("kind", ["llama", "words"])
def test_a_sentencepiece_folder_and_what_transformers_saves_of_it(pieces, tmp_path, kind, config, bos, model_type):
    import transformers

    folder = folder_of(tmp_path / "m", None, config, model_type)
    (folder / "tokenizer.model").write_bytes(pieces[kind])
    texts = FOLDER_TEXTS[::3]
    assert same_as_transformers(folder, texts).bos == bos
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert same_as_transformers(folder_of(tmp_path / "saved", model_type=model_type), texts).bos == bos
    assert not (tmp_path / "saved/tokenizer.model").is_file()


@pytest.mark.parametrize("kind", ["defaults", "words"])
@pytest.mark.parametrize("config", [{"legacy": None}, {"additional_special_tokens": []},
                                    {"bos_token": None, "add_bos_token": True}])
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_what_a_sentencepiece_folder_leaves_out_is_filled_in_as_transformers_does(pieces, tmp_path, kind, config,
                                                                                  model_type):
    folder = folder_of(tmp_path / "m", None, {"tokenizer_class": "LlamaTokenizer", **config}, model_type)
    (folder / "tokenizer.model").write_bytes(pieces[kind])
    same_as_transformers(folder, FOLDER_TEXTS[::3])


@pytest.mark.parametrize("class_name", ["CodeLlamaTokenizer", "GemmaTokenizer", "LlamaTokenizer", "Own"])
@pytest.mark.parametrize("kind", ["llama", "words"])
def test_a_sentencepiece_folder_of_each_class_may_name_reserved_pieces(pieces, tmp_path, class_name, kind):
    listed = {"1": token("<s>"), "2": token("</s>"), "9": token("<|im_start|>", lstrip=True), "10": token("the", False)}
    config = {"tokenizer_class": class_name, "added_tokens_decoder": listed, "eos_token": "<|im_start|>"}
    folder = folder_of(tmp_path / "m", None, config)
    (folder / "tokenizer.model").write_bytes(pieces[kind])
    tokenizer = same_as_transformers(folder, [*FOLDER_TEXTS[::3], "a TOOLx  y"])
    assert tokenizer.eos == (9 if class_name == "Own" else 700)


def test_a_folder_of_tinyllamas_shape_has_the_bos_of_its_template(pieces, tmp_path):
    import transformers

    folder_of(tmp_path / "m", None, LLAMA).joinpath("tokenizer.model").write_bytes(pieces["llama"])
    transformers.AutoTokenizer.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "saved")
    spec = json.loads((tmp_path / "saved/tokenizer.json").read_text())
    spec["post_processor"] = {"type": "TemplateProcessing", "pair": [], "special_tokens": {
        "<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}, "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    (tmp_path / "m/tokenizer.json").write_text(json.dumps(spec))
    tokenizer = same_as_transformers(tmp_path / "m")
    assert tokenizer.bos == [1]
    assert tokenizer.decode(tokenizer.encode("x  y")) == "x  y"


@pytest.mark.parametrize("files", [
    {}, {"added_tokens": {"<|im_end|>": 600, "self": 601}},
    {"special_tokens_map": {"bos_token": token("<s>"), "eos_token": "<|im_end|>"}},
    {"special_tokens_map": {"additional_special_tokens": ["<|im_end|>"], "extra_special_tokens": ["<tool>"]}}])
@pytest.mark.parametrize("config", [{}, {"eos_token": "<|im_end|>", "additional_special_tokens": ["<a>"]}])
def test_tokens_of_older_folders_are_added_from_their_own_files(tmp_path, small, files, config):
    same_as_transformers(folder_of(tmp_path / "m", small, {"tokenizer_class": "GPT2Tokenizer", **config}, **files))


# ----------------------------------------------------------------------------------------------------------------
# folders that only transformers reads


def wordpiece(path, pieces):
    """BERT's, as saved with padding and truncation, which are no part of a text's ids."""
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,()=:_"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "de", *letters, *(f"##{x}" for x in letters)]
    tokenizer = transformers.BertTokenizerFast(vocab={token: i for i, token in enumerate(vocab)})
    tokenizer.backend_tokenizer.enable_padding(length=40)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.save_pretrained(path)


def unigram(path, pieces):
    folder_of(path, None, {"tokenizer_class": "T5Tokenizer"}).joinpath("spiece.model").write_bytes(pieces["unigram"])


def ctrl(path, pieces):
    """Of a class in Python: words that are no tokens go by pairs."""
    tokens = ["<unk>", "the", "th@@", "e", "he@@", "l@@", "lo", "a", "d@@", "e@@", "f"]
    folder_of(path, None, {"tokenizer_class": "CTRLTokenizer"}, vocab={token: i for i, token in enumerate(tokens)})
    (path / "merges.txt").write_text("#version\nt h\nth e</w>\nh e\nl o</w>\n")


def byt5(path, pieces):
    folder_of(path, None, {"tokenizer_class": "ByT5Tokenizer"})


def mistral(path, pieces):
    """With the flag that replaces a pattern in vocabularies of more than 100,000 tokens."""
    tokenizer = trained(split(r"\p{L}+|\p{N}+|\s+"))
    spec = json.loads(tokenizer.to_str())
    spec["model"]["vocab"] |= {f"word{i}": 600 + i for i in range(100_000)}
    folder_of(path, Tokenizer.from_str(json.dumps(spec)), {"fix_mistral_regex": True})
    (path / "config.json").write_text(json.dumps({"model_type": "mistral"}))


def versioned(path, pieces):
    folder_of(path, trained(DIGITS), {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]})
    trained(byte_level(True)).save(str(path / "tokenizer.4.0.0.json"))


def with_own_code(path, pieces):
    auto_map = {"AutoTokenizer": ["own.OwnTokenizer", None]}  # goes behind a class of transformers
    folder_of(path, trained(DIGITS), {"tokenizer_class": "GPT2Tokenizer", "auto_map": auto_map}, "granite")


def whisper(path, pieces):
    """Puts two tokens before a text."""
    spec = json.loads(trained(byte_level(True)).to_str())
    for i, word in enumerate(["<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"], 600):
        spec["added_tokens"].append({"id": i, **token(word)})
    folder_of(path, Tokenizer.from_str(json.dumps(spec)), {"tokenizer_class": "WhisperTokenizer"})


def words_as_llama(path, pieces):
    """A tokenizer.json of whole words, with a class that makes pairs."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "def": 2, "a": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder_of(path, tokenizer, {"tokenizer_class": "LlamaTokenizer"})


@pytest.mark.parametrize("make, bos, eos", [
    (wordpiece, [2], None), (unigram, [], 2), (ctrl, [], None), (byt5, [], 1), (mistral, [], 0), (versioned, [], 0),
    (whisper, [600, 602], 0), (with_own_code, [], 0), (words_as_llama, [], 5)])
def test_a_folder_of_another_class_has_the_ids_and_the_text_of_transformers(tmp_path, capsys, pieces, make, bos, eos):
    import transformers

    make(tmp_path / "m", pieces)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    tokenizer = same_as_transformers(tmp_path / "m")
    assert (tokenizer.bos, tokenizer.eos) == (bos, eos)
    assert (tokenizer.python is not None) == (make in (ctrl, byt5))
    for text in ["the def f", "h\u00e9llo \u5317\u4eac \U0001f680.", *FOLDER_TEXTS[::7]]:
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == reference.decode(ids)
        if make is not ctrl:  # whose tokens say that the next one goes on with the word
            sample.show(iter(ids), tokenizer, set())
            assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


def test_a_fingerprint_of_a_class_in_python_changes_with_its_files_and_not_with_its_place(tmp_path, pieces):
    for name in "ab":
        ctrl(tmp_path / name, pieces)
    first, again = (get_tokenizer(str(tmp_path / name)).fingerprint for name in "ab")
    (tmp_path / "b/merges.txt").write_text("#version\nt h\nh e</w>\n")
    assert first == again != get_tokenizer(str(tmp_path / "b")).fingerprint


@pytest.mark.parametrize("config, message", [
    ({"tokenizer_class": "LlamaTokenizer"}, "m lacks the vocabulary of its LlamaTokenizer$"),
    ({"tokenizer_class": "CTRLTokenizer"}, "transformers .* cannot read .*m: "),
    ({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}, "contains custom code"),
    ({"tokenizer_class": 5}, "transformers .* cannot read .*tokenizer.json: ")])
def test_a_folder_that_transformers_cannot_read_either_is_one_line(tmp_path, small, config, message):
    folder = folder_of(tmp_path / "m", small if config["tokenizer_class"] == 5 else None, config)
    with pytest.raises(UserError, match=message) as caught:
        get_tokenizer(str(folder))
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------
# what a folder says, fingerprints


def test_a_folder_says_what_begins_and_ends_a_text(tmp_path, small):
    template = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    post = {"type": "Sequence", "processors": [{**LEVEL, "type": "ByteLevel"}, json.loads(template.__getstate__())]}
    start, end = "<|im_start|>", "<|endoftext|>"
    # as in transformers 5, tokenizer.json's template decides, not add_bos_token
    typed = {"__type": "AddedToken", **token(start)}
    for config, eos in [(None, 0), ({"add_bos_token": False, "bos_token": start}, 0), ({}, 0),
                        ({"eos_token": start}, 1), ({"eos_token": typed}, 1), ({"eos_token": None}, 0)]:
        changed(small, tmp_path / "tokenizer.json", post_processor=post)
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = get_tokenizer(str(tmp_path))
        assert (tokenizer.bos, tokenizer.eos) == ([1], eos), config
        assert tokenizer.name == tmp_path.name
        assert tokenizer.named_tokens.get("eos_token") == (start if eos == 1 else None)
    changed(small, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": end}))
    assert get_tokenizer(str(tmp_path)).bos == []


def test_a_folders_chat_template_is_read_from_each_place_where_transformers_looks(tmp_path, small):
    changed(small, tmp_path / "tokenizer.json")
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    for config in ({}, {"chat_template": "c"}, {"chat_template": named}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert get_tokenizer(str(tmp_path)).chat_template == config.get("chat_template")
        expected = ("d", "t") if isinstance(config.get("chat_template"), list) else ("c", "c")
        assert not config or Template(get_tokenizer(str(tmp_path))).sources == expected
    (tmp_path / "chat_template.jinja").write_text("j")
    assert Template(get_tokenizer(str(tmp_path))).sources == ("j", "j")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("t")
    assert Template(get_tokenizer(str(tmp_path))).sources == ("j", "t")


def test_tokenizer_json_wins_over_other_files(tmp_path, small):
    with pytest.raises(ValueError, match="holds no tokenizer: expected a tokenizer.json"):
        get_tokenizer(str(tmp_path))
    rank_file(tmp_path / "tokenizer.model")
    assert get_tokenizer(str(tmp_path)).largest == 256
    changed(small, tmp_path / "tokenizer.json")
    assert get_tokenizer(str(tmp_path)).largest == 599 and get_tokenizer(str(tmp_path)).name == tmp_path.name


def test_fingerprints_tell_apart_whatever_changes_ids(tmp_path, small):
    ranks = {bytes([i]): i for i in range(256)}
    base = dict(pat_str=r"\s|\S+", mergeable_ranks=ranks, special_tokens={"<w>": 300})
    others = [{}, dict(pat_str=r"\S+|\s"), dict(special_tokens={"<w>": 301}),
              dict(mergeable_ranks={**ranks, b"th": 256})]
    made = [tokenizer_module.Tokenizer("x", tiktoken.Encoding("x", **{**base, **keys})) for keys in others]
    made += [tokenizer_module.Tokenizer("x", made[0].ranks, nfc=True), BYTES]
    for parts in ({}, dict(added_tokens=added()), dict(normalizer={"type": "NFC"}), dict(model__ignore_merges=True)):
        made.append(get_tokenizer(str(changed(small, tmp_path / "tokenizer.json", **parts))))
    assert len({tokenizer.fingerprint for tokenizer in made}) == len(made)
    again = tokenizer_module.Tokenizer("another name", tiktoken.Encoding("y", **base))
    assert again.fingerprint == made[0].fingerprint
