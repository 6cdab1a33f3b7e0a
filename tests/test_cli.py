"""The command line: help without anything heavy, and each verb on tiny models."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import slow

from tracing_jax import cli
from tracing_jax.cli import startup
from tracing_jax.cli.absl_flags import parse_flags
from tracing_jax.cli.arguments import given
from tracing_jax.cli.generate import GenerateOptions
from tracing_jax.cli.inspect import InspectOptions
from tracing_jax.cli.merge import MergeOptions
from tracing_jax.cli.plane import PlaneOptions
from tracing_jax.cli.scan import ScanOptions
from tracing_jax.cli.signature import SignatureOptions
from tracing_jax.cli.startup import prepare_libraries
from tracing_jax.cli.zoo import Slurm, ZooOptions
from tracing_jax.data import GENERATED_FOLDER
from tracing_jax.dataclass_options import options_of, problems
from tracing_jax.options import COMPARE, RunOptions
from tracing_jax.zoo import make_plan, read_models

ROOT = Path(__file__).parents[1]
OPTIONS = {"compare": (RunOptions,), "verify": (), "inspect": (InspectOptions,), "align": (), "disguise": (),
           "generate": (GenerateOptions,), "library": (), "merge": (MergeOptions,), "plane": (PlaneOptions,),
           "scan": (ScanOptions,), "signature": (SignatureOptions,), "zoo": (RunOptions, ZooOptions)}  # fmt: skip
LEFT_OUT = {"base_model_id", "ft_model_id", "ft_model_ids", "save"}

_LIGHT = """
import sys
for name in ("jax", "numpy", "ml_collections", "scipy", "transformers"):
    sys.modules[name] = None
from tracing_jax.cli import main
main(sys.argv[1:])
"""


def light(*argv):
    return subprocess.run(
        [sys.executable, "-c", _LIGHT, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_every_module_of_a_verb_is_a_verb():
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py") if "\nUSAGE = " in path.read_text("utf-8")}
    assert modules == set(cli.VERBS) == set(OPTIONS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_imports_nothing_heavy_and_lists_every_option_with_its_default(verb):
    done = light(verb, "--help")
    assert done.returncode == 0, done.stderr
    words = "".join(done.stdout.split())
    for kind in OPTIONS[verb]:
        for found in options_of(kind):
            if found.name not in LEFT_OUT:
                assert f"--{found.name}" in done.stdout
                assert "".join(found.meaning.split()) in words
    assert "[" in done.stdout


def test_help_and_version_of_the_program():
    done = light("--help")
    assert done.returncode == 0, done.stderr
    for verb, meaning in cli.VERBS.items():
        assert verb in done.stdout
        assert meaning in " ".join(done.stdout.split())
    assert light("--version").stdout.startswith("tracing-jax ")


def test_the_help_of_compare_shows_its_own_defaults():
    text = " ".join(light("compare", "--help").stdout.split())
    assert "[auto]" in text
    assert f"[{COMPARE.save}]" in text


@pytest.mark.parametrize(("argv", "message"), [
    (["comapre", "A", "B"], "comapre: there is no such verb; did you mean compare?"),
    (["compare", "A"], "required: FT"),
    (["compare", "A", "B", "--match.max_token", "3"], "there is no such option; did you mean --match.max_tokens?"),
    (["compare", "A", "B", "--batch_size", "many"], "--batch_size: expected a whole number, found 'many'"),
    (["disguise", "A", "--save", "x"], "required: --disguise"),
    (["compare", "A", "B", "--match.max_tokens=-4"], "match.max_tokens=-4: at least 1"),
    (["compare", "A", "B", "--stat", "csuu"], "did you mean csu?"),
    (["zoo", "--save", "x"], "--models is needed"),
    (["library", "add", "x"], "add takes signature files"),
    (["merge", "A", "--parents", "B", "--seed=-1"], "seed=-1: at least 0"),
    (["inspect", "A", "--cache_dir=x"], "--cache_dir: that option is --download_dir now"),
    (["generate", "--models=A", "--mesh_data=2"], "--mesh_data: that option is --mesh.data now"),
    (["compare", "A", "B", "--no_compile_cache"], "--no_compile_cache: that option is --no-compile_cache now"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(argv, message):
    done = light(*argv)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_compare_prints_a_verdict_without_a_text(family, in_folder, capsys, drawn):
    cli.main(["compare", str(family.member("base")), str(family.member("finetune"))])
    shown = capsys.readouterr().out
    assert shown.startswith("Compared\n  base")
    assert "\n  RELATED  base and finetune\n" in shown
    record = json.loads((in_folder / "runs/compare.json").read_text())
    assert record["tokens"] is None
    assert record["args"]["stat"] == ["auto"]
    assert {"csu", "match", "match_io", "match_heads", "unseen_tokens"} <= set(record["statistics"])
    assert any("only the form weights" in note for note in record["notes"])


@pytest.mark.slow
def test_compare_prints_the_record_or_the_verdict_alone_and_its_status_says_related(family, in_folder, capsys):
    pair = [str(family.member("base")), str(family.member("finetune"))]
    cli.main(["compare", *pair, "--stat", "csu", "--json", "--save", "one.p"])
    assert json.loads(capsys.readouterr().out) == json.loads((in_folder / "one.json").read_text())
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["compare", *pair, str(family.member("independent")), "--stat", "csu", "--quiet", "--fail_on", "related"]
        )
    assert ended.value.code == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["RELATED", "UNDECIDED"]  # csu alone does not detect a permuted copy


@pytest.mark.slow
def test_with_a_text_compare_matches_activations_too(family, in_folder, capsys):
    sizes = ["--dataset", str(family.text), "--num_tokens", "1024", "--block_size", "64", "--mesh.data", "1"]
    cli.main(["compare", str(family.member("base")), str(family.member("finetune")), *sizes, "--stat", "match"])
    assert "RELATED" in capsys.readouterr().out
    record = json.loads((in_folder / "runs/compare.json").read_text())
    assert set(record["statistics"]["match"]["non_aligned"]["null"]) >= {"forward", "weights"}


def test_a_statistic_that_needs_a_text_reads_that_of_the_package_where_none_is_named(family, in_folder, capsys):
    pair = [str(family.member("base")), str(family.member("finetune"))]
    cli.main(["compare", *pair, "--stat", "mode", "--num_tokens", "512", "--block_size", "64", "--mesh.data", "1"])
    shown = " ".join(capsys.readouterr().out.split())
    record = json.loads((in_folder / "runs/compare.json").read_text())
    assert record["args"]["dataset"] == record["tokens"]["dataset"] == "sample"
    assert f"text sample: {record['tokens']['source']}, 512 tokens of base" in shown
    assert any(note.startswith("text: sample") for note in record["notes"])


@pytest.mark.slow
def test_align_writes_the_aligned_model(family, in_folder, capsys):
    argv = ["align", str(family.member("base")), str(family.member("disguised")), "--save_aligned", "aligned"]
    cli.main([*argv, "--align_axes", "embed,mlp,kv_heads,q_group"])
    capsys.readouterr()
    distance = json.loads((in_folder / "runs/align.json").read_text())["statistics"]["l2"]
    assert distance["aligned"]["headline"] < 0.5 * distance["non_aligned"]["headline"]
    assert (in_folder / "aligned" / "config.json").exists()


def test_disguise_writes_a_checkpoint_of_the_same_function(family, in_folder, capsys):
    cli.main(["disguise", str(family.member("finetune")), "--disguise", "rotate, permute", "--save", "disguised"])
    assert "rewrites: rotate, permute" in capsys.readouterr().out
    assert (in_folder / "disguised" / "model.safetensors").exists()


@pytest.mark.slow
def test_generate_writes_texts(family, in_folder, capsys):
    model = str(family.member("base"))
    cli.main(["generate", "--models", model, "--num_samples", "2", "--max_new_tokens", "4", "--save", "texts"])
    file = Path(capsys.readouterr().out.strip())
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.slow
def test_print_shows_a_plan_and_leaves_a_finished_folder_as_it_is(family, tmp_path):
    listed = tmp_path / "models.yaml"
    listed.write_text(json.dumps([str(family.member("base")), str(family.member("finetune"))]))
    folder = tmp_path / "zoo"
    folder.mkdir()
    make_plan(read_models(listed, None), RunOptions(stat=("csu",))).write(folder)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    flags = [f"--save={folder}", f"--models={listed}", "--executor=print"]
    done = subprocess.run(
        [sys.executable, "launch.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "0: base--finetune" in done.stdout
    assert "#SBATCH" in done.stdout
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_list_that_is_given_in_two_places_is_the_whole_of_both():
    parsed = cli.parser_of("compare").parse_args(["A", "B", "--stat", "csu,match", "--seed=1", "--stat=l2", "--seed=2"])
    assert given(parsed, RunOptions) == {"stat": ("csu", "match", "l2"), "seed": 2}


def test_options_of_the_other_programs_fit_the_package():
    assert next(found for found in options_of(GenerateOptions) if found.name == "save").default == GENERATED_FOLDER
    assert problems(ZooOptions(save="x")) == problems(Slurm()) == problems(GenerateOptions(models=("a",))) == []


def test_a_flag_of_a_config_is_checked_before_anything_is_parsed(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_flags(["main.py", "--noconfig.aling"])
    assert ended.value.code == 2
    assert "aling: there is no such option; did you mean align?" in capsys.readouterr().err


def test_libraries_are_set_up_unless_the_user_did(monkeypatch):
    monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x --xla_cpu_parallel_codegen_split_count=8")
    monkeypatch.setattr(startup.metadata, "version", lambda name: "0.10.2")
    prepare_libraries()
    assert os.environ["OPENBLAS_THREAD_TIMEOUT"] == "4"
    own = "--xla_dump_to=x --xla_cpu_parallel_codegen_split_count=8"
    assert os.environ["XLA_FLAGS"] == f"{own} --xla_cpu_use_fusion_emitters=false"
    monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", "20")
    monkeypatch.setattr(startup.metadata, "version", lambda name: "9.9")
    monkeypatch.setenv("XLA_FLAGS", own)
    prepare_libraries()
    assert (os.environ["OPENBLAS_THREAD_TIMEOUT"], os.environ["XLA_FLAGS"]) == ("20", own)


def test_xla_compiles_quickly_only_for_small_models(monkeypatch, tmp_path):
    monkeypatch.setattr(startup.metadata, "version", lambda name: "0.10.2")
    (small := tmp_path / "small").mkdir()
    (small / "model.safetensors").write_bytes(bytes(8))
    (large := tmp_path / "large").mkdir()
    with (large / "model.safetensors").open("wb") as file:
        file.truncate(2**31)
    lists = {"small": tmp_path / "small.yaml", "large": tmp_path / "large.yaml"}
    lists["small"].write_text(f"family: [demo:base, {small}]\n")
    lists["large"].write_text(f"tree:\n  {small}:\n    '{large}':\n")
    quick, thorough = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1", ""
    for arguments, flags in (
        ([str(small), "demo:base", "--save=runs/pair.p"], quick),
        ([str(small), str(large)], thorough),
        ([f"--config.base_model_id={large}"], thorough),
        (["--base_model_id=org/name", str(small)], thorough),
        (["org/name@v1.0", str(small)], thorough),
        ([f"--models={lists['small']}"], quick),
        ([f"--models={lists['large']}"], thorough),
        ([f"--models={tmp_path / 'missing.yaml'}"], quick),
    ):
        monkeypatch.setenv("XLA_FLAGS", "")
        prepare_libraries(arguments)
        assert os.environ["XLA_FLAGS"].strip() == flags.strip(), arguments


_FREED = """
import resource, sys
from tracing_jax import host_memory
host_memory.free_memory = lambda: int(sys.argv[1])
from tracing_jax.cli.startup import prepare_libraries
prepare_libraries()
import numpy as np
for _ in range(20):
    np.zeros(2**26, np.uint8)[:] = 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="a setting of glibc")
@pytest.mark.skipif(_HUGE_PAGES.exists() and "[always]" in _HUGE_PAGES.read_text(), reason="pages are huge, and few")
def test_freed_memory_is_used_again_where_much_is_free():
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES" and not k.startswith("MALLOC_")}
    env |= {"NUMPY_MADVISE_HUGEPAGE": "0"}

    def faults(free: int, **more: str) -> int:
        command = [sys.executable, "-c", _FREED, str(free)]
        return int(subprocess.run(command, env=env | more, check=True, capture_output=True, text=True).stdout)

    pages = 2**26 // os.sysconf("SC_PAGE_SIZE")
    assert faults(2**40) < faults(2**30) - 18 * pages
    assert faults(2**40, MALLOC_ARENA_MAX="2") > faults(2**40) + 18 * pages


_KEPT = """
import sys
from tracing_jax.cli.startup import keep_compiled_programs
if sys.argv[1] == "late":
    import jax
keep_compiled_programs()
import jax
assert jax.jit(lambda x: x + 1)(1) == 2
"""


@pytest.mark.parametrize("when", ["early", slow("late")])
def test_compiled_programs_are_kept_in_the_cache_of_the_user_unless_another_place_is_set(when, tmp_path):
    kept, own = tmp_path / "cache", tmp_path / "own"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(kept), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", _KEPT, when], env=environment, check=True, timeout=60)
    (folder,) = (kept / "tracing_jax" / "xla").iterdir()
    assert any(folder.iterdir())
    before = set(folder.iterdir())
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(own)}
    subprocess.run([sys.executable, "-c", _KEPT, when], env=environment, check=True, timeout=60)
    assert any(own.iterdir())
    assert set(folder.iterdir()) == before


_LISTED = """
import sys
from pathlib import Path
from tracing_jax.cli.startup import import_transformers_without_torch
read = set()
sys.addaudithook(lambda event, given: read.add(str(given[0])) if event == "open" else None)
if sys.argv[1] == "kept":
    import_transformers_without_torch()
import transformers
from transformers.utils.import_utils import define_import_structure
models = Path(transformers.__path__[0]) / "models"
print(sum(Path(file).name.startswith("modeling_") for file in read))
print(sorted((sorted(needs), sorted(m), sorted(map(sorted, m.values())))
             for needs, m in define_import_structure(models, "models").items()))
print(transformers.LlamaConfig().model_type, transformers.utils.__name__, transformers.__version__)
"""


@pytest.mark.slow
def test_the_list_of_models_of_transformers_is_read_once_and_stays_the_same(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def listed(how):
        command = [sys.executable, "-c", _LISTED, how]
        done = subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True, text=True)
        opened, *found = done.stdout.splitlines()
        return int(opened), found

    opened, plain = listed("plain")
    assert opened > 100
    assert listed("kept") == (opened, plain)
    assert listed("kept") == (0, plain)
    (file,) = (tmp_path / "tracing_jax").glob("transformers-*")
    file.write_bytes(file.read_bytes()[:1000])
    assert listed("kept") == (opened, plain)
    assert listed("kept") == (0, plain)
