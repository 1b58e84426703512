"""Batches from files: their samples, whatever the workers, and images that cannot be read."""

import os

import numpy as np
import pytest
import torch
from fake_cuda import fake_cuda
from made_folders import make_folders
from made_views import RECIPES, photograph, published
from odd_images import DAMAGED, ODD, encoded
from PIL import Image

from moco.data.augment import draw, moco_v2
from moco.data.cache import decoded_cache
from moco.data.decode import read_pixels
from moco.data.device import DeviceAugment
from moco.data.folders import ImageFolder, image_folder, paths_of
from moco.data.loader import TRIES, TrainLoader, ValidationLoader, batch_per_process
from moco.errors import UserError


def train_loader(folder, **settings):
    settings = {"size": 16, "batch_size": 8, "seed": 3} | settings
    return TrainLoader(image_folder(folder, "train"), moco_v2(), **settings)


def batches_of(folder, epoch=1, first_step=0, **settings):
    """The batches of an epoch, copied, and their normalized views: a list of (q, k, targets, indices)."""
    loader, normalized = train_loader(folder, **settings), DeviceAugment(moco_v2(), "cpu", photometric=False)
    found = [
        (*normalized(batch), batch.targets, torch.from_numpy(batch.indices))
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
    without = batches_of(folders)
    assert equal(without, batches_of(folders, workers=2))
    assert equal(without[1:], batches_of(folders, workers=1, first_step=1))
    assert not equal(without, batches_of(folders, seed=4))
    assert not equal(without, batches_of(folders, epoch=2))
    targets, indices = (torch.cat([batch[part] for batch in without]) for part in (2, 3))
    assert sorted(indices.tolist()) == list(range(24))
    assert torch.equal(targets, torch.tensor(image_folder(folders, "train").targets)[indices])


def test_no_two_samples_draw_the_same_numbers(tmp_path):
    """One image under many names: every view that any worker or rank makes of it differs from the others."""
    make_folders(tmp_path, classes=("ant",), train=1)
    image = tmp_path / "train" / "ant" / "0.jpg"
    for i in range(1, 32):
        (image.parent / f"{i}.jpg").write_bytes(image.read_bytes())
    views = [
        view
        for rank in range(2)
        for q, k, *_ in batches_of(tmp_path, workers=2, batch_size=4, rank=rank, world_size=2)
        for view in (*q, *k)
    ]
    assert len(views) == 2 * 32
    assert len({view.numpy().tobytes() for view in views}) == len(views)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("photometric", [True, False])
def test_views_are_the_published_pixels_of_the_files(tmp_path, name, photometric):
    recipe, folder = RECIPES[name], tmp_path / "train" / "all"
    folder.mkdir(parents=True)
    for number in range(4):
        Image.fromarray(photograph(320, 214, number)).save(folder / f"{number}.jpg", quality=90)
    images, augment = image_folder(tmp_path, "train"), DeviceAugment(recipe, "cpu", not photometric)
    loader = TrainLoader(images, recipe, size=224, batch_size=4, seed=3, photometric=photometric)
    [batch] = loader.epoch(1)
    for *pair, index in zip(*augment(batch), batch.indices.tolist(), strict=True):
        image = Image.open(folder / f"{index}.jpg")
        views = draw(recipe, *image.size, 3, 1, index)
        expected = [published(image, view, name, 224) for view in views]
        assert all(map(torch.equal, pair, expected))
        assert not torch.equal(pair[0], expected[1])


@pytest.mark.parametrize("resize", ["pil", "torch"])
def test_a_cache_changes_no_sample(folders, resize):
    cache = decoded_cache(paths_of(image_folder(folders, "train")), show_progress=False)
    from_files = batches_of(folders, workers=1, resize=resize)
    assert equal(from_files, batches_of(folders, workers=2, resize=resize, cache=cache))
    cache.writable(0)[...] = 0  # negative control
    assert not equal(from_files, batches_of(folders, resize=resize, cache=cache))


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


# The last step of an epoch, for which too few images are left.


@pytest.mark.parametrize(
    ("world_size", "batch_size", "last"),
    [(1, 6, [3]), (2, 4, [3, 2]), (2, 5, [1, 0]), (3, 3, [1, 1, 1]), (4, 5, [1, 0, 0, 0])],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_the_images_of_the_last_step(tmp_path, world_size, batch_size, last, workers):
    make_folders(tmp_path, train=7)  # 21 images
    settings = {"batch_size": batch_size, "world_size": world_size, "workers": workers}
    shared = [batches_of(tmp_path, rank=rank, drop_last=False, **settings) for rank in range(world_size)]
    assert [[len(indices) for *_, indices in of_rank] for of_rank in shared] == [
        [batch_size] * (21 // (batch_size * world_size)) + [size] for size in last
    ]
    whole = batches_of(tmp_path, batch_size=batch_size * world_size, drop_last=False)
    for together, *parts in zip(whole, *shared, strict=True):
        assert all(torch.equal(part, torch.cat(both)) for part, *both in zip(together, *parts, strict=True))
    assert sorted(torch.cat([indices for *_, indices in whole]).tolist()) == list(range(21))
    dropped = batches_of(tmp_path, batch_size=batch_size * world_size)  # negative control
    assert equal(whole[:-1], dropped) and sum(len(indices) for *_, indices in dropped) == 21 - sum(last)


def test_of_images_that_fill_all_steps_none_is_left_to_drop(folders):
    assert equal(batches_of(folders, drop_last=False), batches_of(folders))


def test_fewer_images_than_a_step_takes_make_one_unless_they_are_dropped(folders):
    [(*_, indices)] = batches_of(folders, batch_size=100, drop_last=False, workers=2)
    assert sorted(indices.tolist()) == list(range(24))
    with pytest.raises(UserError, match="has 24 images, fewer than a step's 100; lower -b"):
        train_loader(folders, batch_size=100)
    one = ImageFolder("DIR", [], [("a.jpg", 0)])
    with pytest.raises(UserError, match="DIR has 1 image, fewer than a step's 2; add images: 2 are the few"):
        TrainLoader(one, moco_v2(), size=16, batch_size=2, seed=0)
    with pytest.raises(UserError, match="fewer than a step's 16; add images: 8 are .* for these processes"):
        TrainLoader(one, moco_v2(), size=16, batch_size=4, seed=0, world_size=4)


@pytest.mark.parametrize("workers", [0, 1])
def test_on_cuda_the_last_batch_has_the_shape_of_the_others(folders, workers):
    def sizes(**settings):
        loader = train_loader(folders, batch_size=5, rank=1, world_size=2, workers=workers, **settings)
        found = [
            [*map(len, (batch.pixels[0], batch.records[0], batch.targets, batch.indices))]
            for epoch in range(2)
            for batch in loader.epoch(epoch)
        ]
        loader.close()
        return found

    with fake_cuda() as gpu:
        assert sizes(drop_last=False, device="cuda") == [[5] * 4, [5] * 4, [5, 5, 2, 2]] * 2
        assert sizes(device="cuda") == [[5] * 4] * 4
    assert gpu.refused == gpu.overwritten == []
    assert sizes(drop_last=False) == [[5] * 4, [5] * 4, [2] * 4] * 2


def test_processes_share_the_batch():
    assert batch_per_process(256, 4) == batch_per_process(256, 4, bn_splits=32) == 64
    assert batch_per_process(4, 4, views=1) == 1
    with pytest.raises(UserError, match="--batch-size 9 cannot be shared by the 2 processes"):
        batch_per_process(9, 2)


# Images that cannot be read.

KINDS = ["truncated.jpg", "text.jpg", "empty.jpg", "bomb.png", "link.jpg"]


def damage(root, kinds=KINDS):
    """Put damaged files into root/train/bee, and a link to nowhere: their paths, in ImageFolder's order."""
    bad = [root / "train" / "bee" / name for name in kinds]
    for path in bad:
        if path.name == "link.jpg":
            path.symlink_to("nowhere")
        else:
            path.write_bytes(DAMAGED[path.name]())
    return sorted(map(str, bad))


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A data set of 27 good and 5 bad training images, which are all in every epoch, and the bad paths."""
    root = tmp_path_factory.mktemp("spoilt")
    make_folders(root, train=9)
    return root, damage(root)


def named(errors):
    """The paths that lines on standard error name; other lines are not allowed."""
    lines = errors.splitlines()
    assert all(line.startswith("bad image: ") and line.endswith("in its place") for line in lines)
    return [line.removeprefix("bad image: ").split(" cannot be read")[0] for line in lines]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_names_the_path(tmp_path, kind, workers):
    make_folders(tmp_path, classes=("ant", "bee"), train=4)
    damage(tmp_path, [kind])
    with pytest.raises(UserError) as caught:
        batches_of(tmp_path, workers=workers, batch_size=9)
    said = f"{tmp_path}/train/bee/{kind} cannot be read as an image ("
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_skip_takes_the_same_other_images_on_every_run(spoilt, folders, capfd):
    root, bad = spoilt
    runs = [batches_of(root, workers=workers, on_bad_image="skip") for workers in (0, 0, 1, 4)]
    assert set(named(capfd.readouterr().err)) == set(bad)
    assert all(equal(runs[0], run) for run in runs)
    assert not equal(runs[0], batches_of(root, on_bad_image="skip", seed=4))
    options = {"batch_size": 4, "world_size": 2, "on_bad_image": "skip"}
    split = [batches_of(root, rank=rank, **options) for rank in (0, 1)]
    for whole, *parts in zip(runs[0], *split, strict=True):
        assert all(torch.equal(part, torch.cat(both)) for part, *both in zip(whole, *parts, strict=True))
    capfd.readouterr()
    batches_of(folders, on_bad_image="skip")  # negative control: nothing is bad
    assert capfd.readouterr().err == ""


def test_each_worker_names_a_file_once(spoilt, capfd):
    root, bad = spoilt
    for workers in (0, 1):
        loader = train_loader(root, workers=workers, on_bad_image="skip")
        for epoch in range(3):
            assert len(list(loader.epoch(epoch))) == 4
        loader.close()
        assert sorted(named(capfd.readouterr().err)) == bad


def test_a_replacement_brings_its_class_and_depends_on_epoch_and_index(spoilt):
    root, bad = spoilt
    images = image_folder(root, "train")
    paths = paths_of(images)
    images.targets = list(range(len(paths)))  # each a class of its own
    loader = TrainLoader(images, moco_v2(), size=16, batch_size=32, seed=3, on_bad_image="skip")
    lost = [paths.index(path) for path in bad]
    taken = {index: [] for index in range(32)}
    for epoch in range(9):
        [batch] = loader.epoch(epoch)
        for index, target in zip(batch.indices.tolist(), batch.targets.tolist(), strict=True):
            taken[index].append(target)
            assert target not in lost and (target == index) == (index not in lost)
        position = batch.indices.tolist().index(lost[0])
        height, width = read_pixels(paths[taken[lost[0]][-1]]).shape[:2]
        assert np.array_equal(batch.records[:, position], draw(moco_v2(), width, height, 3, epoch, lost[0]))
    assert len({tuple(taken[index]) for index in lost}) == len(lost)
    recorded = [[1, 23, 31], [8, 29, 16], [26, 29, 8], [9, 3, 3], [4, 28, 0]]  # on every version
    assert [taken[index][:3] for index in lost] == recorded


def test_when_nothing_can_be_read(tmp_path, capfd):
    make_folders(tmp_path, classes=("ant",))
    for path in (tmp_path / "train" / "ant").iterdir():
        path.write_text("no image")
    with pytest.raises(UserError) as caught:
        batches_of(tmp_path, workers=1, on_bad_image="skip")
    assert f"cannot be read, nor can {TRIES} images drawn in its place" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(named(capfd.readouterr().err)) == 8


@pytest.mark.parametrize("on_bad_image", ["skip", "error"])
def test_a_file_that_is_removed_during_training(tmp_path, capfd, on_bad_image):
    make_folders(tmp_path)
    gone = tmp_path / "train" / "cat" / "0.jpg"
    loader = train_loader(tmp_path, on_bad_image=on_bad_image)
    assert len(list(loader.epoch(0))) == 3
    gone.unlink()
    if on_bad_image == "skip":
        assert len(list(loader.epoch(1))) == 3
        assert named(capfd.readouterr().err) == [str(gone)]
    else:
        with pytest.raises(UserError, match=r"cat/0\.jpg cannot be read"):
            list(loader.epoch(1))


def test_names_of_any_bytes(tmp_path, capfd):
    make_folders(tmp_path)
    for name in (b"caf\xe9.jpg", b"a\nb.jpg"):
        with open(os.fsencode(tmp_path) + b"/train/ant/" + name, "wb") as file:
            file.write(b"no image")
    batches_of(tmp_path, workers=1, batch_size=26, on_bad_image="skip")
    names = [path.removeprefix(f"{tmp_path}/train/ant/") for path in named(capfd.readouterr().err)]
    assert sorted(names) == [r"a\nb.jpg", r"caf\udce9.jpg"]
    with pytest.raises(UserError, match=r"train/ant/(a\\nb|caf\\udce9)\.jpg cannot be read"):
        batches_of(tmp_path, workers=1, batch_size=26)


def test_validation_skips_none_unless_it_is_asked_to(tmp_path, capfd):
    make_folders(tmp_path)
    (tmp_path / "val" / "bee" / "1.jpg").write_text("no image")
    images = image_folder(tmp_path, "val")
    loader = ValidationLoader(images, size=16, batch_size=4, workers=1)
    with pytest.raises(UserError, match=r"bee/1\.jpg cannot be read .* \(validation counts every image"):
        list(loader)
    loader.close()
    loader = ValidationLoader(images, size=16, batch_size=4, skip_bad=True)
    targets = torch.cat([batch.targets for batch in loader]).tolist()
    assert targets == [0, 0, 0, 1, -1, 1, 2, 2, 2]
    assert capfd.readouterr().err.count("bee/1.jpg cannot be read") == 1


@pytest.mark.parametrize(("photometric", "resize"), [(True, "pil"), (False, "torch")])
def test_odd_images_are_no_bad_images(tmp_path, photometric, resize):
    folder, deep = tmp_path / "train" / "all", np.arange(6000, dtype=np.uint16).reshape(60, 100)
    folder.mkdir(parents=True)
    for number, name in enumerate(ODD):
        (folder / f"{number}.jpg").write_bytes(ODD[name]())  # what is in a file counts, not its name
    (folder / "16 bits.png").write_bytes(encoded(Image.fromarray(deep), "PNG"))
    [(q, *_)] = batches_of(tmp_path, batch_size=len(ODD) + 1, photometric=photometric, resize=resize)
    assert len(q) == len(ODD) + 1 and bool(q.isfinite().all())
