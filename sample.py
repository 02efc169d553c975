"""Generate text from a checkpoint of train.py, or from a Hugging Face model folder.

    python sample.py --from=DIR [--prompt=TEXT] [--max_new_tokens=N] [--temperature=T] [--top_k=K] [--seed=S]
        [--tokenizer=bytes]

Runs in the dtype that the weights were trained in, without FP8: the checkpoint holds plain tensors. There is no KV
cache: every token runs the whole context through the model, which is short to read and fast enough for a first look.
"""

import codecs
import math
import os
import sys
from pathlib import Path

import torch

import checkpoint
import configurator
import data
import model as models
from formats import hf
from formats.tokenizer import get_tokenizer
from plumbing import entry
from plumbing.errors import UserError


@torch.no_grad()
def generate(model, tokens, max_new_tokens, temperature, top_k, generator):
    """Yield token ids that continue `tokens` (a list of ids), one at a time; temperature 0 takes the likeliest.

    top_k: sample among this many most likely tokens; 0: among all.
    """
    device = model.cos.device
    for _ in range(max_new_tokens):
        context = torch.tensor([tokens[-model.cfg.block_size :]], device=device)  # (1, T)
        logits = model(context)[0, -1].float()  # (V,)
        if temperature == 0:
            token = logits.argmax()
        else:
            logits /= temperature
            if top_k:
                smallest = logits.topk(min(top_k, len(logits))).values[-1]
                logits[logits < smallest] = -float("inf")
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = tokens + [int(token)]
        yield int(token)


def load_model(folder, device, tokenizer=None):
    """(model, tokenizer, config) of an out_dir's newest checkpoint, or of a Hugging Face model folder.

    tokenizer: a value for data.tokenizer in place of the run's or the folder's. Raises UserError if the folder is
    neither.
    """
    is_model_folder = Path(folder, "config.json").is_file()
    if is_model_folder:
        config = configurator.Config(
            init_from=str(folder), model=hf.model_config(folder), data=data.DataConfig(tokenizer=str(folder)),
            dtype=hf.stored_dtype(folder))  # float16 too, which training has not
    else:
        newest, config = checkpoint.open_run(folder)
    with torch.device("meta"):
        model = models.Transformer(config.model).to(getattr(torch, config.dtype))
    model.to_empty(device=device)
    models.init_buffers(model)
    if is_model_folder:
        hf.load(folder, model)
    else:
        checkpoint.load(newest, model)
    return model.eval(), get_tokenizer(tokenizer or config.data.tokenizer), config


def main():
    parser = entry.Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="folder", required=True, type=os.path.expanduser,
                        help="out_dir of a run of train.py, or a model folder")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a new line)")
    parser.add_argument("--max_new_tokens", type=int, default=300, help="tokens to generate (default 300)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest; higher: more varied (0.7)")
    parser.add_argument("--top_k", type=int, default=50, help="sample among the K likeliest tokens; 0: among all (50)")
    parser.add_argument("--seed", type=int, default=1337, help="seed of the sampling (1337)")
    parser.add_argument("--tokenizer", help="as data.tokenizer, for a model folder without one")
    args = parser.parse_args()
    errors = []
    for name in ("max_new_tokens", "temperature", "top_k"):
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            errors.append(f"--{name}={value} must be a number that is not negative")
    if not -(2**63) <= args.seed < 2**63:
        errors.append(f"--seed={args.seed} must fit in 64 bits")
    if errors:
        raise UserError("\n".join(errors))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, config = load_model(args.folder, device, args.tokenizer)
    bos = [] if tokenizer.bos is None else [tokenizer.bos]  # as documents begin in training
    prompt = bos + tokenizer.encode(args.prompt).tolist()
    if not prompt:
        raise UserError("--prompt is empty: give at least one character")
    models.check_ids(config.model, max(prompt))
    generator = torch.Generator(device).manual_seed(args.seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end in the middle of a character
    sys.stdout.write(args.prompt)
    for token in generate(model, prompt, args.max_new_tokens, args.temperature, args.top_k, generator):
        if token > tokenizer.largest or token in tokenizer.specials.values():
            break  # the end of the document, or an id that only pads the vocabulary
        sys.stdout.write(decoder.decode(tokenizer.decode_bytes(token)))
        sys.stdout.flush()
    print()


if __name__ == "__main__":
    entry.run(main)
