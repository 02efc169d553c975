"""sample.py: which tokens are drawn, from what context, through the cache or not, and what is said in a chat."""

import io
import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from conftest import build, main_here, train_here

import eval as evaluation
import model as models
import sample
from attention import attend
from formats.tokenizer import get_tokenizer
from plumbing.errors import RunStopped

# ----------------------------------------------------------------------------------------------------------------
# drawing


class Fixed:
    """A model that gives token i the probability PROBABILITIES[i], whatever the context."""

    cfg = SimpleNamespace(block_size=4, n_kv_head=1, head_dim=1, rope_scaling=None)
    embed = SimpleNamespace(weight=torch.zeros(1))
    layers = ()
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def __init__(self):
        self.contexts = []

    def __call__(self, tokens, positions=None, bounds=None):
        self.contexts.append(tokens[0].tolist())
        return self.probabilities.log().expand(1, tokens.shape[1], 4)


def shares(temperature, top_k, n=4000):
    """How often each token is drawn."""
    drawn = list(sample.generate(Fixed(), [0], n, temperature, top_k, torch.Generator().manual_seed(1)))
    return torch.bincount(torch.tensor(drawn), minlength=4) / n


@pytest.mark.parametrize("temperature, top_k, expected", [
    (1.0, 0, [0.1, 0.2, 0.3, 0.4]), (0.5, 0, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),  # squares of the probabilities
    (1.0, 2, [0.0, 0.0, 3 / 7, 4 / 7]), (1.0, 9, [0.1, 0.2, 0.3, 0.4]), (0.0, 0, [0.0, 0.0, 0.0, 1.0])])
def test_tokens_are_drawn_by_their_probability(temperature, top_k, expected):
    # four standard deviations of a share: 4 x sqrt(0.25 / 4000) = 0.032
    assert shares(temperature, top_k).tolist() == pytest.approx(expected, abs=0.032)
    assert [share > 0 for share in shares(temperature, top_k)] == [share > 0 for share in expected]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_it(bad, temperature):
    with pytest.raises(RunStopped, match="the model gives nan or inf"):
        sample.draw(torch.tensor([1.0, bad, 2.0]), temperature, 2, torch.Generator())


# ----------------------------------------------------------------------------------------------------------------
# the cache


def test_a_new_token_is_all_that_the_model_reads_until_the_context_is_full():
    model = Fixed()
    assert list(sample.generate(model, [0, 1, 2], 4, 0.0, 0, None)) == [3, 3, 3, 3]
    assert model.contexts == [[0, 1, 2], [3], [1, 2, 3, 3], [2, 3, 3, 3]]


def uncached(model, tokens):
    return model(torch.tensor([tokens[-model.cfg.block_size :]], device=model.cos.device))[0, -1]


SWITCHES = {
    "llama": {}, "multi-head attention": {"n_kv_head": 4}, "a window": {"sliding_window": 9},
    "a window of one token": {"sliding_window": 1}, "a window beyond the context": {"sliding_window": 64},
    "llama 3's rope": {"rope_scaling": models.RopeScaling(original_max_position=16)},
    "half of a head has no positions": {"rope_fraction": 0.5}, "odd sizes": {"n_head": 6, "head_dim": 10},
    "longrope": {"rope_scaling": models.RopeScaling(
        kind="longrope", original_max_position=16, short_factors=[1.0] * 8, long_factors=[2.0, 3.0] * 4)},
    "norms of q and k": {"qk_norm": "head"}, "layers without positions": {"no_rope_interval": 2},
    "multipliers": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1},
}


@pytest.mark.parametrize("n_prompt", [1, 7])
@pytest.mark.parametrize("name", SWITCHES)
@torch.no_grad()
def test_logits_and_greedy_text_are_those_of_the_model_without_a_cache(name, n_prompt):
    model, other = build(**SWITCHES[name]), build(**SWITCHES[name])
    for p in (*model.parameters(), *other.parameters()):
        p.mul_(3)  # the initial weights give nearly the same logits to all tokens
    tokens = torch.randint(0, 256, (n_prompt,), generator=torch.Generator().manual_seed(2)).tolist()
    new = list(sample.generate(model, tokens, 80, 0, 0, None))  # the context has 64
    cache, text = sample.Cache(model, 64), tokens
    for token in new:
        cached, expected = cache.logits(text), uncached(other, text)
        # both are float32 sums of 128 terms at most, in another order
        assert (cached - expected).norm() < 1e-5 * expected.norm(), len(text)
        assert int(expected.argmax()) == token
        text = [*text, token]
    assert len(set(new)) > 5


def test_the_model_is_as_before_whether_or_not_a_text_was_read_to_its_end():
    model = build()
    tokens = sample.generate(model, [1, 2, 3], 5, 0, 0, None)
    next(tokens)
    assert model.layers[0].attn.attend is not attend
    tokens.close()
    assert all(layer.attn.attend is attend for layer in model.layers)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40])
@torch.no_grad()
def test_a_captured_pass_gives_the_logits_of_the_model_without_a_cache(window):
    sizes = dict(device="cuda", dtype=torch.bfloat16, sliding_window=window, block_size=256, n_embd=256, head_dim=64)
    model, other = build(**sizes), build(**sizes)
    text = torch.randint(0, 256, (300,), device="cuda").tolist()
    cache = sample.Cache(model, 256)
    for n in range(20, 300):
        expected = uncached(other, text[:n]).float()
        # bf16 has 8 bits; the roundings of two blocks add up
        assert (cache.logits(text[:n]) - expected).norm() < 0.03 * expected.norm(), n
    assert cache.graphed is not None


# ----------------------------------------------------------------------------------------------------------------
# the command


TEMPLATE = ("{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder of bytes with random weights, whose tokenizer puts BOS first and has a chat template."""
    path = tmp_path_factory.mktemp("model")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.add_special_tokens(["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"])
    tok.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>",
                                         chat_template=TEMPLATE).save_pretrained(path)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=261, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, bos_token_id=256,
        eos_token_id=257)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    """(tokenizer, model) of transformers."""
    return (transformers.AutoTokenizer.from_pretrained(folder),
            transformers.AutoModelForCausalLM.from_pretrained(folder).eval())


def continued(model, ids, **options):
    """The ids that transformers' greedy generate adds."""
    ids = torch.tensor([ids])
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                          **options)[0, ids.shape[1] :].tolist()


def test_the_text_begins_with_bos_and_goes_on_as_in_transformers(folder, reference):
    tokenizer, model = reference
    new = continued(model, tokenizer("def add").input_ids, max_new_tokens=20)
    without = continued(model, tokenizer("def add", add_special_tokens=False).input_ids, max_new_tokens=20)
    expected, other = ("def add" + tokenizer.decode([i for i in ids if i != 257]) + "\n" for ids in (new, without))
    status, out, _ = main_here(sample.main, f"--from={folder}", "--prompt=def add", "--max_new_tokens=20",
                               "--temperature=0")
    assert status == 0 and out == expected != other


def test_generation_config_alone_says_what_ends_a_text_and_what_is_not_followed_is_named(folder, tmp_path, capsys):
    tokenizer = get_tokenizer(str(folder))
    (tmp_path / "config.json").write_text('{"eos_token_id": 35}')
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": [1, 2], "repetition_penalty": 1.05, "num_beams": 1, "top_p": 0.8}')
    assert sample.stop_ids(tokenizer, tmp_path, str(tmp_path)) == {tokenizer.eos, 1, 2}
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "asks for repetition_penalty=1.05, which is not done here" in shown


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_text_ends_where_the_folder_says(name, folder, reference, tmp_path):
    _, model = reference
    new = continued(model, [256, 3], max_new_tokens=20)
    (tmp_path / name).write_text(json.dumps({"eos_token_id": [270, new[5]]}))
    tokenizer = get_tokenizer(str(folder))
    stops = sample.stop_ids(tokenizer, folder, tmp_path)
    assert stops == {257, 270, new[5]}
    assert sample.show(iter(new), tokenizer, stops)[0] == new[: new.index(new[5])]


def test_a_chat_keeps_the_conversation_and_stops_at_the_end_of_a_turn(folder, reference, monkeypatch):
    tokenizer, model = reference
    prompts, replies = [], iter([b"4 \xc3\xa9", b"no"])
    encoded = get_tokenizer(str(folder))

    def generate(model, tokens, *_):
        prompts.append(tokens)
        yield from encoded.encode(next(replies).decode())
        yield encoded.specials["<|end|>"]
        raise AssertionError("behind the end of the turn")

    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sys, "stdin", io.StringIO("2 + 2?\n\nsure, <|end|>?\n"))
    status, out, _ = main_here(sample.main, f"--from={folder}", "--chat")
    assert status == 0 and out == "4 é\nno\n"
    talk = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4 é"},
            {"role": "user", "content": "sure, ANGRY?"}]
    first, second = (tokenizer.apply_chat_template(talk[:n], add_generation_prompt=True, return_dict=False)
                     for n in (1, 3))
    assert prompts[0] == first
    assert encoded.decode(prompts[1]) == encoded.decode(second).replace("ANGRY", "<|end|>")
    assert prompts[1].count(encoded.specials["<|end|>"]) == 3  # what somebody writes stays text


def test_a_reply_is_that_of_transformers(folder, reference):
    tokenizer, model = reference
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True,
                                        return_dict=False)
    new = continued(model, ids, max_new_tokens=12, eos_token_id=[257, 260])
    status, out, _ = main_here(sample.main, f"--from={folder}", "--prompt=hi", "--chat", "--temperature=0",
                               "--max_new_tokens=12")
    assert status == 0 and out == tokenizer.decode([i for i in new if i not in (257, 260)]) + "\n"


def test_a_run_trained_on_conversations_answers(folder, tiny_run, tmp_path):
    rows = [{"prompt": f"add {i}", "completion": str(i + 1)} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "template.jinja").write_text(TEMPLATE.replace("<|end|>", "</s>"))
    args = [arg for arg in tiny_run if not arg.startswith("--data.")]
    train_here(*args, f"--out_dir={tmp_path / 'out'}", "--data.format=chat", f"--data.tokenizer={folder}",
               f'--data.train=["{tmp_path / "rows.jsonl"}"]', f"--data.cache_dir={tmp_path}",
               f"--data.chat_template={tmp_path / 'template.jinja'}", "--data.packed_sequence_size=64")
    status, out, err = main_here(sample.main, f"--from={tmp_path / 'out'}", "--prompt=add 3", "--chat",
                                 "--max_new_tokens=5")
    assert status == 0 and out.endswith("\n") and "tokens/s" in err
    (tmp_path / "template.jinja").unlink()
    status, _, err = main_here(sample.main, f"--from={tmp_path / 'out'}", "--chat", "--prompt=a")
    assert status == 2 and "data.chat_template=" in err


def test_the_speed_leaves_out_the_first_two_tokens(folder, monkeypatch):
    clock = itertools.chain([0.0, 100.0], itertools.count(100.5, 0.5))  # 2 tokens a second
    monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    _, _, err = main_here(sample.main, f"--from={folder}", "--prompt=a", "--max_new_tokens=9", "--temperature=0")
    assert err == "2.0 tokens/s\n"


def test_an_id_without_a_token_is_no_text(wide, capsys):
    assert sample.show(iter([5, 300 + ord("a"), 299]), wide, set())[0] == [5, 397, 299]
    assert capsys.readouterr().out == "a\n" and wide.decode([5, 397]) == "a"


def test_an_empty_prompt_without_bos_is_refused(folder):
    status, out, err = main_here(sample.main, f"--from={folder}", "--prompt=", "--tokenizer=bytes")
    assert (status, out, err) == (2, "", "sample.py: --prompt is empty: give at least one character\n")
    assert main_here(sample.main, f"--from={folder}", "--prompt=", "--max_new_tokens=1")[0] == 0  # BOS is there


def test_a_prompt_beyond_the_context_is_reported(folder):
    _, _, err = main_here(sample.main, f"--from={folder}", f"--prompt={'a' * 200}", "--max_new_tokens=1")
    assert "the prompt has 201 tokens: the model reads the last 128" in err


@pytest.mark.parametrize("command", [sample.main, evaluation.main])
def test_weights_that_are_not_finite_are_one_message_with_the_first_tensor(command, folder, tmp_path, monkeypatch):
    real = sample.hf.load

    def load(source, model):
        real(source, model)
        with torch.no_grad():
            model.layers[1].mlp.down.weight[3, 4] = model.norm.weight[0] = float("inf")

    monkeypatch.setattr(sample.hf, "load", load)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"ind": 0, "activity_label": "a", "ctx_a": "b", "ctx_b": "c", "ctx": "b c",
                                     "endings": ["d", "e", "f", "g"], "label": "0"}) + "\n")
    args = [f"--data={questions}"] if command is evaluation.main else []
    status, out, err = main_here(command, f"--from={folder}", *args)
    assert status == 2 and out == "" and err.count("\n") == 1 and "layers.1.mlp.down.weight holds inf or nan" in err


def test_a_tokenizer_without_a_template_is_one_message(folder):
    status, _, err = main_here(sample.main, f"--from={folder}", "--chat", "--prompt=a", "--tokenizer=bytes")
    assert status == 2 and "tokenizer bytes is not that of a model folder" in err and "--tokenizer=FOLDER" in err
