"""Generate text from a checkpoint of train.py, or from a Hugging Face model folder.

    python sample.py --from=DIR [--prompt=TEXT] [--chat] [--max_new_tokens=N] [--temperature=T] [--top_k=K] [--seed=S]
        [--tokenizer=bytes]

--chat speaks through the chat template of the tokenizer's folder, or of the run's data.chat_template. Without --prompt
it reads one message per line from stdin and keeps the conversation.

Runs in the dtype that the weights were trained in, without FP8: the checkpoint holds plain tensors. The keys and values
of the context are cached, so a new token costs one pass over one token: one read of the weights. Beyond
model.block_size tokens every new one reads the last block_size anew, as training has shown the model nothing longer.
"""

import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
import configurator
import data
import model as models
from attention import attend, attend_one
from formats import chat, hf
from formats.tokenizer import get_tokenizer, read_json
from plumbing import entry
from plumbing.errors import RunStopped, UserError


class Cache:
    """Keys and values of a model's context, up to `length` tokens. On a GPU, a new token is one CUDA graph.

    Attention in every layer of the model goes through here, until its `attend` is deleted.
    """

    def __init__(self, model, length):
        self.model, self.length, self.n_tokens, self.graphed = model, length, 0, None
        weight, shape = model.embed.weight, (1, length, model.cfg.n_kv_head, model.cfg.head_dim)
        self.token, self.position = weight.new_zeros(2, 1, 1, dtype=torch.int64)
        for layer in model.layers:  # zeros: what attention does not see must be finite
            layer.attn.attend = partial(self.attend, weight.new_zeros(shape), weight.new_zeros(shape))

    def attend(self, keys, values, q, k, v, mask, window):
        """attention.attend() of a whole context, or of the token at self.position; keys, values: this layer's cache."""
        T = q.shape[1]
        if T > 1:
            keys[:, :T], values[:, :T] = k, v
            return attend(q, k, v, mask, window)
        keys.index_copy_(1, self.position[0], k)
        values.index_copy_(1, self.position[0], v)
        return attend_one(q, keys, values, self.position, mask, window)

    def logits(self, tokens):
        """Float32 logits (V,) of what follows `tokens`, a list of ids that each call continues by one."""
        n, scaling = len(tokens), self.model.cfg.rope_scaling
        # from this length on, longrope has other frequencies for all keys
        turned = scaling and scaling.kind == "longrope" and n == scaling.original_max_position + 1
        in_turn, self.n_tokens = n == self.n_tokens + 1, n
        if turned or n > self.length or not in_turn:
            return self.model(torch.tensor([tokens[-self.length :]], device=self.token.device))[0, -1].float()
        self.token.fill_(tokens[-1])
        self.position.fill_(n - 1)
        if self.token.is_cuda and self.graphed is None:  # Python takes longer to launch the kernels than they run
            self.graphed = torch.cuda.make_graphed_callables(self.run_token, (self.token, self.position))
        return (self.graphed or self.run_token)(self.token, self.position)

    def run_token(self, token, position):
        lengths = torch.cat((torch.ones_like(position), position + 1))  # of the query and of its keys
        bounds = F.pad(lengths, (1, 0)).int(), self.length
        return self.model(token, positions=position, bounds=bounds)[0, 0].float()


def draw(logits, temperature, top_k, generator):
    """A token id drawn from logits (V,); arguments as in generate(). RunStopped if they hold nan or inf."""
    scores = logits
    if temperature > 0:
        scores = logits / temperature
        if top_k:
            smallest = scores.topk(min(top_k, len(scores))).values[-1]
            scores = scores.masked_fill(scores < smallest, -math.inf)
        # The largest p / e, with e from an exponential distribution, falls on each token with its probability p;
        # torch.multinomial would make Python wait for the GPU.
        scores = scores.softmax(-1) / torch.empty_like(scores).exponential_(generator=generator)
    best, token = scores.max(0)
    if not best.isfinite():
        raise RunStopped("the model gives nan or inf, though its weights are finite: no token can be drawn")
    return int(token)


@torch.no_grad()
def generate(model, tokens, max_new_tokens, temperature, top_k, generator):
    """Yield token ids that continue `tokens` (a list of ids), one at a time; temperature 0 takes the likeliest.

    top_k: sample among this many most likely tokens; 0: among all.
    """
    tokens = list(tokens)
    cache = Cache(model, min(len(tokens) + max_new_tokens, model.cfg.block_size))
    try:
        for _ in range(max_new_tokens):
            tokens.append(draw(cache.logits(tokens), temperature, top_k, generator))
            yield tokens[-1]
    finally:
        for layer in model.layers:
            del layer.attn.attend


def load_model(folder, device, tokenizer=None):
    """(model, tokenizer, config) of an out_dir's newest checkpoint, or of a Hugging Face model folder, else UserError.

    tokenizer: a value for data.tokenizer in place of the run's or the folder's.
    """
    if Path(folder, "config.json").is_file():
        config = configurator.Config(
            init_from=str(folder), model=hf.model_config(folder), data=data.DataConfig(tokenizer=str(folder)),
            dtype=hf.stored_dtype(folder))  # float16 too, which training has not
        load = partial(hf.load, folder)
    else:
        newest, config = checkpoint.open_run(folder)
        load = partial(checkpoint.load, newest)
    model = models.on_meta(config.model).to(getattr(torch, config.dtype)).to_empty(device=device)
    models.init_buffers(model)
    load(model)
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise UserError(f"{folder}: {name} holds inf or nan: take an earlier checkpoint, or download it again")
    return model.eval(), get_tokenizer(tokenizer or config.data.tokenizer), config


# What a generation_config.json may ask for that is not done here, and the value that asks for nothing
NOT_FOLLOWED = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": None, "min_length": 0,
                "suppress_tokens": None, "begin_suppress_tokens": None, "bad_words_ids": None, "num_beams": 1}


def stop_ids(tokenizer, *folders):
    """The ids that end a text: the tokenizer's EOS, and eos_token_id of model folders.

    Of generation_config.json if a folder has one, else of config.json, as in transformers. Prints what is not followed.
    """
    found = {tokenizer.eos}
    for folder in dict.fromkeys(map(str, folders)):
        paths = [Path(os.path.expanduser(folder), name) for name in ("generation_config.json", "config.json")]
        settings = next((read_json(path) for path in paths if path.is_file()), {})
        eos = settings.get("eos_token_id")
        found |= set(eos) if isinstance(eos, list) else {eos}
        ignored = [f"{key}={settings[key]}" for key, neutral in NOT_FOLLOWED.items()
                   if settings.get(key) not in (None, neutral)]
        if ignored:
            print(f"{folder}: generation_config.json asks for {', '.join(ignored)}, which is not done here",
                  file=sys.stderr)
    return found - {None}


def read_messages(prompt):
    """Yield what the user says: `prompt`, or without one the lines of stdin."""
    while prompt is None:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.rstrip("\n")
    yield prompt


def show(tokens, tokenizer, stops, prompt=()):
    """Print tokens as they come, until one of `stops` or one that only pads the vocabulary: (ids, times of arrival).

    prompt: ids before them, which decide whether their text begins with a space.
    """
    ids, times, n_printed = list(prompt), [], len(prompt)

    def new_text():
        before = ids[max(0, n_printed - 64) : n_printed]
        return tokenizer.decode(before + ids[n_printed:])[len(tokenizer.decode(before)) :]

    for token in tokens:
        times.append(time.perf_counter())
        if token in stops or token > tokenizer.largest:
            break
        ids.append(token)
        text = new_text()
        if not text.endswith("\ufffd"):  # else in the middle of a character
            sys.stdout.write(text)
            sys.stdout.flush()
            n_printed = len(ids)
    print(new_text())
    return ids[len(prompt) :], times


def main():
    parser = entry.Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="folder", required=True, type=entry.path,
                        help="out_dir of a run of train.py, or a model folder")
    parser.add_argument("--prompt", help="text to continue (a new line); with --chat: the message to answer (stdin)")
    parser.add_argument("--chat", action="store_true", help="answer messages, in the words of the chat template")
    parser.add_argument("--max_new_tokens", type=int, default=300, help="tokens to generate (default 300)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest; higher: more varied (0.7)")
    parser.add_argument("--top_k", type=int, default=50, help="sample among the K likeliest tokens; 0: among all (50)")
    parser.add_argument("--seed", type=int, default=1337, help="seed of the sampling (1337)")
    parser.add_argument("--tokenizer", type=entry.path, help="as data.tokenizer, for a model folder without one")
    args = parser.parse_args()
    errors = [f"--{name}={getattr(args, name)} must be a number that is not negative"
              for name in ("max_new_tokens", "temperature", "top_k") if not 0 <= getattr(args, name) < math.inf]
    if not -(2**63) <= args.seed < 2**63:
        errors.append(f"--seed={args.seed} must fit in 64 bits")
    if errors:
        raise UserError("\n".join(errors))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, config = load_model(args.folder, device, args.tokenizer)
    stops = stop_ids(tokenizer, args.folder, config.data.tokenizer)
    if args.chat:
        template = chat.read_template(config.data, tokenizer)
        stops.add(template.end_of_reply())
    elif args.prompt is None:
        args.prompt = "\n"
    generator = torch.Generator(device).manual_seed(args.seed)
    conversation, n_tokens, seconds = [], 0, 0.0
    for text in read_messages(args.prompt):
        if args.chat:
            conversation.append({"role": "user", "content": text})
            prompt = template.encode(conversation, train_on="all", prompt=True)[0].tolist()
        else:
            prompt = tokenizer.bos + tokenizer.encode(text).tolist()  # as documents begin in training
            sys.stdout.write(text)
        if not prompt:
            raise UserError("--prompt is empty: give at least one character")
        models.check_ids(config.model, max(prompt))
        if len(prompt) > config.model.block_size:
            print(f"the prompt has {len(prompt):,} tokens: the model reads the last {config.model.block_size:,}",
                  file=sys.stderr)
        tokens = generate(model, prompt, args.max_new_tokens, args.temperature, args.top_k, generator)
        reply, times = show(tokens, tokenizer, stops, prompt)
        conversation.append({"role": "assistant", "content": tokenizer.decode(reply)})
        n_tokens += len(times[2:])  # the first reads the prompt, the second captures the graph
        seconds += times[-1] - times[1] if times[2:] else 0
    if n_tokens:
        print(f"{n_tokens / seconds:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    entry.run(main, piped=True)
