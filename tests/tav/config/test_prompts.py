"""Prompt CSVs: what is read, the line that an error names, and the names of rows."""

from __future__ import annotations

import csv
import io
import random
import re
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tav.config.prompts import CATEGORIES, COLUMNS, PromptRow, append_rows, make_rows, read_prompts
from tav_model.errors import TavError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.csv"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for tests that write it many times."""
    return tmp_path_factory.mktemp("scratch") / "x.csv"


def read(path: Path, text: str | bytes) -> list[PromptRow]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_prompts(path)


def refusal(path: Path, text: str | bytes) -> str:
    with pytest.raises(TavError) as caught:
        read(path, text)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def names(path: Path, *prompts: str) -> list[str]:
    stream = io.StringIO()
    csv.writer(stream).writerows([["prompt"], *([prompt] for prompt in prompts)])
    return [row.name for row in read(path, stream.getvalue())]


# What is read


def test_all_columns(path: Path) -> None:
    rows = read(
        path,
        "name,prompt,steps,seed,guidance_scale,negative_prompt,category\n"
        "Blue ball_2.x,a blue ball,20,9223372036854775807,7.5,blurry,colour\n"
        "plain,a ball,,,,,\n",
    )
    assert rows == [
        PromptRow(2, "a blue ball", "Blue ball_2.x", 2**63 - 1, 7.5, 20, "blurry", "colour"),
        PromptRow(3, "a ball", "plain"),
    ]


def test_prompts_alone(path: Path) -> None:
    assert read(path, "prompt\na cat\n") == [PromptRow(2, "a cat", "a-cat")]


def test_the_sample() -> None:
    rows = read_prompts(ROOT / "data" / "ball.csv")
    assert len(rows) >= 4 and len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", ["", "end", "blank"])
def test_line_ends_marks_and_blank_rows(path: Path, end: str, mark: str, last: str) -> None:
    lines = [
        " prompt ,seed",
        "",
        "a cat ,1",
        '"a dog, and',
        'a ""bone""", 2 ',
        ",",
        " , ",
        "a fox,",
        *[",", ""][: len(last)],
    ]
    text = mark + end.join(lines) + (end if last else "")
    assert read(path, text) == [
        PromptRow(3, "a cat", "a-cat", seed=1),
        PromptRow(4, 'a dog, and\na "bone"', "a-dog-and-a-bone", seed=2),
        PromptRow(8, "a fox", "a-fox"),
    ]


def test_texts_that_pandas_takes_for_missing_are_texts(path: Path) -> None:
    rows = read(path, "prompt,negative_prompt\nNA,null\nnan,\n1.0,None\n")
    assert [(row.prompt, row.negative_prompt) for row in rows] == [("NA", "null"), ("nan", None), ("1.0", "None")]


cells = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('\n,"\t'), max_size=12)
known_rows = st.fixed_dictionaries(
    {"prompt": cells.filter(str.strip), "seed": st.integers(0, 2**63 - 1)},
    optional={
        "guidance_scale": st.floats(1, 100),
        "steps": st.integers(1, 1000),
        "negative_prompt": cells,
        "category": st.sampled_from(CATEGORIES),
    },
)


@given(
    rows=st.lists(known_rows, min_size=1, max_size=6, unique_by=lambda row: row["seed"]),
    columns=st.permutations([name for name in COLUMNS if name != "name"]),
    end=st.sampled_from(["\n", "\r\n"]),
    blank=st.lists(st.integers(0, 2), min_size=7, max_size=7),
)
@settings(max_examples=100)
def test_what_was_written_is_read(
    scratch: Path, rows: list[dict], columns: list[str], end: str, blank: list[int]
) -> None:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, lineterminator=end)
    writer.writeheader()
    begins = []
    for row, empty in zip(rows, blank, strict=False):
        stream.write(end * empty)
        begins.append(len(re.findall("\r\n|\n", stream.getvalue())) + 1)
        writer.writerow(row)
    read_rows = read(scratch, stream.getvalue())
    assert [row.line for row in read_rows] == begins
    for got, row in zip(read_rows, rows, strict=True):
        assert (got.prompt, got.seed) == (row["prompt"].strip(), row["seed"])
        assert (got.guidance_scale, got.steps) == (row.get("guidance_scale"), row.get("steps"))
        assert got.negative_prompt == (row.get("negative_prompt", "").strip() or None)
        assert got.category == row.get("category")


@given(
    text=st.text(max_size=30) | st.text('prom,"\n\r 1-.\0é', max_size=40),
    header=st.sampled_from(["", "prompt\n", "prompt,seed\n"]),
)
@settings(max_examples=200)
def test_any_file_is_read_or_refused_in_one_line(scratch: Path, text: str, header: str) -> None:
    scratch.write_bytes((header + text).encode(errors="surrogatepass"))
    rows, message = [], None
    try:
        rows = read_prompts(scratch)
    except TavError as error:
        message = str(error)
    if message is None:
        assert rows and all(row.prompt and row.name for row in rows)
    else:
        assert message.startswith(f"{scratch}: ") and message.isprintable()


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows; it needs a header with the column 'prompt', and one row for each edit"),
        ("\ufeff\r\n \n", "no rows"),
        ("prompt\n", "no rows"),
        ("prompt,seed\n,\n\n", "no rows"),
        ("a cat\na dog\n", "line 1: unknown column 'a cat'; allowed: prompt, name, seed, guidance_scale, steps, negat"),
        ("\nprompt,sede\na,1\n", "line 2: unknown column 'sede'; allowed: prompt, name, seed"),
        ("prompt,\na,\n", "line 1: unknown column ''"),
        ("prompt;seed\na;1\n", "line 1: unknown column 'prompt;seed'"),
        ("seed\n1\n", "line 1: the column 'prompt' is missing"),
        ("prompt,seed, seed\na,1,2\n", "line 1: duplicate column 'seed'"),
        ("prompt,seed\na,1\na, b,1\n", "line 3: 3 cells, but the header has 2; put a prompt that contains a comma in"),
        ("prompt,seed\na\n", "line 2: 1 cells, but the header has 2"),
        ("prompt,seed\na,1\n ,2\n", "line 3: the prompt is empty"),
        (
            'prompt,seed\n"a\nb",1\n\n"c\nd",x\n',
            "line 5: seed: 'x' is not a whole number between 0 and 92233720368547758",
        ),
        ("prompt,steps\na,abc\n", "line 2: steps: 'abc' is not a whole number between 1 and 1000"),
        ("prompt,guidance_scale\na,high\n", "line 2: guidance_scale: 'high' is not a number between 1 and 100"),
        (
            "prompt,category\na,colours\n",
            "line 2: category: 'colours' is not one of style, object, background, multiple,",
        ),
        ('prompt\na\n"b\n', "line 3: not CSV (unexpected end of data)"),
        ('prompt\n"a"b\n', "line 2: not CSV ("),
        (f"prompt\n{'x' * 140000}\n", "line 2: not CSV (field larger than field limit"),
        ("prompt\na\0b\n", "line 2: prompt: 'a\\x00b' is not a string without control characters"),
        ("prompt\na\x1bb\n", "line 2: prompt: 'a\\x1bb' is not a string without control characters"),
        (
            "prompt,negative_prompt\na,\x85b\x85c\n",
            "line 2: negative_prompt: 'b\\x85c' is not a string without control",
        ),
        ("prompt\na\ngr\xfcn\n".encode("latin-1"), "line 3: not UTF-8; save the file as UTF-8"),
        ("prompt\na\n".encode("utf-16"), "line 1: not UTF-8"),
        ("prompt,seed\na,1\nb,2\na,1\n", "line 4: the same row as line 2; remove one of them"),
        ("prompt,name\na,x\nb,x\n", "line 3: the name 'x' is already used in line 2"),
        ("prompt,name\na,Cat\nb,cAT\n", "line 3: the name 'cAT' is already used in line 2, as 'Cat' (upper"),
    ],
)
def test_mistakes(path: Path, text: str | bytes, message: str) -> None:
    assert refusal(path, text).startswith(message)


@pytest.mark.parametrize("column", ["seed", "steps", "guidance_scale"])
@pytest.mark.parametrize(
    "value",
    [
        "nan",
        "inf",
        "-inf",
        "-1",
        "1e9",
        "1_0",
        "0x10",
        "\uff11\uff12",
        "1 2",
        "--1",
        "1,5",
        "9" * 400,
        "9" * 5000,
        "true",
    ],
)
def test_bad_numbers(path: Path, column: str, value: str) -> None:
    assert refusal(path, f'prompt,{column}\na cat,5\na dog,"{value}"\n').startswith(
        f"line 3: {column}: '{value[:80]}' is not a"
    )


@pytest.mark.parametrize(
    ("column", "good", "bad"),
    [
        ("seed", ["0", "9223372036854775807", "+3"], ["9223372036854775808", "1.0", "1.5"]),
        ("steps", ["1", "1000", "007"], ["0", "1001", "1.0", "5.5"]),
        ("guidance_scale", ["1", "100", "7.5", ".5e1", "1e2"], ["0.99", "100.1", "0"]),
        ("control_scale", ["0", "2", "0.5"], ["-0.1", "2.1"]),
    ],
)
def test_limits_of_numbers(path: Path, column: str, good: list[str], bad: list[str]) -> None:
    for value in good:
        (row,) = read(path, f"prompt,{column}\na,{value}\n")
        assert getattr(row, column) == (float if column.endswith("_scale") else int)(value)
    for value in bad:
        assert f"line 2: {column}: '{value}' is not a" in refusal(path, f"prompt,{column}\na,{value}\n")


@pytest.mark.parametrize("name", ["a", "A 1", "a.b", "cat-2_x.y", "9", "x" * 80, "console", "a-con", "com", "a_", "a-"])
def test_good_names(path: Path, name: str) -> None:
    assert read(path, f"prompt,name\na cat,{name}\n")[0].name == name


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../x",
            "a/b",
            "a\\b",
            ".x",
            "..",
            "-x",
            "_x",
            "x.",
            "x:y",
            "x*",
            "~",
            "ü",
            "x\ny",
            "x\0y",
            "x" * 81,
            "x\u202ey",
        ),
        *("con", "NUL", "aux.txt", "Com1", "lpt9.a.b", "$x", "x|y", "x>y"),
    ],
)
def test_unsafe_names(path: Path, name: str) -> None:
    assert refusal(path, f'prompt,name\na cat,"{name}"\n').startswith("line 2: name: ")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TavError, match=r"absent\.csv: no such file$"):
        read_prompts(tmp_path / "absent.csv")
    with pytest.raises(TavError, match=r"cannot be read \(Is a directory\)$"):
        read_prompts(tmp_path)


# Names made from prompts


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red Ball, bouncing!", "a-red-ball-bouncing"),
        ("Café à la crème", "cafe-a-la-creme"),
        ("½ ﬁne Ⅳ", "12-fine-iv"),
        ("../../etc/passwd", "etc-passwd"),
        (
            "one two three four five six seven eight nine ten eleven twelve",
            "one-two-three-four-five-six-seven-eight-nine-ten-eleven",
        ),
        ("x" * 100, "x" * 60),
    ],
)
def test_names_from_prompts(path: Path, prompt: str, name: str) -> None:
    assert names(path, prompt) == [name]


@pytest.mark.parametrize("prompt", ["🎈", "赤い球", "...", "CON", "nul", "com1"])
def test_prompts_that_make_no_name_of_their_own(path: Path, prompt: str) -> None:
    (name,) = names(path, prompt)
    word = prompt.lower() if prompt.isalnum() and prompt.isascii() else "edit"
    assert re.fullmatch(rf"{word}-[0-9a-f]{{12}}", name)
    assert names(path, "a cat", prompt)[1] == name


def test_same_words_get_different_names(path: Path) -> None:
    made = names(path, "a cat", "A cat.", "a dog", "x" * 100, "x" * 101)
    assert made[2] == "a-dog" and len(set(made)) == 5
    assert all(re.fullmatch(r"(a-cat|x{60})-[0-9a-f]{12}", made[i]) for i in (0, 1, 3, 4))
    seeds = read(path, "prompt,seed,category\na cat,1,\na cat,2,\na cat,,\na cat,1,style\n")
    assert len({row.name for row in seeds}) == 4


def test_given_names_come_first(path: Path) -> None:
    rows = read(path, "prompt,name\na cat,\nanother cat,A-Cat\n")
    assert rows[1].name == "A-Cat" and re.fullmatch(r"a-cat-[0-9a-f]{12}", rows[0].name)


few_words = st.lists(st.sampled_from(["a", "A", "cat", "cat.", "猫", "🎈", "con", "x" * 61]), min_size=1, max_size=3)


@given(
    rows=st.lists(
        st.tuples(
            few_words.map(" ".join), st.sampled_from(["", "1", "2"]), st.sampled_from(["", "", "", "a-cat", "Edit"])
        ),
        min_size=1,
        max_size=8,
        unique=True,
    ),
    chance=st.randoms(use_true_random=False),
)
@settings(max_examples=150)
def test_names_are_safe_unique_and_independent_of_order(
    scratch: Path, rows: list[tuple], chance: random.Random
) -> None:
    given_names = [name for *_, name in rows if name]
    assume(len(given_names) == len(set(given_names)))

    def named(order: list[tuple]) -> dict[tuple, str]:
        stream = io.StringIO()
        csv.writer(stream).writerows([("prompt", "seed", "name"), *order])
        return {row: got.name for row, got in zip(order, read(scratch, stream.getvalue()), strict=True)}

    made = named(rows)
    assert len({name.lower() for name in made.values()}) == len(rows)
    for (_, _, wanted), name in made.items():
        assert name == wanted if wanted else re.fullmatch(r"[a-z0-9][a-z0-9-]{0,72}", name)
        assert name.lower() not in ("con", "nul", "aux", "prn")
    shuffled = list(rows)
    chance.shuffle(shuffled)
    assert named(shuffled) == made


@given(prompt=st.text(min_size=1, max_size=100))
@settings(max_examples=100)
def test_any_prompt_gets_a_safe_name(scratch: Path, prompt: str) -> None:
    assume(prompt.strip() and not any(unicodedata.category(c) in ("Cc", "Cs") for c in prompt))
    (name,) = names(scratch, prompt)
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,71}[a-z0-9])?", name)
    # The name is good as a given one too.
    assert read(scratch, f"prompt,name\na,{name}\n")[0].name == name


def test_ten_thousand_rows(path: Path) -> None:
    same = "".join(f"a ball of the same colour,{seed},\n" for seed in range(5000))
    other = "".join(f"a ball number {i} rolls over the grass,{i},{i % 50 + 1}\n" for i in range(5000))
    import pandas  # noqa: F401 (not what is timed)

    begin = time.perf_counter()
    rows = read(path, "prompt,seed,guidance_scale\n" + same + other)
    assert time.perf_counter() - begin < 2
    assert len({row.name for row in rows}) == 10000 and rows[-1].line == 10001


# Rows that come from elsewhere


def test_rows_of_a_command_line_are_those_of_a_csv(path: Path) -> None:
    made = make_rows(["a cat", " a dog ", "a cat"], "--edit", seed=7, steps=None, negative_prompt="blurred")
    assert made == [
        PromptRow(line=1, prompt="a cat", name="a-cat", seed=7, negative_prompt="blurred"),
        PromptRow(line=2, prompt="a dog", name="a-dog", seed=7, negative_prompt="blurred"),
    ]
    assert len({row.name for row in make_rows(["a cat!", "a cat?"], "--edit")}) == 2
    for prompts, cells, message in (
        ([""], {}, "--edit: the prompt is empty"),
        (["a\0"], {}, "--edit: prompt: .* without control characters"),
        (["a"], {"guidance_scale": float("nan")}, "--edit: guidance_scale: 'nan' is not a number between 1 and 100"),
        (["a"], {"steps": 1001}, "--edit: steps: '1001' is not a whole number between 1 and 1000"),
    ):
        with pytest.raises(TavError, match=message):
            make_rows(prompts, "--edit", **cells)


def test_rows_are_added_below_the_others_which_stay_as_they_are(path: Path) -> None:
    before = b'\xef\xbb\xbfname,prompt\r\n\r\nfelix,"a cat, sleeping"'
    read(path, before)
    added = append_rows(path, make_rows(["a dog", "a cat, sleeping", 'a "fish"'], "--edit"))
    assert [row.name for row in added] == ["a-dog", "a-fish"]
    assert path.read_bytes() == before + b'\r\n,a dog\r\n,"a ""fish"""\r\n'
    assert append_rows(path, make_rows(["a dog"], "--edit")) == []


def test_a_column_that_is_missing_is_added(path: Path) -> None:
    read(path, "prompt,category\na cat,style\n")
    (added,) = append_rows(path, make_rows(["a cat"], "--edit", seed=3, guidance_scale=2.5))
    assert path.read_text() == "prompt,category,seed,guidance_scale\na cat,style,,\na cat,,3,2.5\n"
    assert (added.prompt, added.seed, added.guidance_scale, added.line) == ("a cat", 3, 2.5, 3)


def test_a_csv_that_is_wrong_gets_no_rows(path: Path) -> None:
    for text in ("prompt\n", "prompt,colour\na cat,red\n"):
        path.write_text(text)
        with pytest.raises(TavError, match=re.escape(str(path))):
            append_rows(path, make_rows(["a dog"], "--edit"))
        assert path.read_text() == text and [file.name for file in path.parent.iterdir()] == [path.name]
