"""Draw the Trifeature data set: python -m moco.trifeature data/trifeature"""

from moco.errors import Parser, interrupt_on_signals, printable, run_program
from moco.trifeature import generate


def main():
    parser = Parser(
        prog="python -m moco.trifeature",
        description="Draw the Trifeature data: 10 shapes x 10 textures x 10 colors on gray; 800 combinations "
        "in OUT/train, the other 200 in OUT/val, a folder each.",
    )
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to make")
    add("--size", type=int, default=128, metavar="PIXELS", help="side of an image (default: %(default)s)")
    add("--renders", type=int, default=10, metavar="N", help="images per combination (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="chooses rotations, places and what is in val")
    add("--force", action="store_true", help="replace what was drawn under this name before")
    args = parser.parse_args()
    interrupt_on_signals()

    drawn = generate(args.out, args.size, args.renders, args.seed, args.force)
    if not drawn:
        print(f"{printable(args.out)}: already drawn with these settings")
        return
    print(f"{printable(args.out)}: {800 * args.renders} images in train, {200 * args.renders} in val")


if __name__ == "__main__":
    run_program(main, "python -m moco.trifeature")
