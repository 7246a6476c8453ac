"""Prompt templates, and texts as token ids: written out by hand, and as transformers' tokenizer makes them."""

import json
import sys

import numpy as np
import pytest

from compo_jax.models import prompts

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz.!"
VOCABULARY = {letter: n for n, letter in enumerate(LETTERS)}
VOCABULARY |= {f"{letter}</w>": len(LETTERS) + n for n, letter in enumerate(LETTERS)}
VOCABULARY |= {"ca": 56, "cat</w>": 57, START: 58, END: 59}
MERGES = [("c", "a"), ("ca", "t</w>")]


def ids_by_hand(text):
    """Letters, but for the word `cat`, which is one token; the last letter of a word has ids of its own."""
    body = []
    for word in text.split():
        letters = [VOCABULARY[letter] for letter in word[:-1]] + [VOCABULARY[f"{word[-1]}</w>"]]
        body += [57] if word == "cat" else letters
    return [58, *body, 59]


def write_tokenizer(path, marks=True):
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.models.BPE(VOCABULARY, MERGES, end_of_word_suffix="</w>", unk_token=END)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if marks:
        tokenizer.post_processor = tokenizers.processors.RobertaProcessing((END, 59), (START, 58))
    tokenizer.enable_truncation(4)  # as a file may say, and what is cut has lost its end
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    return path


# Templates


def test_the_data_sets_have_as_many_templates_as_published():
    counts = {"cifar10": 18, "cifar100": 18, "cars": 8, "dtd": 8, "eurosat": 3, "gtsrb": 3, "mnist": 1, "resisc45": 18,
              "sun397": 2, "svhn": 1}  # fmt: skip
    assert {name: len(set(templates)) for name, templates in prompts.TEMPLATES.items()} == counts
    assert all(text.count("{}") == 1 for templates in prompts.TEMPLATES.values() for text in templates)
    assert {"a photo of a {}.", "a low contrast photo of the {}.", "a photo of the big {}."} < set(
        prompts.TEMPLATES["cifar100"]
    )
    assert {"satellite imagery of {}.", "aerial view of the {}."} < set(prompts.TEMPLATES["resisc45"])
    assert {"a photo of the {} pattern.", "a photo of a {} thing."} < set(prompts.TEMPLATES["dtd"])
    assert 'a close up photo of a "{}" traffic sign.' in prompts.TEMPLATES["gtsrb"]


# Tokenising


def test_each_template_of_each_class_is_tokenised_and_filled_up_with_its_end(tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer.json")
    classes, templates = ["cat", "Red dog"], ["a {} .", "my {}"]
    ids = prompts.token_ids(tmp_path, classes, templates, context=12)
    assert ids.shape == (2, 2, 12) and ids.dtype == np.int32
    for row, text in zip(ids.reshape(4, 12), ["a cat .", "my cat", "a red dog .", "my red dog"], strict=True):
        by_hand = ids_by_hand(text)
        np.testing.assert_array_equal(row, by_hand + [59] * (12 - len(by_hand)))
    np.testing.assert_array_equal(prompts.token_ids(path, classes, templates, context=12), ids)


def test_ids_are_those_of_transformers_clip_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer(vocab=VOCABULARY, merges=MERGES)
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    classes, templates = ["cat", "Red  dog", "taco's"], prompts.TEMPLATES["cars"]
    texts = [template.format(name) for name in classes for template in templates]
    expected = np.asarray(theirs(texts, padding="max_length", max_length=77)["input_ids"])
    np.testing.assert_array_equal(prompts.token_ids(tmp_path, classes, templates), expected.reshape(3, 8, 77))


def test_texts_that_are_too_long_are_all_named(tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"longer than 8 tokens: 'a horse\.' \(9\), 'the horse\.' \(11\)\. Shorten"):
        prompts.token_ids(path, ["cat", "horse."], ["a {}", "the {}"], context=8)


def test_what_is_no_tokenizer_of_clip_is_refused(tmp_path):
    path = write_tokenizer(tmp_path / "plain.json", marks=False)
    with pytest.raises(ValueError, match="plain.json puts no start and end around a text, as CLIP's does"):
        prompts.token_ids(path, ["cat"], ["a {}"])
    with pytest.raises(FileNotFoundError, match="no tokenizer .*tokenizer.json: download"):
        prompts.token_ids(tmp_path, ["cat"], ["a {}"])
    path.write_text("{}")
    with pytest.raises(ValueError, match="plain.json is no file of the tokenizers library"):
        prompts.token_ids(path, ["cat"], ["a {}"])


def test_templates_without_a_place_for_the_class_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'a cat', '\{\} or \{\}': a template has one \{\}"):
        prompts.token_ids(tmp_path, ["cat"], ["a {}", "a cat", "{} or {}"])
    with pytest.raises(ValueError, match="1 classes and 0 templates make no text"):
        prompts.token_ids(tmp_path, ["cat"], [])


def test_without_the_library_it_is_said_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ValueError, match=r"pip install compo-jax\[text\]. Or make them where it is, and read them from a"
    ):
        prompts.token_ids(tmp_path, ["cat"], ["a {}"])


# Files


def test_ids_are_read_as_they_were_written(tmp_path):
    ids = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    prompts.save_token_ids(tmp_path / "ids.npz", ids)
    np.testing.assert_array_equal(prompts.read_token_ids(tmp_path / "ids.npz"), ids, strict=True)
    (tmp_path / "ids.json").write_text(json.dumps({"ids": ids.tolist()}))
    np.testing.assert_array_equal(prompts.read_token_ids(tmp_path / "ids.json"), ids, strict=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.json", "ids.npz"]


@pytest.mark.parametrize(
    "text, told",
    [
        ('{"ids": [[1, 2]]}', r"this is \(1, 2\) of int64"),
        ('{"ids": [[[1, 2], [3]]]}', "inhomogeneous"),
        ('{"ids": [[[1.5]]]}', "of float64"),
        ('{"tokens": []}', "'ids'"),
        ("[]", "list indices"),
        ("no JSON", "Expecting value"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, told):
    path = tmp_path / "ids.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"ids.json holds no token ids \(classes, templates, tokens\): .*{told}"):
        prompts.read_token_ids(path)


def test_a_damaged_or_missing_archive_is_refused(tmp_path):
    path = tmp_path / "ids.npz"
    with pytest.raises(FileNotFoundError, match="no file of token ids"):
        prompts.read_token_ids(path)
    prompts.save_token_ids(path, np.ones((1, 1, 9), np.int32))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="ids.npz holds no token ids"):
        prompts.read_token_ids(path)
