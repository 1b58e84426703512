"""Unsupervised pre-training with MoCo v1, MoCo v2 and implicit feature modification (IFM).

One process, on a GPU or on the CPU:   python main_moco.py --dataset_root ROOT ... One process per GPU of
this machine:   python main_moco.py --multiprocessing-distributed --world-size 1 --rank 0 ... The same by
torchrun, on any nodes:    torchrun --nproc_per_node 4 main_moco.py ...
"""

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from moco import losses
from moco.bad_images import BadImages
from moco.builder import MoCo
from moco.checkpoint import continue_from, trained_state
from moco.data import image_folder, paths_of
from moco.distributed import Process, check_agreement, from_first, wrap
from moco.draws import pretraining
from moco.encoders import base_encoder, check_image_size
from moco.errors import UserError, run_program
from moco.execution import Execution, execution_of, start_momentum
from moco.experiments import Experiments
from moco.feature_statistics import similarities
from moco.finish import finisher
from moco.knn_evaluation import KnnEvaluation
from moco.launch import launch
from moco.memory import peak_megabytes
from moco.meters import StepLog, epoch_line, rank_accuracy
from moco.pretrain_options import check, notes, parse_args
from moco.resume import same_course, start_from
from moco.run_folder import RunFolder
from moco.run_log import RunLog, start_log
from moco.run_settings import check_output, data_folder, fast_line, loading_line, loading_of, settings
from moco.schedules import learning_rate, set_learning_rate
from moco.seeds import STEP, fold, run_seed, shuffle_order
from moco.watch import PREEMPTED, Signals, Watch


def main():
    args = parse_args()
    check(args)
    check_image_size(args.arch, args.image_size)
    check_output(args.output_dir)
    folder = data_folder(args)
    image_folder(folder, "train")
    launch(
        pretrain, (args, folder),
        nodes=args.world_size, node_rank=args.rank, url=args.dist_url, backend=args.dist_backend,
        spawn=args.multiprocessing_distributed, gpu=args.gpu,
    )  # fmt: skip


@dataclass
class Run:
    """What the steps of a run share, in one of its processes."""

    args: argparse.Namespace
    process: Process
    seed: int
    settings: dict
    loader: Iterable
    finish: Callable
    execution: Execution
    model: nn.Module
    optimizer: torch.optim.Optimizer
    watch: Watch
    alter: Experiments = Experiments()
    data: dict | None = None  # images and global batch
    chance: float | None = None  # loss of a model that tells nothing apart
    output: RunFolder | None = None
    record: RunLog = RunLog()
    knn: KnnEvaluation | None = None
    bad_image_lines: Callable | None = None  # of an epoch


def pretrain(process, args, folder):
    """Train in one process of the run, from where it stands to the last epoch."""
    say, output = process.say, RunFolder(args.output_dir, args.keep, args.save_freq)
    source, checkpoint = start_from(process, args.resume, output, args.arch, say)
    how_to = args.amp, args.channels_last, args.compile, args.fast, args.bn_splits
    execution = execution_of(process.device, *how_to)
    execution.check_network(args.arch, args.image_size)
    seed = from_first(run_seed(args.seed, checkpoint))

    # Data: every process loads its part of each global batch.
    images = image_folder(folder, "train")
    alter = Experiments(args.random_bits, args.recolor, seed, folder)
    recipe = pretraining(args.aug_plus, args.crops_only)
    device_aug, loading = loading_of(args, process.device)
    chosen = settings(args, device_aug, loading, execution, seed)
    alike = {"start_epoch": args.start_epoch, "knn": args.knn, "cache": args.cache, "images": len(images)}
    check_agreement({**chosen, **alike, "checkpoint": str(source)})
    bad_images = BadImages(args.on_bad_image, len(images), seed)
    loader = loading.training(
        images, recipe, process, seed,
        photometric=device_aug == "off", bn_splits=args.bn_splits, bad_images=bad_images,
    )  # fmt: skip
    finish, how = finisher(device_aug, recipe, process.device)
    batches = alter.batches = loader.batch_sampler
    groups = process.world_size * args.bn_splits
    data = {"images": len(images), "global_batch": batches.global_batch, "batchnorm_groups": groups}
    knn = KnnEvaluation(args.knn, args.epochs, args.arch, process, execution)
    knn.load(folder, images, loading, may_skip=args.on_bad_image == "skip")

    # Model: equal on all processes, as torch's generator starts from the run's seed on each.
    torch.manual_seed(seed)
    model = MoCo(
        alter.widened(base_encoder(args.arch)),
        args.moco_dim, args.moco_k, args.moco_m, args.moco_t, args.mlp,
        epsilon=args.epsilon, bn_splits=args.bn_splits,
    )  # fmt: skip
    execution.prepare(model.encoder_q, model.encoder_k)
    model = wrap(model.to(process.device), process, identical=("queue", "queue_ptr"))
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    start_momentum(optimizer)
    epoch, step = args.start_epoch, 0
    if checkpoint:
        same_course(checkpoint, source, data, chosen, say)
        epoch = continue_from(checkpoint, source, model.module, optimizer, args.epochs, execution.scaler)
        step = checkpoint.get("step", 0)

    chance = losses.chance(args.moco_k, args.method, args.epsilon, args.alpha, args.moco_t)
    for line in (
        f"{len(images)} images of {folder}, {len(loader)} steps of {batches.global_batch} an epoch",
        f"seed {seed}; processes: {process.world_size}, on {process.device.type}",
        *(loading_line(loader, loading), how, execution),
        *([fast_line(args, chosen)] if args.fast else []),
        *notes(args, chance, len(images), groups),
    ):
        say(line)

    state = trained_state(model, optimizer, execution.scaler)
    if fault := from_first(process.is_first and output.lacks_room(state, args.epochs)):
        raise UserError(fault)
    if process.is_first:
        output.start(epoch, step, say)
    record = start_log(
        args.output_dir, process, args.tensorboard, "main_moco.py", settings=chosen, **data,
        steps=len(loader), chance=chance, epoch=epoch, step=step,
    )  # fmt: skip
    with Signals() as signals, record, output:
        watch = Watch(signals, process)
        run = Run(args, process, seed, chosen, loader, finish, execution, model, optimizer, watch, alter)
        run.data, run.chance, run.output, run.record, run.knn = data, chance, output, record, knn
        run.bad_image_lines = partial(bad_images.lines, paths=paths_of(images))
        train(run, epoch, step, checkpoint.get("log", {}) | checkpoint.get("noted", {}))


def train(run, epoch, step, log_state):
    """Train from `step` of `epoch` to the end, or until a process is told to stop: then SystemExit ends it.

    log_state: of the StepLog of an epoch that is continued.
    """
    args, process, batches = run.args, run.process, run.loader.batch_sampler
    start, first_epoch = time.monotonic(), epoch
    for epoch in range(first_epoch, args.epochs):
        lr = learning_rate(args.lr, epoch, args.epochs, args.cos, args.schedule)
        set_learning_rate(run.optimizer, lr)
        batches.epoch, batches.first = epoch, step
        write = partial(run.record.write, epoch=epoch, lr=lr)
        print_freq = args.print_freq * process.is_first
        log = StepLog(f"Epoch: [{epoch}]", run.loader, print_freq, step, process.world_size, write)
        if step:
            log.load_state_dict(log_state, process.device)
        step, told = train_epoch(run, epoch, log)
        for line in run.bad_image_lines(epoch):
            process.say(line)

        whole = step == len(batches)
        if whole:
            means = log.means() | {"lr": lr, **standing(run, epoch, step)}
            seconds = (time.monotonic() - start) / (epoch + 1 - first_epoch)
            process.say(epoch_line(epoch, means, run.chance, seconds, args.epochs - epoch - 1))
        if process.is_first:
            state = trained_state(run.model, run.optimizer, run.execution.scaler) | {
                "epoch": epoch + whole, "step": 0 if whole else step, "arch": args.arch, "seed": run.seed,
                "settings": run.settings, "data": run.data, "log": log.state_dict(), "noted": log.noted(),
            }  # fmt: skip
            path = run.output.save(state)
        if whole:
            write("epoch", **means)  # at once: what ends the run now cannot take it along
            if found := run.knn(epoch, run.model.module.encoder_q):
                write("epoch", **means, **found)
            told = told or run.watch.last()[0]  # during the evaluation
        if told and not (whole and epoch + 1 == args.epochs):
            run.output.wait()
            from_first(None)  # all wait for the file: who leaves first may take the others along
            name = run.watch.signals.name or "a signal to another process"
            process.say(f"stopped in epoch {epoch} after {step} of {len(batches)} steps, as {name} said")
            if process.is_first:
                print(f"{path} has it all; --resume auto goes on")
            raise SystemExit(PREEMPTED)
        step = 0
    run.output.tidy()


def train_epoch(run, epoch, log):
    """Train on the batches that are left of an epoch, unless a process of the run is told to stop.

    Returns how many of its steps are done and whether one was told. Raises UserError on all processes
    when a loss is not finite on one; nothing has been saved since the last one that was.
    """
    args, model, optimizer, scaler = run.args, run.model, run.optimizer, run.execution.scaler
    weights = losses.weights(args.method, args.alpha)
    model.train()
    step = log.first - 1
    for step, batch in enumerate(log.steps(), log.first):
        im_q, im_k = run.alter(run.finish(batch), step)  # N x 3 x H x W each, unless with --random-bits

        torch.manual_seed(fold(run.seed, STEP, epoch, step, run.process.rank))  # for dropout
        order = shuffle_order(run.seed, epoch, step, len(im_q) * run.process.world_size)
        mean_key = model.module.queue.mean(dim=1) if log.due else None  # before the queue changes
        with run.execution.autocast():
            loss, ranks, q, k = model(im_q, im_k, weights=weights, order=order)

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        log.update(loss, rank_accuracy(ranks), len(ranks))
        if log.due:
            log.note(similarities(q, k, mean_key), **standing(run, epoch, step + 1))
        told, bad = run.watch.step(loss)
        if told or bad:
            log.stop()
    told, bad = run.watch.last()
    if bad:
        raise UserError(
            f"the loss of epoch {epoch} became nan or infinite in step {step} or just before, at lr "
            f"{optimizer.param_groups[0]['lr']:g}; the checkpoints are as they were: go on from the last, or "
            "from the one before if that fails at once, with a lower --lr, or a higher --moco-t"
        )
    return step + 1, told


def standing(run, epoch, steps):
    """How full the queue is after the steps of an epoch, from 0 to 1, and the memory of this process."""
    keys = (epoch * len(run.loader) + steps) * run.data["global_batch"]
    return {"queue_fill": min(1.0, keys / run.args.moco_k), "memory_mb": peak_megabytes(run.process.device)}


if __name__ == "__main__":
    run_program(main)
