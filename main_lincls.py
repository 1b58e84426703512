"""Linear classification on the frozen features of a pre-trained encoder.

python main_lincls.py --pretrained checkpoint_0199.pth.tar --dataset_root ROOT ...   (and every way to
start that main_moco.py has)
python main_lincls.py --lr 1 3 10 30 ...    trains a classifier per value in one pass and keeps the best
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moco import heads, linear_report, zoo
from moco.bad_images import BadImages
from moco.data import labelled_folders, paths_of
from moco.distributed import Process, check_agreement, everybodys, from_first, wrap
from moco.draws import linear_train
from moco.encoders import base_encoder, check_image_size
from moco.errors import run_program
from moco.execution import Execution, execution_of
from moco.factors import FACTORS
from moco.finish import finisher
from moco.heads import Layers, check_frozen, freeze_all_but_last
from moco.launch import launch
from moco.linear_checkpoint import Place, restore
from moco.linear_folder import LinearFolder
from moco.linear_options import check, goes_on, notes, parse_args
from moco.memory import peak_megabytes
from moco.meters import accuracy, top_classes
from moco.resume import same_classes, same_course, start_from
from moco.run_log import RunLog, start_log
from moco.run_settings import check_output, data_folder, fast_line, loading_line, loading_of, settings
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
    if args.pretrained and not goes_on(args):  # the checkpoint holds the features too
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
    output: LinearFolder
    loader: Any
    val_loader: Any
    finish: Callable
    bad_image_lines: Callable  # of an epoch
    execution: Execution
    model: nn.Module
    heads: list
    shared: dict  # entries of every checkpoint
    watch: Watch
    print_freq: int  # 0 where nothing is printed
    record: RunLog = RunLog()


def evaluate_features(process, args, folder):
    """Train and validate the classifiers in one process of the run."""
    say, output = process.say, LinearFolder(args.output_dir)
    resumed, checkpoint = start_from(process, args.resume, output, args.arch, say, args.pretrained)
    source = resumed or args.pretrained
    execution = execution_of(process.device, args.amp, args.channels_last, args.compile, args.fast)
    seed = from_first(run_seed(args.seed, checkpoint if resumed else {}))

    # Data: training samples are shared out batch by batch, validation images one by one.
    train_images, val_images, classes = labelled_folders(folder, args.target)
    names = list(FACTORS[args.target] if args.target else train_images.classes)
    device_aug, loading = loading_of(args, process.device)
    bad_images = BadImages(args.on_bad_image, len(train_images), seed)
    loader = loading.training(
        train_images, linear_train(), process, seed,
        views=1, photometric=device_aug == "off", bad_images=bad_images,
    )  # fmt: skip
    val_loader = loading.validation(val_images, process)
    finish, how = finisher(device_aug, linear_train(), process.device)
    chosen = settings(args, device_aug, loading, execution, seed)
    data = {"images": len(train_images), "validation_images": len(val_images)}
    data |= {"global_batch": loader.batch_sampler.global_batch, "processes": process.world_size}
    alike = {"classes": names, "start_epoch": args.start_epoch, "checkpoint": str(source)}
    check_agreement(chosen | data | alike)

    # Model: everything is frozen but the last layer, which starts small, the same for every learning rate.
    torch.manual_seed(seed)
    model = base_encoder(args.arch)(num_classes=classes)
    if resumed:
        same_classes(checkpoint, source, names)
    freeze_all_but_last(model, checkpoint, source, resumed)
    model.fc = Layers(model.fc, len(args.lr))
    execution.prepare(model)
    model = wrap(model.to(process.device), process)
    sgd = args.lr, args.momentum, args.weight_decay
    of_lrs = heads.make_heads(model.module.fc, *sgd, execution.new_scaler)
    place = Place(args.start_epoch)
    if resumed and not args.evaluate:
        place = restore(of_lrs, checkpoint, source, args.epochs)
        same_course(checkpoint, source, data, chosen, say)

    for line in (
        "{images} training and {validation_images} validation images".format(**data)
        + f" of {folder}, {classes} classes; seed {seed}",
        *(loading_line(loader, loading), how, execution),
        *([fast_line(args, chosen)] if args.fast else []),
        *notes(args, source),
    ):
        say(line)

    shared = {"arch": args.arch, "seed": seed, "settings": chosen, "data": data, "classes": names}
    with Signals() as signals:
        run = Run(
            args, process, output, loader, val_loader, finish,
            partial(bad_images.lines, paths=paths_of(train_images)), execution, model, of_lrs, shared,
            Watch(signals, process), args.print_freq * process.is_first,
        )  # fmt: skip
        if args.evaluate:
            found = validate(run) or run.watch.leave("in the validation", "it is not finished")
            for line in linear_report.worst_classes(found[2], names):
                say(line)
            return
        if process.is_first:
            output.start(resumed, say)
        with start_log(
            args.output_dir, process, False, "main_lincls.py", linear=True, settings=chosen, **data,
            classes=classes, steps=len(loader), chance=math.log(classes), epoch=place.epoch, step=place.step,
        ) as run.record:  # fmt: skip
            train(run, place)


def train(run, place):
    """Train from a Place to the end, or until a process is told to stop: then SystemExit ends it. Report."""
    args, process, batches, output = run.args, run.process, run.loader.batch_sampler, run.output
    frozen = {n: t.clone() for n, t in run.model.module.state_dict().items() if not n.startswith("fc.")}
    kept = f"{output.newest} has it all; --resume auto goes on"
    for epoch in range(place.epoch, args.epochs):
        heads.set_learning_rates(run.heads, epoch, args.epochs, args.schedule)
        batches.epoch, batches.first = epoch, place.step
        logs, shown = heads.epoch_logs(run.heads, place, run.loader, run.print_freq, process, run.record)
        step, told, losses = train_epoch(run, epoch, logs, shown)
        for line in run.bad_image_lines(epoch):
            process.say(line)
        if told or (found := validate(run)) is None:
            place.step, place.logs = step, everybodys([log.state_dict() for log in logs])
            if process.is_first:
                output.save(run.heads, place, run.model.state_dict(), run.shared)
            run.watch.leave(f"in epoch {epoch} after {step} of {len(batches)} steps", kept)
        check_frozen(run.model.module, frozen)

        reached, best, confused = found
        heads.record(run.heads, epoch, losses, reached)
        means = linear_report.epoch_entry(run.heads, best, losses, reached, logs, shown)
        run.record.write("epoch", epoch=epoch, **means, memory_mb=peak_megabytes(process.device))
        place.epoch, place.step, place.logs = epoch + 1, 0, ()
        if is_best := reached[best][0] > place.best_acc1:
            place.best_acc1, place.confusion = reached[best][0], confused
        if process.is_first:
            output.save(run.heads, place, run.model.state_dict(), run.shared, best if is_best else None)
        if run.watch.last()[0] and epoch + 1 < args.epochs:
            run.watch.leave(f"after epoch {epoch}", kept)
    if process.is_first:
        for line in linear_report.finish(output.report, run.heads, place, run.shared):
            print(line)
        output.tidy()


def train_epoch(run, epoch, logs, shown):
    """Train on what is left of an epoch, unless a process of the run is told to stop; with the backbone in
    evaluation mode, so that its BatchNorm stays as it is. Returns how many of its steps are done, whether one
    was told, and the mean loss of every head over all processes.

    logs: of each head; shown: the one that prints. Raises UserError when no head has a finite loss left.
    """
    run.model.eval()
    step = shown.first - 1
    for step, batch in enumerate(shown.steps(), shown.first):  # noqa: B007, how many it was counts
        [images], target = run.finish(batch), batch.targets

        with run.execution.autocast():
            outputs = run.model(images)  # of each head N x classes
        outputs = [output.float() for output in outputs]
        losses = [F.cross_entropy(output, target) for output in outputs]

        heads.train_step(run.heads, losses)
        for log, loss, output in zip(logs, losses, outputs, strict=True):
            log.update(loss, accuracy(output, target), len(target))
        if shown.due:
            shown.note({}, memory_mb=peak_megabytes(run.process.device))
        if any(run.watch.step(heads.any_finite(run.heads, [log.loss.total for log in logs]))):
            shown.stop()
    told, bad = run.watch.last()
    losses = heads.mean_losses(logs, run.process.device)
    if bad or not told:  # within an epoch a head that diverges is noted only at its end
        heads.note_diverged(run.heads, losses, epoch, run.process.say)
    return step + 1, told, losses


@torch.no_grad()
def validate(run):
    """Top-1 and top-5 accuracy of every head in percent on the validation set, each image counted once in all
    processes; which head that has not diverged is the best; and its moco.linear_report.confusion_of. None
    when a process was told to stop.
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
            return None
    run.watch.last()

    reached = heads.mean_accuracies(logs, run.process.device)
    best = heads.best_now(run.heads, reached)
    for line in linear_report.accuracies(run.heads, reached, best):
        run.process.say(line)
    return reached, best, linear_report.confusion_of(torch.cat(targets), torch.cat(predictions, 1)[best])


if __name__ == "__main__":
    run_program(main)
