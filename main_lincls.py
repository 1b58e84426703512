"""Linear classification on the frozen features of a pre-trained encoder.

python main_lincls.py --pretrained checkpoint_0199.pth.tar --dataset_root ROOT ...   (and every way to
start that main_moco.py has)
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from moco import trifeature, zoo
from moco.bad_images import BadImages
from moco.checkpoint import (
    check_arch,
    continue_from,
    encoder_state,
    load_strictly,
    read_checkpoint,
    save_checkpoint,
    trained_state,
)
from moco.data import labelled_folders, paths_of
from moco.distributed import check_agreement, from_first, sum_over_processes, wrap
from moco.draws import linear_train
from moco.encoders import base_encoder, check_image_size
from moco.errors import UserError, run_program
from moco.execution import execution_of, start_momentum
from moco.finish import finisher
from moco.launch import launch
from moco.meters import StepLog, accuracy, check_finite
from moco.options import check_shared, shared_parser
from moco.run_settings import check_output, data_folder, fast_line, loading_line, loading_of, settings
from moco.schedules import learning_rate, set_learning_rate
from moco.seeds import run_seed
from moco.views import normalise


def parse_args():
    parser = shared_parser(
        "Train a linear classifier on the frozen features of a pre-trained encoder.",
        epochs=100, lr=30.0, schedule=[60, 80], weight_decay=0.0,
    )  # fmt: skip
    linear = parser.add_argument_group("linear evaluation")
    linear.add_argument(
        "--pretrained",
        default="",
        metavar="CKPT",
        help="checkpoint or released model (default: untrained)",
    )
    linear.add_argument(
        "-e", "--evaluate", action="store_true", help="only validate the classifier of --resume"
    )
    linear.add_argument(
        "--target",
        choices=tuple(trifeature.FACTORS),
        help="predict this factor of Trifeature, not the folder's class",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    check_shared(args)
    if args.resume == "auto":
        newest = Path(args.output_dir) / "checkpoint.pth.tar"
        args.resume = str(newest) if newest.is_file() else ""
        print(f"--resume auto: {args.resume or 'nothing to go on from yet'}")
    if args.evaluate and not args.resume:
        raise UserError("--evaluate needs the classifier to validate: --resume model_best.pth.tar")
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


def evaluate_features(process, args, folder):
    """Train and validate the classifier in one process of the run."""
    say = process.say
    source = args.resume or args.pretrained
    checkpoint = read_checkpoint(source) if source else {}
    check_arch(checkpoint, args.arch, source)
    execution = execution_of(process.device, args.amp, args.channels_last, args.compile, args.fast)
    seed = from_first(run_seed(args.seed, checkpoint if args.resume else {}))

    # Data: training samples are shared out batch by batch, validation images one by one.
    train, val, classes = labelled_folders(folder, args.target)
    device_aug, loading = loading_of(args, process.device)
    bad_images = BadImages(args.on_bad_image, len(train), seed)
    train_loader = loading.training(
        train, linear_train(), process, seed,
        views=1, photometric=device_aug == "off", bad_images=bad_images,
    )  # fmt: skip
    val_loader = loading.validation(val, process)
    finish, how = finisher(device_aug, linear_train(), process.device)

    chosen = settings(args, device_aug, loading, execution, seed)
    check_agreement({**chosen, "images": len(train), "validation images": len(val), "classes": classes})

    # Model: everything is frozen but the last layer, which starts small.
    torch.manual_seed(seed)
    model = base_encoder(args.arch)(num_classes=classes)
    model.requires_grad_(False)
    model.fc.weight.data.normal_(mean=0.0, std=0.01)
    model.fc.bias.data.zero_()
    model.fc.requires_grad_(True)
    if args.resume:
        load_strictly(model, checkpoint["state_dict"], source)
    elif args.pretrained:
        load_strictly(model, encoder_state(checkpoint, source), source, may_miss=("fc.weight", "fc.bias"))
    execution.prepare(model)
    model = wrap(model.to(process.device), process)
    optimizer = torch.optim.SGD(
        model.module.fc.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    start_momentum(optimizer)
    start_epoch, best_acc1 = args.start_epoch, 0.0
    if args.resume and not args.evaluate:
        start_epoch = continue_from(
            checkpoint, args.resume, model.module, optimizer, args.epochs, execution.scaler
        )
        best_acc1 = float(checkpoint.get("best_acc1", 0.0))
    frozen = {name: t.clone() for name, t in model.module.state_dict().items() if not name.startswith("fc.")}

    say(f"{len(train)} training and {len(val)} validation images of {folder}, {classes} classes; seed {seed}")
    say(loading_line(train_loader, loading))
    say(how)
    say(execution)
    if args.fast:
        say(fast_line(args, chosen))
    say(f"features of {source}" if source else "no --pretrained: features of an untrained encoder")
    if args.evaluate:
        validate(args, process, val_loader, execution, model)
        return

    for epoch in range(start_epoch, args.epochs):
        set_learning_rate(optimizer, learning_rate(args.lr, epoch, args.epochs, milestones=args.schedule))
        train_loader.batch_sampler.epoch = epoch
        train_epoch(args, process, train_loader, finish, execution, model, optimizer, epoch)
        for line in bad_images.lines(epoch, paths_of(train)):
            say(line)
        acc1 = validate(args, process, val_loader, execution, model)
        if epoch == start_epoch:
            check_frozen(model.module, frozen)

        is_best, best_acc1 = acc1 > best_acc1, max(acc1, best_acc1)
        if process.is_first:
            state = {
                "epoch": epoch + 1,
                "arch": args.arch,
                **trained_state(model, optimizer, execution.scaler),
                "best_acc1": best_acc1,
                "seed": seed,
            }
            for name in ["checkpoint.pth.tar"] + ["model_best.pth.tar"] * is_best:
                save_checkpoint(state, Path(args.output_dir) / name)
    say(f"best Acc@1 {best_acc1:.3f} (chance {100 / classes:.3f})")


def train_epoch(args, process, loader, finish, execution, model, optimizer, epoch):
    """One pass over the training data with the backbone in evaluation mode, so that its BatchNorm stays
    as it is.
    """
    model.eval()
    log = StepLog(f"Epoch: [{epoch}]", loader, args.print_freq if process.is_first else 0)
    for batch in log.steps():
        [images], target = finish(batch), batch.targets

        with execution.autocast():
            output = model(images).float()  # N x classes
        loss = F.cross_entropy(output, target)

        optimizer.zero_grad()
        execution.scaler.scale(loss).backward()
        execution.scaler.step(optimizer)
        execution.scaler.update()
        log.update(loss, accuracy(output, target), len(target))
    check_finite(sum_over_processes(log.loss.total_tensor(process.device)), epoch, optimizer)


@torch.no_grad()
def validate(args, process, loader, execution, model):
    """Top-1 accuracy in percent on the validation set, each image counted once in all processes."""
    model.eval()
    log = StepLog("Test: ", loader, args.print_freq if process.is_first else 0)
    for batch in log.steps():
        with execution.autocast():  # past DDP, as processes may differ in steps
            output = model.module(normalise(batch.pixels[0])).float()
        target = batch.targets
        log.update(F.cross_entropy(output, target), accuracy(output, target), len(target))

    sums = torch.tensor([float(log.top1.total), float(log.top5.total), log.top1.count], dtype=torch.float64)
    acc1, acc5, count = sum_over_processes(sums.to(process.device)).tolist()
    if process.is_first:
        print(f" * Acc@1 {acc1 / count:.3f} Acc@5 {acc5 / count:.3f}")
    return acc1 / count


def check_frozen(model, frozen):
    """Raise RuntimeError when a tensor of the backbone is not what it was before training."""
    state = model.state_dict()
    moved = [name for name, tensor in frozen.items() if not torch.equal(state[name], tensor)]
    if moved:
        raise RuntimeError(f"training the classifier changed frozen tensors: {', '.join(moved[:3])}")


if __name__ == "__main__":
    run_program(main)
