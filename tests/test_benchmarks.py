"""The paper's benchmarks on the command line: what they fill in, what wins over them, and whose numbers are shown."""

import json
import sys

import numpy as np
import pytest
from jobs import ROOT
from PIL import Image

from compo_jax import incremental

sys.path.insert(0, str(ROOT / "experiments"))
import benchmarks
import incremental as job
from incremental_options import METHODS, parse
from options import flat

BASE = job.models.backbone().params


def options(line):
    return parse(line.split())


def images(folder, classes, train, test, size=6):
    """Folders of images whose grey tells their class."""
    for part, count in (("train", train), ("test", test)):
        for c in range(classes):
            (folder / part / f"c{c:02}").mkdir(parents=True)
            for i in range(count):
                noise = np.random.default_rng([c, i, part == "test"]).integers(0, 40, (size, size + 2, 3))
                pixels = np.uint8(noise + 200 * c // classes)
                Image.fromarray(pixels).save(folder / part / f"c{c:02}" / f"{i}.png")
    return folder


def test_tasks_are_the_papers_and_its_numbers_are_of_methods_that_are_run():
    assert {name: sum(b.classes) for name, b in benchmarks.BENCHMARKS.items()} == {
        "imagenet_r-10x20": 200, "cifar100-10x10": 100, "cub-10x20": 200, "caltech256-10": 256, "mit67-10": 67,
        "resisc45-9x5": 45, "cropdisease-7x5": 35,
    }  # fmt: skip
    for name, benchmark in benchmarks.BENCHMARKS.items():
        numbers = benchmarks.published(name)
        assert {method.partition("-")[0] for method in numbers} <= incremental.WAYS.keys()
        assert set(numbers) <= set(METHODS) and all(0 < number < 1 for number in numbers.values())
        assert {"ita-lora", "iel-ia3", "none-full"} <= set(numbers)
        assert benchmark.data.startswith("folder:") == bool(benchmark.layout)
    assert benchmarks.published("cifar100-10x10")["ita-lora"] == 0.8996
    assert benchmarks.published("cifar100-10x10")["joint-full"] == 0.9174
    assert benchmarks.published("cropdisease-7x5")["pull-lora"] == 0.9622
    assert "joint-full" not in benchmarks.published("mit67-10")


def test_a_benchmark_fills_in_what_the_command_line_leaves_open():
    chosen = options("--benchmark cropdisease-7x5 --data-dir x --methods ita-lora iel-lora")
    assert (chosen.stream.data, chosen.stream.tasks, chosen.stream.augment) == ("folder:cropdisease", 7, "original")
    assert (chosen.training.epochs, chosen.training.batch, chosen.training.probe_epochs) == (5, 128, 1)
    assert (chosen.training.rank, chosen.training.learning_rate) == (16, 3e-4)
    weigh = chosen.penalties
    assert (weigh.alpha, weigh.beta, weigh.pull, weigh.iel_pull) == (5, 20, (0.1, 0.01), (0.1, 0.001))
    assert chosen.place.name == "incremental-cropdisease-7x5-0-ita-lora-iel-lora"
    ours = options("")
    assert ours.penalties.alpha == 0.1 and ours.training.rank == 8 and ours.stream.augment == "default"


def test_what_the_command_line_names_wins():
    line = "--benchmark imagenet_r-10x20 --alpha 0.5 --epochs 2 --rank 8 --pull 1 2 --methods ita-lora iel-lora"
    chosen = options(f"{line} --data folder:/somewhere/r --class-order 1993")
    assert (chosen.penalties.alpha, chosen.training.epochs, chosen.training.rank) == (0.5, 2, 8)
    assert (chosen.stream.data, chosen.stream.class_order, chosen.stream.train_split) == (
        "folder:/somewhere/r",
        1993,
        None,
    )
    assert options(f"{line} --data-dir x").stream.train_split == "test"
    pulls = [method.pull for method in job.methods(chosen, BASE)]
    assert pulls == [(1, 2), (1, 2)]


@pytest.mark.parametrize(
    ("line", "weighed"),
    [
        ("--benchmark cifar100-10x10 --data-dir x", ["paper 0.02", "paper 20", "relative 0.004", "relative 0.1"]),
        (
            "--benchmark cropdisease-7x5 --data-dir x --alpha 7 --ewc 3",
            ["paper 7", "paper 20", "relative 0.004", "relative 3"],
        ),
        (
            "--benchmark cropdisease-7x5 --data-dir x --units relative",
            ["relative 0.1", "relative 0.1", "relative 0.004", "relative 0.1"],
        ),
        (
            "--benchmark cifar100-10x10 --data-dir x --units paper --tak-alpha 10 --ewc 300",
            ["paper 0.02", "paper 20", "paper 10", "paper 300"],
        ),
        ("", ["relative 0.1", "relative 0.1", "relative 0.004", "relative 0.1"]),
    ],
)
def test_a_benchmarks_units_are_those_of_the_weights_that_it_gives(line, weighed):
    made = job.methods(options(f"{line} --methods ita-lora iel-lora tak-lora ewc-full"), BASE)
    assert [f"{method.units} {method.alpha:g}" for method in made] == weighed


def test_weights_in_the_papers_units_are_named():
    for line in ("--benchmark cifar100-10x10 --data-dir x", ""):
        with pytest.raises(ValueError, match="no default for .*--tak-alpha and --ewc: name them too"):
            options(f"{line} --units paper --methods ita-lora tak-lora ewc-full")


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("--benchmark cifar100-10x10", True),
        ("--benchmark cifar100-10x10 --class-order 1993", True),
        ("--benchmark cifar100-10x10 --train-split train --test-split test", True),
        ("--benchmark cifar100-10x10 --test-split test", True),
        ("--benchmark cifar100-10x10 --data folder:c --train-split val", False),
        ("--benchmark resisc45-9x5 --data resisc45", True),
        ("--benchmark resisc45-9x5 --train-split train[:50%]", False),
        ("--benchmark cifar100-10x10 --train-split train", False),
        ("--benchmark cifar100-10x10 --train-split train[:1%]", False),
        ("--benchmark cifar100-10x10 --test-split test[:5%]", False),
        ("--benchmark cifar100-10x10 --images 5", False),
        ("--benchmark cifar100-10x10 --data cifar10", False),
        ("--benchmark imagenet_r-10x20", True),
        ("--benchmark imagenet_r-10x20 --test-fraction 0.01", False),
        ("--benchmark imagenet_r-10x20 --data folder:r", True),
        ("--benchmark mit67-10 --train-split all", True),
        ("--benchmark mit67-10 --test-fraction 0.5", False),
    ],
)
def test_the_papers_numbers_are_of_its_images_alone(line, same):
    chosen = options(f"{line} --data-dir x")
    told = benchmarks.differs(chosen.stream.benchmark, chosen.stream, benchmarks.BENCHMARKS[line.split()[1]].classes)
    assert (told == "") is same


def test_ita_and_iel_have_each_its_pull():
    chosen = options("--benchmark cifar100-10x10 --data-dir x --methods pull-lora iel_pull-lora ita-ia3")
    pulls = [method.pull for method in job.methods(chosen, BASE)]
    assert pulls == [(0.025, 0.001), (0.1, 0.001), (0.025, 0.001)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--benchmark mnist", "none of imagenet_r-10x20"),
        ("--benchmark cifar100-10x10 --classes 3", "--classes plays no part with cifar100"),
        ("--benchmark cifar100-10x10 --beta 3", "--beta plays no part with ita-lora"),
        ("--data folder:x --by colour", "--by plays no part with folders"),
        ("--data omniglot --by alphabet --class-order 1993", "--class-order plays no part with --by"),
        ("--class-order 1993 --crop 0.5", "--class-order and --crop play no part with glyphs"),
    ],
)
def test_what_plays_no_part_is_refused_with_a_benchmark_as_without(line, told, capsys):
    with pytest.raises((ValueError, SystemExit)) as caught:
        options(line)
    assert told in f"{caught.value} {' '.join(capsys.readouterr().err.replace('│', ' ').split())}"


def test_a_folder_that_is_not_there_is_told_with_how_to_lay_it_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*mit67: .* Here: mit67 in DATA_DIR/mit67/train"):
        job.open_stream(options(f"--benchmark mit67-10 --data-dir {tmp_path}"), 8)


def test_67_classes_are_seven_tasks_of_seven_and_three_of_six_in_the_fields_order(tmp_path, capsys):
    images(tmp_path / "mit67", 67, 1, 1)
    chosen = options(f"--benchmark mit67-10 --data-dir {tmp_path} --class-order 1993")
    stream = job.open_stream(chosen, 8)
    assert [len(task.classes) for task in stream.tasks] == [7] * 7 + [6] * 3
    assert stream.classes == tuple(f"c{c:02}" for c in np.random.RandomState(1993).permutation(67))
    assert job.published(chosen, stream)["ita-lora"] == 0.866 and not capsys.readouterr().out
    five = options(f"--benchmark mit67-10 --data-dir {tmp_path} --tasks 5")
    assert job.published(five, job.open_stream(five, 8)) == {}
    told = "tasks of 7 x 7 + 3 x 6 classes, and these are 2 x 14 + 3 x 13: the paper's numbers are left out"
    assert told in " ".join(capsys.readouterr().out.split())


def test_a_run_on_a_folder_is_opened_again_with_the_very_images(tmp_path):
    images(tmp_path / "greys", 4, 8, 2)
    line = f"--data folder:greys --data-dir {tmp_path} --tasks 2 --batch 8 --images 6"
    chosen = options(f"{line} --augment original --class-order 3 --crop 0.5")
    assert chosen.place.name == "incremental-greys-0"
    learned, _ = job.setup(chosen)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(flat(chosen)))
    (folder / "metrics.json").write_text("{}")
    np.savez(folder / "reference.npz", kernel=np.zeros((learned.base["norm"]["scale"].shape[-1], 4)), bias=np.zeros(4))
    stream = incremental.open_finished(folder).stream
    assert stream.classes == tuple(f"c{c:02}" for c in np.random.RandomState(3).permutation(4))
    for task, twin in zip(stream.tasks, learned.stream.tasks, strict=True):
        assert len(task.train) == 12 and task.train.source.files == twin.train.source.files
        assert (task.train.rows == twin.train.rows).all() and task.train.draws and task.train.decoding.crop == 0.5
        assert (task.test.pixels == twin.test.pixels).all()
