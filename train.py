"""Train a Llama-style model in FP8 or bf16: the whole loop, in reading order.

    torchrun [--nproc-per-node=N] train.py [CONFIG.py] [--key=value ...]
    python train.py --help

1) configuration and ranks, 2) data, 3) the model: built on meta, converted to FP8, compiled, sharded, then filled,
4) optimizer and resume, 5) a first pass that proves that FP8 runs, 6) the loop, 7) plots and a summary.
"""

import functools
import json
import os
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import attention
import checkpoint
import configurator
import data
import fp8
import model as models
from checks import estimate, gemms, nonfinite, proof, telemetry
from eval import Evaluation
from formats import hf
from optim import AdamW, get_lr
from plumbing import cudagraph, entry, logs
from plumbing.compiling import check_compiler, compile_and_checkpoint
from plumbing.disk import check_shared, replace_text
from plumbing.errors import RunStopped, UserError
from plumbing.profiling import StepRecorder
from plumbing.ranks import check_same, device_mesh, find_ranks, join_process_group
from plumbing.schema import flat
from plumbing.sharding import plain_local
from plumbing.stopping import StopSignals


def main():
    # ------------------------------------------------------------------------------------------------------------
    # 1) configuration and ranks. Fail early: everything that can be checked without data or weights is checked here.

    config = configurator.load(sys.argv[1:])
    ranks = find_ranks(config.device)
    device, world_size, say = ranks.device, ranks.world_size, ranks.say
    out_dir, dtype, from_scratch = Path(config.out_dir), getattr(torch, config.dtype), config.init_from == "scratch"
    if not from_scratch:
        config.init_from = os.path.realpath(os.path.expanduser(config.init_from))
        config.model = hf.model_config(config.init_from, config.model)
    config.data.resolve_paths(config.init_from)
    logs.check_trackers(config)
    if config.compile.enabled:
        check_compiler(device)
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:  # cuBLAS is deterministic only with a workspace of fixed size
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    rows_per_pass = config.micro_batch_size * world_size
    if config.global_batch_size % rows_per_pass:
        raise UserError(f"global_batch_size={config.global_batch_size} must be a multiple of micro_batch_size x ranks "
                        f"= {config.micro_batch_size} x {world_size} = {rows_per_pass}")
    accumulation = config.global_batch_size // rows_per_pass  # forward passes per optimizer step
    replicas = config.replicas or ranks.n_nodes
    if world_size % replicas:
        raise UserError(f"replicas={replicas} must divide the number of ranks, {world_size}")
    # Ranks that share one copy of the weights. 0: no FSDP2, whose copies cost a single rank 7 to 17% of the step.
    n_shards = world_size // replicas if world_size > 1 or config.shard_one_rank else 0
    ranks.watch(config.timeout_minutes)
    if n_shards:
        join_process_group(ranks)
        check_same(flat(replace(config, data=None, init_from="")))  # data is checked below: its paths may differ
        check_shared(out_dir)

    on_gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if on_gpu else f"CPU with {torch.get_num_threads()} threads"
    say(f"nanofp8 on {world_size} x {hardware}, torch {torch.__version__}, {config.dtype}")
    if replicas > 1:
        say(f"HSDP: {replicas} replicas, each sharded over {n_shards} of {world_size} ranks (--replicas=1: over all)")
    logs.check_unused(out_dir)
    resumes = config.resume != "never" or ranks.replace_others()  # torchrun --max-restarts: the run goes on
    resume_from = checkpoint.last_good(out_dir, say) if resumes else None
    newest_checkpoint = checkpoint.latest(out_dir)
    if config.resume == "must" and resume_from is None:
        raise UserError(f"resume=must, but {out_dir} holds no checkpoint: check out_dir, or set resume=auto")
    identity = {"model": repr(config.model), "seed": config.seed, "global_batch_size": config.global_batch_size,
                "init_from": Path(config.init_from).name}  # without its folder, which may move
    previous_run = {"step": 0, "time_s": 0.0, "auto_filtered": None}
    if resume_from:
        previous_run = checkpoint.read_run(resume_from, config, **identity)
    start_step = previous_run["step"]
    model = models.on_meta(config.model).to(dtype)
    say(f"attention: {attention.select_kernel(model, config, device)}")
    cudagraph.check(config, n_shards, device)
    recorder = StepRecorder(config, out_dir, ranks)
    check_fp8 = functools.partial(fp8.check, model=model, device=device, compiled=config.compile.enabled,
                                  shards=n_shards, loss_chunks=config.loss_chunks)
    if config.fp8.enabled:
        check_fp8(config.fp8)  # how many tokens a pass has, the data decides: checked below
        if config.fp8.offload_weights and not estimate.offloaded_weights(config, model, n_shards, accumulation):
            raise UserError("fp8.offload_weights=True has no weight to move: it is for tensorwise layers on one rank "
                            "without shard_one_rank, with several passes a step (global_batch_size), and optim.offload "
                            "must be large enough for a weight")
    if start_step >= config.max_steps:
        say(f"nothing to do: {resume_from} has {start_step} of {config.max_steps} steps"
            f"{configurator.changed(out_dir / 'config.py', config)}. Raise max_steps to go on, or start anew: another "
            "out_dir, or --resume=never")
        ranks.watchdog.ended.set()
        return

    # ------------------------------------------------------------------------------------------------------------
    # 2) data: rows of tokens, whatever their format

    with ranks.node_first():
        train_rows, val_rows, encoding = data.prepare(config.data, config.model.block_size, config.seed)
        evaluate = Evaluation(config, val_rows, encoding, ranks)
    check_same({"training data": train_rows.digest, "validation data": val_rows.digest})
    models.check_ids(config.model, max(train_rows.largest, evaluate.largest))
    loader = data.Loader(train_rows, global_batch_size=config.global_batch_size, seed=config.seed, rank=ranks.rank,
                         micro_batch_size=config.micro_batch_size, world_size=world_size)

    def micro_batches(step):
        """This rank's micro-batches of a step, counted from 1: [(x, y, documents)], as the model takes them."""
        x, y, positions = loader.batch(step - 1)
        return [data.on_device(x[i], y[i], None if positions is None else positions[i], train_rows, device)
                for i in range(accumulation)]

    row_length = train_rows.block_size  # model.block_size is only the most that the model takes
    tokens_per_pass = config.micro_batch_size * row_length
    if tokens_per_pass % config.loss_chunks:
        raise UserError(f"loss_chunks={config.loss_chunks} must divide the tokens of a forward pass, micro_batch_size "
                        f"x {row_length} = {tokens_per_pass}")
    cudagraph.check_rows(config, train_rows)
    tokens_per_step = round(config.global_batch_size * row_length * (1 - train_rows.padding))  # mean, without padding
    step_config = replace(config, model=replace(config.model, block_size=row_length))  # as it runs

    # ------------------------------------------------------------------------------------------------------------
    # 3) the model. The order matters: built without memory, FP8 swaps modules, then recompute and compile wrap each
    #    block's forward, then FSDP2 cuts the parameters (its hooks stay outside of the compiled graphs), and only then
    #    is memory allocated: by each rank for its own shards, so that no rank ever holds the whole model.

    flops_per_token, fp8_flops = sum(estimate.matmul_flops_per_token(model, train_rows.document)), 0.0
    auto_filtered = None
    if config.fp8.enabled:
        if config.fp8.auto_filter:  # a resumed run keeps its choice, whatever a new timing would say
            auto_filtered = previous_run["auto_filtered"]
            if auto_filtered is None:
                auto_filtered = gemms.choose(step_config, device, accumulation)
            say(f"fp8.auto_filter leaves out, since FP8 makes them no faster: {', '.join(auto_filtered) or 'nothing'}")
            step_config = replace(step_config, fp8=fp8.leave_out(config.fp8, auto_filtered))
        check_fp8(step_config.fp8, tokens=tokens_per_pass)
        if proof.needs_self_check(config.fp8):
            say(proof.self_check(step_config, micro_batches(1)[0], device))
        fp8.convert(model, step_config.fp8, shards=n_shards, accumulation=accumulation)
        fp8_flops = proof.covered_flops(model) / flops_per_token
        say(proof.table(model, config.fp8, fp8_flops, shards=n_shards))
    gib, host_gib, no_room = estimate.check_memory(step_config, n_shards, accumulation, device)
    if no_room:
        say(no_room)
    compile_and_checkpoint(model, config.compile, config.activation_checkpoint, config.fp8.copies)
    if n_shards:
        mesh = device_mesh(ranks, replicas)
        policy = MixedPrecisionPolicy(reduce_dtype=getattr(torch, config.reduce_dtype))
        for block in model.layers:
            fully_shard(block, mesh=mesh, reshard_after_forward=config.reshard_after_forward, mp_policy=policy)
        # Embedding, last norm and lm_head: backward follows at once, so FSDP2 keeps them gathered, unless FP8 weights
        # are to be cast again in backward.
        cast_again = config.fp8.enabled and config.fp8.force_recompute_fp8_weight_in_bwd
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True if cast_again else None)
    model.to_empty(device=device)
    for p in model.parameters():
        plain_local(p).fill_(float("nan"))  # shows a weight that nothing fills
    if from_scratch and not resume_from:
        models.init_weights(model, config.seed)
    else:  # step 4 loads the weights
        models.init_buffers(model)

    # ------------------------------------------------------------------------------------------------------------
    # 4) optimizer, and what an earlier run or a model folder provides

    optimizer = AdamW(model, config.optim, seed=config.seed, compiled=config.compile.enabled)
    identity["data"] = train_rows.digest
    if resume_from:
        checkpoint.read_run(resume_from, config, data=train_rows.digest)
        checkpoint.load(resume_from, model, optimizer)
        say(f"resuming from {resume_from}, {start_step} steps done"
            f"{configurator.changed(out_dir / 'config.py', config)}")
    elif not from_scratch:
        hf.load(config.init_from, model, optimizer)
        say(f"weights: {config.init_from}")
    assert not optimizer.unfilled(), f"weights that nothing filled: {optimizer.unfilled()}"
    fp8.prepare_weights(model, config.fp8, shards=n_shards)
    if config.fp8.offload_weights:
        optimizer.offload_weights(fp8.weight_casts(model))
    saver = checkpoint.Saver(out_dir, model, optimizer, say, keep=config.keep,
                             background=estimate.saves_in_background(config) and not no_room)
    on_host = f", and {host_gib:.1f} GiB of host memory" if host_gib >= 0.05 else ""
    say(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {gib:.1f} GiB estimated per rank with "
        f"gradients, optimizer and activations{on_host}")
    say(f"data: {train_rows.description}; {config.max_steps:,} steps see {loader.epochs(config.max_steps)}")
    say(f"step: micro-batch {config.micro_batch_size} x length {row_length} x ranks {world_size} x accumulation "
        f"{accumulation} = {tokens_per_step:,} tokens" + (" without padding, on average" if train_rows.padding else ""))

    # ------------------------------------------------------------------------------------------------------------
    # 5) a first pass, which changes nothing: it compiles, and proves what runs

    def forward_backward(x, y, documents, n_targets):
        """The loss summed over the targets of a micro-batch; gradients of the mean over n_targets add to p.grad."""
        loss = model(x, y, config.loss_chunks, *documents)
        (loss * (world_size / n_targets)).backward()  # x world_size: FSDP2 averages gradients over ranks, this is a sum
        return loss.detach()

    def count_targets(batch):
        """Targets in the global batch, at least 1: a batch without any has loss 0, not nan. Ranks may differ."""
        return ranks.sum(sum((y != models.IGNORE).sum() for _, y, _ in batch)).clamp(min=1)

    def dry_run(batch, n_targets):
        """Forward and backward passes whose gradients are dropped."""
        for micro_batch in batch:
            forward_backward(*micro_batch, n_targets)
        model.zero_grad()

    if config.compile.enabled:
        say("compiling, which takes a minute or so")
    clock = time.perf_counter()
    batch = micro_batches(start_step + 1)
    first_pass = functools.partial(dry_run, batch[:1], batch[0][1].numel())
    if config.fp8.enabled:
        proof.verify_sharded(model, step_config.fp8, shards=n_shards)
        n_matmuls = proof.verify_step(model, config.fp8, first_pass, shards=n_shards, tokens=tokens_per_pass,
                                      loss_chunks=config.loss_chunks)
        say(f"fp8: verified, {n_matmuls} {'emulated ' if config.fp8.emulate else ''}fp8 matmuls ran in one pass")
    else:
        first_pass()
    compile_s = time.perf_counter() - clock
    say(f"first pass: {compile_s:.1f} s")

    # ------------------------------------------------------------------------------------------------------------
    # 6) the loop

    peak_flops = estimate.bf16_peak(hardware)
    record = {**identity, **logs.provenance(), "hardware": f"{world_size} x {hardware}", "ranks": world_size,
              "compile_s": compile_s, "block_size": row_length, "tokens_per_step": tokens_per_step,
              "flops_per_token": flops_per_token, "fp8_flops": fp8_flops, "peak_flops": peak_flops,
              "auto_filtered": auto_filtered}
    if record["git_commit"] is None:
        say("run.json names no commit: git is not installed, or does not track this code")
    if ranks.is_main:
        metrics = logs.open_metrics(out_dir)
        if checkpoint.latest(out_dir) != newest_checkpoint:  # its rows would be cut, its checkpoints in the way
            raise UserError(f"another run has saved in {out_dir} since this one started: start again")
        if earlier := logs.continue_metrics(metrics, start_step):
            say(f"the run that was in {out_dir} is now in {earlier}")
        trackers = logs.open_trackers(config, start_step)
        replace_text(out_dir / "config.py", configurator.to_python(config))
        replace_text(out_dir / "run.json", json.dumps(record, indent=1))
        ranks.note_start()

    def log(*rows):
        if ranks.is_main:
            logs.write(rows, metrics, trackers)

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    run_pass = forward_backward
    if config.cuda_graph:
        run_pass = cudagraph.GraphedPass(forward_backward, model, accumulation > 1)
    guard = nonfinite.Guard(config.on_nonfinite, device)
    progress = tqdm(initial=start_step, total=config.max_steps, unit="step", disable=None if ranks.is_main else True)
    timer = logs.StepTimer(ranks, start_step, previous_run["time_s"], max_steps=config.max_steps,
                           tokens=tokens_per_step, flops=flops_per_token, peak_flops=peak_flops)
    n_skipped = 0  # updates since the last log line
    signals = StopSignals()
    for step in range(start_step + 1, config.max_steps + 1):
        first, last = step == start_step + 1, step == config.max_steps
        recorder.begin(step)
        batch = micro_batches(step)
        n_targets = count_targets(batch)
        stats_interval = config.fp8.enabled and config.fp8.stats_interval
        if stats_interval and (first or step % stats_interval == 0):
            health = telemetry.health(model, functools.partial(dry_run, batch[:1], n_targets), step)
            log(*health)
            say(f"step {step}/{config.max_steps} | {telemetry.worst(health)}")
        loss = torch.zeros((), device=device)
        for i, micro_batch in enumerate(batch, 1):
            if n_shards and not config.reshard_after_forward:  # gather, and cast to FP8, once for all passes of a step
                model.set_reshard_after_backward(i == accumulation)
            if n_shards and not config.reduce_each_pass:
                model.set_requires_gradient_sync(i == accumulation)
            loss += run_pass(*micro_batch, n_targets)
            if accumulation > 1:
                optimizer.accumulate()
        signals.share()
        loss, grad_norm = ranks.sum(loss) / n_targets, optimizer.grad_norm()
        lr = get_lr(config.optim, step, config.max_steps)
        saver.before_update()
        optimizer.step(lr, grad_norm, guard.check(step, loss, grad_norm))
        fp8.prepare_weights(model, config.fp8, shards=n_shards)
        recorder.end(step)
        progress.update()
        timer.end_step(step)
        ranks.watchdog.progress(step)
        stop = None if last else signals.wait()

        logs_now = first or last or stop or step % config.log_interval == 0  # the first also compiles AdamW
        evaluates_now = config.eval_interval and (last or not stop and step % config.eval_interval == 0)
        saves_now = config.checkpoint_interval and (last or stop or step % config.checkpoint_interval == 0)
        if (logs_now or evaluates_now or saves_now) and (bad := guard.take()):
            n_skipped += bad.skipped
            bad_batch = micro_batches(bad.step)
            rerun = functools.partial(dry_run, bad_batch, count_targets(bad_batch))
            folder, message = nonfinite.save_evidence(config, bad, loader, model, rerun)
            if config.on_nonfinite == "stop" and config.checkpoint_interval:
                state = checkpoint.tensors(model, optimizer)
                with ranks.watchdog.patient():
                    checkpoint.save(folder, bad.step - 1, state, {**record, "time_s": timer.seconds}, keep=0)
                message += f" To repeat the step: the same command with --out_dir={folder} --resume=must"
            if config.on_nonfinite == "stop" or bad.in_a_row >= 10:
                saver.wait()
                raise RunStopped(message)
            say(message)
        if logs_now:
            row, line = timer.log_row(step, loss, lr, grad_norm)
            log({**row, "skipped": n_skipped} if n_skipped else row)
            say(line)
            n_skipped = 0
        if evaluates_now or saves_now:
            with timer.paused() as seconds:
                if evaluates_now:
                    row, result = evaluate(model)
                    log({"step": step, **row})
                    say(f"step {step}/{config.max_steps} | {result}")
                if saves_now:
                    with ranks.watchdog.patient():
                        saver.save(step, {**record, "time_s": seconds})
        if stop:
            break
    progress.close()
    with ranks.watchdog.patient():
        saver.wait()
    signals.restore()
    if stop:
        resume = " with --resume=auto" if config.resume == "never" else ""
        say(f"stopped by {stop.name} after step {step}/{config.max_steps}, "
            f"{f'saved: the same command{resume} goes on' if saves_now else 'not saved, as checkpoint_interval=0'}")

    # ------------------------------------------------------------------------------------------------------------
    # 7) plots and a summary

    if ranks.is_main:
        metrics.close()
        logs.plot_losses(out_dir)
        if health_plot := telemetry.plot_health(out_dir):
            say(f"fp8 health of every layer: {health_plot}")
        if not config.eval_interval:
            result = f"training loss {loss:.4f} nats per token"
        if not stop:
            say(f"done: {config.max_steps} steps, {config.max_steps * tokens_per_step:,} tokens in "
                f"{timer.seconds / 60:.1f} min, {result}; curves in {out_dir / 'loss.png'}, metrics in "
                f"{out_dir / 'metrics.jsonl'}")
            if config.checkpoint_interval:
                chat = " --chat" if config.data.format == "chat" else ""
                say(f"sample from it: python sample.py --from={shlex.quote(str(out_dir))}{chat}")
    ranks.watchdog.ended.set()
    return 130 if stop == signal.SIGINT else 0


if __name__ == "__main__":
    entry.run(main)
