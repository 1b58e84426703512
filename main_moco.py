"""Pre-train an encoder by momentum contrast: MoCo v1, MoCo v2, and implicit feature modification (IFM).

python main_moco.py --dataset_root ROOT ...   one process, on a GPU or the CPU
python main_moco.py --multiprocessing-distributed --world-size 1 --rank 0 ...  one process per GPU
torchrun --nproc_per_node 8 main_moco.py ...   the same, on any number of nodes
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch is imported: moco/run/README.md, "Threads"

import math
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils import get_total_norm

from moco import losses, options, seeds, zoo
from moco.builder import MoCo
from moco.data.augment import pretraining
from moco.data.cache import decoded_cache
from moco.data.decode import decoder_name
from moco.data.device import DeviceAugment
from moco.data.experiments import RandomBits
from moco.data.folders import data_folder, paths_of, pretraining_images
from moco.data.gray import range_warnings, uses_of_some
from moco.data.loader import TrainLoader, batch_per_process
from moco.encoders import base_encoder, check_image_size, has_batchnorm, on_meta_device
from moco.errors import UserError, run_program
from moco.evaluate.features import similarities
from moco.evaluate.knn import KnnMonitor, labeled_val
from moco.files import make_output_folder
from moco.losses import rank_accuracy
from moco.run.backbone import initial_state
from moco.run.checkpoint import Checkpoints, check_arch, check_compatible, read, restore
from moco.run.launch import launch
from moco.run.log import Meters, RunLog
from moco.run.signals import StopRequest, exit_on_signal


def main():
    args = options.pretraining()
    check_image_size(args.arch, args.image_size, stem=args.stem)
    encoder = base_encoder(args.arch, stem=args.stem, image_size=args.image_size)
    small = partial(MoCo, encoder, args.moco_dim, K=1, mlp=args.mlp, bn_splits=args.bn_splits)
    if args.bn_splits > 1:  # fails here where there is nothing to split
        on_meta_device(small)
    make_output_folder(args.output_dir)
    there = Checkpoints(args.output_dir, rank=None).newest_first()
    with exit_on_signal():  # no part of a download, and nothing half-drawn, stays
        if args.pretrained and not (there if args.resume == "auto" else args.resume):
            args.pretrained = str(zoo.resolve(args.pretrained, args.arch, args.image_size))  # downloads
            if args.overwrite and Path(args.pretrained).resolve() in [path.resolve() for path in there]:
                raise UserError(
                    f"--overwrite would remove --pretrained {args.pretrained}; choose another folder"
                )
            pretrained_state(on_meta_device(small), args)  # fails here where it does not fit
        if args.images is None:
            args.folder = data_folder(args.folder, args.dataset_root, args.dataset)
    images = pretraining_images(args.folder, args.images)  # fails before any process is started
    if args.knn:
        labeled_val(images)
    del images  # each process lists them itself
    launch(pretrain, args, **options.processes(args))


def pretrain(rank, args):
    """Train in one process of the run, from the newest checkpoint (or the start) to the last epoch."""
    checkpoints = Checkpoints(args.output_dir, rank, args.keep, args.save_freq)
    source, checkpoint = checkpoints.load(args.resume, args.overwrite)  # None and {} for a new run
    if args.resume == "auto" and checkpoint.get("epoch", 0) >= args.epochs:
        rank.print(f"all {args.epochs} epochs are finished")
        return
    check_arch(checkpoint, args.arch, source)
    seed = rank.broadcast(seeds.run_seed(args.seed, checkpoint))
    options.resolve(args, rank.device)
    settings = options.settings(args, seed)

    # Data. Every random number of a view is a function of (seed, epoch, index): moco/data/README.md
    images = pretraining_images(args.folder, args.images)
    same = {"images": len(images), "checkpoint": source, "cache": args.cache}
    same["pretrained"] = None if checkpoint else Path(args.pretrained).name
    rank.check_same(settings | same)
    for line in images.summary():
        rank.print(line)
    recipe = pretraining(args.aug_plus, args.crops_only)
    in_workers = args.device_aug == "off"  # where color, blur and flip are done
    loading = {
        "size": args.image_size,
        "batch_size": batch_per_process(args.batch_size, rank.local_world_size, args.bn_splits),
        "rank": rank.rank,
        "world_size": rank.world_size,
        "resize": args.resize,
        "gray_range": args.gray_range,
        "workers": rank.loader_workers(args.workers),
        "device": rank.device,
    }
    cache = None
    if args.cache:
        node = rank.rank, rank.local_rank, rank.local_world_size, rank.all_gather
        cache = decoded_cache(paths_of(images), *node, loading["workers"], gray_range=args.gray_range)
    extra = {"photometric": in_workers, "cache": cache, "on_bad_image": args.on_bad_image}
    loader = TrainLoader(images, recipe, seed=seed, **loading, **extra)
    batch_shape = 2 * loading["batch_size"], args.image_size
    augment = DeviceAugment(recipe, rank.device, not in_workers, batch_shape)
    autocast = partial(options.autocast, args, rank.device)
    skip_bad = args.on_bad_image == "skip"
    encoder = base_encoder(args.arch, args.random_bits, args.stem, args.image_size)
    knn = KnnMonitor(args.knn, args.epochs, encoder, images, rank, loading, autocast, skip_bad)

    # Model. It is equal on all ranks, because torch's generator starts from the same seed on each.
    torch.manual_seed(seed)
    model = MoCo(
        encoder, args.moco_dim, args.moco_k, args.moco_m, args.moco_t, args.mlp, args.epsilon, args.bn_splits
    )
    pretrained = checkpoint.get("pretrained") if checkpoint else args.pretrained or None
    if args.pretrained and checkpoint:
        rank.print(f"the run continues from {source}: --pretrained {args.pretrained} is not read")
    elif args.pretrained:
        state, taken = pretrained_state(model, args)
        for encoder in (model.encoder_q, model.encoder_k):
            encoder.load_state_dict(state, strict=False)  # what it may miss is in `taken`
        rank.print(f"pretrained: {pretrained}: {taken}")
    options.prepare(args, model.encoder_q, model.encoder_k)  # --channels-last, --compile
    ddp = rank.wrap(model.to(rank.device), identical=("queue", "queue_ptr"))
    # not fused in fp16: fused SGD leaves momentum unwritten when the first step overflows
    optimizer = torch.optim.SGD(
        ddp.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=args.amp != "fp16"
    )
    scaler = torch.amp.GradScaler(rank.device.type, enabled=args.amp == "fp16")

    # Resume
    first_epoch, step, sums = args.start_epoch, 0, {}
    groups = rank.world_size * args.bn_splits
    data = {"images": len(images), "global_batch": loader.global_batch, "batchnorm_groups": groups}
    if checkpoint:
        check_compatible(checkpoint, source, data, settings, rank)
        first_epoch, step = restore(checkpoint, source, model, optimizer, scaler, args.epochs)
        # of a stop within an epoch; "noted" is of files of earlier versions
        sums = checkpoint.get("log", {}) | checkpoint.get("noted", {}) if step else {}

    if rank.is_first:
        uses = uses_of_some(paths_of(images), args.gray_range)
        for line in range_warnings(uses, args.gray_range):
            rank.print(line)
    rank.print(f"{len(loader)} steps of {loader.global_batch} images an epoch, {loader.transport}")
    rank.print(f"{augment}; JPEG files are decoded by {decoder_name()}")
    if args.random_bits:
        augment = RandomBits(args.random_bits, seed, augment, per_view=args.bits_per == "view")
    encoders = options.speed(args, rank.device)
    rank.print(f"seed {seed}; {rank.world_size} process(es) on {rank.device.type}; {encoders}")
    for line in options.notes(args, len(images), groups if has_batchnorm(model) else 0):
        rank.print(line)

    method = options.trained_method(args)
    chance = losses.chance(args.moco_k, method, args.epsilon, args.alpha, args.moco_t)
    start = {"epoch": first_epoch, "step": step, "steps": len(loader), "settings": settings, "chance": chance}
    start["pretrained"] = pretrained
    log = RunLog(args.output_dir, "log.jsonl", rank, tensorboard=args.tensorboard, **start, **data)
    entries = {"arch": args.arch, "seed": seed, "settings": settings, "data": data}  # of every checkpoint
    entries["pretrained"] = pretrained
    with log, StopRequest(rank) as stop:  # SIGTERM, Ctrl-C and others: save after the step, exit code 75
        for epoch in range(first_epoch, args.epochs):
            set_learning_rate(optimizer, epoch, args)
            meters = Meters(f"Epoch: [{epoch}]", len(loader), rank, step, sums)
            step = train_one_epoch(
                ddp, model, optimizer, scaler, loader, augment, meters, log, stop, epoch, seed, args
            )
            finished = step == len(loader)
            next_epoch, next_step = (epoch + 1, 0) if finished else (epoch, step)
            entries["log"] = meters.state_dict()
            path = checkpoints.save(model, optimizer, scaler, epoch=next_epoch, step=next_step, **entries)
            if finished:
                means = meters.means() | {"lr": optimizer.param_groups[0]["lr"]}
                numbers = means | {"queue_fill": queue_fill(epoch, step, loader, args)}
                try:
                    numbers |= knn(epoch, model.encoder_q)
                finally:
                    log.epoch(epoch, **numbers)
                speed, left = f"{means['images_per_s']:.0f} images/s", log.time_left(epoch, args.epochs)
                loss, lr = f"loss {means['loss']:.4f}", f"lr {means['lr']:.3g}"
                rank.print(f"epoch {epoch}: {loss}, {lr}, {speed}, run: {left} left")
            if stop.requested() and not (finished and epoch + 1 == args.epochs):
                checkpoints.wait()
                stop.exit(
                    f"stopped in epoch {epoch} after {step} of {len(loader)} steps",
                    f"saved {path}; continue with --resume auto",
                )
            step, sums = 0, {}
        checkpoints.finish()


def pretrained_state(model, args):
    """What moco.run.backbone.initial_state gives for --pretrained and the encoders of `model`."""
    path, network = args.pretrained, (args.arch, args.stem, args.image_size)
    return initial_state(read(path), path, model.encoder_q, model.head, *network)


def train_one_epoch(ddp, model, optimizer, scaler, loader, augment, meters, log, stop, epoch, seed, args):
    """Train on the epoch's batches from meters.first_step on, until the end or a requested stop.

    Returns the number of finished steps. Raises DivergedError when the loss was not finite.
    """
    rank, lr = stop.rank, optimizer.param_groups[0]["lr"]
    # of the plain and of the perturbed loss
    weights = losses.weights(options.trained_method(args), args.alpha)
    ifm = args.epsilon, args.moco_t, args.alpha, args.method
    model.train()
    step = meters.first_step - 1
    for step, batch in meters.timed(loader.epoch(epoch, meters.first_step)):
        im_q, im_k = augment(batch)  # float32 N x 3 x H x W each, normalized
        printed = step % args.print_freq == 0
        mean_key = model.queue.mean(dim=1) if printed else None  # C, before the queue changes

        torch.manual_seed(seeds.fold(seed, seeds.STEP, epoch, step, rank.rank))  # for dropout
        order = seeds.shuffle_order(seed, epoch, step, len(im_q) * rank.world_size)  # for shuffling BatchNorm
        with options.autocast(args, rank.device):
            loss, ranks, image_losses, q, k = ddp(im_q, im_k, weights=weights, order=order)

        optimizer.zero_grad()
        if args.method and (printed or args.match_ifm):
            lengthened, length = rank.all_reduce(losses.gradient_lengths(image_losses, *ifm))
        if args.match_ifm:  # the control: InfoNCE times IFM's factor
            scaler.scale(loss * (lengthened / length)).backward()
        else:
            scaler.scale(loss).backward()
        if printed:
            scaler.unscale_(optimizer)
            gradients = [weight.grad for weight in model.encoder_q.parameters()]
            grad_norm = get_total_norm([each for each in gradients if each is not None])  # some may be frozen
        scaler.step(optimizer)
        scaler.update()

        meters.update(loss, rank_accuracy(ranks), len(ranks))
        if printed:
            meters.check_finite(epoch, step, lr)
            fill = queue_fill(epoch, step + 1, loader, args)
            features = similarities(q, k, mean_key) | {"grad_norm": grad_norm}
            if args.method:
                features |= losses.weight_statistics(image_losses, *ifm) | {"ifm_factor": lengthened / length}
            log.step(meters, epoch, step, lr=lr, features=features, queue_fill=fill)
        if stop.requested():  # on any rank
            break
    meters.check_finite(epoch, step, lr)
    return step + 1


def set_learning_rate(optimizer, epoch, args):
    """Half a cosine over all epochs (--cos), or x 0.1 at each epoch of --schedule."""
    lr = args.lr
    if args.cos:
        lr *= 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    else:
        for milestone in args.schedule:
            lr *= 0.1 if epoch >= milestone else 1
    for group in optimizer.param_groups:
        group["lr"] = lr


def queue_fill(epoch, steps, loader, args):
    """The share of the queue that holds keys after `steps` of `epoch`, 0 to 1: the rest is initial noise."""
    return min(1.0, (epoch * len(loader) + steps) * loader.global_batch / args.moco_k)


if __name__ == "__main__":
    run_program(main)
