"""Names of classes: kept beside a run, and turned into numbers."""

import pytest

from fastdit.config import UserError
from fastdit.data import classes


def test_names_are_kept_as_they_are(tmp_path):
    names = ["bag", "T-shirt/top", "größer", "\x1b[31m", "1"]
    classes.write(tmp_path, names)
    assert classes.read(tmp_path) == names
    assert [p.name for p in tmp_path.iterdir()] == ["classes.json"]


def test_no_names_are_no_file(tmp_path):
    classes.write(tmp_path, [])
    assert not list(tmp_path.iterdir())
    assert classes.read(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "{}", "5", '["a", 5]', "[[]]", "[" * 100_000, "\x00"])
def test_a_file_that_is_no_list_of_names_is_one_line(tmp_path, text):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(UserError, match=r"classes\.json: not the names of classes") as caught:
        classes.read(tmp_path)
    assert str(caught.value).isprintable()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text('["secret"]')
    (tmp_path / "classes.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="not the names of classes"):
        classes.read(tmp_path)


def test_captions_are_the_names_where_there_are_any():
    assert classes.captions(["bag", "coat"], [1, 0, 1]) == ["coat", "bag", "coat"]
    assert classes.captions([], [1, 0]) == classes.captions(["bag"], None) == []


def test_a_label_is_a_name_or_a_number():
    names = ["bag", "coat", "dress"]
    assert [classes.number(label, names, 3) for label in ("bag", "dress", "0", "2")] == [0, 2, 0, 2]
    assert classes.number("7", [], 10) == 7
    assert classes.number("2", ["1", "10", "2"], 3) == 2
    assert classes.number("10", ["1", "10", "2"], 3) == 1  # the folder of that name


@pytest.mark.parametrize(
    ("label", "names", "num_classes", "message"),
    [
        ("bags", ["bag", "coat"], 2, r"--label bags: the model has classes 0 … 1 \(bag, coat\); did you mean bag\?"),
        ("xyz", ["bag", "coat"], 2, r"classes 0 … 1 \(bag, coat\)$"),
        ("2", ["bag", "coat"], 2, r"--label 2: the model has classes 0 … 1"),
        ("-1", [], 2, r"--label -1"),
        ("٣", [], 9, "--label"),
        ("1" * 5000, [], 9, "--label 111"),
        ("0", [], 0, "the model has no classes"),
        ("coat", ["bag", "coat"], 1, "classes 0 … 0"),  # a class that the model was not trained on
        ("x\x1b[2J", ["\x1b[31m"], 1, "--label"),
    ],
)
def test_what_is_no_class_is_one_line(label, names, num_classes, message):
    with pytest.raises(UserError, match=message) as caught:
        classes.number(label, names, num_classes)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
