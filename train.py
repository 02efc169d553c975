"""Train a Llama-style model in FP8 (or bf16): the whole loop, in reading order.

    torchrun [--nproc-per-node=N] train.py [CONFIG.py] [--key=value ...]
    python train.py --help

Read it top to bottom: 1) configuration and ranks, 2) data, 3) the model: built on meta, converted to FP8, compiled,
sharded, then filled, 4) optimizer and resume, 5) proof that FP8 is on, 6) the loop, 7) what is left behind.
"""

import functools
import json
import math
import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import attention
import checkpoint
import configurator
import data
import fp8
import model as models
from checks import estimate, gemms, proof, telemetry
from eval import accuracies, score
from formats import hellaswag, hf
from optim import AdamW, get_lr
from plumbing import cudagraph, entry, logs
from plumbing.errors import RunStopped, UserError
from plumbing.sharding import plain_local, reshard


def on_device(x, y, positions, device):
    """A micro-batch of data.py as arguments of the model: (x, y, documents).

    documents: () where attention runs over whole rows, or positions and bounds, which keep it within documents.
    """
    bounds = None if positions is None else attention.document_bounds(positions)  # here: to ask a GPU is to stall it
    if device.type == "cuda":
        x, y, positions = (t if t is None else t.pin_memory().to(device, non_blocking=True) for t in (x, y, positions))
    return x, y, () if positions is None else (positions, bounds)


@torch.no_grad()
def evaluate(model, batches, device, loss_chunks, reduce):
    """Mean loss in nats per token over `batches`, weighted by token over all ranks. Every rank must call it."""
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        x, y, documents = on_device(*batch, device)
        totals[0] += model(x, y, loss_chunks, *documents)
        totals[1] += (y != models.IGNORE).sum()
    reshard(model)
    loss, tokens = reduce(totals).tolist()
    return loss / max(1, tokens)


def main():
    # ------------------------------------------------------------------------------------------------------------
    # 1) configuration and ranks

    config = configurator.load(sys.argv[1:])
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first = rank == 0  # this one prints and writes
    use_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    if use_cuda and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no GPU: set device=auto or device=cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
    if use_cuda:
        if device.index >= torch.cuda.device_count():
            raise UserError(f"a rank for GPU {device.index}, but there are {torch.cuda.device_count()}: start no more "
                             "ranks than there are GPUs (torchrun --nproc-per-node)")
        torch.cuda.set_device(device)
        if config.deterministic:  # what cuBLAS wants for it
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    dtype, scratch = getattr(torch, config.dtype), config.init_from == "scratch"
    if not scratch:
        config.init_from = str(Path(config.init_from).expanduser().resolve())
        config.model = hf.model_config(config.init_from, config.model)
    if config.data.tokenizer == "auto":
        config.data.tokenizer = "bytes" if scratch else config.init_from
    logs.check_trackers(config)
    if world_size % config.replicas:
        raise UserError(f"replicas={config.replicas} must divide the number of ranks, {world_size}")
    # ranks that FSDP2 cuts a copy of the weights over; 0: it is off, as its copying costs one rank 7 to 17% of the step
    shards = world_size // config.replicas if world_size > 1 or config.shard_one_rank else 0
    per_pass = config.micro_batch_size * world_size
    if config.global_batch_size % per_pass:
        raise UserError(f"global_batch_size={config.global_batch_size} must be a multiple of micro_batch_size x ranks "
                         f"= {config.micro_batch_size} x {world_size} = {per_pass}")
    accumulation = config.global_batch_size // per_pass
    torch.use_deterministic_algorithms(config.deterministic)
    if shards:
        if not dist.is_initialized():
            alone = dict(init_method="tcp://localhost:0", rank=0, world_size=1)  # port 0: any that is free
            dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=timedelta(hours=6),
                                    **({} if "RANK" in os.environ else alone))  # ranks wait while rank 0 tokenizes
        shape, names = ((shards,), ("shard",)) if config.replicas == 1 else (
            (config.replicas, shards), ("replicate", "shard"))
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)

    def reduce(tensor):
        """Sum over all ranks, in place."""
        if world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def say(*text):
        if first:
            tqdm.write(" ".join(str(t) for t in text), file=sys.stdout)
            sys.stdout.flush()

    hardware = torch.cuda.get_device_name(device) if use_cuda else f"CPU with {torch.get_num_threads()} threads"
    peak = estimate.bf16_peak(hardware)
    say(f"nanofp8 on {world_size} x {hardware}, torch {torch.__version__}, {config.dtype}")
    out_dir = Path(config.out_dir)
    logs.check_alone(out_dir)
    newest = checkpoint.latest(out_dir)
    folder = newest if config.resume != "never" else None
    if config.resume == "must" and folder is None:
        raise UserError(f"resume=must, but {out_dir} holds no checkpoint: check out_dir, or set resume=auto")
    identity = {"model": repr(config.model), "seed": config.seed, "global_batch_size": config.global_batch_size,
                "init_from": Path(config.init_from).name}  # a folder may move
    before = folder and checkpoint.read_run(folder, config, **identity)
    start, seconds = (before["step"], before["time_s"]) if before else (0, 0.0)  # steps done, time spent on them
    with torch.device("meta"):  # no memory is taken yet: what cannot work is told before anything slow
        model = models.Transformer(config.model, config.flash4).to(dtype)
    attention.check_flash4(config, device)
    cudagraph.check(config, shards, device)
    check_fp8 = functools.partial(fp8.check, config.fp8, model, device=device, compiled=config.compile.enabled,
                                  shards=shards, loss_chunks=config.loss_chunks)
    if config.fp8.enabled:  # how long rows of HellaSwag are depends on the data
        check_fp8(tokens=config.micro_batch_size * config.model.block_size if config.data.format == "text" else 0)
    if start >= config.max_steps:
        if first and logs.unplotted(out_dir):
            logs.plot_losses(out_dir)
            telemetry.plot_health(out_dir)
        say(f"nothing to do: {folder} has {start} of {config.max_steps} steps"
            f"{configurator.changed(out_dir / 'config.py', config)}. Raise max_steps to go on, or start anew: another "
            "out_dir, or --resume=never")
        return

    # ------------------------------------------------------------------------------------------------------------
    # 2) data: rank 0 tokenizes, the others wait and then find it done

    if not first:
        checkpoint.barrier()
    train_rows, val_rows, encoding = data.prepare(config.data, config.model.block_size, config.seed)
    questions = hellaswag.questions(config.data)[1][:n] if (n := config.eval_hellaswag_items) else []
    if first:
        checkpoint.barrier()
    sequences = hellaswag.sequences(encoding, questions, config.model.block_size)
    models.check_ids(config.model, max(train_rows.largest, val_rows.largest, *(ids.max() for ids, _ in sequences)))
    loader = data.Loader(train_rows, global_batch_size=config.global_batch_size, seed=config.seed, rank=rank,
                         micro_batch_size=config.micro_batch_size, world_size=world_size)

    def micro_batches(step):
        """This rank's part of a step's batch, steps counted from 0: a list of what micro_step takes."""
        x, y, positions = loader.batch(step)
        return [on_device(x[i], y[i], None if positions is None else positions[i], device) for i in range(accumulation)]

    length = train_rows.block_size  # of the rows that the model sees; model.block_size is the longest that it could
    tokens = config.micro_batch_size * length  # of a forward pass on a rank
    if tokens % config.loss_chunks:
        raise UserError(f"loss_chunks={config.loss_chunks} must divide the tokens of a forward pass, {tokens}")
    tokens_per_step = round(config.global_batch_size * length * (1 - train_rows.padding))  # of text, on average
    real = replace(config, model=replace(config.model, block_size=length))  # what a step costs

    # ------------------------------------------------------------------------------------------------------------
    # 3) the model. The order matters: built without memory, FP8 swaps modules, then recompute and compile wrap each
    #    block's forward, then FSDP2 cuts the parameters (its hooks stay outside of the compiled graphs), and only then
    #    is memory taken: by each rank for its own shards, so that no rank ever holds the whole model.

    flops_per_token, fp8_flops = sum(estimate.matmul_flops_per_token(model, train_rows.document)), 0.0
    auto_filtered = None
    if config.fp8.enabled:
        if config.fp8.auto_filter:  # a resumed run keeps what it chose, whatever a new timing would say
            auto_filtered = before["auto_filtered"] if before else None
            if auto_filtered is None:
                auto_filtered = gemms.choose(real, device, accumulation)
            say(f"fp8.auto_filter leaves out, since FP8 makes them no faster: {', '.join(auto_filtered) or 'nothing'}")
            config.fp8.filter_fqns += [fqn for fqn in auto_filtered if fqn not in config.fp8.filter_fqns]
        check_fp8(tokens=tokens)
        if config.fp8.self_check:
            say(proof.self_check(config, micro_batches(0)[0], device))
        fp8.convert(model, config.fp8, shards=shards)
        fp8_flops = proof.covered_flops(model, config.fp8) / flops_per_token
        say(proof.table(model, config.fp8, fp8_flops, shards=shards))
        converted = list(fp8.float8_linears(model))
    gib = estimate.check_memory(real, shards, accumulation, device)
    fp8.compile_and_checkpoint(model, config.fp8, config.compile, config.activation_checkpoint)
    if shards:
        policy = MixedPrecisionPolicy(reduce_dtype=getattr(torch, config.reduce_dtype))
        for block in model.layers:
            fully_shard(block, mesh=mesh, reshard_after_forward=config.reshard_after_forward, mp_policy=policy)
        # embedding, last norm, lm_head: FSDP2 keeps them for the backward pass that follows at once, unless told not to
        keep_none = config.fp8.enabled and config.fp8.force_recompute_fp8_weight_in_bwd
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True if keep_none else None)
    model.to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():
            plain_local(p).fill_(float("nan"))  # so that a weight which nothing fills shows
    if scratch and folder is None:
        models.init_weights(model, config.seed)
    else:  # the weights come from a file, below
        models.init_buffers(model)

    # ------------------------------------------------------------------------------------------------------------
    # 4) optimizer, and everything that an earlier run left

    optimizer = AdamW(model, config.optim, seed=config.seed, compiled=config.compile.enabled)
    n_params = sum(p.numel() for p in model.parameters())
    identity["data"] = train_rows.digest
    if before:
        checkpoint.read_run(folder, config, data=train_rows.digest)
        checkpoint.load(folder, model, optimizer)
        say(f"resuming from {folder}, {start} steps done" + configurator.changed(out_dir / "config.py", config)
            + logs.changed_code(before))
    elif not scratch:
        hf.load(config.init_from, model, optimizer)
        say(f"weights: {config.init_from}")
    unfilled = [name for name, p in model.named_parameters() if plain_local(p).isnan().any()]
    assert not unfilled, f"weights that nothing filled: {unfilled}"
    fp8.precompute_scales(model, config.fp8, shards=shards)
    say(f"model: {n_params:,} parameters, {gib:.1f} GiB estimated per rank with gradients, optimizer and activations")
    say(f"data: {train_rows.description}")
    say(f"step: {config.micro_batch_size} sequences x {length} tokens x {world_size} ranks x {accumulation} "
        f"accumulation = {tokens_per_step:,} tokens" + (" without padding, on average" if train_rows.padding else ""))

    # ------------------------------------------------------------------------------------------------------------
    # 5) a first pass that changes nothing: it compiles, and shows what really runs

    def micro_step(x, y, documents, divisor):
        loss = model(x, y, config.loss_chunks, *documents)
        (loss * (world_size / divisor)).backward()  # FSDP2 averages gradients over ranks, the loss wants their sum
        return loss.detach()

    def count_targets(batch):
        """Of the global batch: ranks may have unequal numbers. At least 1: without a target the loss is 0, not nan."""
        return reduce(sum((y != models.IGNORE).sum() for _, y, _ in batch)).clamp(min=1)

    def dry_run(batch, divisor):
        for micro_batch in batch:
            micro_step(*micro_batch, divisor)
        for p in model.parameters():
            p.grad = None

    if config.compile.enabled:
        say("compiling, which takes a minute or so")
    clock = time.perf_counter()
    batch = micro_batches(start)
    first_pass = functools.partial(dry_run, batch[:1], batch[0][1].numel())
    if config.fp8.enabled:
        proof.verify_sharded(model, config.fp8, converted, shards=shards)
        ran = proof.verify_step(model, config.fp8, first_pass, shards=shards, tokens=tokens,
                                loss_chunks=config.loss_chunks)
        say(f"fp8: verified, {ran} {'emulated ' if config.fp8.emulate else ''}fp8 matmuls ran in one pass")
    else:
        first_pass()
    compile_s = time.perf_counter() - clock
    say(f"first pass: {compile_s:.1f} s")

    # ------------------------------------------------------------------------------------------------------------
    # 6) the loop

    run = {**logs.provenance(), "hardware": f"{world_size} x {hardware}", "ranks": world_size, "compile_s": compile_s,
           "block_size": length, "tokens_per_step": tokens_per_step, "flops_per_token": flops_per_token,
           "fp8_flops": fp8_flops, "peak_flops": peak, "auto_filtered": auto_filtered}
    if first:
        metrics, earlier = logs.open_metrics(out_dir, start, newest)
        if earlier:
            say(f"the run that was in {out_dir} is now in {earlier}")
        trackers = logs.open_trackers(config)
        logs.replace_text(out_dir / "config.py", configurator.to_python(config))
        logs.replace_text(out_dir / "run.json", json.dumps(run, indent=1))

    def log(*rows):
        if first:
            metrics.write("".join(json.dumps(row) + "\n" for row in rows))
            metrics.flush()
            for tracker in trackers:
                tracker(logs.scalars(rows))

    def now():
        if use_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    if use_cuda:
        torch.cuda.reset_peak_memory_stats()
    run_pass = cudagraph.GraphedPass(micro_step, model, accumulation > 1) if config.cuda_graph else micro_step
    progress = tqdm(initial=start, total=config.max_steps, unit="step", disable=None if first else True)
    clock, last_logged, n_skipped = now(), start, 0
    bad = torch.zeros(3, device=device)  # the first step since the last look with inf or nan, its loss, gradient norm
    skipped = torch.zeros(2, dtype=torch.int64, device=device)  # steps since the last look, and in a row
    for step in range(start + 1, config.max_steps + 1):
        last = step == config.max_steps
        batch = micro_batches(step - 1)
        n_tokens = count_targets(batch)
        if config.fp8.enabled and config.fp8.stats_interval and (
                step % config.fp8.stats_interval == 0 or step == start + 1):
            health = telemetry.health(model, lambda: dry_run(batch[:1], n_tokens), step)  # noqa: B023
            log(*health)
            say(f"step {step}/{config.max_steps} | {telemetry.worst(health)}")
        loss = torch.zeros((), device=device)
        for micro_batch in batch:
            loss += run_pass(*micro_batch, n_tokens)
            if accumulation > 1:
                optimizer.accumulate()
        lr = get_lr(config.optim, step, config.max_steps)
        loss, grad_norm = reduce(loss) / n_tokens, optimizer.grad_norm()
        # inf and nan are seen on the device, where they leave the weights alone, and told at the next look: no waiting
        good = (loss + grad_norm).isfinite()
        if config.on_nonfinite == "stop":
            good &= bad[0] == 0  # nothing moves any more: the look finds the weights that the bad step met
        optimizer.step(lr, grad_norm, good)
        seen = torch.stack([loss.new_full((), step), loss, grad_norm])
        bad = torch.where(good | (bad[0] > 0), bad, seen)
        skipped = torch.stack([skipped[0] + ~good, (skipped[1] + 1) * ~good])
        fp8.precompute_scales(model, config.fp8, shards=shards)
        progress.update()

        shows = step % config.log_interval == 0 or step == start + 1 or last  # the first also compiles the optimizer
        evaluates = config.eval_interval and (last or step % config.eval_interval == 0)
        saves = config.checkpoint_interval and (last or step % config.checkpoint_interval == 0)
        if (shows or evaluates or saves) and bad[0] > 0:
            bad_step, (new, in_a_row) = int(bad[0]), skipped.tolist()
            n_skipped += new
            batch = micro_batches(bad_step - 1)
            health = []
            if config.fp8.enabled:
                health = telemetry.health(model, lambda: dry_run(batch, count_targets(batch)), bad_step)  # noqa: B023
            evidence, told = telemetry.keep_nonfinite(out_dir, *bad.tolist(), new, health, loader)
            if config.on_nonfinite == "stop":
                if config.checkpoint_interval:
                    kept = {**identity, **run, "time_s": seconds}
                    checkpoint.save(evidence, bad_step - 1, model, optimizer, kept, keep=0)
                    told += f" Take the step again: the same command with --out_dir={evidence} --resume=must"
                raise RunStopped(told)
            say(told)
            if in_a_row >= 10:
                raise RunStopped(f"step {step}: {in_a_row} steps in a row were skipped: {told}")
            bad, skipped[0] = torch.zeros_like(bad), 0
        if shows:
            elapsed = now() - clock
            seconds += elapsed
            rate = tokens_per_step * (step - last_logged) / elapsed / world_size
            mfu = rate * flops_per_token / peak if peak else None
            row = {"step": step, "loss": logs.number(loss), "lr": lr, "grad_norm": logs.number(grad_norm),
                   "tokens": step * tokens_per_step, "tokens_per_s": rate, "mfu": mfu, "time_s": seconds,
                   "peak_gib": logs.peak_memory(use_cuda)}
            if n_skipped:
                row["skipped"] = n_skipped
            log(row)
            shown = f"{mfu:.1%} of bf16 peak" if mfu else "n/a"
            minutes = (config.max_steps - step) * elapsed / (step - last_logged) / 60
            say(f"step {step}/{config.max_steps} | loss {loss:.4f} | lr {lr:.2e}"
                f" | grad norm {grad_norm:.3f} | {rate:,.0f} tok/s per GPU | MFU {shown}"
                f" | {row['peak_gib']:.2f} GiB | {minutes:.1f} min left")
            clock, last_logged, n_skipped = now(), step, 0
        if evaluates or saves:
            pause = now()
            if evaluates:
                batches = data.eval_batches(val_rows, n=config.eval_sequences, rank=rank, world_size=world_size,
                                            micro_batch_size=config.micro_batch_size)
                val_loss = evaluate(model, batches, device, config.loss_chunks, reduce)
                row = {"step": step, "val_loss": val_loss if math.isfinite(val_loss) else None}  # JSON has no nan
                told = f"validation loss {val_loss:.4f} nats per token"
                if questions:
                    with torch.compiler.set_stance("force_eager"):  # rows of many lengths are not worth their graphs
                        scored = score(model, questions, sequences, device=device, rank=rank, world_size=world_size,
                                       reduce=reduce)
                    reshard(model)
                    acc, acc_norm = accuracies(scored)
                    row |= {"hellaswag_acc": acc, "hellaswag_acc_norm": acc_norm} if math.isfinite(acc) else {}
                    told += f" | HellaSwag acc {acc:.4f}, acc_norm {acc_norm:.4f}"
                log(row)
                say(f"step {step}/{config.max_steps} | {told}")
            if saves:
                kept = {**identity, **run, "time_s": seconds + pause - clock}
                checkpoint.save(out_dir, step, model, optimizer, kept, keep=config.keep)
            clock += now() - pause  # not training time
    progress.close()

    # ------------------------------------------------------------------------------------------------------------
    # 7) what is left behind

    if first:
        metrics.close()
        logs.plot_losses(out_dir)
        if plotted := telemetry.plot_health(out_dir):
            say(f"fp8 health of every layer: {plotted}")
        result = f"validation loss {val_loss:.4f}" if config.eval_interval else f"training loss {loss:.4f}"
        say(f"done: {config.max_steps} steps, {config.max_steps * tokens_per_step:,} tokens in {seconds / 60:.1f} min, "
            f"{result}; curves in {out_dir / 'loss.png'}, metrics in {out_dir / 'metrics.jsonl'}")
        if config.checkpoint_interval:
            say(f"sample from it: python sample.py --from={out_dir}")


if __name__ == "__main__":
    entry.run(main)
