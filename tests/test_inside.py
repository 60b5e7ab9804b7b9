"""A method inside the language model of stock LLaVA: equal to one that masks, slowly."""

import pytest
from inside import KINDS, QUESTIONS, assert_equal, each_rule, expected, generated

from llava_hvp import HIVTP, prune

pytestmark = pytest.mark.usefixtures("double")


@each_rule
@pytest.mark.parametrize("name", KINDS)
def test_one_row_is_as_if_masked(deep, photos, name, method, slowly):
    bundle = deep(name)
    wanted = expected(bundle, QUESTIONS[0], photos[:1], method, slowly)
    with prune(bundle.model, method):
        ids, logits = generated(bundle, QUESTIONS[:1], [photos[:1]])
    assert_equal((ids[0], logits[0]), wanted)


@each_rule
def test_ragged_rows_are_each_as_if_alone(deep, photos, method, slowly):
    bundle = deep()
    wanted = [
        expected(bundle, q, photos[i : i + 1], method, slowly) for i, q in enumerate(QUESTIONS)
    ]
    with prune(bundle.model, method):
        ids, logits = generated(bundle, QUESTIONS, [photos[:1], photos[1:2]])
    for row in range(2):
        assert_equal((ids[row], logits[row]), wanted[row])


@each_rule
def test_several_images_of_a_prompt_are_one_set(deep, photos, method, slowly):
    bundle = deep()
    wanted = expected(bundle, QUESTIONS[0], photos[:2], method, slowly)
    with prune(bundle.model, method):
        ids, logits = generated(bundle, QUESTIONS[:1], [photos[:2]])
    assert_equal((ids[0], logits[0]), wanted)


@each_rule
def test_after_a_method_at_the_tower(deep, photos, method, slowly):
    bundle, before = deep(), HIVTP(r_max=0.5)
    wanted = expected(bundle, QUESTIONS[0], photos[:1], method, slowly, before=before)
    with prune(bundle.model, before, method) as pruned:
        ids, logits = generated(bundle, QUESTIONS[:1], [photos[:1]])
    assert_equal((ids[0], logits[0]), wanted)
    report = pruned.last[0]
    assert report.kept_tokens == report.layer_tokens[0] == report.stock_tokens // 2
    assert report.layer_tokens[-1] < report.layer_tokens[0]
