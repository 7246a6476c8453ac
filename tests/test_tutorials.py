"""The tutorials are short, say how they are run, and run."""

import ast
import re
import sys

import pytest
from jobs import ROOT

FOLDER = ROOT / "experiments" / "tutorials"
# In this order: the first of the second line makes the pool of the others.
ORDER = [
    "curvature_of_your_model", "modular_network", "your_own_images",
    "train_and_store", "merge_a_pool", "forecast", "peft_in_and_out",
]  # fmt: skip


def test_all_are_here_and_have_at_most_70_lines_and_a_docstring_with_the_command():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(ORDER)
    for name in ORDER:
        text = (FOLDER / f"{name}.py").read_text()
        assert text.count("\n") <= 70, name
        assert f"python experiments/tutorials/{name}.py" in ast.get_docstring(ast.parse(text)), name


# What is made smaller here, to save time.
SMALLER = {
    "modular_network": {"steps=200": "steps=30", "steps=100": "steps=50"},
    "your_own_images": {
        "epochs=3": "epochs=1",
        "load_digits(return_X_y=True)": "(x[:500] for x in load_digits(return_X_y=True))",
    },
    "train_and_store": {"range(60)": "range(30)"},
}


def smaller(name):
    text = (FOLDER / f"{name}.py").read_text()
    for usual, small in SMALLER.get(name, {}).items():
        assert text.count(usual) == 1, (name, usual)
        text = text.replace(usual, small)
    return text


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("tutorials"))
        patch.syspath_prepend(str(FOLDER))
        lines = {name: [] for name in ORDER}
        for name in ORDER:
            show = lambda *values, sep=" ", end="\n", name=name: lines[name].append(sep.join(map(str, values)) + end)
            exec(compile(smaller(name), f"{name}.py", "exec"), {"print": show, "__name__": "__main__"})
        sys.modules.pop("train_and_store", None)
        return {name: "".join(parts) for name, parts in lines.items()}


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def line(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def test_the_curvature_tutorial_agrees_with_itself(printed):
    trace, error = numbers(line(printed["curvature_of_your_model"], "its trace"))
    first, *_ = numbers(line(printed["curvature_of_your_model"], "its largest"))
    exact, drawn = numbers(line(printed["curvature_of_your_model"], "Fisher, summed"))
    assert 0 < first < trace + 3 * error and abs(exact - drawn) < 0.3 * exact


def test_modules_know_their_tasks_and_go_when_they_are_taken_away(printed):
    mean, without = (numbers(line(printed["merge_a_pool"], start)) for start in ("mean of all", "without `high`"))
    assert min(mean) > 0.6 and without[2] < mean[2] - 0.1


def test_the_forecast_is_near_the_truth(printed):
    forecast, true, mean = numbers(line(printed["forecast"], "their loss"))
    assert true <= mean and abs(forecast - true) < 0.1 * true


def test_a_module_comes_back_from_peft_as_it_went(printed):
    assert numbers(line(printed["peft_in_and_out"], "largest difference")) == [0.0]


def test_own_images_are_learned(printed):
    last = line(printed["your_own_images"], "after digits-4")
    ita, none, ncm, frozen = numbers(last)
    assert min(ita, none, ncm, frozen) > 20


def test_a_modular_network_gives_way_to_a_fourth_task(printed):
    before, after = numbers(line(printed["modular_network"], "the new task"))
    assert after > before
