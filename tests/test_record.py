"""Counting images, and writing the record of it."""

import json
from dataclasses import replace

import pytest
import torch

from llava_hvp import Selection
from llava_hvp.files import write_json
from llava_hvp.pruning.record import Totals, added, answers_facts, record_path, summary
from llava_hvp.pruning.report import ImageReport


def report(kept, stock, tiles=1):
    mask = torch.zeros(tiles, 100, dtype=torch.bool)
    mask.view(-1)[:kept] = True
    selection = Selection(mask, {})
    return ImageReport(
        "m", tiles, stock, kept, mask, (10, 10), None, selection, pruned_by="m r_max=0.5"
    )


def whole(totals):
    """The counts of all images, where one method was used."""
    counts = totals.as_dict()
    assert counts.pop("by_method") == {"m r_max=0.5": counts}
    return counts


def test_ratios_are_means_over_images():
    totals = Totals()
    totals.add([report(50, 100), report(50, 200, tiles=5)])
    totals.add([report(30, 100)])
    assert whole(totals) == {
        "images": 3,
        "reused": 0,
        "kept_tokens": 130,
        "stock_tokens": 400,
        "mean_kept_of_stock": pytest.approx((0.5 + 0.25 + 0.3) / 3),
        "mean_kept_of_patches": pytest.approx((0.5 + 0.1 + 0.3) / 3),
    }
    assert summary(totals.as_dict()).startswith("3 images, kept 35.0% of stock's")


def test_an_image_that_is_sent_again_counts_once():
    totals = Totals()
    totals.add([report(50, 100)])
    for _ in range(2):
        totals.add([replace(report(50, 100), reused=True)])
    assert (totals.images, totals.reused, totals.kept_tokens) == (1, 2, 50)
    assert str(totals).startswith("1 image, sent 3 times, kept 50.0% of stock's")
    totals.add([report(30, 100)])
    assert whole(totals) == {
        "images": 2,
        "reused": 2,
        "kept_tokens": 80,
        "stock_tokens": 200,
        "mean_kept_of_stock": pytest.approx(0.4),
        "mean_kept_of_patches": pytest.approx(0.4),
    }
    assert str(totals).startswith("2 images, sent 4 times, kept 40.0% of stock's")


def test_what_enters_each_layer_is_counted_and_told():
    totals = Totals()
    one = replace(report(60, 100), layer_tokens=(60, 60, 20, 20))
    two = replace(report(40, 100), layer_tokens=(40, 40, 20, 10))
    totals.add([one, two])
    counts = totals.as_dict()
    assert counts["layer_tokens"] == [100, 100, 40, 30]
    assert counts["mean_average_of_stock"] == pytest.approx((0.4 + 0.275) / 2)
    assert str(totals) == (
        "2 images, kept 33.8% of stock's visual tokens on average over 4 layers, 50 -> 20 after "
        "layer 2 -> 15 after layer 3, and sent 50.0% of all patches (means)"
    )
    assert (one.average_tokens, report(60, 100).average_tokens) == (40, 60)


def test_images_are_counted_by_method():
    totals = Totals("m r_max=0.5")
    totals.add([report(50, 100), report(30, 100)])
    assert str(totals) == (
        "2 images, kept 40.0% of stock's visual tokens and 40.0% of all patches (means)"
    )
    none = replace(report(100, 100), method="none", pruned_by="none")
    inside = replace(report(60, 100), pruned_by="m+f", layer_tokens=(60, 20))
    totals.add([none, inside, replace(none, reused=True)])
    counts = totals.as_dict()
    kept = {name: each["kept_tokens"] for name, each in counts["by_method"].items()}
    assert kept == {"m r_max=0.5": 80, "none": 100, "m+f": 60}
    # What is not dropped inside enters every layer.
    assert counts["layer_tokens"] == [240, 200]
    assert counts["mean_average_of_stock"] == pytest.approx((0.5 + 0.3 + 1 + 0.4) / 4)
    assert str(totals).endswith(
        "; m r_max=0.5: 2 images, 40.0%; none: 1 image, sent 2 times, 100.0%; m+f: 1 image, 40.0%"
    )
    merged = added([counts, counts])["by_method"]
    assert (merged["none"]["images"], merged["none"]["mean_kept_of_stock"]) == (2, 1)
    assert merged["m+f"]["layer_tokens"] == [120, 40]


def test_another_method_than_the_one_asked_for_is_named():
    totals = Totals("m r_max=0.25")
    totals.add([report(50, 100)])
    assert str(totals).endswith("; m r_max=0.5: 1 image, 50.0%")


def test_no_image_has_no_ratio():
    assert Totals().as_dict()["mean_kept_of_stock"] is None
    assert str(Totals()) == "no image"


def test_the_record_lies_beside_the_answers_and_knows_them(tmp_path):
    answers = tmp_path / "a.jsonl"
    answers.write_text("{}\n{}\n")
    assert record_path(answers).name == "a.jsonl.hvp.json"
    facts = answers_facts(answers)
    assert facts["lines"] == 2
    answers.write_text("{}\n{ }\n")
    assert answers_facts(answers)["sha256"] != facts["sha256"]


def test_nothing_half_written_is_left(tmp_path):
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": torch})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
