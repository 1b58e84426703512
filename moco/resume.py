"""Which checkpoint a run goes on from, and whether it can."""

from moco.checkpoint import check_arch
from moco.checkpoint_reader import check_kinds, read_checkpoint
from moco.distributed import from_first
from moco.errors import UserError


def start_from(process, resume, output, arch, say, features=""):
    """(path, what read_checkpoint gives) that --resume asks for, or for a new run None and {}, or what it
    gives for the path `features`.

    resume: a path, "auto" for the newest whole one of the folder `output` (moco.run_folder,
    moco.linear_folder), or "". say: prints a line.
    """
    source = resume
    if source == "auto":
        source, _ = output.newest_good(say) if process.is_first else (None, None)
        source = from_first(source)
        say(f"--resume auto: {source or 'nothing to go on from yet, a new run'}")
    path = source or features
    checkpoint = read_checkpoint(path) if path else {}
    check_arch(checkpoint, arch, path)
    if source:
        check_kinds(checkpoint, source)
    return source, checkpoint


def same_course(checkpoint, source, data, settings, say):
    """Refuse or, where it can work, note what differs between the run of a checkpoint and this one.

    data: `images` and `global_batch` of this run; settings: moco.run_settings.settings of it. Raises
    UserError.
    """
    before = checkpoint.get("settings", {})
    for name in ("moco_dim", "moco_k", "mlp"):
        if name in before and before[name] != settings[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{source} is of a run with {flag} {before[name]}, not {settings[name]}")
    step, of_before = checkpoint.get("step"), checkpoint.get("data", {})
    groups = ", --bn-splits" if "batchnorm_groups" in data else ""
    for name, here in data.items():
        value = of_before.get(name, here)
        if value != here and step:
            raise UserError(
                f"{source} stands in the middle of an epoch of {value} {name.replace('_', ' ')}, and here it "
                f"would be {here}: go on with the same data, -b{groups} and number of processes"
            )
        if value != here:
            say(f"note: {name} was {value} in {source} and is {here} from here on")
    if step and before.get("seed", settings["seed"]) != settings["seed"]:
        raise UserError(
            f"{source} stands in the middle of an epoch of --seed {before['seed']}, whose other half --seed "
            f"{settings['seed']} does not know: go on with the same, or leave the flag out"
        )
    if step and step > (steps := data["images"] // data["global_batch"]):
        raise UserError(
            f"{source} is no checkpoint of this program: it stands after {step} of an epoch's {steps} steps"
        )
    for name, value in ({"recolor": False} | before if before else {}).items():  # older runs do not say so
        if settings.get(name, value) != value:
            say(f"note: {name} was {value} in {source} and is {settings[name]} from here on")


def same_classes(checkpoint, source, names):
    """Raise UserError when the classifier of a checkpoint is of other classes than `names` (a list of str).

    A checkpoint that does not tell its classes, as of upstream, passes.
    """
    before = checkpoint.get("classes", names)
    if before == names:
        return
    place = next((i for i, pair in enumerate(zip(before, names, strict=False)) if len(set(pair)) == 2), None)
    differ = f", such as {before[place]} there for {names[place]} here" if place is not None else ""
    raise UserError(
        f"{source} tells {len(before)} classes apart that are not the {len(names)} here{differ}: name their "
        "images and their --target, or start anew without --resume"
    )
