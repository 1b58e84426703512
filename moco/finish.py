"""From a loaded batch of uint8 views to what the encoders take."""

from moco.photometric import fastest_finish, to_device
from moco.views import normalise


def finisher(device_aug, recipe, device):
    """A function from a Batch (moco.slots) to its views, float32 (N, 3, H, W) on `device` each, and a
    line on it.

    device_aug: "off" when the workers have done the recipe's photometric half, so that only normalisation is
    left; "exact" (PIL's pixels) or "float" (torchvision's formulas) to do it here.
    """
    if device_aug == "off":
        return lambda batch: [
            normalise(view) for view in batch.pixels
        ], "photometric half: PIL, in the workers"
    finish, how = fastest_finish(recipe, device_aug, device)

    def apply(batch):
        views, n = batch.pixels.shape[:2]
        drawn = to_device(batch.records.reshape(-1), device)
        return finish(batch.pixels.flatten(0, 1), drawn).unflatten(0, (views, n)).unbind()

    return apply, how
