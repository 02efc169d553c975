"""tokenizer.py: the ids of every kind of file are those of its own library, and what would differ is refused."""

import base64
import json
import random
import sys
import unicodedata

import pytest
import tiktoken
from conftest import REPO
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from formats.tokenizer import GPT2_SPLIT, LLAMA3_SPLIT, QWEN_SPLIT, Encoding, fingerprint, get_tokenizer

BYTES = get_tokenizer("bytes")
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
    assert (BYTES.eos, BYTES.bos, BYTES.largest, BYTES.specials) == (256, None, 256, {"<|endoftext|>": 256})


def test_a_batch_is_encoded_as_its_texts_are_one_by_one_and_half_characters_are_replaced():
    texts = ["a", "", "x \ud800 y", "\ud83d\ude80"]
    ids = BYTES.encode_batch(texts, threads=2)
    assert [BYTES.decode(row) for row in ids] == ["a", "", "x \ufffd y", "\U0001f680"]
    assert [row.tolist() for row in ids] == [BYTES.encode(text).tolist() for text in texts]


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
    assert (encoding.eos, encoding.bos, encoding.largest) == (eos, None, n_vocab - 1)
    assert (encoding.encoding._pat_str, encoding.encoding.nfc) == (pattern, nfc)
    assert encoding.decode(encoding.encode("e\u0301")) == ("\u00e9" if nfc else "e\u0301")


@pytest.mark.parametrize("content, told", [(b"not base64 at all\n", "no tiktoken rank file"),
                                           (b"YQ== 0\n", "lacks 255 of the 256 single bytes"),
                                           (b"YQ== 0\nYg== 2\n", "2 ranks, which are not 0 to 1, each once"),
                                           (b"YQ== 0\nYQ== 1\n", "2 ranks, which are not 0 to 1, each once"),
                                           (b"", "lacks 256 of the 256 single bytes"),
                                           (b"YQ==\n", "no tiktoken rank file"), (b"{nothing", "no JSON file"),
                                           (b"{}", "neither a tokenizer.json .* nor a tekken.json")])
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
    assert told.startswith(f"{tmp_path / file} is ") and f"'{key}'" in told and "\n" not in told


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
    encoding = get_tokenizer(str(tmp_path / "tokenizer.json"))
    used = set()
    for text in TEXTS:
        ids = reference.encode(text, add_special_tokens=False).ids
        assert encoding.encode(text).tolist() == ids, repr(text)
        used |= set(ids)
        if "missing" not in kind and "removed" not in kind:
            assert encoding.decode(ids) == (unicodedata.normalize("NFC", text) if kind == "qwen" else text)
    assert len(used) > (20 if "groups" in kind else 300) and encoding.eos == 0  # the texts use half of the tokens
    assert bool(encoding.encoding.missing) == ("missing" in kind)


def test_merges_as_pairs_of_a_string_and_a_model_without_type_are_read(tmp_path, small):
    spec = json.loads(small.to_str())["model"]
    path = changed(small, tmp_path / "t.json", model__merges=[" ".join(m) for m in spec["merges"]])
    old = json.loads(path.read_text())
    del old["model"]["type"]
    path.write_text(json.dumps(old))
    assert get_tokenizer(str(path)).encode("the function").tolist() == small.encode("the function").ids


def toy(*merges, **keys):
    """Parts of a tokenizer.json whose tokens are a, b, c, d and those of the merges."""
    tokens = dict.fromkeys(["a", "b", "c", "d", *("".join(m) for m in merges)])
    return {"model__vocab": {t: 10 + i for i, t in enumerate(tokens)}, "model__merges": [list(m) for m in merges],
            **keys}


def added(**flags):
    word = dict(id=5000, content="<w>", single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    return [{**word, **flags}]


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def splits(pattern, **keys):
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False, **keys},
        {**LEVEL, "use_regex": False}]}


@pytest.mark.parametrize("parts, told", [
    (dict(model__type="WordPiece"), "its model is WordPiece"),
    (dict(model__byte_fallback=True), "BPE with byte_fallback"),
    (dict(model__dropout=0.1), "model.dropout=0.1"),
    (dict(model__end_of_word_suffix="</w>"), "end_of_word_suffix='</w>'"),
    (dict(model__continuing_subword_prefix="##"), "continuing_subword_prefix='##'"),
    (dict(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
    (dict(added_tokens=added(lstrip=True)), "'<w>' with lstrip"),
    (dict(added_tokens=added(rstrip=True)), "with rstrip"),
    (dict(added_tokens=added(single_word=True)), "with single_word"),
    (dict(added_tokens=added(normalized=True), normalizer={"type": "NFC"}), "'<w>' with normalized"),
    (dict(added_tokens=added(normalized=True) + added(content="<v>")), "with normalized and without"),
    (toy(("a", "b"), model__unk_token="a"), "unk_token='a' for single bytes without a token"),
    (toy(("a", "b"), model__vocab={"a": 0, "b": 1}), "merge 'a' 'b' makes no token"),
    (toy(("a", "b"), ("b", "c"), model__vocab={"a": 0, "b": 1, "c": 2, "ab": 4, "bc": 3}),
     r"order of the merges \(at 'bc'\)"),
    (toy(("a", "b"), ("b", "c"), ("a", "bc"), ("c", "d"), ("ab", "c")), r"order of the merges \(at 'abc'\)"),
    (toy(("a", "b"), ("b", "c"), ("a", "bc")), "token 'abc' is not what its merge makes"),
    (toy(("a", "b"), model__vocab={"a": 0, "b": 1, "ab": 2, "dd": 3}, model__ignore_merges=True),
     "with 1 tokens that no merge"),
    (dict(pre_tokenizer=None), "pre_tokenizer None"),
    (dict(pre_tokenizer={"type": "Metaspace"}), "pre_tokenizer Metaspace"),
    (dict(pre_tokenizer={**LEVEL, "add_prefix_space": True}), "'add_prefix_space': True"),
    (dict(pre_tokenizer={**LEVEL, "use_regex": False}), "'use_regex': False"),
    (dict(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, LEVEL]}),
     "'individual_digits': False"),
    (dict(pre_tokenizer=splits({"String": "x"})), "pre_tokenizer Split"),
    (dict(pre_tokenizer=splits({"Regex": "x"}, behavior="MergedWithNext")), "MergedWithNext"),
    (dict(pre_tokenizer=splits({"Regex": r"\p{N}{1,3}+"})), r"Split with \{1,3\}\+ in its pattern"),
    (dict(pre_tokenizer=splits({"Regex": r"\s+$|\s"})), r"Split with \$ in its pattern")])
def test_what_would_not_be_followed_exactly_is_refused_by_name(tmp_path, small, parts, told):
    with pytest.raises(ValueError, match=told):
        get_tokenizer(str(changed(small, tmp_path / "tokenizer.json", **parts)))


# ----------------------------------------------------------------------------------------------------------------
# SentencePiece, folders, fingerprints


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    library = pytest.importorskip("sentencepiece", reason="pip install sentencepiece")
    prefix = tmp_path_factory.mktemp("sp") / "tokenizer"
    library.SentencePieceTrainer.train(sentence_iterator=iter((REPO / "formats/tokenizer.py").read_text().splitlines()),
                                       model_prefix=str(prefix), vocab_size=500, model_type="bpe", byte_fallback=True,
                                       minloglevel=2)
    return prefix.with_suffix(".model")


def test_sentencepiece_ids_are_those_of_its_library(pieces):
    reference = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(pieces))
    encoding = get_tokenizer(str(pieces))
    for text in TEXTS:
        ids = encoding.encode(text).tolist()
        assert ids == reference.encode(text)
        assert encoding.decode(ids) == reference.decode(ids)
        parts = b"".join(map(encoding.decode_bytes, ids))
        assert parts.removeprefix(b" ").decode() == encoding.decode(ids)
    assert (encoding.largest, encoding.bos, encoding.eos) == (499, None, 2)


def test_sentencepiece_errors_say_what_to_do(pieces, tmp_path, monkeypatch):
    (tmp_path / "x.model").write_bytes(b"\nrubbish")
    with pytest.raises(ValueError, match="x.model is no SentencePiece model"):
        get_tokenizer(str(tmp_path / "x.model"))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="needs a package: pip install sentencepiece"):
        get_tokenizer(str(pieces))


def test_a_folder_says_what_begins_and_ends_a_text(tmp_path, small):
    template = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    post = {"type": "Sequence", "processors": [{**LEVEL, "type": "ByteLevel"}, json.loads(template.__getstate__())]}
    changed(small, tmp_path / "tokenizer.json", post_processor=post)
    start, end = "<|im_start|>", "<|endoftext|>"
    for config, bos, eos in [(None, 1, 0), ({"add_bos_token": False, "bos_token": start}, None, 0), ({}, 1, 0),
                             ({"add_bos_token": True, "bos_token": end, "eos_token": start}, 0, 1),
                             ({"add_bos_token": True, "bos_token": {"content": end}, "eos_token": {"content": start}},
                              0, 1),
                             ({"add_bos_token": True}, None, 0), ({"eos_token": None}, 1, 0)]:
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        encoding = get_tokenizer(str(tmp_path))
        assert (encoding.bos, encoding.eos, encoding.name, encoding.config) == (bos, eos, tmp_path.name, config or {})


def test_a_folders_chat_template_is_read_from_each_place_where_transformers_looks(tmp_path, small):
    changed(small, tmp_path / "tokenizer.json")
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    for config, template in [({}, None), ({"chat_template": "c"}, "c"), ({"chat_template": named}, "d"),
                             ({"chat_template": named[:1]}, None)]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert get_tokenizer(str(tmp_path)).chat_template == template
    (tmp_path / "chat_template.jinja").write_text("j")
    assert get_tokenizer(str(tmp_path)).chat_template == "j"


def test_the_file_of_a_folder_that_can_be_followed_is_taken(tmp_path, small):
    with pytest.raises(ValueError, match="holds no tokenizer: expected a tokenizer.json"):
        get_tokenizer(str(tmp_path))
    rank_file(tmp_path / "tokenizer.model")
    assert get_tokenizer(str(tmp_path)).largest == 256
    changed(small, tmp_path / "tokenizer.json")
    assert get_tokenizer(str(tmp_path)).largest == 599
    # as Mistral 7B's: its tokenizer.json is the same vocabulary in a form that is not read
    path = changed(small, tmp_path / "tokenizer.json", model__byte_fallback=True, pre_tokenizer=None)
    path.write_text(path.read_text().replace("ByteLevel", "Metaspace"))
    assert get_tokenizer(str(tmp_path)).largest == 256


def test_fingerprints_tell_apart_whatever_changes_ids(pieces):
    ranks = {bytes([i]): i for i in range(256)}
    base = dict(pat_str=r"\s|\S+", mergeable_ranks=ranks, special_tokens={"<w>": 300})
    others = [dict(nfc=True), dict(words=["<w>"]), dict(pat_str=r"\S+|\s"), dict(special_tokens={"<w>": 301}),
              dict(mergeable_ranks={**ranks, b"th": 256})]
    prints = [fingerprint(Encoding("x", **{**base, **keys})) for keys in [{}, *others]]
    prints += [BYTES.fingerprint, get_tokenizer(str(pieces)).fingerprint]
    assert len(set(prints)) == len(prints)
    assert prints[0] == fingerprint(Encoding("another name", **base))
