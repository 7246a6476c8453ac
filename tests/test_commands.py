"""What a command line may not say, in all experiments alike: told in a line, before anything is computed or written."""

import dataclasses
import errno
import importlib
import json
import re
import shutil
import subprocess
import sys
from typing import get_args, get_type_hints

import numpy as np
import pytest
from jobs import ROOT, main, wrong_line_as_value_error
from test_house import HEAVY
from tyro.constructors import PrimitiveConstructorSpec

from compo_jax import compose, incremental, modular
from compo_jax.data import ArraySplit, Task, TaskStream
from compo_jax.incremental import finished

sys.path.insert(0, str(ROOT / "experiments"))
import job

SCRIPTS = [
    "incremental", "merging", "unlearning", "curvature_check", "throughput", "pretrain", "modular_multitask",
    "modular_transfer", "modular_adaptation", "modular_reuse", "vision8",
]  # fmt: skip
COUNT = ["0", "-1", "2.5", "nan", "inf", "x", "99999999999"]
RATE, WEIGHT, SEED = ["0", "-1", "nan", "inf"], ["-300", "nan", "inf"], ["-1", "x", "99999999999"]


def each(values, *options):
    return dict.fromkeys(options, values)


RANGES = {
    "incremental": {
        **each(COUNT, "tasks", "images", "heads", "image-size", "epochs", "batch", "rank", "classes", "probe-epochs"),
        **each(RATE, "learning-rate", "ia3-learning-rate", "tmc-learning-rate", "full-learning-rate"),
        **each(WEIGHT, "alpha", "tak-alpha", "beta", "ewc", "lwf"),
        **each(["0", "-1", "nan", "1.5"], "crop", "test-fraction"), "class-order": SEED,
        "fisher-images": ["-5", "x"], "seed": SEED, "name": ["../x", "..", "", "/x"], "runs": [""],
    },
    "merging": {"images": COUNT, "seed": SEED},
    "unlearning": {"runs": [""]},
    "curvature_check": {
        **each(COUNT, "images", "fisher-images", "fisher-batches", "order"), "weightings": ["1", *COUNT], "seed": SEED
    },
    "throughput": {**each(COUNT, "batch", "rank", "steps", "threads"), **each(RATE, "peak", "minutes")},
    "vision8": {
        **each(COUNT, "images", "test-images", "steps", "batch", "rank", "curvature-images", "heads", "image-size",
               "factor-images"),
        **each(RATE, "learning-rate", "full-learning-rate", "linear-learning-rate", "strengths"), "seeds": SEED,
        "name": ["../x", "a/b"],
    },
    "pretrain": {**each(COUNT, "steps", "batch", "width", "depth", "heads"), "learning-rate": RATE, "seed": SEED},
}  # fmt: skip
OF_ALL_MODULAR = {
    **each(COUNT, "images", "size", "layers", "width", "patch", "steps", "batch"), "learning-rate": RATE,
    "seeds": SEED, "name": ["../x", "a/b"], "phases": ["-0.1", "2", "nan"],
}  # fmt: skip
ALSO = {
    "modular_multitask": {**each(COUNT, "tasks", "templates", "analysis-images")},
    "modular_transfer": {
        **each(COUNT, "tasks", "templates", "held-out", "new-steps", "new-batch"), "budgets": ["-1", "x"],
        "new-learning-rate": RATE, "smoothing": ["0", "1", "2", "nan"],
    },
    "modular_adaptation": {
        **each(COUNT, "templates", "adapt-steps", "adapt-batch"),
        **each(RATE, "adapt-learning-rate", "route-rate"),
    },
    "modular_reuse": {"tasks": COUNT},
}  # fmt: skip


def load(script):
    return importlib.import_module(script)


def refused(script, *arguments):
    """What is said of a wrong command line, nothing else having been done."""
    module = load(script)
    with pytest.raises(ValueError) as caught, wrong_line_as_value_error():
        module.parse(list(arguments))
    return str(caught.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_values_out_of_range_are_refused_with_option_value_and_range(script):
    for option, values in (RANGES.get(script, OF_ALL_MODULAR) | ALSO.get(script, {})).items():
        for value in values:
            first = [value, "1"] if option == "phases" else [value]
            told = refused(script, f"--{option}", *first)
            assert f"--{option}: " in told and value in told and "\n" not in told, (option, value, told)
            assert re.search("whole number|a number|name of a folder|no path|more than 2147483647", told), told


def fields(group):
    """(name, type with its annotations, default) of all options, out of their groups."""
    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type)
        else:
            yield field.name, hints[field.name], field.default


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_a_range_which_the_help_shows(script):
    for name, hint, default in fields(load(script).Options):
        specs = [extra for extra in get_args(hint)[1:] if isinstance(extra, PrimitiveConstructorSpec)]
        if not specs:
            assert not re.search("int|float", str(hint)) or "Literal" in str(hint), name
        elif default is not None and specs[0].metavar.startswith(("INT", "FLOAT")):
            assert re.search("[<>]", specs[0].metavar), name
            assert specs[0].instance_from_str(specs[0].str_from_instance(default)) == default, name


def test_help_and_a_wrong_option_end_before_jax_and_the_rooms_are_loaded():
    lines = [[script, option] for script in SCRIPTS for option in ("--help", "--bogus")]
    code = f"""
import contextlib, io, json, runpy, sys
sys.path.insert(0, {str(ROOT / "experiments")!r})
told = []
for script, option in {lines}:
    sys.argv, printed = [script, option], io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            runpy.run_path({str(ROOT / "experiments")!r} + f"/{{script}}.py", run_name="__main__")
    except SystemExit as end:
        heavy = [name for name in {[*HEAVY, "jax", "numpy"]} if name in sys.modules]
        told.append([script, option, end.code, heavy, printed.getvalue()])
print(json.dumps(told))
"""
    told = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert [line[:2] for line in told] == lines
    for script, option, code, heavy, printed in told:
        assert not heavy, (script, option)
        if option == "--help":
            assert code == 0 and printed.startswith("usage: ")
        else:
            assert code == 2 and "Unrecognized options: --bogus" in printed


def test_the_names_that_options_offer_are_the_library_s():
    assert list(compose.RULES) == load("merging").RULES
    assert tuple(modular.PARTS) == load("modular_options").PARTS
    offered = load("incremental_options").METHODS
    assert {name.partition("-")[0] for name in offered} == set(incremental.WAYS)


GLYPHS = "with glyphs, which are rendered"


@pytest.mark.parametrize(
    ("script", "line", "told"),
    [
        *(("incremental", f"--{key} x", f"--{key} plays no part {GLYPHS}") for key in ("data-dir", "by", "test-split")),
        ("incremental", "--by x --train-split y", f"--by and --train-split play no part {GLYPHS}"),
        ("incremental", "--data mnist --classes 3", "--classes plays no part with mnist"),
        ("incremental", "--heads 3 --image-size 32", "--heads and --image-size play no part without --backbone"),
        ("incremental", "--compare --methods none-lora", "--methods plays no part with --compare"),
        ("incremental", "--parallel --runner pmap", "name one of the two"),
        ("incremental", "--parallel --methods iel-lora", "--parallel plays no part with iel-lora"),
        ("incremental", "--methods ita-ia3 --rank 3", "--rank plays no part with ita-ia3"),
        ("incremental", "--methods tmc-full --full-learning-rate 1", "--full-learning-rate plays no part"),
        ("incremental", "--beta 3", "--beta plays no part with ita-lora"),
        ("incremental", "--methods none-lora --penalty coupled", "--penalty plays no part"),
        ("incremental", "--methods none-lora --pull 1 1", "--pull plays no part"),
        ("incremental", "--methods ita-lora ita-lora", "--methods: one of the values stands there twice"),
        ("incremental", "--methods ncm", "train nothing"),
        ("incremental", "bogus", "Unrecognized options: bogus"),
        ("throughput", "--loader x --peak 3", "--peak plays no part with --loader"),
        ("throughput", "--loader x --curvature", "--curvature and --loader are two kinds of run"),
        ("merging", "--rules ties ties", "stands there twice"),
        ("modular_multitask", "--data-dir x", "--data-dir plays no part with glyphs"),
        ("modular_multitask", "--templates 1 --analysis-images 3", "--analysis-images plays no part with one template"),
        ("modular_multitask", "--seeds 1 1", "--seeds: one of the values stands there twice: 1 1"),
        ("modular_multitask", "--orders soft --groups 2", "--groups plays no part without linear orders"),
        ("modular_transfer", "--relaxation gumbel", "--relaxation plays no part with linear routes"),
        ("modular_adaptation", "--route soft --groups 2", "--groups plays no part with soft routes"),
        ("modular_reuse", "--phases 0.1 0.2", "--phases plays no part with linear routes"),
        ("modular_multitask", "--orders hard --phases 0.9 0.1", "the first not after the second"),
        ("modular_reuse", "--batch 12", "--batch 12 can't be divided among 8 devices"),
        ("modular_transfer", "--new-batch 12", "--new-batch 12 can't be divided among 8 devices"),
        ("modular_transfer", "--methods head --smoothing 0.1", "--smoothing plays no part"),
        ("modular_transfer", "--budgets 5 1", "two images of each class"),
        ("modular_adaptation", "--data-dir x", "--data-dir plays no part with rendered"),
        ("modular_adaptation", "--methods --adapt-batch 8", "--adapt-batch plays no part with these --methods"),
        ("modular_adaptation", "--size 30", "can't be cut into patches of 4"),
    ],
)  # fmt: skip
def test_what_plays_no_part_or_does_not_go_together_is_refused(script, line, told):
    assert told in refused(script, *line.split())


@pytest.mark.parametrize(
    ("script", "line", "told"),
    [
        ("throughput", "--curvature --rank 3 --peak 9", "--rank and --peak play no part with --curvature"),
        ("throughput", "--modular --model s16", "--model plays no part with --modular"),
        ("throughput", "--batch 12", "--batch 12 can't be divided among 8 devices"),
        ("throughput", "--device --batch 12", "--batch 12 can't be divided among 8 devices"),
        ("throughput", "--peers --model s16", "--model plays no part with --peers"),
        ("throughput", "--minutes 3", "--minutes plays no part without --device"),
        ("throughput", "--threads 2", "--threads plays no part without --peers"),
        ("throughput", "--only hvp", "--only plays no part without --peers or --device"),
        ("throughput", "--peers --only merging", "--only merging: the rows of --peers are forward, gradient"),
        ("throughput", "--peers --rank 65", "--rank 65 is too large: the joint qkv of the ViT, 192 wide"),
        ("throughput", "--peers --threads 9999", "--threads 9999 is more than the"),
        ("throughput", "--peers --device", "--peers and --device are two kinds of run"),
        ("merging", "--methods foo", "the small run has no pool of foo; it has none-lora, none-full"),
        ("merging", "--data-dir x", "--data-dir plays no part without --run"),
        ("merging", "--run x --runs y", "--runs plays no part with --run"),
        ("merging", "--run x", "x holds no finished run"),
        ("unlearning", "--methods foo", "the small run has no pool of foo"),
        ("curvature_check", "--fisher-images 9", "must be a multiple of 8"),
        ("curvature_check", "--fisher-batches 8 7", "--fisher-batches 7: not divisors of 128 images"),
        ("pretrain", "--heads 5", "--heads 5 don't divide --width 96"),
        ("pretrain", "--out x.json", "name a file that ends in .safetensors"),
        ("incremental", "--batch 12", "--batch 12 can't be divided among 8 devices: choose a multiple of 8"),
        ("incremental", "--tasks 12", "12 tasks were asked for and glyphs has 11 scripts: arabic, "),
        ("incremental", "--tasks 2 --classes 2 --images 8 --batch 64", "--batch 64 is more than all the 32"),
        ("modular_multitask", "--data rendered", "rendered without one: glyphs"),
        ("modular_multitask", "--data mnist --data-dir x --tasks 3", "tasks=3 plays no part with mnist"),
        ("modular_adaptation", "--data glyphs", "rendered without one: rendered"),
    ],
)  # fmt: skip
def test_it_is_told_before_anything_is_computed_or_written(script, line, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=re.escape(told)):
        main(*line.split(), script=f"{script}.py")
    assert not list(tmp_path.iterdir())


def test_a_backbone_of_another_run_is_not_written_over(tmp_path):
    pretrain = load("pretrain")
    out, sidecar, config = tmp_path / "a.safetensors", tmp_path / "a.json", {"steps": 4000, "seed": 0}
    assert not pretrain.is_written(out, sidecar, config)
    out.write_bytes(b"theirs")
    with pytest.raises(ValueError, match="is of another run .steps: None there, 4000 now"):
        pretrain.is_written(out, sidecar, config)
    sidecar.write_text(json.dumps(config | {"seed": 1}))
    with pytest.raises(ValueError, match="seed: 1 there, 0 now. and stays"):
        pretrain.is_written(out, sidecar, config)
    sidecar.write_text("{")
    with pytest.raises(ValueError, match="a.json is damaged"):
        pretrain.is_written(out, sidecar, config)
    sidecar.write_text(json.dumps(config | {"jax": "x"}))
    assert pretrain.is_written(out, sidecar, config)
    assert out.read_bytes() == b"theirs"
    packaged = ROOT / "compo_jax" / "models" / "embedded.safetensors"
    before = packaged.read_bytes()
    with pytest.raises(ValueError, match="steps: 4000 there, 8 now"):
        main("--out", packaged, "--steps", 8, "--run", tmp_path / "run", script="pretrain.py")
    assert packaged.read_bytes() == before and not (tmp_path / "run").exists()
    assert pretrain.parse([]).out is None  # beside the run's log


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("[/b] is\nnot [bold]"), 2, "error: [/b] is not [bold]"),
        (KeyError("the metrics lack it"), 2, "error: the metrics lack it"),
        (OSError(errno.ENOENT, "gone", "a"), 2, "gone: 'a'"),
        (OSError(errno.ENOSPC, "No space left on device", "a"), 2, "error: the disk is full ("),
        (ValueError("RESOURCE_EXHAUSTED: ...: No space left on device"), 2, "error: the disk is full ("),
        (MemoryError("286 GiB"), 2, "memory ran out (286 GiB)"),
        (KeyboardInterrupt(), 130, "stopped: the same command goes on where it was"),
    ],
)
def test_every_end_is_one_line(error, code, told, capsys, monkeypatch):
    monkeypatch.setattr(job.signal, "signal", lambda *_: None)

    def fails():
        raise error

    with pytest.raises(SystemExit) as caught:
        job.closing(fails)
    printed = capsys.readouterr()
    assert caught.value.code == code
    assert told in printed.out and printed.out.count("\n") == 1 and not printed.err


def test_an_error_of_ours_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as caught:
        job.closing(lambda: {}["x"])
    assert caught.value.code == 1
    assert "KeyError: 'x'" in capsys.readouterr().err


def test_fewer_images_than_asked_for_are_told(capsys):
    pixels = np.arange(7 * 12, dtype=np.uint8).reshape(7, 2, 2, 3)
    stream = TaskStream("few", (), 2)
    split = ArraySplit(pixels, np.array([0, 0, 0, 1, 1, 1, 1]))
    job.tell_images(stream._replace(tasks=(Task("t", ("a", "b"), split, split),)), 4)
    assert "1 of 2 classes have fewer than --images 4 training images (3 at least)" in " ".join(
        capsys.readouterr().out.split()
    )


# Runs that were damaged


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def strange(folder, config=None):
    """A run without a reference head, with these settings or none."""
    (folder / "reference.npz").unlink()
    (folder / "config.json").unlink() if config is None else (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files of a finished run that are read when it is opened, without a pool."""
    folder = tmp_path_factory.mktemp("runs") / "made"
    folder.mkdir()
    config = {
        "data": "glyphs", "data_dir": None, "tasks": 2, "seed": 0, "by": None, "train_split": None, "test_split": None,
        "classes": 2, "images": 2, "backbone": None, "heads": None, "image_size": None, "dtype": "float32",
        "methods": ["ita-lora"], "epochs": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text("{}")
    np.savez(folder / "reference.npz", kernel=np.zeros((96, 4), np.float32), bias=np.zeros(4, np.float32))
    return folder


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: cut(f / "config.json"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json holds list and must hold an object"),
        (lambda f: (f / "config.json").unlink(), "lacks config.json"),
        (lambda f: (f / "config.json").write_text("{}"), "its settings lack backbone, by"),
        (lambda f: (f / "metrics.json").write_text(""), "metrics.json is damaged"),
        (lambda f: (f / "metrics.json").unlink(), "holds no finished run"),
        (lambda f: cut(f / "reference.npz"), "reference.npz, the run's reference head, is damaged"),
        (lambda f: (f / "reference.npz").write_bytes(b""), "reference.npz, the run's reference head, is damaged"),
        (lambda f: np.savez(f / "reference.npz", kernel=np.zeros((96, 3)), bias=np.zeros(3)), "of another run"),
        (lambda f: (f / "reference.npz").unlink(), "made by another version: it lacks the reference head"),
        (lambda f: strange(f, {"adapt_steps": 3}), "run is no run of experiments/incremental.py but of modular_adapta"),
        (lambda f: strange(f, {"steps": 3}), r"run is no run of experiments/incremental.py, as the settings in config"),
        (lambda f: strange(f), "is no run of experiments/incremental.py: it has neither config.json nor reference.npz"),
    ],
)
def test_a_damaged_run_is_told_with_its_file(made, tmp_path, damage, told):
    folder = shutil.copytree(made, tmp_path / "run")
    damage(folder)
    with pytest.raises(ValueError, match=told):
        incremental.open_finished(folder)


def test_every_other_script_is_told_by_a_setting_of_its_own():
    kinds = {"vision8.py": load("vision8_options").Options, "incremental.py": load("incremental_options").Options}
    names = ("multitask", "transfer", "adaptation", "reuse")
    kinds |= {f"modular_{name}.py": getattr(load("modular_options"), name.capitalize()) for name in names}
    settings = {script: {name for name, *_ in fields(kind)} for script, kind in kinds.items()}
    assert "epochs" in settings["incremental.py"] and finished._OTHERS.keys() == kinds.keys() - {"incremental.py"}
    for script, setting in finished._OTHERS.items():
        assert [name for name, of_script in settings.items() if setting in of_script] == [script]


def test_runs_that_do_not_belong_together_are_refused(made, tmp_path, monkeypatch):
    run = incremental.open_finished(made)
    assert (len(run.stream.tasks[0].train), run.stream.name) == (4, "glyphs")
    with pytest.raises(ValueError, match="a run is named twice"):
        incremental.open_several([made, made.parent / "." / "made"])
    monkeypatch.setenv("HOME", str(made.parent))
    with pytest.raises(ValueError, match="a run is named twice"):
        incremental.open_several([made, "~/made"])
    with pytest.raises(ValueError, match="is of glyphs, which are rendered"):
        incremental.open_finished(made, tmp_path)
