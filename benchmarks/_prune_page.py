"""The results of ``prune.py``: stored as JSON, shown as ``docs/prune.md``."""

from __future__ import annotations

from collections.abc import Iterator

from _stored import Results, Row

NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "tflite": "LiteRT"}
ROLES = {
    "original": "original",
    "pruned": "`prune`, with its teacher",
    "removed": "`prune` without solving, with its teacher",
    "pruned4": "`prune` in fours, with its teacher",
    "removed4": "`prune` in fours without solving, with its teacher",
    "plain": "Torch-Pruning, plain fine-tuning",
}
MADE_AS = {"removed": "pruned", "removed4": "pruned4"}  # as wide


def document(stored: Row) -> str:
    return "\n".join(_lines(stored)) + "\n"


def _lines(stored: Row) -> Iterator[str]:
    yield "# Fewer channels: `prune`"
    yield ""
    yield (
        "Written by `python benchmarks/prune.py` from `benchmarks/results/prune.json`; do not edit. ResNet-32 on "
        "CIFAR-10. Its shortcuts slice and pad channels, so that only the widths inside its blocks can go; `prune` "
        "finds that out by itself, Torch-Pruning is told. Both leave multiples of 8 channels, `prune` *in fours* "
        "multiples of 4 (Torch-Pruning's halves would stay as they are)."
    )
    yield ""
    yield from _accuracy(stored)
    if stored.get("race"):
        yield ""
        yield from _race(stored)
    if stored.get("budget"):
        yield ""
        yield from _budget(stored["budget"])
    yield ""
    yield from _choice(stored)
    yield ""
    named = ", ".join(f"{name} {version}" for name, version in stored["facts"]["versions"].items())
    yield f"{stored['facts']['processor']}; {named}."


def _accuracy(stored: Row) -> Iterator[str]:
    yield "## Accuracy"
    yield ""
    scores = {row["role"]: row for row in stored.get("accuracy", [])}
    yield (
        "Top-1 on all 10,000 test images. Channels were chosen on training images, and the last epoch was taken. "
        "Trainings of as many epochs have as many steps and images (SGD, cosine, bfloat16, batch norms in training "
        "mode), and every training that ended has its row; they differ in where they begin (`prune` solves the layers "
        "that read fewer channels anew, by least squares on training images) and in what is learned from: the "
        "original's answers, its inner results at the last two resolutions and labels, or labels alone. Fours and "
        "temperature 2 were chosen after shorter trainings, on 2,000 training images that were held out of them."
    )
    yield ""
    yield "| network | MACs | parameters | not trained | epochs | learning rate | trained | lost | training |"
    yield "| --- " * 9 + "|"
    original = scores.get("original")
    for row in sorted(stored.get("training", []), key=_place):
        role, settings = row["role"].partition("-")[0], row["settings"]
        choice = next(one for one in stored["choice"] if one["role"] == MADE_AS.get(role, role))
        after = scores.get(f"{row['role']}-trained")
        lost = f"{100 * (original['top1'] - after['top1']):.2f} points" if original and after else "not run"
        shares = [f"{choice[name][1] / choice[name][0]:.3f}" for name in ("macs", "parameters")]
        yield (
            f"| {ROLES[role]} | {' | '.join(shares)} | {_percent(scores.get(role))} | {settings['epochs']} "
            f"| {settings['lr']:g} | {_percent(after)} | {lost} | {_training(row)} |"
        )
    yield ""
    yield f"The original has {_percent(original)}. The best of each at as many epochs (rates, seeds and all):"
    yield ""
    yield "| epochs | `prune`, with its teacher | Torch-Pruning, plain fine-tuning | more |"
    yield "| --- " * 4 + "|"
    for epochs in sorted({row["settings"]["epochs"] for row in stored.get("training", [])}):
        roles = [row["role"] for row in stored["training"] if row["settings"]["epochs"] == epochs]
        found = [scores[f"{role}-trained"] for role in roles if f"{role}-trained" in scores]
        ours, theirs = (
            max((row["top1"] for row in found if row["role"].startswith("plain") == plain), default=None)
            for plain in (False, True)
        )
        if ours is not None and theirs is not None:
            yield f"| {epochs} | {100 * ours:.2f} % | {100 * theirs:.2f} % | {100 * (ours - theirs):.2f} points |"


def _place(row: Row) -> tuple[int, int, bool, float, int]:
    settings, place = row["settings"], list(ROLES).index(row["role"].partition("-")[0])
    return settings["epochs"], place, settings["mixup"], settings["lr"], settings.get("seed", 0)


def _percent(row: Row | None) -> str:
    return "not run" if row is None else f"{100 * row['top1']:.2f} %"


def _training(row: Row) -> str:
    settings = row["settings"]
    mixed = " mixed by twos" if settings["mixup"] else ""
    inner, again = "", ", another seed" if settings.get("seed") else ""
    if settings["features"]:
        inner = f", temperature {settings['temperature']:g}, inner results × {settings['feature_weight']:g}"
    return f"{row['images']:,} images{mixed}, batches of {settings['batch']}{inner}{again}"


def _race(stored: Row) -> Iterator[str]:
    yield "## Latency"
    yield ""
    yield (
        "Whole networks, float32, one thread, one image, all networks interleaved; *× as fast* as the original "
        "with the 95 % interval. The even halves are faster at as many multiply-accumulates. The "
        "files hold the weights from before training, of which these times do not depend."
    )
    yield ""
    yield "| network | engine | × as fast [95 %] | ms original → pruned | file, of the original's |"
    yield "| --- " * 5 + "|"
    sizes = {(row["role"], row["target"]): row["size_bytes"] for row in stored["size"]}
    for row in stored["race"]:
        ratio, key = row["ratio"], (row["role"], row["target"])
        faster = f"{1 / ratio['value']:.3f} [{1 / ratio['high']:.3f}, {1 / ratio['low']:.3f}]"
        yield (
            f"| {ROLES[row['role']]} | {NAMES[row['target']]} | {faster} | {row['ms'][0]:.3f} → {row['ms'][1]:.3f} "
            f"| {sizes[key] / sizes['original', row['target']]:.3f} |"
        )


def _budget(rows: list[Row]) -> Iterator[str]:
    yield "## A budget of latency"
    yield ""
    yield (
        "`latency_ratio` alone, nothing trained: the pass measures whole networks in the engine until the fewest "
        "removals are found that keep the budget, and then the network that it gives."
    )
    yield ""
    yield "| engine | budget | measured [95 %] | MACs | parameters | channels that stay, layer by layer |"
    yield "| --- " * 6 + "|"
    for row in rows:
        ratio, shares = row["measured"], [f"{row[name][1] / row[name][0]:.3f}" for name in ("macs", "parameters")]
        widths = ", ".join(f"{after} of {before}" for before, after in row["widths"])
        yield (f"| {NAMES[row['target']]} | {row['limit']:g} | {ratio['value']:.3f} [{ratio['low']:.3f}, "
               f"{ratio['high']:.3f}] | {' | '.join(shares)} | {widths} |")  # fmt: skip


def _choice(stored: Row) -> Iterator[str]:
    choices = {row["role"]: row for row in stored["choice"]}
    pruned = choices["pruned"]
    fours = {row["layer"]: row["after"] for row in choices.get("pruned4", {}).get("layers", ())}
    yield "## Layer by layer"
    yield ""
    yield (
        f"What a channel is worth ({pruned['criterion']}): the expected square of what the outputs change by without "
        f"it. Before training the pruned network differs by {pruned['difference']:.0e} of the largest output from the "
        "original with the weights of the same channels at 0."
    )
    yield ""
    yield "| layer | channels | `prune` | in fours | Torch-Pruning | worth of those that stay | of those that go |"
    yield "| --- " * 7 + "|"
    for row in pruned["layers"]:
        spread = [_spread(row["criterion"].get(word)) for word in ("kept", "gone")]
        yield (f"| {row['layer']} | {row['before']} | {row['after']} | {fours.get(row['layer'], '–')} "
               f"| {choices['plain']['widths'][row['layer']]} | {' | '.join(spread)} |")  # fmt: skip
    yield ""
    yield "Left as they are:"
    yield ""
    for name, why in pruned["left"].items():
        yield f"- `{name}`: {why}"


def _spread(row: Row | None) -> str:
    return "–" if row is None else f"{row['least']:.3g} … {row['most']:.3g}"


RESULTS = Results.of("prune", document, "role", "target")
