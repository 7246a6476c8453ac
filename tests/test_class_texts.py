"""Heads that a small CLIP's text tower makes of class names: in a whole run, by its tokenizer, and what is refused."""

import sys

import clip_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jobs import ROOT, main, run
from test_prompts import write_tokenizer

from compo_jax import data, models
from compo_jax.compose.rule_results import MergingResults
from compo_jax.models import clip_text, prompts, zero_shot
from compo_jax.pool import ModulePool
from compo_jax.train import read_result

sys.path.insert(0, str(ROOT / "experiments"))
import class_texts
import vision8

SMALL = ["--images", "16", "--test-images", "10", "--steps", "2", "--batch", "8", "--curvature-images", "4"]


def glyphs(classes=8, size=8):
    return data.open_tasks(["glyphs"], size, tasks=8, classes=classes, images=2)


def write_ids(folder, tasks, templates=2):
    """A file of token ids for each task."""
    folder.mkdir()
    for t, task in enumerate(tasks):
        texts = clip_cases.random_ids(len(task.classes) * templates, seed=t)
        ids = np.where(texts == clip_cases.END, 59, texts).reshape(-1, templates, texts.shape[1])
        prompts.save_token_ids(folder / f"{task.name}.npz", ids)
    return folder


def test_templates_and_names_are_as_one_would_say_them():
    assert class_texts.templates("dtd64") == prompts.TEMPLATES["dtd"]
    assert class_texts.templates("svhn_cropped") == prompts.TEMPLATES["svhn"]
    assert class_texts.templates("resisc64") == prompts.TEMPLATES["resisc45"]
    assert class_texts.templates("letters64") == class_texts.templates("64") == ("a photo of a {}.",)
    for name, words in (
        ("AnnualCrop", "Annual Crop"), ("baseball_diamond", "baseball diamond"), ("McLaren MP4-12C", "McLaren MP4-12C"),
        ("/b/bow_window/indoor", "bow window indoor"), ("Speed limit (20km/h)", "Speed limit (20km/h)"), ("7", "7"),
    ):  # fmt: skip
        assert class_texts.spoken(name) == words


def test_modules_are_merged_under_the_heads_of_a_clips_texts(tmp_path):
    clip_cases.write_clip(tmp_path / "clip")
    ids = write_ids(tmp_path / "ids", glyphs().tasks)
    line = [*SMALL, "--zero-shot", tmp_path / "clip", "--token-ids", ids, "--runs", tmp_path, "--name", "run"]
    done = run(*line, "--rules", "average", script="vision8.py")
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_result(tmp_path / "run" / "metrics.json", MergingResults)
    assert results.backbone == "clip, heads of clip's texts"
    merges = results.runs[0].pools["lora"]
    assert list(merges.rules) == ["average"]

    options = vision8.parse(list(map(str, line)))
    backbone, (tower, params) = models.backbone(tmp_path / "clip"), clip_text.load(tmp_path / "clip")
    stream = backbone.normalised(vision8.open_tasks(options, 8, 0))
    pool = ModulePool(tmp_path / "run" / "pools" / "lora-0")
    for t, (name, task) in enumerate(zip(pool.names(), stream.tasks, strict=True)):
        embeddings = zero_shot.class_embeddings(tower, params, prompts.read_token_ids(ids / f"{task.name}.npz"))
        images = stream.prepare(jnp.asarray(task.test.images(np.arange(10))))
        features = backbone.model.apply({"params": backbone.params}, images)
        cosines = zero_shot.unit(features) @ embeddings.T
        assert merges.base[t] == pytest.approx(np.mean(cosines.argmax(-1) == task.test.labels))
        head = zero_shot.head(embeddings, params["logit_scale"])
        np.testing.assert_allclose(pool.load(name, "head")["kernel"], head["kernel"], rtol=1e-5, atol=1e-6)


def test_a_tokenizer_beside_the_clip_writes_the_texts(tmp_path, capsys):
    clip_cases.write_clip(tmp_path / "clip")
    stream = glyphs()
    with pytest.raises((FileNotFoundError, ValueError), match=r"there is no tokenizer|made by the tokenizers library"):
        class_texts.zero_shot_head(tmp_path / "clip", stream, 7)
    write_tokenizer(tmp_path / "clip" / "tokenizer.json")
    tasks = [
        task._replace(name=name, classes=("aCat", "a_dog"))
        for name, task in zip(("sun397", "photos"), stream.tasks[:2], strict=True)
    ]
    head = class_texts.zero_shot_head(tmp_path / "clip", stream._replace(tasks=tasks), 7)
    assert head["kernel"].shape == (7, 4) and not head["bias"].any()
    tower, params = clip_text.load(tmp_path / "clip")
    ids = prompts.token_ids(tmp_path / "clip", ["a cat", "a dog"], ["a photo of a {}."], tower.context)
    by_hand = zero_shot.head(zero_shot.class_embeddings(tower, params, ids), params["logit_scale"])
    np.testing.assert_allclose(head["kernel"][:, 2:], by_hand["kernel"], rtol=1e-5, atol=1e-6)
    assert "sun397: 2 texts a class, 'a photo of a {}.' the first" in capsys.readouterr().out


def test_towers_and_texts_that_do_not_fit_are_told(tmp_path):
    clip, tasks = tmp_path / "clip", glyphs().tasks
    clip_cases.write_clip(clip)
    ids = write_ids(tmp_path / "ids", tasks[1:])
    few = write_ids(tmp_path / "few", glyphs(4).tasks)
    for arguments, told in (
        (["--token-ids", ids], "--token-ids plays no part without --zero-shot"),
        (["--zero-shot", clip, "--backbone", backbone_file(tmp_path)], "features of width 7, the base's have 24"),
        (["--zero-shot", clip, "--token-ids", ids], f"there is no file of token ids .*{tasks[0].name}.npz"),
        (["--zero-shot", clip, "--token-ids", few], "has token ids of 4 classes for .*, which has 8"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            main(*SMALL, *arguments, "--runs", tmp_path / "runs", script="vision8.py")
    assert not (tmp_path / "runs").exists()


def backbone_file(folder):
    model = models.ViT(8, 4, 24, 1, 3)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    models.save(folder / "vit.safetensors", params, model=model)
    return folder / "vit.safetensors"
