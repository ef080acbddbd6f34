"""Makes every model from books: tokens, training, GGUF files, perplexities.

usage: build.py BOOKS TEXT FOLDER [NAME..]

BOOKS is what is learned, TEXT what perplexities are told of; both may be compressed. Without names, all models of configs/
are made; what is in FOLDER is not made again, and an interrupted run goes on.
"""

import pathlib
import subprocess
import sys

import train

HERE = pathlib.Path(__file__).parent
# What a config's `data` is made with.
DATA = {"books": ["--passes", 7], "words": ["--words"]}


def run(script, *args):
    print(script, *args, flush=True)
    subprocess.run([sys.executable, HERE / f"{script}.py", *map(str, args)], check=True)


def make(name, books, text, out):
    path = HERE / "configs" / f"{name}.toml"
    c = train.config(path)
    if "start" in c:
        make(c["start"], books, text, out)
    data = c.get("data", "books")
    tokens = out / f"{data}.bin"
    if not tokens.exists():
        run("corpus", books, tokens, *DATA[data])
    run("train", path, "--tokens", tokens, "--valid", text, "--out", out)
    for ty in ("F16", "Q8_0"):
        run("export", out / f"{name}.pt", out / f"{name}-{ty.lower()}.gguf", ty)
    run("evaluate", out / f"{name}.pt", text)


def main(books, text, out, *names):
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    all_names = sorted(p.stem for p in (HERE / "configs").glob("*.toml") if "name" in train.config(p))
    for name in names or all_names:
        make(name, books, text, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
