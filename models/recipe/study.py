"""Measures the family with qkov, and writes the tables and figures of models/README.md.

usage: study.py MODELS TEXT --out FOLDER [--qkov PROGRAM] [--only normalizers|geometries]

MODELS has NAME-q8_0.gguf of every file of configs/ that extends family.toml. Every command is printed before it runs; what
each measured stays in FOLDER, and is not measured again.
"""

import argparse
import json
import pathlib
import shlex
import subprocess

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

# Names of files, and of what they were trained with in the registry; sinks are swapped in as one logit for all.
NORMALIZERS = {
    "softmax": "softmax", "softmax1": "softmax1", "sinks": "sink", "sigmoid": "sigmoid", "relu2": "relu2", "softpick": "softpick",
    "entmax15": "entmax15", "stick-breaking": "stick_breaking",
}
GEOMETRIES = {
    "softmax": "GQA, RoPE", "gpt2": "MHA, learned positions", "qk-norm": "GQA, RoPE, QK-norm", "nope": "GQA, RoPE in 3 of 4 layers",
    "mla": "MLA", "prefix": "GQA, RoPE, prefix mask",
}
# Elements of a head of 32 that are kept.
RANKS = [28, 24, 20, 16, 12, 8, 4]
COMMON = ["-c", "512", "-t", "1"]


class Study:
    def __init__(self, args):
        self.args = args
        args.out.mkdir(parents=True, exist_ok=True)

    def model(self, name):
        return str(self.args.models / f"{name}-q8_0.gguf")

    def run(self, name, *command):
        """What a command of qkov prints as JSON."""
        kept = self.args.out / f"{name}.json"
        command = [self.args.qkov, *command, "-f", str(self.args.text), *COMMON, "--json"]
        print(" ".join(map(shlex.quote, command)), flush=True)
        if not kept.exists():
            kept.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return json.loads(kept.read_text())

    def trained(self, name):
        base = self.args.out / "softmax.base"
        if name == "softmax":
            return self.run("trained-softmax", "eval", "-m", self.model(name), "--save-base", str(base), "--heads", "--retrieval")
        return self.run(f"trained-{name}", "eval", "-m", self.model(name), "--base", str(base), "--heads", "--retrieval")

    def normalizers(self):
        norms = [part for n in NORMALIZERS.values() if n != "softmax" for part in ("--norm", n)]
        compare = ["compare", "-m", self.model("softmax"), "--no-yardsticks", *norms]
        probe = ["--calibrate", "--windows", "96", "--trials", "24", "--trial-ctx", "512", "--rounds", "0"]
        swapped = {r["name"]: r for r in self.run("swapped", *compare, *probe)}
        # On a machine that does nothing else.
        probe = ["--windows", "2", "--trials", "0", "--rounds", "16"]
        speeds = {r["name"]: r for r in self.run("speeds", *compare, *probe)}
        rows = []
        for name, norm in NORMALIZERS.items():
            trained = self.trained(name)
            raw = swapped[norm]
            rows.append((name, trained, raw, swapped.get(f"{norm} fitted", raw), speeds[norm]))
        print(normalizer_table(rows))
        normalizer_figure(rows, self.args.out / "normalizers.svg")

    def geometries(self):
        results = {}
        for name in GEOMETRIES:
            if name == "mla":
                continue
            forms = [f"lowrank:{what}={rank}{data}" for what in ("qk", "ov") for data in ("", ",data=no") for rank in RANKS]
            flags = [part for form in forms for part in ("--form", form)]
            probe = ["--windows", "48", "--trials", "0", "--rounds", "0", "--no-yardsticks"]
            results[name] = {r["form"]: r for r in self.run(f"forms-{name}", "compare", "-m", self.model(name), *flags, *probe)}
        trained = {name: self.trained(name) for name in GEOMETRIES}
        print(geometry_table(trained))
        print(rank_table(results))
        rank_figure(results, self.args.out / "ranks.svg")


def mean_of_heads(r, key):
    values = [h[key] for h in r["heads"]]
    return sum(values) / len(values)


def sinks_of(heads):
    """Of a head, the weight of the first key, as a share of all weights, with that of a sink that is no key."""
    shares = [h.get("sink_mass", h.get("sink")) for h in heads]
    return f"{100 * sum(shares) / len(shares):.1f}"


def pm(value, error, digits):
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def table(head, rows):
    bar = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(head))) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", bar, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def normalizer_table(rows):
    swapped = ["KL", "copies", "first key %"]
    head = ["normalizer", "trained: perplexity", "ln ratio", "KL", "copies, nats", "first key %", "row sum",
            "raw: perplexity", *swapped, "fitted: perplexity", *swapped, "prompt speed", "token speed"]
    out = []
    for name, t, raw, fit, timed in rows:
        copies = lambda r: pm(r["retrieval_ln_p_gain"], r["retrieval_ln_p_gain_err"], 2)
        speed = lambda r, what: f"{r[what + '_ratio']:.2f} ({r[what + '_ratio_min']:.2f} to {r[what + '_ratio_max']:.2f})"
        out.append([
            f"`{name}`", pm(t["ppl"], t["ppl_err"], 2),
            pm(t["ln_ppl_ratio"], t["ln_ppl_ratio_err"], 4) if "ln_ppl_ratio" in t else "0",
            f"{t.get('kl_mean', 0):.2f}", copies(t), sinks_of(t["heads"]), f"{mean_of_heads(t, 'mass'):.2f}",
            *(x for r in (raw, fit) for x in (f"{r['ppl']:.2f}", f"{r['kl_mean']:.4f}", copies(r), sinks_of(r["heads"]))),
            speed(timed, "prefill"), speed(timed, "decode"),
        ])
    return table(head, out)


def geometry_table(trained):
    head = ["geometry", "perplexity", "ln ratio", "copies, nats", "first key %"]
    out = []
    for name, t in trained.items():
        ratio = pm(t["ln_ppl_ratio"], t["ln_ppl_ratio_err"], 4) if "ln_ppl_ratio" in t else "0"
        copies = pm(t["retrieval_ln_p_gain"], t["retrieval_ln_p_gain_err"], 2)
        out.append([f"{GEOMETRIES[name]} (`{name}`)", pm(t["ppl"], t["ppl_err"], 2), ratio, copies, sinks_of(t["heads"])])
    return table(head, out)


def rank_table(results):
    head = ["geometry", "what", *map(str, RANKS)]
    out = []
    for name, forms in results.items():
        for what in ("qk", "ov"):
            for data, label in (("", "data"), (",data=no", "weights")):
                cells = [forms.get(f"lowrank:{what}={rank}{data}") for rank in RANKS]
                out.append([GEOMETRIES[name], f"{what.upper()}, {label}", *(f"{c['ppl_ratio']:.3f}" if c else "refused" for c in cells)])
    return table(head, out)


def clean(ax):
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="x" if ax.get_xscale() == "log" else "y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)


def save(fig, path):
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def normalizer_figure(rows, path):
    plt.rcParams.update({"svg.hashsalt": "qkov", "font.size": 9})
    fig, ax = plt.subplots(figsize=(7, 3.2))
    order = list(reversed(rows))
    at = range(len(order))
    marks = [("trained with it", 1, "o", "#1b6ca8"), ("swapped in, fitted", 3, "s", "#d98c21"), ("swapped in", 2, "x", "#b3362b")]
    for label, k, mark, color in marks:
        ax.scatter([row[k]["ppl"] for row in order], at, marker=mark, color=color, label=label, zorder=3, s=30)
    ax.set_yticks(at, [row[0] for row in order])
    ax.set_xscale("log")
    ticks = [40, 60, 100, 200, 500, 1000, 2000, 5000]
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()
    ax.set_xlabel("perplexity on unseen books")
    ax.legend(frameon=False, loc="upper right")
    clean(ax)
    save(fig, path)


def rank_figure(results, path):
    plt.rcParams.update({"svg.hashsalt": "qkov", "font.size": 9})
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    colors = dict(zip(results, ["#1b6ca8", "#b3362b", "#2e8b57", "#d98c21", "#7a4fa3"]))
    for ax, what in zip(axes, ("qk", "ov")):
        for name, forms in results.items():
            for data, style in (("", "-"), (",data=no", ":")):
                points = [(r, forms[f"lowrank:{what}={r}{data}"]["ppl_ratio"]) for r in RANKS if f"lowrank:{what}={r}{data}" in forms]
                if points:
                    label = GEOMETRIES[name] if not data else None
                    ax.plot(*zip(*points), style, marker=".", color=colors[name], label=label)
        ax.set_yscale("log")
        ax.set_ylim(0.98, 8)
        ax.set_yticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
        ax.minorticks_off()
        ax.set_xticks(RANKS)
        ax.invert_xaxis()
        ax.set_xlabel(f"elements of a head's {what.upper()} that are kept, of 32")
        clean(ax)
    axes[0].set_ylabel("perplexity, relative to the whole head")
    axes[1].legend(frameon=False, title="by data; dotted: by weights alone")
    save(fig, path)


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("models", type=pathlib.Path)
    args.add_argument("text", type=pathlib.Path)
    args.add_argument("--out", type=pathlib.Path, required=True)
    args.add_argument("--qkov", default="qkov")
    args.add_argument("--only", choices=["normalizers", "geometries"])
    args = args.parse_args()
    study = Study(args)
    if args.only != "geometries":
        study.normalizers()
    if args.only != "normalizers":
        study.geometries()


if __name__ == "__main__":
    main()
