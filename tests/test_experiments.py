"""The main job from its command line: results, resume after a kill, and what it says to bad input."""

import json
import re
import sys

import jax
import numpy as np
import pytest
from jobs import ROOT, comparable, killed, main, run

from compo_jax.compose.rule_results import MergingResults
from compo_jax.curvature.check_results import CurvatureResults
from compo_jax.incremental.outcomes import Results
from compo_jax.incremental.unlearning_results import UnlearningResults
from compo_jax.pool import ModulePool
from compo_jax.train import read_result

sys.path.insert(0, str(ROOT / "experiments"))

import merge_bench

SMALL = ["--tasks", "2", "--classes", "3", "--images", "24", "--epochs", "3", "--batch", "24", "--fisher-images", "24"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    done = run(*SMALL, "--runs", runs, "--name", "whole")
    assert done.returncode == 0, done.stdout + done.stderr
    return runs / "whole", done.stdout


def test_the_main_job_writes_what_it_promises(finished):
    folder, printed = finished
    results = read_result(folder / "metrics.json", Results)
    main = results.methods[results.method]
    assert np.isnan(main.accuracy_matrix[0, 1])
    assert main.final_accuracy == pytest.approx(np.mean(main.accuracy_matrix[1]))
    assert main.final_forgetting == pytest.approx(main.accuracy_matrix[0, 0] - main.accuracy_matrix[1, 0])
    assert main.final_accuracy > 1.5 / 6  # better than chance
    frozen = results.frozen
    assert frozen.final_accuracy == pytest.approx(np.mean(frozen.accuracy_matrix[1]))
    assert 0 < frozen.accuracy_matrix[0, 0] <= 1
    assert results.images_per_second > 0
    assert results.seconds > main.seconds > 0
    assert (folder / "report.html").stat().st_size > 20_000
    assert json.loads((folder / "config.json").read_text())["seed"] == 0
    pool = ModulePool(folder / "pool")
    assert pool.names() == ["00-arabic", "01-armenian"]
    assert pool.load("00-arabic", "head")["kernel"].shape == (96, 3)
    assert pool.manifest("01-armenian").settings["rank"] == 8
    assert "ita-lora" in printed
    assert "frozen" in printed


def test_a_finished_run_is_not_run_again_and_other_settings_are_refused(finished, capsys):
    folder, _ = finished
    before = (folder / "metrics.json").read_bytes()
    main(*SMALL, "--runs", folder.parent, "--name", folder.name)
    assert "is finished" in " ".join(capsys.readouterr().out.split())
    assert (folder / "metrics.json").read_bytes() == before
    with pytest.raises(ValueError, match="rank: 8 there, 4 now"):
        main(*SMALL, "--runs", folder.parent, "--name", folder.name, "--rank", "4")
    assert (folder / "metrics.json").read_bytes() == before


def test_a_killed_run_ends_bit_identical(finished, tmp_path):
    whole, _ = finished
    folder = tmp_path / "killed"
    arguments = [*SMALL, "--runs", tmp_path, "--name", "killed"]
    # Killed when the first task's module is in the pool and the second task's training has begun.
    assert killed(folder / "checkpoints/ita-lora-1", *arguments)
    assert not (folder / "metrics.json").exists()
    last = run(*arguments)
    assert last.returncode == 0, last.stdout + last.stderr
    assert comparable(folder) == comparable(whole)
    for name in ("00-arabic", "01-armenian"):
        first, second = ModulePool(whole / "pool").manifest(name), ModulePool(folder / "pool").manifest(name)
        assert first.parts == second.parts  # shapes, dtypes and SHA-256 of every array
    first, second = (read_result(f / "metrics.json", Results) for f in (whole, folder))
    for one, other in ((first.methods["ita-lora"], second.methods["ita-lora"]), (first.frozen, second.frozen)):
        np.testing.assert_array_equal(one.accuracy_matrix, other.accuracy_matrix)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--data", "mnist"], "mnist needs data_dir (--data-dir)"),
        (["--data", "mnist", "--data-dir", "{tmp}/nowhere"], "there is no folder"),
        (["--data", "mnist", "--data-dir", "{tmp}"], "no prepared set 'mnist'"),
        (["--data", "mnist", "--data-dir", "gs://x"], "gs://x is an address"),
        (["--classes", "40"], "has only 20 characters"),
        (["--rank", "200"], "rank 200 is larger than the 96x96 matrix"),
        (["--backbone", "{tmp}/nothing.safetensors"], "nothing.safetensors"),
        (["--runs", "{tmp}/file"], "can't be written"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(arguments, told, tmp_path):
    (tmp_path / "file").write_text("in the way")
    filled = [a.format(tmp=tmp_path) for a in arguments]
    of_data = [] if "--data" in filled else SMALL
    with pytest.raises((ValueError, OSError), match=re.escape(told)):
        main(*of_data, *([] if "--runs" in filled else ["--runs", tmp_path / "runs"]), *filled)
    assert not (tmp_path / "runs").exists()  # nothing that a rerun would trip on


def test_what_the_user_can_mend_is_one_sentence_and_exit_code_2(tmp_path):
    result = run(*SMALL, "--classes", "40", "--runs", tmp_path / "runs")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "error: 40 classes were asked for and arabic has only 20 characters" in result.stdout
    assert "Traceback" not in result.stderr


def test_the_curvature_of_a_finished_run_is_checked(finished):
    folder, _ = finished
    few = ["--images", 16, "--fisher-images", 8, "--fisher-batches", 8, "--weightings", 20, "--order", 3]
    done = run("--run", folder, *few, script="curvature_check.py")
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_result(folder / "curvature" / "metrics.json", CurvatureResults)
    assert results.products.error_float64 < 1e-10
    rows = {row.estimate: row for row in results.fisher.rows}
    assert {row.batch for row in rows.values()} == {8}
    assert rows["exact diagonal"].trace_ratio == 1
    assert rows["EKFAC"].trace_ratio == pytest.approx(1, rel=1e-4)
    check = results.forecast["ita-lora"]
    uniform = check.anchors["the uniform composition"]
    assert uniform.correlation > 0.9
    assert uniform.relative_error < 0.02
    assert 0 < uniform.gain_error < 1
    assert check.theorem.measured_gap[0] == pytest.approx(0, abs=1e-6)  # at scale zero all compositions are the base
    assert (folder / "curvature" / "report.html").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--run", "{tmp}"], "holds no finished run"),
        (["--run", "{run}", "--images", "9"], "must be a multiple of 8, at most the 9 of --images"),
        (
            ["--run", "{run}", "--fisher-images", "128"],
            "must be a multiple of 8, at most the 120 images that there are",
        ),
        (["--run", "{run}", "--images", "1", "--fisher-images", "8"], "at most the 1 of --images"),
    ],
)
def test_the_curvature_check_says_what_it_lacks(finished, tmp_path, arguments, told):
    filled = [a.format(tmp=tmp_path, run=finished[0]) for a in arguments]
    with pytest.raises((ValueError, OSError), match=told):
        main(*filled, script="curvature_check.py")


SEVERAL = [*SMALL, "--epochs", "1", "--methods", "none-lora", "iel-ia3", "tak-lora", "ncm", "ranpac"]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A run of many methods, killed after its first task and taken up again."""
    runs = tmp_path_factory.mktemp("runs")
    arguments = [*SEVERAL, "--runs", runs, "--name", "several"]
    assert killed(runs / "several" / "pool" / "01-armenian", *arguments)
    done = run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on after arabic (1/2)" in done.stdout
    return runs / "several"


def test_a_killed_run_of_methods_with_a_memory_ends_bit_identical(several):
    """All tasks at once for what is independent, and no kill: the others must end the same to the bit."""
    whole = run(*SEVERAL, "--parallel", "--runs", several.parent, "--name", "whole")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    first, second = (read_result(several.parent / f / "metrics.json", Results).methods for f in ("several", "whole"))
    for name in ("iel-ia3", "ncm", "ranpac"):
        np.testing.assert_array_equal(first[name].accuracy_matrix, second[name].accuracy_matrix, name)
    for pool in ("pool", "pools/tak-lora"):
        one, other = (ModulePool(several.parent / f / pool).load("01-armenian") for f in ("several", "whole"))
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-4)
    one, other = (
        ModulePool(several.parent / f / "pools/iel-ia3").manifest("01-armenian") for f in ("several", "whole")
    )
    assert one.parts == other.parts
    for pool in ("pool", "pools/iel-ia3"):
        one, other = (ModulePool(several.parent / f / pool) for f in ("several", "whole"))
        for kind in ("diagonal", "kronecker"):
            assert int(one.curvature("00-arabic", kind=kind).count) == 24
            for x, y in zip(
                *(jax.tree.leaves(p.curvature("01-armenian", kind=kind)) for p in (one, other)), strict=True
            ):
                np.testing.assert_array_equal(x, y)


def test_every_task_is_unlearned_from_every_pool(several):
    done = run("--run", several, script="unlearning.py")
    assert done.returncode == 0, done.stdout + done.stderr
    (measured,) = read_result(several / "unlearning" / "metrics.json", UnlearningResults).runs
    assert sorted(measured.methods) == ["iel-ia3", "none-lora", "tak-lora"]  # not what composes nothing
    main = read_result(several / "metrics.json", Results)
    for name, pool in measured.methods.items():
        assert pool.unlearn.shape == (2, 2)
        np.testing.assert_allclose(pool.composed, main.methods[name].accuracy_matrix[-1])
        # of two modules, all but one is the other alone
        np.testing.assert_array_equal(pool.unlearn, pool.specialise[::-1])
    targets, controls = ([getattr(skill, key) for skill in main.specialise] for key in ("target", "control"))
    matrix = measured.methods["none-lora"].specialise
    np.testing.assert_allclose([targets, controls], [np.diag(matrix), matrix[[0, 1], [1, 0]]])
    assert (several / "unlearning" / "report.html").stat().st_size > 10_000


def test_rules_are_compared_on_every_pool(several):
    rules = ["average", "fisher", "best_weights", "emr"]
    one = ["--run", several, "--methods", "none-lora", "--images", 8]
    done = run(*one, "--rules", *rules, script="merging.py")
    assert done.returncode == 0, done.stdout + done.stderr
    (measured,) = read_result(several / "merging" / "metrics.json", MergingResults).runs
    for found in measured.pools.values():
        assert list(found.rules) == rules
        for merged in found.rules.values():
            np.testing.assert_allclose(found.normalised(merged.within), merged.within / found.individual)
            assert merged.memory > 1
            assert merged.seconds > 0
        np.testing.assert_allclose(found.rules["average"].expected.distance, 0, atol=1e-6)
        assert found.rules["emr"].expected is None  # a model for each task
        assert np.isnan(found.rules["emr"].incremental).all()
        average = found.weightings.within[found.weightings.weights.sum(1) == 1][0]
        np.testing.assert_array_equal(average, found.rules["average"].within)
    assert (several / "merging" / "report.html").stat().st_size > 10_000
    pool = ModulePool(next((several / "merging" / "pools").glob("none-lora-*")))
    assert pool.find(curvature="diagonal") == pool.names()
    assert pool.find(curvature="kronecker") == []  # which none of these rules needs


def test_a_comparison_that_is_stopped_goes_on_behind_its_last_rule(several, monkeypatch):
    """The second start makes what the first one lacks, no rule twice, and leaves nothing behind."""
    one = ["--run", several, "--methods", "none-lora", "--images", 6, "--rules", "average", "fisher", "cart"]
    made, by_rule = [], merge_bench.Ground.by_rule

    def counted(self, rule, *rest):
        made.append(rule)
        if made == ["average", "fisher"]:
            raise KeyboardInterrupt
        return by_rule(self, rule, *rest)

    monkeypatch.setattr(merge_bench.Ground, "by_rule", counted)
    with pytest.raises(KeyboardInterrupt):
        main(*one, script="merging.py")
    main("--run", several, "--methods", "none-lora", "--images", 7, "--rules", "average", script="merging.py")
    main(*one, script="merging.py")
    assert made == ["average", "fisher", "average", "fisher", "cart"]  # another comparison takes nothing away
    aside = [read_result(file, MergingResults) for file in (several / "merging").glob("earlier-*/metrics.json")]
    assert [[*results.runs[0].pools["none-lora"].rules] for results in aside if results.images == 7] == [["average"]]
    (resumed,) = read_result(several / "merging" / "metrics.json", MergingResults).runs
    main(*one, script="merging.py")
    assert made[5:] == ["average", "fisher", "cart"]  # a comparison that is finished begins anew
    (anew,) = read_result(several / "merging" / "metrics.json", MergingResults).runs
    for rule, merged in anew.pools["none-lora"].rules.items():
        np.testing.assert_array_equal(resumed.pools["none-lora"].rules[rule].within, merged.within)
    assert not list((several / "merging").glob("unfinished*"))


def test_a_folder_without_a_run_is_told(tmp_path):
    with pytest.raises((ValueError, OSError), match="holds no finished run"):
        main("--run", tmp_path, script="merging.py")


def test_what_the_pools_of_a_run_do_not_have_is_told_before_a_curvature_is_taken(several):
    for arguments, told in (
        (["--images", 73], "--images 73: a task has 72 training images"),
        (["--methods", "foo"], "not every run has a pool of foo"),
    ):
        with pytest.raises(ValueError, match=told):
            main("--run", several, *arguments, script="merging.py")
