"""Linear evaluation: train linear classifiers on the frozen features of a pre-trained encoder.

python main_lincls.py --pretrained checkpoint_0199.pth.tar --dataset_root ROOT ...   started like main_moco.py
python main_lincls.py --lr 1 3 10 30 --pretrained ...   a classifier for each value in one pass over the data
python main_lincls.py --evaluate --resume model_best.pth.tar ...   validates a classifier
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch is imported: moco/run/README.md, "Threads"

import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from moco import options, seeds, zoo
from moco.data.augment import linear_train
from moco.data.cache import decoded_cache
from moco.data.decode import decoder_name
from moco.data.device import DeviceAugment, normalize
from moco.data.folders import data_folder, image_folder, labeled_folders, paths_of
from moco.data.gray import range_warnings, uses_of_some
from moco.data.loader import TrainLoader, ValidationLoader, batch_per_process
from moco.encoders import base_encoder, check_image_size, last_linear, replace_layer
from moco.errors import UserError, run_program
from moco.evaluate import linear
from moco.files import make_output_folder
from moco.run.backbone import load_encoder, network_settings, with_counters
from moco.run.checkpoint import (
    LinearCheckpoints,
    check_arch,
    check_compatible,
    check_linear,
    load_strictly,
    read,
)
from moco.run.launch import launch
from moco.run.log import Meters, RunLog
from moco.run.signals import StopRequest, exit_on_signal


def main():
    args = options.linear_evaluation()
    check_image_size(args.arch, args.image_size, stem=args.stem)
    make_output_folder(args.output_dir)
    with exit_on_signal():  # nothing half-drawn, and no part of a download, stays
        args.folder = data_folder(args.folder, args.dataset_root, args.dataset)
        if args.evaluate:
            image_folder(args.folder, "val")  # fails before any process is started
        else:
            labeled_folders(args.folder, args.target)
        if args.pretrained and not Path(args.resume).is_file():  # that checkpoint has the features too
            args.pretrained = str(zoo.resolve(args.pretrained, args.arch, args.image_size))  # downloads
    launch(evaluate, args, **options.processes(args))


def evaluate(rank, args):
    """Train and validate the classifiers in one process of the run."""
    checkpoints = LinearCheckpoints(args.output_dir, rank)
    if args.evaluate and args.resume != "auto":
        resumed, checkpoint = args.resume, read(args.resume)  # no file of --output-dir is touched
        check_linear(checkpoint, resumed)
    else:
        resumed, checkpoint = checkpoints.load(args.resume, args.overwrite)  # None and {} for a new run
    if args.evaluate and not resumed:
        raise UserError(
            "--evaluate finds no classifier in --output-dir; name it: --resume model_best.pth.tar"
        )
    if args.resume == "auto" and not args.evaluate and checkpoint.get("epoch", 0) >= args.epochs:
        rank.print(f"all {args.epochs} epochs are finished")
        return
    seed = rank.broadcast(seeds.run_seed(args.seed, checkpoint))
    source = resumed or args.pretrained
    if source and not resumed:
        checkpoint = read(source)
    check_arch(checkpoint, args.arch, source)
    if source:  # its tensors say which stem it has
        args.stem = network_settings(checkpoint, source, args.arch, args.stem, args.image_size)["stem"]
    encoder = base_encoder(args.arch, stem=args.stem, image_size=args.image_size)
    head = last_linear(encoder)
    options.resolve(args, rank.device)
    settings = options.settings(args, seed)

    # Data. Every random number of a view is a function of (seed, epoch, index): moco/data/README.md
    if args.evaluate:
        val_images, classes = linear.labeled_validation(args.folder, args.target, checkpoint, source, head)
        images = []
    else:
        images, val_images, classes = labeled_folders(args.folder, args.target)
    data = {"images": len(images), "validation_images": len(val_images)}
    rank.check_same(settings | data | {"classes": classes, "checkpoint": source})
    in_workers = args.device_aug == "off"  # where flips are made
    loading = {
        "size": args.image_size,
        "batch_size": batch_per_process(args.batch_size, rank.local_world_size, views=1),
        "rank": rank.rank,
        "world_size": rank.world_size,
        "resize": args.resize,
        "gray_range": args.gray_range,
        "workers": rank.loader_workers(args.workers),
        "device": rank.device,
    }
    cache = val_cache = None
    if args.cache:
        node = rank.rank, rank.local_rank, rank.local_world_size, rank.all_gather
        decode = partial(decoded_cache, gray_range=args.gray_range)
        cache = decode(paths_of(images), *node, loading["workers"]) if images else None
        val_cache = decode(paths_of(val_images), *node, loading["workers"])
    val_loader = ValidationLoader(val_images, cache=val_cache, **loading)
    if not args.evaluate:
        extra = {"views": 1, "photometric": in_workers, "cache": cache, "on_bad_image": args.on_bad_image}
        loader = TrainLoader(images, linear_train(), seed=seed, drop_last=False, **loading, **extra)
        batch_shape = loading["batch_size"], args.image_size
        augment = DeviceAugment(linear_train(), rank.device, not in_workers, batch_shape)

    # Model. All is frozen but the last layer, which starts small and equal for every --lr and rank.
    torch.manual_seed(seed)
    backbone = encoder(num_classes=len(classes)).requires_grad_(False).eval()
    classifier = backbone.get_submodule(head)
    classifier.weight.normal_(mean=0.0, std=0.01)
    if classifier.bias is not None:
        classifier.bias.zero_()
    if resumed:
        linear.check_classes(checkpoint, source, classes, head)
        load_strictly(backbone, with_counters(checkpoint["state_dict"], backbone), source)
    elif source:
        taken = load_encoder(backbone, checkpoint, source, args.arch)
    lrs = args.lr[:1] if args.evaluate else args.lr  # a checkpoint's own tensors are of one classifier
    replace_layer(backbone, head, nn.Identity())
    probes = linear.Probes(classifier, len(lrs), head).to(rank.device)
    options.prepare(args, backbone)  # --channels-last, --compile
    backbone.to(rank.device)
    results = linear.Results(lrs, classes)

    uses = []
    for split in filter(None, (images, val_images)):
        for line in split.summary():
            rank.print(line)
        uses += uses_of_some(paths_of(split), args.gray_range) if rank.is_first else []
    for line in range_warnings(uses, args.gray_range):
        rank.print(line)
    speed = options.speed(args, rank.device)
    rank.print(f"seed {seed}; {rank.world_size} process(es) on {rank.device.type}; {speed}")
    rank.print(val_loader.transport if args.evaluate else loader.transport)
    if not in_workers and not args.evaluate:
        rank.print(augment)
    rank.print(f"JPEG files are decoded by {decoder_name()}")
    features = f"features of {source}" if source else "no --pretrained: features of an untrained encoder"
    rank.print(f"{len(classes)} classes; {features}")
    if source and not resumed:
        rank.print(f"pretrained: {taken}")
    if args.evaluate:
        accuracies, _ = validate(backbone, probes, val_loader, rank, args, shown=0)
        rank.print(*results.accuracy_line(accuracies, 0).splitlines())
        return

    optimizer = linear.sgd(probes, lrs, args.momentum, args.weight_decay)
    first_epoch = args.start_epoch
    data |= {"global_batch": loader.global_batch, "processes": rank.world_size}
    if resumed:
        check_compatible(checkpoint, source, data, settings, rank)
        first_epoch = linear.restore(checkpoint, source, probes, optimizer, results, args.epochs)
    if len(lrs) > 1:
        rank.print(f"{len(lrs)} classifiers; steps show the best so far, now --lr {lrs[results.leader]:g}")
    frozen = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    ddp = rank.wrap(probes)

    start = {"epoch": first_epoch, "step": 0, "steps": len(loader), "settings": settings, **data}
    log = RunLog(args.output_dir, "linear.jsonl", rank, chance=math.log(len(classes)), **start)
    with log, StopRequest(rank) as stop:  # SIGTERM, Ctrl-C and others: leave the epoch, exit code 75
        for epoch in range(first_epoch, args.epochs):
            set_learning_rates(optimizer, epoch, args)
            meters = Meters(f"Epoch: [{epoch}]", len(loader), rank, shown=results.leader)
            if not train_one_epoch(backbone, ddp, optimizer, loader, augment, meters, log, stop, epoch, args):
                saved = checkpoints.newest.is_file()
                advice = f"--resume auto continues from epoch {epoch}" if saved else "nothing is saved yet"
                stop.exit(f"stopped in epoch {epoch}", advice)
            losses = linear.mean_losses(meters, rank, len(images))
            for line in results.check_finite(epoch, losses):
                rank.print(line)
            linear.check_frozen(backbone, frozen)

            accuracies, confusion = validate(backbone, probes, val_loader, rank, args, results.leader)
            best, improved = results.add(epoch, losses, accuracies, confusion)
            entries = {"epoch": epoch + 1, "arch": args.arch, "classes": classes}
            entries |= {"seed": seed, "settings": settings, "data": data}
            model_best = linear.checkpoint_of(best, backbone, probes, optimizer, results) | entries
            newest = linear.checkpoint_of_all(backbone, probes, optimizer, results) | entries
            if rank.is_first:
                results.write(Path(args.output_dir) / "linear.json", seed)
            checkpoints.save(newest, model_best if improved else None)
            log.epoch(epoch, **meters.times(), **results.log_entries(best, meters, optimizer))
            rank.print(*results.accuracy_line(accuracies, best).splitlines())
            if stop.requested() and epoch + 1 < args.epochs:
                stop.exit(f"stopped after epoch {epoch}", f"--resume auto continues from epoch {epoch + 1}")
    checkpoints.finish()
    rank.print(*results.table().splitlines())


def train_one_epoch(backbone, probes, optimizer, loader, augment, meters, log, stop, epoch, args):
    """Train the classifiers on an epoch. Returns False when it ends early because a stop was requested."""
    lr, head = optimizer.param_groups[meters.shown]["lr"], args.lr[meters.shown]
    for step, batch in meters.timed(loader.epoch(epoch)):
        [images] = augment(batch)  # float32 N x 3 x S x S
        N = len(batch.targets)  # in the epoch's last step perhaps less than that of images, or 0
        features = features_of(backbone, images, args)[:N]  # N x d
        outputs = probes(features)  # of each classifier N x classes
        losses = torch.stack([linear.mean_loss(output, batch.targets) for output in outputs])

        optimizer.zero_grad()
        # Each classifier gets the gradient of its own loss, as the mean over all images of the step. The mean
        # over ranks is that once each is weighted by its images; the weight is 1 in all but the last step.
        weight = N * meters.rank.world_size / loader.images_in(step)
        (weight * losses).sum().backward()
        optimizer.step()

        meters.update(losses, linear.accuracies(outputs, batch.targets), N)
        stop_requested = stop.requested()  # on any rank; all have queued this step, which printing waits for
        if step % args.print_freq == 0:
            log.step(meters, epoch, step, lr=lr, head=head)
        if stop_requested:
            return step + 1 == len(loader)
    return True


@torch.no_grad()
def validate(backbone, probes, loader, rank, args, shown):
    """([(top-1, top-5) of each classifier in percent], confusion counts) on the images of all ranks."""
    meters = Meters("Test: ", len(loader), rank, shown=shown)
    classes, numbers = probes.each[0].out_features, {"dtype": torch.int64, "device": rank.device}
    targets = [torch.empty(0, **numbers)]  # a rank may have no image
    top = [torch.empty(len(probes.each), 0, min(5, classes), **numbers)]
    for step, batch in meters.timed(loader):
        features = features_of(backbone, normalize(batch.pixels[0]), args)
        outputs = probes(features)
        losses = torch.stack([F.cross_entropy(output, batch.targets) for output in outputs])
        meters.update(losses, linear.accuracies(outputs, batch.targets), len(features))
        if step % args.print_freq == 0:
            rank.print(meters.line(step))
        targets.append(batch.targets)
        top.append(torch.stack([output.topk(min(5, classes)).indices for output in outputs]))
    return linear.score(torch.cat(targets), torch.cat(top, dim=1), classes, rank)


@torch.no_grad()
def features_of(backbone, images, args):
    """Pooled features N x d, float32 whatever precision (--amp) the backbone computes in."""
    with options.autocast(args, images.device):
        return backbone(images).float()


def set_learning_rates(optimizer, epoch, args):
    """Each --lr x 0.1 at each epoch of --schedule."""
    for group, lr in zip(optimizer.param_groups, args.lr, strict=True):
        for milestone in args.schedule:
            lr *= 0.1 if epoch >= milestone else 1
        group["lr"] = lr


if __name__ == "__main__":
    run_program(main)
