"""The memory traffic of compiled kernels, by Inductor's count of its own code for CUDA: BatchNorm over groups
against one group, and the augmentation. `python -m pytest -m slow -s` prints the gigabytes.
"""

import inductor_bytes
import null_cuda
import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.cuda.is_available() and null_cuda.missing() is not None, reason=str(null_cuda.missing())
    ),
]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """counted(*words): what inductor_bytes.py says, on a GPU or on null CUDA."""
    environment = {}
    if not torch.cuda.is_available():
        environment = null_cuda.environment(null_cuda.build(tmp_path_factory.mktemp("null_cuda")))

    def run(*words):
        found = inductor_bytes.counted(environment, *words)
        print(*words, found)
        return found["gigabytes"]

    return run


def test_groups_cost_little_memory_traffic(counted):
    """A step of ResNet-50 on 512 images of 224 px: queries forward and backward, keys forward."""
    one, eight = (counted("encoder", "resnet50", splits, 512, 224) for splits in (1, 8))
    assert len(one) == len(eight) == 3  # one graph each: nothing breaks them
    print(f"groups / none: {sum(eight) / sum(one):.3f}")
    assert 1 < sum(eight) / sum(one) <= 1.06


def test_box_filters_of_the_augmentation_keep_bytes(counted):
    ours, by_default = counted("augmentation", "moco_v2", 1024, 224)
    assert ours <= 3 * 1.3  # three times what kernels written for it moved
    assert by_default > 2 * ours  # the control: the count sees sums that are kept
