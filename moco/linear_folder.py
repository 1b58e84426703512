"""The files of a linear evaluation: its newest checkpoint, the one before, its best one, its report."""

from pathlib import Path

from moco.checkpoint import save_checkpoint
from moco.files import set_aside
from moco.linear_checkpoint import checkpoint_of, checkpoint_of_all
from moco.run_folder import first_whole


class LinearFolder:
    """checkpoint.pth.tar and model_best.pth.tar, which upstream has too; checkpoint_previous.pth.tar while
    the run goes on; and linear.json.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.newest = self.path / "checkpoint.pth.tar"
        self.previous = self.path / "checkpoint_previous.pth.tar"
        self.best, self.report = self.path / "model_best.pth.tar", self.path / "linear.json"

    def newest_first(self):
        """The paths of the checkpoints to go on from that are there."""
        return [path for path in (self.newest, self.previous) if path.is_file()]

    def newest_good(self, say):
        """(path, what read_checkpoint gives) of the newest that is whole, or (None, {}) without any.

        say: called with a line about one that is damaged. Raises UserError when both are.
        """
        return first_whole(self.newest_first(), say)

    def start(self, source, say):
        """Make the folder that of a run which goes on from the file `source`, or is new (None).

        What --resume auto would take up instead is of another course: it is set aside, and with it, unless
        the source is one of the folder's files, what another run found. Half-written files that a killed run
        left are removed. say: called with a line about it.
        """
        for name in (self.newest.name, self.best.name, self.report.name):
            for half in self.path.glob(f".{name}.*.tmp"):
                half.unlink(missing_ok=True)
        own = [self.newest, self.previous, self.best, self.report]
        place = next((i for i, path in enumerate(own) if _same(path, source)), None)
        others = {None: own, 0: [], 1: own[:1]}.get(place, own[:2])
        set_aside([path for path in others if path.is_file()], say)

    def save(self, heads, place, state_dict, shared, best=None):
        """Write where a run stands; the checkpoint before stays beside it until the next.

        heads, place, state_dict, shared: as for moco.linear_checkpoint; best: the number of the head that
        has become the best one in the epoch, which gets its file too. Raises UserError.
        """
        if best is not None:  # first: an end between the two files leaves the epoch to be done again
            save_checkpoint(checkpoint_of(heads, heads[best], place, state_dict, shared), self.best)
        newest = checkpoint_of_all(heads, place, state_dict, shared)
        save_checkpoint(newest, self.newest, before=self.previous)

    def tidy(self):
        """Remove the one before, at the end of a run."""
        self.previous.unlink(missing_ok=True)


def _same(path, source):
    return source is not None and path.is_file() and path.samefile(source)
