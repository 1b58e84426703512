"""Which checkpoint a run goes on from, and whether it can."""

from moco.checkpoint import check_arch, read_checkpoint
from moco.distributed import from_first
from moco.errors import UserError


def start_from(process, resume, output, arch, say):
    """(path, what read_checkpoint gives) that --resume asks for, or (None, {}) for a new run.

    resume: a path, "auto" for the newest whole one of the RunFolder `output`, or "". say: prints a line.
    """
    source = resume
    if source == "auto":
        source, _ = output.newest_good(say) if process.is_first else (None, None)
        source = from_first(source)
        say(f"--resume auto: {source or 'nothing to go on from yet, a new run'}")
    checkpoint = read_checkpoint(source) if source else {}
    check_arch(checkpoint, arch, source)
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
    for name, here in data.items():
        value = of_before.get(name, here)
        if value != here and step:
            raise UserError(
                f"{source} stands in the middle of an epoch of {value} {name.replace('_', ' ')}, and here it "
                f"would be {here}: go on with the same data, -b, --bn-splits and number of processes"
            )
        if value != here:
            say(f"note: {name} was {value} in {source} and is {here} from here on")
    if step and before.get("seed", settings["seed"]) != settings["seed"]:
        raise UserError(
            f"{source} stands in the middle of an epoch of --seed {before['seed']}, whose other half --seed "
            f"{settings['seed']} does not know: go on with the same, or leave the flag out"
        )
    for name, value in before.items():
        if settings.get(name, value) != value:
            say(f"note: {name} was {value} in {source} and is {settings[name]} from here on")
