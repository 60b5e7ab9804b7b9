"""Scores and uploads from answers that a test writes, and what a run's folder does with them."""

import json
from pathlib import Path

import pytest
from benchdata import WRITERS, write_mmbench, write_scienceqa, write_textvqa

from llava_hvp.checkpoints.naming import model_name
from llava_hvp.config import Request
from llava_hvp.errors import EvaluationError, OptionError
from llava_hvp.evaluation.benchmarks import get_benchmark
from llava_hvp.evaluation.data import find_data
from llava_hvp.evaluation.files import complete_lines
from llava_hvp.evaluation.mmbench import letter_of
from llava_hvp.evaluation.questions import read_table
from llava_hvp.evaluation.results import make_result
from llava_hvp.evaluation.scores import Score, score
from llava_hvp.evaluation.settings import is_next, method_name, settings_of
from llava_hvp.evaluation.store import Store
from llava_hvp.evaluation.workers import chunks
from llava_hvp.runtime import PruningConfig


def answered(folder, name, texts, **options):
    """The data of a benchmark and a store in which each question has its text."""
    benchmark = get_benchmark(name)
    data = find_data(benchmark, folder / "data", **options)
    store = Store(folder / "run", data.questions)
    store.parts.mkdir(parents=True, exist_ok=True)
    records = []
    for row, text in enumerate(texts):
        item = data.questions.items[row]
        if name.startswith("mmbench"):
            choices = [item[c] for c in "ABCD" if isinstance(item[c], str)]
            record = {"question_id": item["index"], "round_id": 0, "prompt": "", "text": text}
            record |= {"options": choices, "option_char": list("ABCD"[: len(choices)])}
        elif name == "scienceqa":
            value = item["conversations"][0]["value"]
            record = {"question_id": item["id"], "prompt": value, "text": text}
        else:
            record = {"question_id": item["question_id"], "prompt": item["text"], "text": text}
        records.append(record | {"answer_id": f"id{row}"})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (store.parts / "0.answers.jsonl").write_text(lines)
    store.collect()
    return benchmark, data, store


def test_mme_counts_accuracy_and_pairs_as_its_own_scorer(tmp_path):
    WRITERS["mme"](tmp_path / "data")
    # Two pictures a category; of each pair the truths are yes and no.
    texts = ["Yes", "No", "Yes.", "Yes", "no", "No way", "perhaps", "not", "Yes", "No", "Yes", "No"]
    benchmark, data, store = answered(tmp_path, "mme", texts)
    found = score(benchmark, data, store)
    assert found.metrics["existence"] == pytest.approx(75 + 50)
    assert found.metrics["code_reasoning"] == pytest.approx(50 + 0)
    assert found.metrics["landmark"] == pytest.approx(100 + 100)
    assert found.metrics["perception"] == pytest.approx(125 + 200)
    assert found.metrics["total"] == pytest.approx(125 + 200 + 50)
    line = (tmp_path / "run/mme/existence.txt").read_text().splitlines()[3]
    assert line == "0001.txt\tIs there a dog in this image?  Please answer yes or no.\tNo\tYes"


def test_mmbench_needs_every_rotation_of_a_question(tmp_path):
    write_mmbench(tmp_path / "data")
    benchmark, data, store = answered(tmp_path, "mmbench", ["A.", "B", "2", "D. none of them"])
    found = score(benchmark, data, store)
    # Rows: A is right, C would be; the words of B, and D.
    assert found.metrics == {"accuracy": 75, "circular_accuracy": pytest.approx(200 / 3)}
    table = read_table(data.questions.path)
    import pandas

    upload = pandas.read_excel(found.upload)
    assert list(upload.columns) == [
        *("index", "question", "A", "B", "C", "D", "prediction", "answer", "split"),
    ]
    assert upload["index"].tolist() == table["index"].tolist()
    assert upload["prediction"].astype(str).tolist() == ["A.", "B", "2", "D. none of them"]


def test_mmbench_without_answers_is_for_the_server(tmp_path):
    write_mmbench(tmp_path / "data", answers=False)
    benchmark, data, store = answered(tmp_path, "mmbench", ["A", "B", "A", "B"])
    found = score(benchmark, data, store)
    assert (found.metrics, found.scorer) == ({}, "server")
    assert found.upload.exists()


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) dog", "B"),
        ("B: dog", "B"),
        ("dog", "B"),
        ("Dog.", "B"),
        ("D", ""),
        ("Boats", ""),
        ("", ""),
        ("a dog", ""),
    ],
)
def test_an_option_is_named_by_letter_or_by_its_words(text, letter):
    assert letter_of(text, ["cat", "dog", "cup"], ["A", "B", "C"]) == letter


def test_scienceqa_by_the_stock_scorer(tmp_path):
    write_scienceqa(tmp_path / "data")
    # Truths A, B, A, B; the first and third have a picture.
    texts = ["A", "B. wood", "The answer is B.", "C"]
    found = score(*answered(tmp_path, "scienceqa", texts))
    assert found.metrics == {"accuracy": 50, "image_accuracy": 50}
    assert found.scorer == "llava.eval"


def test_vqav2_and_vizwiz_with_annotations(tmp_path):
    WRITERS["vqav2"](tmp_path / "data")
    path = tmp_path / "annotations.json"
    hits = (10, 2, 0)
    listed = [
        {
            "question_id": 262144001 + i,
            "answers": [{"answer": "two" if a < n else "blue"} for a in range(10)],
        }
        for i, n in enumerate(hits)
    ]
    path.write_text(json.dumps({"annotations": listed}))
    benchmark, data, store = answered(tmp_path, "vqav2", ["2", "Two.", "the 2"])
    unscored = score(benchmark, data, store)
    assert unscored.metrics == {}
    upload = json.loads(unscored.upload.read_text())
    assert [each["answer"] for each in upload] == ["", "2", "2", "2"]
    scored = find_data(benchmark, tmp_path / "data", annotation_file=path)
    # Two of ten said it: eight of the leave-one-out sets hold two of them, two hold one.
    expected = 100 * (1 + (8 * 2 / 3 + 2 * 1 / 3) / 10 + 0) / 3
    assert score(benchmark, scored, store).metrics["accuracy"] == pytest.approx(expected)

    WRITERS["vizwiz"](tmp_path / "data")
    images = [f"VizWiz_test_{i:08d}.jpg" for i in range(3)]
    listed = [{"image": n, "answers": [{"answer": "a cup"}] * 10} for n in images]
    path.write_text(json.dumps(listed))
    benchmark, data, store = answered(tmp_path / ".", "vizwiz", ["Cup", "dog", "a cup."])
    assert json.loads(score(benchmark, data, store).upload.read_text())[0] == {
        "image": images[0],
        "answer": "cup",
    }
    scored = find_data(benchmark, tmp_path / "data", annotation_file=path)
    assert score(benchmark, scored, store).metrics["accuracy"] == pytest.approx(200 / 3)


def test_a_stock_scorer_that_fails_is_an_error_and_the_answers_stay(tmp_path):
    write_textvqa(tmp_path / "data")
    benchmark, data, store = answered(tmp_path, "textvqa", ["a", "b", "c", "d"])
    (tmp_path / "data/textvqa/TextVQA_0.5.1_val.json").write_text('{"data": []}')
    with pytest.raises(EvaluationError, match=r"eval_textvqa ended with exit code 1: KeyError"):
        score(benchmark, data, store)
    assert len(store.answers_file.read_text().splitlines()) == 4


# --- the folder of a run ---


@pytest.fixture
def textvqa(tmp_path):
    write_textvqa(tmp_path / "data")
    return answered(tmp_path, "textvqa", ["one", "two"])


def test_answers_find_their_rows_though_two_share_an_id(textvqa):
    _, _, store = textvqa
    assert store.remaining == [2, 3]
    assert [a.record["text"] for a in store.in_order] == ["one", "two"]


def test_parts_join_in_the_order_of_the_questions_and_half_lines_go(textvqa, capsys):
    _, data, store = textvqa
    item = data.questions.items[3]
    line = json.dumps(
        {"question_id": "e5f6", "prompt": item["text"], "text": "x", "answer_id": "y"}
    )
    (store.parts / "1.answers.jsonl").write_text(f"{line}\n" + line[:20])
    (store.parts / "1.calls.jsonl").write_text('{"images": 1}\n{"images": 2}\n{"ima')
    store.collect()
    assert store.remaining == [2]
    assert store.answers[3][0].call == {"images": 1}
    assert "half written" in capsys.readouterr().err
    again = Store(store.folder, data.questions)
    again.collect()
    assert again.in_order == store.in_order


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question_id": "zz", "prompt": "?", "text": "x", "answer_id": "z"}', "no question of"),
        ("not json\n{}", "line 3, is no answer"),
        (None, "2 answers to 'a1b2', which is asked 1 times"),
    ],
)
def test_answers_that_do_not_belong_are_refused_and_left_as_they_are(textvqa, line, words):
    _, _, store = textvqa
    if line is None:
        first = json.loads(store.answers_file.read_text().splitlines()[0])
        line = json.dumps(first | {"answer_id": "another"})
    with store.answers_file.open("a") as file:
        file.write(line + "\n")
    before = store.answers_file.read_bytes()
    with pytest.raises(EvaluationError, match=words):
        store.collect()
    assert store.answers_file.read_bytes() == before


def test_all_rounds_of_a_question_or_none(tmp_path):
    write_mmbench(tmp_path / "data")
    _, data, store = answered(tmp_path, "mmbench", ["A", "B"])
    rounds = Store(store.folder, data.questions, all_rounds=True)
    rounds.collect()
    assert rounds.remaining == [0, 1, 2, 3]


def test_two_runs_at_a_time_are_refused(textvqa):
    _, _, store = textvqa
    second = pytest.raises(EvaluationError, match="another run is at work")
    with store.locked(), second, Store(store.folder, store.questions).locked():
        pass


def test_settings_are_compared_only_where_there_are_answers(textvqa, tmp_path):
    benchmark, data, store = textvqa

    def settings(**changed):
        request = Request(PruningConfig.of("hivtp", **changed))
        return settings_of(
            benchmark, request, model_path="m", model_base=None, stock=(), questions=data.questions
        )

    empty = Store(tmp_path / "empty", data.questions)
    empty.parts.mkdir(parents=True)
    empty.check_settings(settings(r_max=0.5))
    empty.check_settings(settings(r_max=0.25))
    (store.folder / "settings.json").write_text(json.dumps(settings(r_max=0.5)))
    store.check_settings(settings(r_max=0.5))
    with pytest.raises(EvaluationError, match=r"options was .* and is .* now"):
        store.check_settings(settings(r_max=0.25))
    store.restart()
    store.check_settings(settings(r_max=0.25))


@pytest.mark.parametrize(("rows", "count"), [(7, 3), (3, 4), (1, 1), (12, 4), (10, 4)])
def test_pieces_are_those_of_the_stock_scripts_without_empty_ones(rows, count):
    pieces = chunks(range(rows), count)
    assert [row for piece in pieces for row in piece] == list(range(rows))
    assert len(pieces) <= count
    assert all(pieces)
    assert len({len(piece) for piece in pieces[:-1]}) <= 1


def test_the_result_has_means_over_images_and_leaves_the_warm_up_out(textvqa):
    benchmark, _, store = textvqa
    call = {"images": 1, "prompts": 1, "stock_tokens": 64, "kept_of_stock": 0.5, "tokens": 4}
    call |= {"average_tokens": 32, "average_of_stock": 0.5}
    calls = [
        {**call, "first_token": 9, "seconds": 9, "kept_tokens": 30, "warmup": True},
        {**call, "first_token": 0.1, "seconds": 0.5, "kept_tokens": 34},
    ]
    for row, each in enumerate(calls):
        (answer,) = store.answers[row]
        store.answers[row] = [
            type(answer)(answer.line, answer.record, {"kept_of_patches": 1} | each)
        ]
    settings = {"model_path": "a/b", "method": None, "options": None, "given": [], "versions": {}}
    settings["tiling"] = "stock"
    result = make_result(benchmark, settings, Score({}, "x"), store, (), command="c")
    assert (result["kept_tokens"], result["stock_tokens"], result["kept_of_stock"]) == (32, 64, 0.5)
    assert result["ttft_ms"] == pytest.approx(100)
    assert result["tokens_per_second"] == pytest.approx(8)
    assert (result["value"], result["model"]) == (None, "b")


def test_names(tmp_path):
    assert model_name("liuhaotian/llava-v1.5-7b/") == "llava-v1.5-7b"
    assert model_name("a/llava-x/checkpoint-50") == "llava-x_checkpoint-50"
    assert method_name(PruningConfig.of("hiprune++", num_tokens=64)) == "hiprune++-num_tokens-64"
    assert method_name(None) == "unpruned"
    assert is_next("liuhaotian/llava-v1.6-vicuna-7b")
    assert not is_next("liuhaotian/llava-v1.5-7b")
    (tmp_path / "config.json").write_text('{"image_aspect_ratio": "anyres"}')
    assert is_next(str(tmp_path))


def test_data_that_is_missing_or_damaged_is_named(tmp_path):
    WRITERS["pope"](tmp_path)
    pope = get_benchmark("pope")
    path = tmp_path / "pope/llava_pope_test.jsonl"
    content = path.read_text()
    path.write_text(content.replace('"question_id"', '"id"'))
    with pytest.raises(EvaluationError, match="is no question file of LLaVA's"):
        find_data(pope, tmp_path)
    path.write_text("")
    with pytest.raises(EvaluationError, match="holds no question"):
        find_data(pope, tmp_path)
    path.write_text(content)
    for each in (tmp_path / "pope/coco").iterdir():
        each.unlink()
    (tmp_path / "pope/coco").rmdir()
    with pytest.raises(EvaluationError, match=r"annotations is missing.*Section 'POPE'"):
        find_data(pope, tmp_path)
    with pytest.raises(OptionError, match="run it through lmms-eval"):
        get_benchmark("ocrbench")


def test_the_last_line_may_be_anything_and_the_others_may_not(tmp_path):
    assert complete_lines(Path("nowhere")) == ([], "")
    path = tmp_path / "x.jsonl"
    for half in ('{"b"', '{"b"\n', "7\n", "\udce2"):
        path.write_bytes(b'{"a": 1}\n' + half.encode(errors="surrogateescape"))
        lines, rest = complete_lines(path)
        assert lines == ['{"a": 1}']
        assert rest
    path.write_text('{"b"\n{"a": 1}\n')
    with pytest.raises(EvaluationError, match="line 1, is no answer"):
        complete_lines(path)
