"""Prompt files of sd-scripts and AUTOMATIC1111, and notices about syntax that other programs interpret in prompts."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import pytest

from batch_infer.errors import TableError
from batch_infer.records import PromptRequest, ResultRow, Source
from batch_infer.table.formats import parse_name
from tests.runs import command, results, run
from tests.tables import compress, open_tables, read, write_bytes

PROMPTS = """\
# samples of May

a red circle
  # an indented comment
a cat -- with a hat --n blurred, "dark" --w 64 --H 32 --s 3 --l 2.5 --d 7
--prompt "a green star" --negative_prompt blurred dark --steps 4 --cfg_scale 3 --width 32 --height 64 --seed 9
\ta blue square --negative_prompt "dark" --steps 5 --seed -1
"""


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(content: str, name: str = "t.prompts.txt") -> Path:
    return write_bytes(Path(name), content.encode())


def request_of(line: str) -> PromptRequest:
    (item,) = read(write(line))
    assert isinstance(item, PromptRequest)
    return item


def error_of(line: str) -> str | None:
    (item,) = read(write(f"a good row\n{line}\n"))[1:]
    assert isinstance(item, ResultRow)
    assert (item.id, item.line, item.source_row) == ("t-00000001", 2, 1)
    return item.error


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_options_are_the_columns_of_a_row(compression: str, line_end: str) -> None:
    content = b"\xef\xbb\xbf" + PROMPTS.replace("\n", line_end).encode()
    path = write_bytes(
        Path(f"t.prompts.txt{compression}"), compress(compression[1:], content) if compression else content
    )
    circle, cat, star, square = (item for item in read(path) if isinstance(item, PromptRequest))
    assert [item.id for item in (circle, cat, star, square)] == [f"t-0000000{k}" for k in range(4)]
    assert [item.source.line for item in (circle, cat, star, square)] == [3, 5, 6, 7]
    assert (circle.prompt, circle.negative_prompt, circle.params.num_inference_steps) == ("a red circle", None, 20)
    assert (cat.prompt, cat.negative_prompt, cat.seed) == ("a cat -- with a hat", 'blurred, "dark"', 7)
    assert (cat.params.width, cat.params.height) == (64, 32)
    assert (cat.params.num_inference_steps, cat.params.guidance_scale) == (3, 2.5)
    assert (star.prompt, star.negative_prompt, star.seed) == ("a green star", "blurred dark", 9)
    assert (star.params.width, star.params.height) == (32, 64)
    assert (star.params.num_inference_steps, star.params.guidance_scale) == (4, 3.0)
    assert (square.prompt, square.negative_prompt, square.params.num_inference_steps) == ("a blue square", "dark", 5)
    assert not square.carried


def test_the_number_of_images_is_a_product() -> None:
    items = read(write('--prompt "a cat" --n_iter 2 --batch_size 3 --seed 5\na dog --num_images_per_prompt 2\n'))
    assert [(item.id[-1], item.image_index) for item in items] == [("0", k) for k in range(6)] + [("1", 0), ("1", 1)]
    assert [item.seed for item in items[:6]] == list(range(5, 11))


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("a cat --foo 3", "option '--foo' is unknown"),
        ("a cat --w 64 --width 64", "option --width sets width, which the line has set before"),
        ("a cat --prompt a dog", "option --prompt sets prompt, which the line has set before"),
        ("a cat --n", "option --n has no value"),
        ("--prompt 'a cat' --steps --width 64", "option --steps has no value"),
        ("--prompt a man's hat", "its options cannot be read (no closing quotation): put values with a quote"),
        ("a cat --d 1,2", "seed '1,2' is not a whole number"),
        ("a cat --s many", "num_inference_steps 'many' is not a whole number"),
        ("a cat --w 65", "width 65 is not a multiple of 8"),
        ("a cat --n_iter 2.5", "option --n_iter '2.5' is not a whole number"),
        ("a cat --n_iter 2 --num_images_per_prompt 2", "--n_iter sets num_images_per_prompt, which the line has set"),
        ("--steps 3", "the prompt is empty"),
    ],
)
def test_options_that_cannot_be_used_make_only_their_row_invalid(line: str, error: str) -> None:
    assert error in (error_of(line) or "")


def test_options_without_effect_are_carried_with_one_notice() -> None:
    path = write('a cat --am 0.8 --ss euler_a\n--prompt "a dog" --sampler_name "Euler a"\na bird\n')
    with open_tables(path) as tables:
        (notice,) = tables.notices
    assert notice == "t.prompts.txt: options without effect, whose values are carried: --am, --ss, --sampler_name"
    cat, dog, bird = read(path)
    assert cat.carried == {"am": "0.8", "ss": "euler_a", "sampler_name": None}
    assert dog.carried == {"am": None, "ss": None, "sampler_name": "Euler a"}
    assert set(bird.carried.values()) == {None}


def test_lines_that_only_resemble_options_are_prompts() -> None:
    for line in ("-- a cat", "--5 degrees", "a well-known cat --", "a #1 cat -n 5", "a cat--w 5"):
        assert request_of(line).prompt == line


def test_a_line_that_is_not_utf_8_makes_only_its_row_invalid() -> None:
    rows = read(write_bytes(Path("t.prompts.txt"), b"one\ncaf\xe9 --s 3\nthree --s 3\n"))
    assert [isinstance(row, PromptRequest) for row in rows] == [True, False, True]


def test_an_empty_file_is_refused_and_one_of_comments_has_no_rows() -> None:
    with pytest.raises(TableError, match=r"t\.prompts\.txt is empty"):
        open_tables(write(""))
    assert read(write("# nothing\n\n")) == []


@pytest.mark.parametrize(
    ("name", "parts", "stem"),
    [
        ("x.prompts.txt", ("x", ".prompts.txt", ""), "x"),
        ("X.Prompts.TXT.gz", ("X", ".prompts.txt", ".gz"), "X"),
        ("a/x.y.prompts.txt", ("a-x.y", ".prompts.txt", ""), "x.y"),
        ("prompts.txt", ("prompts", ".txt", ""), "prompts"),
        ("a/.prompts.txt", ("a-.prompts", ".txt", ""), ".prompts"),
        ("x.txt", ("x", ".txt", ""), "x"),
        ("x.csv.csv.gz", ("x.csv", ".csv", ".gz"), "x.csv"),
    ],
)
def test_the_stem_lacks_both_parts_of_the_ending(name: str, parts: tuple[str, str, str], stem: str) -> None:
    assert parse_name(name) == parts
    assert Source(name, 0).stem == stem == Source(f"{name}#2", 0).stem


@pytest.mark.parametrize(
    "name", ["t.csv", "t", "a.b.csv", ".csv", "a.", "a..csv", "a/b.tar.gz", "a.csv.gz", ".gz", "é.x"]
)
def test_other_stems_are_those_of_pathlib(name: str) -> None:
    path = PurePosixPath(name)
    expected = (path.with_suffix("") if path.suffix == ".gz" else path).stem
    assert Source(name, 0).stem == expected


def test_a_run_accounts_for_every_line(tmp_path: Path) -> None:
    done = run(write(PROMPTS + "a dog --zoom 2\n"), tmp_path / "out")
    assert done.code == 3 and "t.prompts.txt, line 8 (t-00000004): option '--zoom' is unknown" in done.stderr
    rows = results(tmp_path / "out")
    assert [row["status"] for row in rows][-1] == "invalid" and len(rows) == 5
    assert rows[0]["generated_image"] == "images/t-00000/t-00000000-0.png"
    assert rows[-1]["prompt"] == "a dog --zoom 2"


# Syntax in prompts


def test_wildcards_and_lora_tags_are_counted_once_per_kind(tmp_path: Path) -> None:
    prompts = [
        "a red circle",
        "a {red|blue} circle",
        "<lora:style:0.8> a {red|{blue|green}} circle",
        'json {"a": "b|c"} and {"style": 1}, a | b, {x}',
        "a <toy> and <b|c> at 5 < 6",
        "a star <LoRA:other>",
    ]
    table = write_bytes(Path("t.jsonl"), "".join(json.dumps({"prompt": text}) + "\n" for text in prompts).encode())
    done = command("plan", table, "--json", "--steps", "2", "--out", tmp_path / "out")
    wildcards, tags = json.loads(done.stdout)["remarks"]
    assert wildcards.startswith("prompts with alternatives such as {red|blue}, which are rendered word for word")
    assert wildcards.endswith(": 2 (first: t.jsonl, line 2: '{red|blue}')")
    assert "--lora" in tags and "--lora-folder" in tags
    assert tags.endswith(": 2 (first: t.jsonl, line 3: '<lora:style:0.8>')")
    done = run(table, tmp_path / "out", "--limit", "2")
    assert done.stderr.count("{red|blue}, which are rendered") == 1
    assert [row["prompt"] for row in results(tmp_path / "out")] == prompts[:2]
