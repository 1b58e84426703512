"""What the tests of the commands share."""

import miniature as of_imagenet
import pytest

from moco import imagenet100


@pytest.fixture
def miniature(monkeypatch):
    """moco.imagenet100 takes the classes and the number of images of the miniature for ImageNet-100's."""
    monkeypatch.setattr(imagenet100, "read_classes", lambda: of_imagenet.CLASSES)
    monkeypatch.setattr(imagenet100, "IMAGES", of_imagenet.IMAGES)
