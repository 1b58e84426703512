"""Batches from files: their samples, whoever makes them, and images that cannot be read."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from made_folders import make_folders
from odd_images import DAMAGED, ODD, encoded
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import functional

from moco.data.augment import draw, linear_train, moco_v1, moco_v2
from moco.data.cache import decoded_cache
from moco.data.decode import read_pixels
from moco.data.device import DeviceAugment
from moco.data.folders import image_folder, paths_of
from moco.data.loader import TRIES, TrainLoader, ValidationLoader, batch_per_process
from moco.errors import UserError
from moco.loader import IMAGENET_MEAN, IMAGENET_STD

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

RECIPES = {"v1": moco_v1(), "v2": moco_v2(), "linear": linear_train()}


def batches_of(
    folder,
    workers=0,
    seed=3,
    epoch=1,
    batch_size=8,
    photometric=True,
    recipe=None,
    size=16,
    first_step=0,
    **options,
):
    """The batches of an epoch, copied, and their finished views: a list of (q, k, targets, indices)."""
    recipe = recipe or moco_v2()
    loader = TrainLoader(
        image_folder(folder, "train"),
        recipe,
        size=size,
        batch_size=batch_size,
        seed=seed,
        workers=workers,
        photometric=photometric,
        **options,
    )
    augment = DeviceAugment(recipe, "cpu", not photometric)
    found = [
        (*augment(batch), batch.targets, torch.from_numpy(batch.indices))
        for batch in loader.epoch(epoch, first_step)
    ]
    assert len(found) == len(loader) - first_step
    loader.close()
    return found


def equal(ours, theirs):
    return all(
        torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_samples_do_not_depend_on_workers(folders):
    without, two = batches_of(folders, 0), batches_of(folders, 2)
    assert equal(without, two)
    assert equal(without[1:], batches_of(folders, 1, first_step=1))
    assert not equal(without, batches_of(folders, 0, seed=4))
    assert not equal(without, batches_of(folders, 0, epoch=2))
    targets, indices = (torch.cat([batch[part] for batch in without]) for part in (2, 3))
    assert sorted(indices.tolist()) == list(range(24))
    assert torch.equal(targets, torch.tensor(image_folder(folders, "train").targets)[indices])


def test_epochs_of_one_loader(folders):
    images, normalized = image_folder(folders, "train"), DeviceAugment(moco_v2(), "cpu", photometric=False)
    loader = TrainLoader(images, moco_v2(), size=16, batch_size=8, seed=3, workers=2)
    for epoch in (0, 1, 0):
        made = [tuple(normalized(batch)) for batch in loader.epoch(epoch)]
        assert equal(made, [batch[:2] for batch in batches_of(folders, epoch=epoch)])
    loader.close()


def test_no_two_samples_draw_the_same_numbers(tmp_path):
    """One image under many names: every view that any worker or rank makes of it differs from the others."""
    make_folders(tmp_path, classes=("ant",), train=1)
    image = tmp_path / "train" / "ant" / "0.jpg"
    for i in range(1, 32):
        (image.parent / f"{i}.jpg").write_bytes(image.read_bytes())
    views = [
        view
        for rank in range(2)
        for q, k, *_ in batches_of(tmp_path, 2, batch_size=4, rank=rank, world_size=2)
        for view in (*q, *k)
    ]
    assert len(views) == 2 * 32
    assert len({view.numpy().tobytes() for view in views}) == len(views)


@pytest.mark.parametrize("recipe", ["v1", "v2"])
@pytest.mark.parametrize("resize", ["pil", "torch"])
def test_pixels_are_the_same_wherever_colors_are_done(folders, recipe, resize):
    options = {"workers": 1, "recipe": RECIPES[recipe], "resize": resize}
    by_workers = batches_of(folders, **options)
    assert equal(by_workers, batches_of(folders, photometric=False, **options))
    other = "torch" if resize == "pil" else "pil"
    assert not equal(by_workers, batches_of(folders, **options | {"resize": other}))


@pytest.mark.parametrize("resize", ["pil", "torch"])
def test_a_cache_changes_no_sample(folders, resize):
    cache = decoded_cache(paths_of(image_folder(folders, "train")), show_progress=False)
    assert equal(batches_of(folders, 1, resize=resize), batches_of(folders, 2, resize=resize, cache=cache))
    cache.place(0)[...] = 0  # negative control
    assert not equal(batches_of(folders, resize=resize), batches_of(folders, resize=resize, cache=cache))


def test_samples_do_not_depend_on_the_batch_size(folders):
    def samples(batch_size):
        batches = batches_of(folders, batch_size=batch_size)
        return sorted(view.numpy().tobytes() for q, *_ in batches for view in q)

    assert samples(4) == samples(12)


def test_loading_leaves_the_callers_generator_alone(folders):
    torch.manual_seed(1)
    batches_of(folders, 1)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2), (4, 1)])
def test_validation_counts_every_image_once(folders, world_size, workers):
    images, seen = image_folder(folders, "val"), {}  # 9 images: no multiple of 2 or 4
    for rank in range(world_size):
        loader = ValidationLoader(
            images, size=16, batch_size=4, rank=rank, world_size=world_size, workers=workers
        )
        for _ in range(2):
            for batch in loader:
                assert batch.pixels.shape[0] == 1
                for index, target, view in zip(batch.indices, batch.targets, batch.pixels[0], strict=True):
                    seen[int(index)] = int(target), view.numpy().tobytes()
        assert len(loader) == -(-len(range(rank, 9, world_size)) // 4)
        loader.close()
    assert sorted(seen) == list(range(9)) and len(set(seen.values())) == 9
    assert [seen[index][0] for index in range(9)] == images.targets


def test_batches_are_shared_by_processes():
    assert batch_per_process(256, 4) == 64
    assert batch_per_process(256, 4, bn_splits=32) == 64
    assert batch_per_process(4, 4, views=1) == 1
    for words, said in (
        ((9, 2), "--batch-size 9 cannot be shared by the 2 processes"),
        ((12, 2, 4), "batch of 6 has no --bn-splits 4 equal groups"),
        ((4, 4), "at least 2 images in each group"),
    ):
        with pytest.raises(UserError, match=said):
            batch_per_process(*words)


def test_fewer_images_than_a_step_takes(folders):
    with pytest.raises(UserError, match=r"has 24 images, fewer than a step's 32; lower -b"):
        batches_of(folders, batch_size=16, world_size=2)


# Real photographs, from their files to the encoder's input.


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A training set of scikit-learn's two photographs, JPEG files of 640 x 427, four times each."""
    folder = tmp_path_factory.mktemp("photographs") / "train"
    for name in ("china", "flower"):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            source = Path(sklearn.datasets.__file__).parent / "images" / f"{name}.jpg"
            shutil.copy(source, folder / name / f"{number}.jpg")
    return folder.parent


def published(path, view, recipe):
    """torchvision's own operations on PIL images, with the numbers that were drawn."""
    image = Image.open(path).convert("RGB")
    box = (int(view[name]) for name in ("top", "left", "height", "width"))
    image = functional.resized_crop(image, *box, [224, 224])
    gray = transforms.Grayscale(3) if view["gray"] else lambda image: image
    image = gray(image) if recipe.gray_first else image
    for operation in view["order"] if view["jitter"] else ():
        name = ("brightness", "contrast", "saturation", "hue")[operation]
        image = getattr(functional, f"adjust_{name}")(image, float(view[name]))
    image = image if recipe.gray_first else gray(image)
    if view["sigma"]:
        image = image.filter(ImageFilter.GaussianBlur(float(view["sigma"])))
    image = functional.hflip(image) if view["flip"] else image
    return functional.normalize(functional.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("photometric", [True, False])
def test_views_are_the_published_pixels(photographs, name, photometric):
    recipe = RECIPES[name]
    [(q, k, targets, indices)] = batches_of(photographs, size=224, recipe=recipe, photometric=photometric)
    paths = sorted(photographs.glob("train/*/*.jpg"))
    for views in zip(q, k, targets, indices.tolist(), strict=True):
        *pair, target, index = views
        expected = [published(paths[index], view, recipe) for view in draw(recipe, 640, 427, 3, 1, index)]
        assert all(map(torch.equal, pair, expected)) and target == index // 4
        assert not torch.equal(pair[0], expected[1])


# Images that cannot be read.

KINDS = ["truncated.jpg", "text.jpg", "empty.jpg", "bomb.png"]


def damage(root, kinds=KINDS):
    """Put damaged files into root/train/bee, and a link to nowhere: their paths, in ImageFolder's order."""
    bad = [root / "train" / "bee" / name for name in kinds]
    for path in bad:
        path.write_bytes(DAMAGED[path.name]())
    bad.append(root / "train" / "bee" / "link.jpg")
    bad[-1].symlink_to("nowhere")
    return sorted(map(str, bad))


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A data set of 27 good and 5 bad training images, which are all in every epoch, and the bad paths."""
    root = tmp_path_factory.mktemp("spoilt")
    make_folders(root, train=9)
    return root, damage(root)


@pytest.mark.parametrize("kind", [*KINDS, "link.jpg"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_names_the_path(tmp_path, kind, workers):
    make_folders(tmp_path, classes=("ant", "bee"), train=4)
    damage(tmp_path, [kind] if kind in KINDS else [])
    if kind in KINDS:
        (tmp_path / "train" / "bee" / "link.jpg").unlink()
    with pytest.raises(UserError) as caught:
        batches_of(tmp_path, workers, batch_size=9)
    said = f"{tmp_path}/train/bee/{kind} cannot be read as an image ("
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def named(errors):
    """The paths that lines on standard error name; other lines are not allowed."""
    lines = errors.splitlines()
    assert all(line.startswith("bad image: ") and line.endswith("in its place") for line in lines)
    return [line.removeprefix("bad image: ").split(" cannot be read")[0] for line in lines]


def test_skip_takes_the_same_other_images_on_every_run(spoilt, folders, capfd):
    root, bad = spoilt
    runs = [batches_of(root, workers, on_bad_image="skip") for workers in (0, 0, 1, 4)]
    said = named(capfd.readouterr().err)
    assert set(said) == set(bad)
    assert all(equal(runs[0], run) for run in runs)
    assert not equal(runs[0], batches_of(root, on_bad_image="skip", seed=4))
    split = [
        batches_of(root, 1, batch_size=4, rank=rank, world_size=2, on_bad_image="skip") for rank in (0, 1)
    ]
    for whole, *parts in zip(runs[0], *split, strict=True):
        assert all(torch.equal(part, torch.cat(both)) for part, *both in zip(whole, *parts, strict=True))
    capfd.readouterr()
    batches_of(folders, on_bad_image="skip")  # negative control: nothing is bad
    assert capfd.readouterr().err == ""


def test_each_worker_names_a_file_once(spoilt, capfd):
    root, bad = spoilt
    images = image_folder(root, "train")
    for workers in (0, 1):
        loader = TrainLoader(
            images, moco_v2(), size=16, batch_size=8, seed=3, workers=workers, on_bad_image="skip"
        )
        for epoch in range(3):
            assert len(list(loader.epoch(epoch))) == 4
        loader.close()
        assert sorted(named(capfd.readouterr().err)) == bad


def test_the_image_in_its_place_brings_its_class_and_depends_on_epoch_and_index(spoilt):
    root, bad = spoilt
    images = image_folder(root, "train")
    paths = paths_of(images)
    images.target_transform = None
    images.samples = [(path, number) for number, path in enumerate(paths)]  # each a class of its own
    images.targets = list(range(len(paths)))
    loader = TrainLoader(images, moco_v2(), size=16, batch_size=32, seed=3, on_bad_image="skip")
    lost = [paths.index(path) for path in bad]
    taken = {index: [] for index in range(32)}
    for epoch in range(9):
        [batch] = loader.epoch(epoch)
        for index, target in zip(batch.indices.tolist(), batch.targets.tolist(), strict=True):
            taken[index].append(target)
            assert target not in lost and (target == index) == (index not in lost)
        place = batch.indices.tolist().index(lost[0])
        height, width = read_pixels(paths[taken[lost[0]][-1]]).shape[:2]
        assert np.array_equal(batch.records[:, place], draw(moco_v2(), width, height, 3, epoch, lost[0]))
    assert len({tuple(taken[index]) for index in lost}) == len(lost)
    assert all(len(set(taken[index])) > 3 for index in lost)
    assert [taken[index][:3] for index in lost] == [
        [1, 23, 31],
        [8, 29, 16],
        [26, 29, 8],
        [9, 3, 3],
        [4, 28, 0],
    ]  # on every version


def test_when_nothing_can_be_read(tmp_path, capfd):
    make_folders(tmp_path, classes=("ant",))
    for path in (tmp_path / "train" / "ant").iterdir():
        path.write_text("no image")
    with pytest.raises(UserError) as caught:
        batches_of(tmp_path, 1, on_bad_image="skip")
    assert f"cannot be read, nor can {TRIES} images drawn in its place" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(named(capfd.readouterr().err)) == 8


def test_a_file_that_vanishes_during_training(tmp_path, capfd):
    make_folders(tmp_path)
    for how in ("skip", "error"):
        gone = tmp_path / "train" / "cat" / "0.jpg"
        loader = TrainLoader(
            image_folder(tmp_path, "train"), moco_v2(), size=16, batch_size=8, seed=3, on_bad_image=how
        )
        assert len(list(loader.epoch(0))) == 3
        kept = gone.read_bytes()
        gone.unlink()
        if how == "error":
            with pytest.raises(UserError, match=r"cat/0\.jpg cannot be read"):
                list(loader.epoch(1))
        else:
            assert len(list(loader.epoch(1))) == 3
            assert named(capfd.readouterr().err) == [str(gone)]
        gone.write_bytes(kept)


def test_names_of_any_bytes(tmp_path, capfd):
    make_folders(tmp_path)
    for name in (b"caf\xe9.jpg", b"a\nb.jpg"):
        with open(os.fsencode(tmp_path) + b"/train/ant/" + name, "wb") as file:
            file.write(b"no image")
    batches_of(tmp_path, 1, batch_size=26, on_bad_image="skip")
    names = [path.removeprefix(f"{tmp_path}/train/ant/") for path in named(capfd.readouterr().err)]
    assert sorted(names) == [r"a\nb.jpg", r"caf\udce9.jpg"]
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"train/ant/(a\\nb|caf\\udce9)\.jpg cannot be read"):
            batches_of(tmp_path, workers, batch_size=26)


def test_validation_skips_none_unless_it_is_asked_to(tmp_path, capfd):
    make_folders(tmp_path)
    (tmp_path / "val" / "bee" / "1.jpg").write_text("no image")
    images = image_folder(tmp_path, "val")
    for workers in (0, 1):
        loader = ValidationLoader(images, size=16, batch_size=4, workers=workers)
        with pytest.raises(UserError, match=r"bee/1\.jpg cannot be read .* \(validation counts every image"):
            list(loader)
        loader.close()
    loader = ValidationLoader(images, size=16, batch_size=4, skip_bad=True)
    targets = torch.cat([batch.targets for batch in loader]).tolist()
    assert targets == [0, 0, 0, 1, -1, 1, 2, 2, 2]
    assert capfd.readouterr().err.count("bee/1.jpg cannot be read") == 1


@pytest.mark.parametrize(("photometric", "resize"), [(True, "pil"), (False, "torch")])
def test_odd_images_are_no_bad_images(tmp_path, capfd, photometric, resize):
    for number, name in enumerate(ODD):
        folder = tmp_path / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(ODD[name]())  # what is in a file counts, not its name
    deep = Image.fromarray(np.arange(6000, dtype=np.uint16).reshape(60, 100))
    (tmp_path / "train" / "a" / "16 bits.png").write_bytes(encoded(deep, "PNG"))
    count = len(ODD) + 1
    options = {"batch_size": count, "photometric": photometric, "resize": resize, "on_bad_image": "skip"}
    [(q, k, *_)] = batches_of(tmp_path, **options)
    assert q.shape == k.shape == (count, 3, 16, 16) and bool(q.isfinite().all())
    assert capfd.readouterr().err == ""
