"""Command lines of both programs: what they mean, and wrong ones, which end in a sentence (exit code 2)."""

import re

import pytest
import torch
from command_lines import MOCO, SMALL

import main_lincls
import main_moco
from moco import options
from moco.encoders import base_encoder
from moco.errors import Parser, UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHARED_DEFAULTS = (
    {"folder": None, "dataset": "imagenet100", "dataset_root": None, "image_size": 224, "workers": None}
    | {"device_aug": None, "resize": None, "cache": None, "gray_range": None, "on_bad_image": "error"}
    | {"arch": "resnet50", "stem": None, "start_epoch": 0, "batch_size": 256, "momentum": 0.9, "seed": None}
    | {"fast": False, "amp": None, "channels_last": None, "compile": None}
    | {"output_dir": ".", "resume": "", "overwrite": False, "print_freq": 10}
    | {"multiprocessing_distributed": False, "world_size": -1, "rank": -1, "gpu": None}
    | {"local_rank": None}
    | {"dist_url": None, "dist_backend": None}
)
PRETRAINING_DEFAULTS = (
    SHARED_DEFAULTS
    | {"epochs": 200, "lr": 0.03, "schedule": [120, 160], "weight_decay": 1e-4}
    | {"moco_dim": 128, "moco_k": 65536, "moco_m": 0.999, "moco_t": 0.07, "mlp": False, "aug_plus": False}
    | {"cos": False, "method": None, "epsilon": None, "alpha": None, "crops_only": False, "bn_splits": 1}
    | {"keep": 1, "save_freq": 0, "knn": 0, "tensorboard": False, "random_bits": 0, "images": None}
    | {"pretrained": "", "bits_per": "image", "match_ifm": False}
)
LINEAR_DEFAULTS = (
    SHARED_DEFAULTS
    | {"epochs": 100, "lr": [30.0], "schedule": [60, 80], "weight_decay": 0.0}
    | {"evaluate": False, "pretrained": "", "target": None}
)


def test_defaults_are_the_published_ones():
    assert vars(options.pretraining([])) == PRETRAINING_DEFAULTS
    assert vars(options.linear_evaluation([])) == LINEAR_DEFAULTS


SPAWN = "--dist-url tcp://localhost:10001 --multiprocessing-distributed --world-size 1 --rank 0"
SPAWNED = {
    "dist_url": "tcp://localhost:10001",
    "multiprocessing_distributed": True,
    "world_size": 1,
    "rank": 0,
}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "-a resnet50 --lr 0.8 --batch-size 512 --moco-m 0.99 --mlp --moco-t 0.2 --aug-plus --cos "
            f"{SPAWN} --method ifm --epsilon 0.1 --dataset_root PATH/TO/DATA",
            {"lr": 0.8, "batch_size": 512, "moco_m": 0.99, "mlp": True, "moco_t": 0.2, "aug_plus": True}
            | {"cos": True, "method": "ifm", "epsilon": 0.1, "alpha": 1.0, "dataset_root": "PATH/TO/DATA"}
            | SPAWNED,
        ),
        (
            f"-a resnet50 --lr 0.03 --batch-size 256 {SPAWN} PATH/TO/IMAGENET",
            {"folder": "PATH/TO/IMAGENET"} | SPAWNED,
        ),
        (
            "--dataset-root R --dataset D --learning-rate 1 --wd 0 --schedule --method ifm_only -j 0",
            {"dataset_root": "R", "dataset": "D", "lr": 1.0, "weight_decay": 0.0, "schedule": []}
            | {"method": "ifm_only", "epsilon": 0.1, "alpha": 1.0, "workers": 0},
        ),
        ("--schedule 30 40 DIR --cos", {"folder": "DIR", "schedule": [30, 40], "cos": True}),
    ],
)
def test_published_pretraining_lines_mean_the_same(line, expected):
    assert vars(options.pretraining(line.split())) == PRETRAINING_DEFAULTS | expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--pretrained=model_best.pth.tar --lr 10.0 -b=128 --schedule 30 40 50 --epochs 60 "
            "--dist-url=tcp://localhost:10001 --dataset_root=PATH/TO/DATA",
            {"pretrained": "model_best.pth.tar", "lr": [10.0], "batch_size": 128, "schedule": [30, 40, 50]}
            | {"epochs": 60, "dist_url": "tcp://localhost:10001", "dataset_root": "PATH/TO/DATA"},
        ),
        ("--lr 30 DIR", {"folder": "DIR"}),
        ("--schedule 30 40 DIR", {"folder": "DIR", "schedule": [30, 40]}),
        ("--schedule DIR --lr 2", {"folder": "DIR", "schedule": [], "lr": [2.0]}),
        ("DIR --lr 0.1 1 10", {"folder": "DIR", "lr": [0.1, 1.0, 10.0]}),
        ("--lr 0.1 1 DIR --weight-decay 1e-6", {"folder": "DIR", "lr": [0.1, 1.0], "weight_decay": 1e-6}),
    ],
)
def test_published_linear_lines_mean_the_same(line, expected):
    assert vars(options.linear_evaluation(line.split())) == LINEAR_DEFAULTS | expected


WRONG_FLAGS = {
    options.pretraining: [
        ("-b 0", "argument -b/--batch-size: must be at least 1, not 0"),
        ("--lr 0", "argument --lr/--learning-rate: must be above 0, not 0"),
        ("--lr nan", "must be above 0, not nan"),
        ("--start-epoch 7 --epochs 7", "--start-epoch 7 leaves nothing of --epochs 7"),
        ("--schedule 10 -1", "--schedule: must be at least 0, not -1"),
        ("--schedule 10 1.5 DIR", "--schedule: '1.5' is not a whole number"),
        ("A --schedule 10 B", "--schedule: 'B' is not a number"),
        ("--schedule 10 A 20", "--schedule: 'A' is not a number"),
        ("--schedule 120,160", "'120,160' is not a number; separate numbers by spaces"),
        ("--schedule A --dataset-root R", "'A' is not a number"),
        ("--seed 9223372036854775808", "--seed: must be between 0 and 9223372036854775807"),
        ("--image-size 7", "--image-size: must be at least 8"),
        ("--moco-m 1.5", "--moco-m: must be between 0 and 1, not 1.5"),
        ("--moco-t 0", "--moco-t: must be above 0"),
        ("--random-bits 64", "--random-bits: must be between 0 and 63"),
        ("--random-bits 2 --knn 1", "--knn evaluates images without --random-bits"),
        ("--bits-per view", "--bits-per view is of --random-bits N"),
        ("--match-ifm", "--match-ifm needs the --method whose factor it takes"),
        ("--epsilon 0.1", "add --method ifm"),
        ("--alpha 1", "add --method ifm"),
        ("--method ifm --epsilon=-1", "--epsilon: must be at least 0"),
        ("--method ifm_only --alpha 1", "ifm_only has one loss"),
        ("--method other", "invalid choice: 'other'"),
        ("--crops-only --aug-plus", "give one of the two"),
        ("--cache decoded --on-bad-image skip", "leave --cache out"),
        ("--resume missing.pth.tar", "there is no file missing.pth.tar"),
        ("--resume auto --overwrite", "give one of the two"),
        ("--decoder pillow", "--decoder is gone: simplejpeg is used when it is installed"),
        ("--cache files", "--cache: files is gone: .* leave it out"),
        ("--cache device", "--cache: device is gone: use decoded"),
        ("--device-aug float", "--device-aug: float is gone: use exact"),
    ],
    options.linear_evaluation: [
        ("--lr 1 1.0", "1 is given twice"),
        ("--lr 1 x 2", "'x' is not a number"),
        ("--lr 3O", "'3O' is not a number"),
        ("--lr DIR", "expected a number before the folder"),
        ("A --lr 1 B", "'B' is not a number"),
        ("-e", "--evaluate needs the classifier to validate: --resume model_best.pth.tar"),
        ("--target size", "invalid choice: 'size'"),
    ],
}


@pytest.mark.parametrize(
    ("parse", "line", "message"), [(parse, *case) for parse, cases in WRONG_FLAGS.items() for case in cases]
)
def test_wrong_flags_are_a_sentence(parse, line, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(line.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("parse", [options.pretraining, options.linear_evaluation])
def test_help_is_narrow_and_says_the_defaults(parse, capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert max(map(len, shown.splitlines())) < 80
    assert "(default: 256)" in " ".join(shown.split())
    described = shown.split("\ndata:")[1]
    for name in vars(parse([])):
        assert name == "folder" or f"--{name.replace('_', '-')}" in described, name


def test_flags_left_open_follow_the_device(monkeypatch):
    def resolved(line, device=CPU):
        args = options.pretraining(line.split())
        options.resolve(args, device)
        return args.amp, args.channels_last, args.compile, args.device_aug, args.resize

    assert resolved("") == (None, False, False, "off", "pil")
    assert resolved("--device-aug exact") == (None, False, False, "exact", "torch")
    assert resolved("--device-aug exact --resize pil") == (None, False, False, "exact", "pil")
    assert resolved("--fast") == (None, True, False, "off", "pil")
    assert resolved("--fast --bn-splits 8") == (None, False, False, "off", "pil")
    assert resolved("--fast --no-channels-last") == (None, False, False, "off", "pil")
    with pytest.raises(UserError, match="--amp bf16 needs a GPU"):
        resolved("--amp bf16")

    monkeypatch.setattr(torch, "compile", lambda function: lambda x: x)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    assert resolved("", CUDA) == (None, False, False, "exact", "torch")
    assert resolved("--fast --bn-splits 8", CUDA) == ("bf16", True, True, "exact", "torch")
    assert resolved("--fast --no-compile --amp fp16", CUDA) == ("fp16", True, False, "exact", "torch")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(UserError, match="Tesla V100 has no bf16; use --amp fp16"):
        resolved("--fast", CUDA)


def test_a_compiler_that_is_missing_is_said(monkeypatch):
    def fail(function):
        raise RuntimeError("InvalidCxxCompiler: no g++\nmore")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UserError, match=r"--compile does not work here \(InvalidCxxCompiler: no g\+\+\); it"):
        options.resolve(options.pretraining(["--compile"]), CPU)


def test_layout_changes_no_name_and_no_value():
    args = options.pretraining(["--channels-last"])
    options.resolve(args, CPU)
    assert options.speed(args, CPU) == "encoders in float32, channels_last"
    network = base_encoder("resnet18")(num_classes=4)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    options.prepare(args, network)
    assert network.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_settings_are_what_decides_the_numbers():
    def settings(line):
        args = options.pretraining(line.split())
        options.resolve(args, CPU)
        return options.settings(args, seed=4)

    plain = settings("")
    assert plain["seed"] == 4 and plain["resize"] == "pil"
    assert (
        settings("A -j 3 -p 1 --keep 4 --knn 1 --output-dir X --cache decoded --dist-backend gloo") == plain
    )
    assert settings("--images list.txt") == plain
    for flag in ("--lr 1", "-b 8", "--epochs 3", "--device-aug exact", "--method ifm", "--bn-splits 2"):
        assert settings(flag) != plain
    assert settings("--gray-range -1024 3071 A")["gray_range"] == [-1024, 3071]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("5", "expected 2 arguments"),
        ("5 5", "5 must be below 5"),
        ("3071 -1024", "3071 must be below -1024"),
        ("0 nan", "must be finite, not nan"),
        ("-inf 0", "expected 2 arguments"),
        ("0 black", "'black' is not a number"),
    ],
)
def test_a_gray_range_is_two_numbers_in_order(words, message):
    for parse in (options.pretraining, options.linear_evaluation):
        with pytest.raises(UserError, match=f"argument --gray-range: {message}"):
            parse(["--gray-range", *words.split()])


@pytest.mark.parametrize("words", ["-1.2e-05 0.999501", "-1e3 3E+3", "-.5 -5.e-2", "-1024 3071"])
def test_negative_numbers_may_have_an_exponent(words):
    numbers = [float(word) for word in words.split()]
    parser = Parser()
    options.add_gray_range(parser.add_argument)  # as moco.check has it
    for parse in (options.pretraining, options.linear_evaluation, parser.parse_args):
        assert parse(["--gray-range", *words.split()]).gray_range == numbers
    with pytest.raises(UserError, match="argument --gray-range: expected 2 arguments"):  # negative control
        options.pretraining(["--gray-range", f"{words.split()[0]}x", words.split()[1]])


def test_notes_say_what_to_expect():
    def notes(line, images, groups):
        return "\n".join(options.notes(options.pretraining(line.split()), images, groups))

    assert notes("", 126_689, 8).startswith("loss at chance: ln(1+K) = 11.0904\n")
    published = notes("--method ifm --moco-t 0.2", 126_689, 8)
    assert ", with IFM 11.5" in published and ", with IFM" not in notes("--method ifm --match-ifm", 9, 8)
    assert (
        "\nwith K = 65536 and T = 0.2 IFM weighs an image's gradient at most 1.0011 where\n"
        "  the queue's mean is 0: to have an effect lower --moco-t or --moco-k (README)" in published
    )
    strong = notes("--method ifm", 126_689, 8)
    assert "IFM weighs an image's gradient at most 9.2059 where\n  the queue's mean is 0" in strong
    assert "to have an effect" not in strong and "weighs" not in notes("", 126_689, 8)
    control = notes("--method ifm --match-ifm", 126_689, 8)
    assert "T = 0.07 the factor of --match-ifm is at most 9.2059 where" in control and "weighs" not in control
    for flag in ("--epsilon 0.001", "--alpha 0"):
        words = notes(f"--method ifm --moco-k 131072 --moco-t 0.0725 {flag}", 126_689, 8)
        assert "to have an effect raise --epsilon or --alpha (README)" in " ".join(words.split())
        assert max(map(len, words.splitlines())) <= 80
    words = notes("--method ifm_only --epsilon 0.001", 126_689, 8)
    assert "raise --epsilon (README)" in " ".join(words.split())
    assert "--bn-splits 8" in notes("", 126_689, 1) and "--bn-splits" not in notes("", 126_689, 8)
    assert "lower --moco-k" in notes("", 4_000, 8) and "lower --moco-k" not in notes("", 126_689, 8)


# What the programs refuse before training, after the flags themselves.
WRONG_USE = {
    main_moco: [
        ("", "where are the images?"),
        ("missing", "there is no folder missing"),
        ("DATA --dataset_root DATA", "give either DIR .* or --dataset_root, not both"),
        ("--dataset_root DATA", "there is no folder .*imagenet100"),
        (
            "DATA/val/ant/0.jpg",
            "0.jpg is a file; give a folder, or for pre-training a list of images by",
        ),
        ("DATA/val/ant --knn 1", "--knn needs train/ and val/ .*, but .*/ant has no labels; leave it out"),
        (
            "--images DATA/list.txt --knn 1",
            "--knn needs labels, which a list of --images does not have; leave",
        ),
        (
            "--images DATA/list.txt DATA",
            "--images takes the place of DIR, --dataset_root and --dataset; give",
        ),
        ("--images DATA/list.txt --dataset trifeature", "--images takes the place of DIR"),
        ("--images DATA/list.txt", "list.txt cannot be read .No such file"),
        ("DATA -a resnet5", "no classification model 'resnet5'; did you mean resnet50?"),
        ("DATA -a inception_v3 --image-size 64", "inception_v3 cannot take --image-size 64 "),
        ("DATA -b 25", "has 24 images, fewer than a step's 25"),
        ("DATA --bn-splits 3", "3 equal groups"),
        ("DATA --bn-splits 8", "at least 2 images"),
        ("DATA --amp bf16", "--amp bf16 needs a GPU"),
        ("DATA --resume DATA/train/ant/0.jpg", "not a checkpoint"),
        ("DATA --output-dir DATA/train/ant/0.jpg", "cannot write to --output-dir"),
        ("DATA --dist-backend nccl", "nccl needs a GPU"),
        ("DATA --dist-backend tcp", "--dist-backend tcp is not known"),
        ("DATA --gpu 0", "this machine has 0 GPUs"),
        ("DATA --world-size 2", "needs --rank between 0 and 1"),
        ("DATA --world-size 2 --rank 0", "several nodes need --dist-url"),
        ("DATA --dist-url env://", "needs the variable.? WORLD_SIZE"),
        ("DATA --multiprocessing-distributed --world-size 1 --rank 1", "needs --rank between 0 and 0"),
    ],
    main_lincls: [
        ("", "where are the images?"),
        ("DATA/val", "val has no folder train/; it needs train/ and val/ with one folder per class each"),
        ("DATA -a googlenet --image-size 8", "googlenet cannot take --image-size 8 "),
        ("DATA --pretrained missing.pth.tar", "missing.pth.tar"),
        ("DATA --pretrained DATA/val/ant/0.jpg", "not a checkpoint"),
        ("DATA --target shape", "is not named shape_texture_color"),
        ("DATA --output-dir DATA/train/ant/0.jpg", "cannot write to --output-dir"),
    ],
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sentences are those of a machine without a GPU")
@pytest.mark.parametrize(
    ("script", "line", "message"), [(script, *case) for script, cases in WRONG_USE.items() for case in cases]
)
def test_wrong_use_is_a_sentence(script, line, message, folders, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("DATA", str(folders)) for word in line.split()]
    code, _, errors = cli(script.main, *(MOCO if script is main_moco else SMALL), *words)
    assert code == 2, errors
    assert re.search(message, errors), errors
    assert errors.count("\n") == 1 and "Traceback" not in errors


def test_batches_beyond_the_memory_are_said(folders, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(main_moco, "check_image_size", lambda *_, **__: None)  # no network can be tried at it
    words = [*MOCO, "--image-size", "100000", "-b", "24", folders, "--output-dir", tmp_path]
    code, _, errors = cli(main_moco.main, *words)
    assert code == 2 and errors.count("\n") == 1, errors
    assert re.search(r"GB of memory .*; lower", errors), errors


def test_a_number_that_is_none_in_the_environment_is_said(folders, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = cli(main_moco.main, *MOCO, folders, "--output-dir", tmp_path, "--dist-url", "env://")
    assert code == 2
    assert "RANK must be a whole number, not 'x'" in errors


def test_precision_is_named_as_torch_is_set(monkeypatch):
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        for capability, in_conv, in_matmul, expected in (
            ((9, 0), "tf32", "ieee", "float32, TF32 convolutions"),
            ((9, 0), "tf32", "tf32", "float32, TF32 convolutions and matrices"),
            ((9, 0), "ieee", "ieee", "float32"),
            ((7, 0), "tf32", "tf32", "float32"),
        ):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
            conv.fp32_precision, matmul.fp32_precision = in_conv, in_matmul
            assert options.precision(CUDA) == expected
            assert options.precision(CPU) == "float32"
    finally:
        conv.fp32_precision, matmul.fp32_precision = before
