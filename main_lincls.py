"""Linear classification on the frozen features of a pre-trained encoder.

python main_lincls.py --pretrained checkpoint_0199.pth.tar --dataset_root ROOT ...   (and every way to
start that main_moco.py has)
python main_lincls.py --lr 1 3 10 30 ...    trains a classifier per value in one pass and keeps the best
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moco import heads, linear_report, trifeature, zoo
from moco.bad_images import BadImages
from moco.checkpoint import check_arch, encoder_state, load_strictly, read_checkpoint, save_checkpoint
from moco.data import labelled_folders, paths_of
from moco.distributed import Process, check_agreement, everybodys, from_first, wrap
from moco.draws import linear_train
from moco.encoders import base_encoder, check_image_size
from moco.errors import run_program
from moco.execution import Execution, execution_of
from moco.files import set_aside
from moco.finish import finisher
from moco.heads import Layers, check_frozen, freeze_all_but_last
from moco.launch import launch
from moco.linear_options import check, newest_in, parse_args, what_is_kept
from moco.meters import accuracy, top_classes
from moco.run_settings import check_output, data_folder, fast_line, loading_line, loading_of, settings
from moco.schedules import learning_rate, set_learning_rate
from moco.seeds import run_seed
from moco.views import normalise
from moco.watch import Signals, Watch


def main():
    args = parse_args()
    check(args)
    check_image_size(args.arch, args.image_size)
    check_output(args.output_dir)
    folder = data_folder(args)
    labelled_folders(folder, args.target)
    if args.pretrained and not args.resume:  # which holds the features too
        args.pretrained = str(zoo.resolve(args.pretrained))  # last, as it may download
    launch(
        evaluate_features, (args, folder),
        nodes=args.world_size, node_rank=args.rank, url=args.dist_url, backend=args.dist_backend,
        spawn=args.multiprocessing_distributed, gpu=args.gpu,
    )  # fmt: skip


@dataclass
class Run:
    """What the steps of a run share, in one of its processes."""

    args: argparse.Namespace
    process: Process
    seed: int
    loader: Any
    val_loader: Any
    names: list  # of the classes
    finish: Callable
    bad_image_lines: Callable  # of an epoch
    execution: Execution
    model: nn.Module
    heads: list
    watch: Watch
    newest: str  # the checkpoint that has the last finished epoch, if there is one
    print_freq: int  # 0 where nothing is printed


def evaluate_features(process, args, folder):
    """Train and validate the classifiers in one process of the run."""
    say = process.say
    source = args.resume or args.pretrained
    checkpoint = read_checkpoint(source) if source else {}
    check_arch(checkpoint, args.arch, source)
    execution = execution_of(process.device, args.amp, args.channels_last, args.compile, args.fast)
    seed = from_first(run_seed(args.seed, checkpoint if args.resume else {}))

    # Data: training samples are shared out batch by batch, validation images one by one.
    train_images, val_images, classes = labelled_folders(folder, args.target)
    device_aug, loading = loading_of(args, process.device)
    bad_images = BadImages(args.on_bad_image, len(train_images), seed)
    loader = loading.training(
        train_images, linear_train(), process, seed,
        views=1, photometric=device_aug == "off", bad_images=bad_images,
    )  # fmt: skip
    val_loader = loading.validation(val_images, process)
    finish, how = finisher(device_aug, linear_train(), process.device)
    chosen = settings(args, device_aug, loading, execution, seed)
    sizes = {"images": len(train_images), "validation images": len(val_images), "classes": classes}
    check_agreement(chosen | sizes)

    # Model: everything is frozen but the last layer, which starts small, the same for every learning rate.
    torch.manual_seed(seed)
    model = base_encoder(args.arch)(num_classes=classes)
    freeze_all_but_last(model)
    if args.resume:
        load_strictly(model, checkpoint["state_dict"], source)
    elif args.pretrained:
        load_strictly(model, encoder_state(checkpoint, source), source, may_miss=("fc.weight", "fc.bias"))
    lrs = args.lr[:1] if args.evaluate else args.lr
    model.fc = Layers(model.fc, len(lrs))
    execution.prepare(model)
    model = wrap(model.to(process.device), process)
    of_lrs = heads.make_heads(model.module.fc, lrs, args.momentum, args.weight_decay, execution.new_scaler)
    start = args.start_epoch, 0.0, None
    if args.resume and not args.evaluate:
        start = heads.restore(of_lrs, checkpoint, source, args.epochs)

    counts = "{} training and {} validation images of {}, {} classes; seed {}"
    say(counts.format(len(train_images), len(val_images), folder, classes, seed))
    say(loading_line(loader, loading))
    say(how)
    say(execution)
    if args.fast:
        say(fast_line(args, chosen))
    say(f"features of {source}" if source else "no --pretrained: features of an untrained encoder")
    if len(lrs) > 1:
        say(f"{len(lrs)} classifiers; the lines of steps show the best so far, at first --lr {lrs[0]:g}")

    names = trifeature.FACTORS[args.target] if args.target else train_images.classes
    lines = partial(bad_images.lines, paths=paths_of(train_images))
    with Signals() as signals:
        run = Run(
            args, process, seed, loader, val_loader, names, finish, lines, execution, model, of_lrs,
            Watch(signals, process), args.resume, args.print_freq if process.is_first else 0,
        )  # fmt: skip
        if args.evaluate:
            for line in linear_report.worst_classes(validate(run, 0)[2], names):
                say(line)
        else:
            train(run, *start)


def train(run, first_epoch, best_acc1, confusion):
    """Train from an epoch to the end, or until a process is told to stop, and report.

    best_acc1, confusion: of the best head in its best epoch so far (None: there is none).
    """
    args, process, newest = run.args, run.process, newest_in(run.args.output_dir)
    if process.is_first and not args.resume:
        names = "checkpoint.pth.tar", "model_best.pth.tar", "linear.json"
        set_aside([path for name in names if (path := newest.with_name(name)).is_file()], print)
    frozen = {n: t.clone() for n, t in run.model.module.state_dict().items() if not n.startswith("fc.")}
    for epoch in range(first_epoch, args.epochs):
        for head in run.heads:
            lr = learning_rate(head.lr, epoch, args.epochs, milestones=args.schedule)
            set_learning_rate(head.optimizer, lr)
        run.loader.batch_sampler.epoch = epoch
        losses = train_epoch(run, epoch)
        for line in run.bad_image_lines(epoch):
            process.say(line)
        reached, best, confused = validate(run, epoch)
        if epoch == first_epoch:
            check_frozen(run.model.module, frozen)

        heads.record(run.heads, epoch, losses, reached)
        if is_best := reached[best][0] > best_acc1:
            best_acc1, confusion = reached[best][0], confused
        if process.is_first:
            shared = {"arch": args.arch, "best_acc1": best_acc1, "seed": run.seed}
            tensors = run.model.state_dict()
            if is_best:  # first: an end between the two files leaves the epoch to be done again
                state = heads.checkpoint_of(run.heads, run.heads[best], epoch + 1, tensors, shared)
                save_checkpoint(state, newest.with_name("model_best.pth.tar"))
            state = heads.checkpoint_of(run.heads, heads.leader(run.heads), epoch + 1, tensors, shared)
            state |= {"heads": [head.state_dict(epoch + 1) for head in run.heads], "confusion": confusion}
            save_checkpoint(state, newest)
        run.newest = str(newest)
    if process.is_first:
        report = newest.with_name("linear.json")
        linear_report.write(report, run.heads, run.names, confusion, seed=run.seed)
        for line in linear_report.lines(run.heads, run.names, confusion, best_acc1, report):
            print(line)


def train_epoch(run, epoch):
    """One pass over the training data with the backbone in evaluation mode, so that its BatchNorm stays
    as it is. Returns the mean loss of every head over all processes.

    Raises UserError when no head has a finite loss left.
    """
    run.model.eval()
    logs, shown = heads.step_logs(f"Epoch: [{epoch}]", run.loader, run.heads, run.print_freq)
    for batch in shown.steps():
        [images], target = run.finish(batch), batch.targets

        with run.execution.autocast():
            outputs = run.model(images)  # of each head N x classes
        outputs = [output.float() for output in outputs]
        losses = [F.cross_entropy(output, target) for output in outputs]

        heads.train_step(run.heads, losses)
        for log, loss, output in zip(logs, losses, outputs, strict=True):
            log.update(loss, accuracy(output, target), len(target))
        if any(run.watch.step(heads.any_finite(run.heads, [log.loss.total for log in logs]))):
            break
    told, _ = run.watch.last()
    losses = heads.mean_losses(logs, run.process.device)
    heads.note_diverged(run.heads, losses, epoch, run.process.say)
    if told:
        run.watch.leave(f"in epoch {epoch}", what_is_kept(run.newest, run.args))
    return losses


@torch.no_grad()
def validate(run, epoch):
    """Top-1 and top-5 accuracy of every head in percent on the validation set, each image counted once in all
    processes; which head that has not diverged is the best; and its moco.linear_report.confusion_of.
    """
    run.model.eval()
    steps = min(everybodys(len(run.val_loader)))  # that every process has
    logs, shown = heads.step_logs("Test: ", run.val_loader, run.heads, run.print_freq)
    targets = [torch.empty(0, dtype=torch.int64, device=run.process.device)]
    predictions = [targets[0].expand(len(run.heads), 0)]
    for step, batch in enumerate(shown.steps()):
        target = batch.targets
        with run.execution.autocast():  # past DDP, as processes may differ in steps
            outputs = run.model.module(normalise(batch.pixels[0]))
        outputs = [output.float() for output in outputs]
        for log, output in zip(logs, outputs, strict=True):
            log.update(F.cross_entropy(output, target), accuracy(output, target), len(target))
        targets.append(target.clone())  # the batch's own would hold its slot of the loader's memory
        predictions.append(torch.stack([top_classes(output)[:, 0] for output in outputs]))
        if step < steps and run.watch.step(torch.zeros(()))[0]:
            run.watch.leave(f"in epoch {epoch}", what_is_kept(run.newest, run.args))
    run.watch.last()

    reached = heads.mean_accuracies(logs, run.process.device)
    best = max(range(len(run.heads)), key=lambda i: (run.heads[i].diverged is None, reached[i][0]))
    for line in linear_report.accuracies(run.heads, reached, best):
        run.process.say(line)
    return reached, best, linear_report.confusion_of(torch.cat(targets), torch.cat(predictions, 1)[best])


if __name__ == "__main__":
    run_program(main)
