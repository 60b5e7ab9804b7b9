"""Methods in order, and which of them are told apart."""

import json
import random
from pathlib import Path

import pytest

from llava_hvp.accuracy.ranking import is_ranked, render_ranking
from llava_hvp.accuracy.scores import Difference, VariantScore, wilson_interval
from llava_hvp.accuracy.tables import no_better

ASKED = 2000
DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results" / "accuracy"


def score(method, right, options="r_max=0.5", budget="r_max=0.5"):
    """Of a list of answers, True where right."""
    low, high = wilson_interval(sum(right), len(right))
    return VariantScore(
        method=method,
        options=options,
        budget=budget,
        tasks={},
        overall=100 * sum(right) / len(right),
        half_width=50 * (high - low),
        questions=len(right),
        kept_tokens=72.0,
        kept_of_patches=0.5,
        time=1.0,
        choice=0.1,
        stability={"float16": 1.0, "bfloat16": 0.5},
        each=f"{int(''.join('01'[r] for r in right), 2):x}",
    )


def first(count, asked=ASKED):
    """The first `count` questions are answered rightly."""
    return [n < count for n in range(asked)]


def test_a_difference_is_paired_by_question():
    gained, lost, both = 120, 60, 1500
    one = [n < both + gained for n in range(ASKED)]
    other = [n < both or both + gained <= n < both + gained + lost for n in range(ASKED)]
    found = Difference.of(score("a", one), score("b", other))
    assert found.points == pytest.approx(3.0, abs=0.01)
    # By the formula of matched proportions, less Agresti and Min's half answers.
    d = [a - b for a, b in zip(one, other, strict=True)]
    mean = sum(d) / ASKED
    deviation = (sum((x - mean) ** 2 for x in d) / ASKED / ASKED) ** 0.5
    assert found.half_width == pytest.approx(196 * deviation, rel=0.01)
    assert found.is_told
    back = Difference.of(score("b", other), score("a", one))
    assert (back.points, back.half_width) == (-found.points, found.half_width)
    same = Difference.of(score("a", one), score("b", one))
    assert same.points == 0 < same.half_width < 0.2
    assert not same.is_told


@pytest.mark.parametrize(("asked", "gained", "lost"), [(50, 0.1, 0.05), (300, 0.02, 0.02)])
def test_nineteen_of_twenty_intervals_hold_the_true_difference(asked, gained, lost):
    draw, held = random.Random(1), 0
    for _ in range(1000):
        kinds = draw.choices("gln", (gained, lost, 1 - gained - lost), k=asked)
        one = score("a", [kind != "l" for kind in kinds])
        other = score("b", [kind != "g" for kind in kinds])
        found = Difference.of(one, other)
        held += abs(found.points - 100 * (gained - lost)) <= found.half_width
    assert 930 <= held <= 995


def test_zeros_before_the_first_right_answer_count_as_wrong():
    late = score("a", [False] * 90 + [True] * 10)
    early = score("b", [True] * 10 + [False] * 90)
    assert Difference.of(late, early).points == pytest.approx(0)
    assert Difference.of(late, late).half_width < Difference.of(late, early).half_width / 3


def table_of(page, heading):
    lines = page.partition(f"\n{heading}\n")[2].strip().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    end = next((n for n, line in enumerate(lines) if line.startswith("#")), len(lines))
    return rows[0], rows[2 : sum("|" in line for line in lines[:end])]


ABOUT = {"command": "x", "machine": "m", "versions": "v", "model": "a model", "looked_at": "9"}


def test_a_ranking_goes_by_score_and_says_who_is_level():
    scores = [
        score("none", first(1990), "", ""),
        score("worst", first(1000)),
        score("best", first(1800)),
        score("near", first(1799)),
        score("random", first(1500)),
        score("uniform", first(1400)),
        score("best", first(1200), "r_max=0.25", "r_max=0.25"),
        score("worst", first(1300), "r_max=0.25", "r_max=0.25"),
        score("alone", first(1300), "r_max=0.1", "r_max=0.1"),
    ]
    assert is_ranked(scores)
    page = render_ranking(ABOUT, scores)
    names, rows = table_of(page, "## r_max=0.5")
    cells = [dict(zip(names, row, strict=True)) for row in rows]
    assert [c["method"] for c in cells] == ["best", "near", "random", "uniform", "worst"]
    assert [c[""] for c in cells] == ["1", "2", "3", "4", "5"]
    assert [c["level with"] for c in cells] == ["near", "", "", "", ""]
    assert cells[0]["over the next"].startswith("+0.0 ± 0.")
    assert cells[1]["over the next"].startswith("+14.9 ± 1.")
    assert [c["over chance"][:5] for c in cells] == ["+15.0", "+14.9", "", "", "-25.0"]
    assert cells[0]["choice"] == "+10%"
    assert (cells[0]["float16"], cells[0]["bfloat16"]) == ("100.0%", "50.0%")
    assert "Percent of 2000 questions" in page
    assert "Unpruned: 99.5" in page
    _, quarter = table_of(page, "## r_max=0.25")
    assert [row[1] for row in quarter] == ["worst", "best"]
    assert "## r_max=0.1\n" not in page
    names, overview = table_of(
        page, "Percent right, and the place at that budget; from the best mean on."
    )
    assert names == ["method", "r_max=0.5", "r_max=0.25", "mean"]
    assert overview[0] == ["near", "90.0 (2)", "", "90.0"]
    assert overview[1] == ["best", "90.0 (1)", "60.0 (2)", "75.0"] or overview[1][0] == "random"


def test_one_method_has_no_order():
    assert not is_ranked([score("none", first(1990), "", ""), score("a", first(5))])


def test_a_method_that_is_no_better_than_chance_is_named():
    chance = [score("none", first(1900), "", ""), score("random", first(1600))]
    chance.append(score("uniform", first(1680)))
    assert no_better([*chance, score("hivtp", first(1800))]) == []
    told = no_better(
        [
            *chance,
            score("hivtp", first(1682)),
            score("fopru", first(1680)),
            score("hiprune", first(1400), "r_max=0.5 alpha=0.2"),
        ]
    )[0]
    assert "- r_max=0.5: no better than uniform (84.0): hivtp (84.1), fopru (84.0)" in told
    assert "- r_max=0.5: below uniform (84.0): hiprune alpha=0.2 (70.0)" in told
    assert no_better([score("none", first(9), "", ""), score("hivtp", first(1))]) == []


# --- the pages that are committed ---


def committed(base):
    """(what is said of a run, its scores)"""
    facts = json.loads((RESULTS / f"{base}.json").read_text())
    return facts, [VariantScore(**row) for row in facts.pop("rows")]


@pytest.mark.parametrize("name", ["llava-shapes", "llava-shapes-next"])
def test_a_committed_ranking_is_what_its_numbers_give(name):
    assert (RESULTS / f"{name}-ranking.md").read_text() == render_ranking(*committed(name))


def test_the_page_of_measurements_has_the_ranking():
    page = render_ranking(*committed("llava-shapes"))
    table = [line for line in page.partition("\n## ")[0].splitlines() if line.startswith("|")]
    assert len(table) == 2 + 16
    assert "\n".join(table) in (DOCS / "measured.md").read_text()


def test_both_signs_are_on_the_page_as_measured():
    def of(base, method):
        scores = committed(base)[1]
        return {score.budget: score for score in scores if score.method == method}, scores[0]

    page = (RESULTS / "README.md").read_text()
    for method, sign in (("cdpruner", "direct"), ("hiprune++", "negated")):
        usual, none = of("llava-shapes", method)
        other, same = of(f"{method}-sign-{sign}/llava-shapes", method)
        assert none.each == same.each  # the same questions, and the same answers
        for budget, kept in (("r_max=0.25", "25 %"), ("r_max=0.11", "11 %")):
            assert f"sign={sign}" in other[budget].options
            pair = usual[budget], other[budget]
            direct, negated = pair if sign == "negated" else reversed(pair)
            over = Difference.of(direct, negated)
            scores = f"{direct.overall:.1f} | {negated.overall:.1f} | {over}"
            assert f"| `{method}` | {kept} | {scores} |" in page
