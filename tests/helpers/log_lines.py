"""Made logs of runs, line by line."""

import json


def start(epoch=0, step=0, steps=4, chance=3.0, **more):
    return {"kind": "start", "epoch": epoch, "step": step, "steps": steps, "chance": chance, **more}


def step(epoch, number, loss, **more):
    return {"kind": "step", "epoch": epoch, "step": number, "loss": loss, **more}


def end(epoch, loss, **more):
    return {"kind": "epoch", "epoch": epoch, "loss": loss, **more}


def write(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
