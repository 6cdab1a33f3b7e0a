"""What it costs to propose the pairs of a large zoo by signatures, and what that finds and leaves out.

    python -m benchmarks.large_zoo --zoo_dir=zoo --out_dir=runs/large --sizes=125,250,500,1000
    python -m benchmarks.large_zoo --zoo_dir=zoo --out_dir=runs/large --sizes=125 --compare
    python -m benchmarks.large_zoo --zoo_dir=zoo --out_dir=runs/large --sizes= --memory_of=20

Half of the models are roots: models of a recipe half way through a short training. The others are what the training
makes of each root until its end, every second one disguised. So each model has one relative, and all other pairs are
unrelated. `--compare` launches the zoo of the first size, as a user would, and counts verdicts and seconds.
`--memory_of` traces all pairs of so many models by one worker, and prints its resident memory as it goes.
"""

import dataclasses
import itertools
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import yaml
from absl import app, flags
from tqdm import tqdm

import tracing_jax as tj
from benchmarks.environment import OUT_DIR, ZOO_DIR, machine, use_all_cores
from benchmarks.results import markdown_table
from benchmarks.seeds import RECIPES, Zoo, ZooRecipe, model, zoo
from tracing_jax.demo import config
from tracing_jax.options import RunOptions
from tracing_jax.record import write_json
from tracing_jax.rewrites import draw_rewrites
from tracing_jax.sources import InMemory, in_memory, rewritten
from tracing_jax.zoo import ZooFolder, make_plan, proposing
from tracing_jax.zoo.launching import write_plan
from tracing_jax.zoo.plan import ModelList

_SIZES = flags.DEFINE_list("sizes", ["125", "250", "500", "1000"], "numbers of models")
_COMPARE = flags.DEFINE_bool("compare", False, "compare the proposed pairs of the first size as well")
_MEMORY_OF = flags.DEFINE_integer("memory_of", 0, "models of which all pairs are traced by one worker", lower_bound=0)
_WORKERS = flags.DEFINE_integer("workers", 2, "processes that read models and compare pairs")

_ROOTS, _STEPS = 500, 96
_ROOT, _CHILD = 0.5, 1.0  # shares of the training
_DISGUISE = "permute,rotate,gains,units,values,queries"
_HEADERS = (
    "models", "pairs", "signing, s", "scanning, s", "related pairs proposed", "unrelated pairs proposed", "closing",
    "peak memory, GiB",
)  # fmt: skip


def recipe() -> ZooRecipe:
    """Returns the recipe of the roots: that of `tiny`, trained an eighth as long."""
    return ZooRecipe(dataclasses.replace(RECIPES["tiny"].models, base_steps=_STEPS), _ROOTS)


def write_models(models: Zoo, folder: Path, pairs: int) -> list[tuple[str, str]]:
    """Writes checkpoints of so many roots and their children, those that are not there; returns their folders."""
    found = [(str(folder / f"root-{i:03d}"), str(folder / f"child-{i:03d}")) for i in range(pairs)]
    configs = folder / "config"
    if not configs.exists():
        config(models.recipe.models).save_pretrained(configs)
    for share, side in ((_ROOT, 0), (_CHILD, 1)):
        if all(Path(pair[side]).exists() for pair in found):
            continue
        params = models.models(share)
        for i in tqdm(range(pairs), desc=f"models after {share:g} of the training", disable=None):
            if Path(found[i][side]).exists():
                continue
            own = InMemory(models.arch, model(params, i))
            if side == 1 and i % 2:
                own = in_memory(rewritten(own, draw_rewrites(_DISGUISE, jax.random.key(i), models.arch)))
            tj.save(found[i][side], own, configs)
    return found


def propose(pairs: Sequence[tuple[str, str]], folder: Path) -> list[str]:
    """Returns the row of a zoo of these pairs of relatives."""
    ids = tuple(itertools.chain(*pairs))
    parents = {name: parent for root, child in pairs for name, parent in ((root, None), (child, root))}
    plan = make_plan(ModelList(ids, tuple(itertools.combinations(ids, 2)), parents), RunOptions(stat=("auto",)))
    place = proposing._Models(folder / "models")
    place.folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    proposing._for_each(partial(proposing._sign, place), plan.names, _WORKERS.value, "signatures")
    signed = time.monotonic()
    library = tuple((name, place.signature(name).stat().st_mtime_ns) for name in plan.names.values())
    found = proposing._for_each(partial(proposing._traces, place, library), plan.names, _WORKERS.value, "scan")
    scanned = time.monotonic()
    kept, _, closing = proposing.selected(plan, found)
    related = sum(bool(pair.related) for pair in kept)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return [
        f"{len(ids):,}", f"{len(plan.pairs):,}", f"{signed - start:.0f}", f"{scanned - signed:.0f}",
        f"{related} of {len(pairs)}", f"{len(kept) - related:,}", str(closing), f"{peak / 2**20:.2f}",
    ]  # fmt: skip


def compare(pairs: Sequence[tuple[str, str]], folder: Path) -> str:
    """Launches the zoo of these pairs of relatives, and returns what it came to in a sentence."""
    (folder / "models.yaml").write_text(yaml.safe_dump({"tree": {root: {child: None} for root, child in pairs}}))
    command = [
        sys.executable, "launch.py", f"--models={folder / 'models.yaml'}", f"--save={folder / 'zoo'}",
        "--candidates=scan", "--executor=local", f"--workers={_WORKERS.value}",
    ]  # fmt: skip
    start = time.monotonic()
    subprocess.run(command, cwd=Path(__file__).parent.parent, check=True)
    seconds = time.monotonic() - start
    zoo_folder = ZooFolder(folder / "zoo")
    records = [(bool(pair.related), zoo_folder.record(pair)) for pair in zoo_folder.plan.pairs]
    words = [(related, record["verdict"]["verdict"] if record else "failed") for related, record in records]
    right = sum(word == "related" for related, word in words if related)
    wrong = sum(word == "related" for related, word in words if not related)
    return (
        f"{len(words)} pairs compared in {seconds:.0f} s: {right} of {len(pairs)} related pairs and {wrong} of "
        f"{sum(not related for related, _ in words)} unrelated ones are related"
    )


def worker_memory(pairs: Sequence[tuple[str, str]], folder: Path) -> str:
    """Traces all pairs of these models by one worker, and returns its resident memory over the pairs as a table."""
    ids = tuple(itertools.chain(*pairs))
    plan = make_plan(
        ModelList(ids, tuple(itertools.combinations(ids, 2)), dict.fromkeys(ids)), RunOptions(stat=("auto",))
    )
    zoo_folder = ZooFolder(folder / "memory")
    write_plan(zoo_folder, plan)
    worker = subprocess.Popen([sys.executable, "-m", "tracing_jax.zoo", "run", str(zoo_folder.path)])
    resident: dict[int, list[float]] = {}
    while worker.poll() is None:
        status = Path(f"/proc/{worker.pid}/status").read_text()
        if "VmRSS" in status:
            done = sum(zoo_folder.record_file(pair).exists() for pair in plan.pairs)
            resident.setdefault(done, []).append(int(status.split("VmRSS:")[1].split()[0]) / 2**20)
        time.sleep(0.5)
    of_pair = [sum(values) / len(values) for done, values in sorted(resident.items()) if done]
    spans = [of_pair[at : at + 50] for at in range(0, len(of_pair), 50)]
    rows = [[f"{50 * i + 1} to {50 * i + len(span)}", *(f"{value:.2f}" for value in
             (sum(span) / len(span), min(span), max(span)))] for i, span in enumerate(spans)]  # fmt: skip
    return markdown_table(("pairs", "mean, GiB", "least", "most"), rows)


def main(argv: list[str]) -> None:
    """Measures, prints a table and writes it."""
    del argv
    use_all_cores()
    folder = Path(OUT_DIR.value).absolute()
    sizes = [int(size) // 2 for size in _SIZES.value if size]
    most = max([*sizes, _MEMORY_OF.value // 2])
    pairs = write_models(zoo(recipe(), ZOO_DIR.value), folder / "checkpoints", most)
    rows = []
    for count in sizes:
        rows.append(propose(pairs[:count], folder / f"of {2 * count}"))
        print(rows[-1], flush=True)
    text = markdown_table(_HEADERS, rows) if rows else ""
    if _MEMORY_OF.value:
        text += worker_memory(pairs[: _MEMORY_OF.value // 2], folder)
    if _COMPARE.value:
        text += "\n\n" + compare(pairs[: sizes[0]], folder)
    print(f"{text}\n\n{machine()['summary']}")
    write_json(folder / "large_zoo.json", {"table": text, "machine": machine()})


if __name__ == "__main__":
    app.run(main)
