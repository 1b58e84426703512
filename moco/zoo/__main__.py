"""python -m moco.zoo list | download NAME: released models of MoCo and IFM."""

from moco import zoo
from moco.errors import Parser, printable, run_program


def main():
    parser = Parser(
        prog="python -m moco.zoo",
        description="Released models of MoCo and IFM by name. The names also work wherever a checkpoint is "
        "asked for: python main_lincls.py --pretrained ifm-eps0.1 ...",
        epilog="ZOO_BASE_URL in the environment: download $ZOO_BASE_URL/NAME.pth.tar instead.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="show the names, with the published linear accuracy")
    get = commands.add_parser("download", help="download and check one model, and print its path")
    get.add_argument("name", metavar="NAME", help="as `list` shows it, for example ifm-eps0.1")
    get.add_argument("--to", metavar="DIR", help="folder for the file (default: torch.hub's, see TORCH_HOME)")
    get.add_argument("--force", action="store_true", help="download again and replace the file")
    args = parser.parse_args()
    if args.command == "list":
        width = max(len(model.name) for model in zoo.MODELS)
        print(f"{'name':{width}}  top-1  model")
        for model in zoo.MODELS:
            print(f"{model.name:{width}}  {model.top1:5.1f}  {model.text}")
        print("top-1: published accuracy in % of a linear classifier on the data set named")
    else:
        print(printable(zoo.fetch(args.name, args.to, args.force)))


if __name__ == "__main__":
    run_program(main, "python -m moco.zoo")
