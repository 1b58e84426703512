"""The plain InfoNCE loss that an encoder reached, which means the same whatever it was trained by."""

import torch

from moco.data import Loading, image_folder
from moco.distributed import Process
from moco.draws import pretraining
from moco.experiments import Experiments
from moco.finish import finisher
from moco.meters import Meter, rank_accuracy
from moco.seeds import STEP, fold, shuffle_order


def plain_loss(model, folder, settings, device):
    """InfoNCE and its accuracy in percent over an epoch of training pairs that changes no weight.

    It is the epoch that would come next, with the views that it would have, in the run's own arrangement
    (shuffled BatchNorm over groups, a queue that moves on), at a learning rate of 0 and a key momentum of 1:
    so it means the same for every epsilon, whose own training loss has the perturbation in it. New keys come
    from the key encoder as it was at the end, while in training old keys are of older weights and easier to
    tell apart: so also without IFM this is not the training loss. BatchNorm's running statistics and the
    queue of `model` (a MoCo) change.
    """
    recipe = pretraining(settings["aug_plus"], settings.get("crops_only", False))
    cache = "device" if settings["resize"] == "device" else None
    resize = "torch" if cache else settings["resize"]
    loading = Loading(settings["image_size"], resize, settings["batch_size"], 0, None, cache)
    process = Process.alone(device)
    aug, seed, epoch = settings["device_aug"], settings["seed"], settings["epochs"]
    loader = loading.training(
        image_folder(folder, "train"), recipe, process, seed,
        photometric=aug == "off", bn_splits=settings["bn_splits"],
    )  # fmt: skip
    finish, _ = finisher(aug, recipe, device)
    loader.batch_sampler.epoch = epoch
    of_run = settings.get("random_bits", 0), settings.get("recolor", False)
    experiments = Experiments(*of_run, seed, folder, loader.batch_sampler)
    model.train()
    model.m = 1.0
    loss_meter, top1 = Meter("Loss", ".4f"), Meter("Acc@1", ".2f")
    for step, batch in enumerate(loader):
        im_q, im_k = experiments(finish(batch), step)
        torch.manual_seed(fold(seed, STEP, epoch, step, 0))
        with torch.no_grad():
            order = shuffle_order(seed, epoch, step, len(im_q))
            loss, ranks, *_ = model(im_q, im_k, weights=(1.0, 0.0), order=order)
        loss_meter.update(loss, len(ranks))
        top1.update(rank_accuracy(ranks)[0], len(ranks))
    return loss_meter.mean, top1.mean
