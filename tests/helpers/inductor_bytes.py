"""The bytes that the kernels of a compiled program move, as Inductor counts them in the code that it makes.

As a program, on a GPU or null CUDA: `encoder ARCH SPLITS BATCH SIZE`, a query encoder's forward and backward
pass and a key encoder's forward pass in bfloat16 and channels_last, or `augmentation RECIPE VIEWS SIZE`. It
prints a line of JSON: {"gigabytes": of each graph, "kernels": of each graph}. Nothing is run.
"""

import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]


class NotRun(Exception):
    pass


def count(work):
    """(bytes, kernels) of each graph that work() compiles, in order."""
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor.graph import GraphLowering

    found = []

    def counted(self):
        self.codegen()
        moved, kernels, _ = self.count_bytes()
        found.append((moved, len(kernels)))
        return types.SimpleNamespace(call=not_run, runner=None, __file__="none.py", key=str(len(found)))

    def not_run(*_):
        raise NotRun

    GraphLowering._compile_to_module = counted
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._inductor.config.fx_graph_cache = False
    torch._inductor.config.triton.autotune_at_compile_time = False
    work()
    return found


def encoder(arch, splits, batch, size):
    from moco.builder import MoCo
    from moco.encoders import base_encoder

    model = MoCo(base_encoder(arch), K=1, mlp=True, bn_splits=splits)
    images = torch.empty(batch, 3, size, size, device="cuda")
    for network in (model.encoder_q, model.encoder_k):
        network.to(memory_format=torch.channels_last)
        network.compile()
    model.cuda()
    for network, learns in ((model.encoder_q, True), (model.encoder_k, False)):
        try:
            with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(learns):
                network(images)
        except NotRun:
            continue


def augmentation(recipe, views, size):
    from moco.data import augment
    from moco.data.device import DeviceAugment

    DeviceAugment(getattr(augment, recipe)(), "cuda", True, (views, size))  # which gets over what is not run


def counted(environment, *words):
    """What this file prints as a program with `words`, as a dict."""
    command = [sys.executable, HERE, *map(str, words)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as cache:
        own = {"PYTHONPATH": paths, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        done = subprocess.run(command, env=os.environ | own | environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    kind, name, *numbers = sys.argv[1:]
    function = {"encoder": encoder, "augmentation": augmentation}[kind]
    graphs = count(lambda: function(name, *map(int, numbers)))
    moved, kernels = zip(*graphs, strict=True)
    print(json.dumps({"gigabytes": [round(number / 1e9, 2) for number in moved], "kernels": kernels}))
