"""`llava-hvp bench`: what it measures is what it says it measures."""

import itertools
import json
import re

import pytest
import torch

from llava_hvp import HIVTP, HiPrune, get_method
from llava_hvp.bench import measure as module
from llava_hvp.bench.clock import Clock
from llava_hvp.bench.flops import complete
from llava_hvp.bench.measure import Measurements, measure, turns
from llava_hvp.bench.phases import Bench
from llava_hvp.bench.results import losses, rows_of
from llava_hvp.bench.workload import make_workload, pattern, random_prompt
from llava_hvp.checkpoints.geometry import get_geometry, list_geometries
from llava_hvp.checkpoints.llava import LlavaCheckpoint
from llava_hvp.checkpoints.synthetic import build_model, build_text, geometry_of
from llava_hvp.checkpoints.variants import Floor, Variant, variants
from llava_hvp.cli import main
from llava_hvp.errors import OptionError
from llava_hvp.hosts.llava.compat.versions import transformers_version
from llava_hvp.hosts.llava.host import attach
from llava_hvp.runtime import PruningConfig, Runtime

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llava-1.5-tiny", "llava-next-tiny"])
def bench(request):
    """Two pictures of random weights."""
    torch.manual_seed(0)
    geometry = get_geometry(request.param)
    model = build_model(geometry, "cpu", torch.float32)
    prompt = random_prompt(20, 500, torch.Generator().manual_seed(0))
    pictures = [pattern((200, 120), seed) for seed in (0, 1)]
    tokenizer, text = build_text(geometry, "cpu")
    processor = model.get_vision_tower().image_processor
    made = LlavaCheckpoint("tiny", tokenizer, model, processor, torch.float32, "vicuna_v1", text)
    work = make_workload(made, pictures, prompt, new_tokens=3)
    return Bench(made, geometry.vision, work, Clock(CPU))


# --- the command ---


def test_the_command_measures_and_writes(tmp_path, capsys):
    out = tmp_path / "results"
    flags = "--geometry llava-next-tiny --methods none,hivtp,random --r-max 0.5,0.25 --batch 1,2"
    assert (
        main(["bench", *flags.split(), "--rounds", "2", "--new-tokens", "3", "--out", str(out)])
        == 0
    )
    printed = capsys.readouterr().out
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".md", ".png"]
    assert next(out.glob("*.png")).read_bytes()[:4] == b"\x89PNG"
    table = next(out.glob("*.md")).read_text()
    content = json.loads(next(out.glob("*.json")).read_text())
    for text in (printed, table):
        assert content["command"] in text
        assert "CPU" in text
        assert "transformers" in text
    rows = content["rows"]
    pruned = [(name, f"r_max={r}") for name in ("hivtp", "random") for r in (0.5, 0.25)]
    assert [(r["batch"], r["method"], r["options"]) for r in rows] == [
        (batch, *label) for batch in (1, 2) for label in (("none", ""), *pruned)
    ]
    for row in rows:
        is_none, reads = row["method"] == "none", row["method"] == "hivtp"
        assert row["tiles"] == 5 * row["batch"]
        assert (row["kept_tokens"] == row["stock_tokens"]) == is_none
        assert set(row["seconds"]) == {"encode", "prefill", "ttft"}
        assert set(row["tokens_per_second"]) == {"decode", "answer"}
        assert set(row["peak_bytes"]) == {"encode", "prefill", "answer"}
        assert (row["selection"] is not None) == reads == bool(row["to_floor"])
        assert row["seconds"]["ttft"]["median"] > row["seconds"]["prefill"]["median"] > 0
        assert (row["peak_to_none"]["prefill"] < 1) != is_none
        assert row["rounds"] == 2


def test_processor_time_is_what_is_counted_where_it_is_asked_for(tmp_path, monkeypatch):
    counted = itertools.count()
    monkeypatch.setattr("time.process_time", lambda: float(next(counted)))
    flags = "--geometry llava-1.5-tiny --methods none --rounds 2 --new-tokens 2 --device cpu"
    assert main(["bench", *flags.split(), "--processor-time", "--out", str(tmp_path)]) == 0
    content = json.loads(next(tmp_path.glob("*.json")).read_text())
    (row,) = content["rows"]
    medians = {name: spread["median"] for name, spread in row["seconds"].items()}
    assert medians == {"encode": 1, "prefill": 2, "ttft": 1}  # looks between
    assert "2 rounds, processor time" in content["model"]


def test_processor_time_of_several_threads_is_refused(capsys):
    flags = "--geometry llava-1.5-tiny --device cpu --processor-time"
    torch.set_num_threads(2)
    try:
        assert main(["bench", *flags.split()]) == 2
    finally:
        torch.set_num_threads(1)
    assert "--processor-time on cpu with 2 threads" in capsys.readouterr().err


def test_a_checkpoint_is_measured_too(checkpoints, photos, tmp_path, capsys):
    path, photo = checkpoints("llava-1.5-llama"), tmp_path / "photo.png"
    photos[0].save(photo)
    flags = ["--model-path", str(path), "--image-file", str(photo), "--methods", "hiprune++"]
    flags += ["--num-tokens", "16", "--rounds", "2", "--new-tokens", "2", "--prompt", "What?"]
    assert main(["bench", *flags]) == 0
    printed = capsys.readouterr().out
    assert "llava-1.5-llama, float32" in printed
    assert "640 x 427 pixels" in printed
    assert "num_tokens=16" in printed


@pytest.mark.skipif(
    transformers_version() < (4, 46), reason="this transformers quantises on a GPU only"
)
def test_a_quantised_checkpoint_is_measured_too(checkpoints, capsys):
    flags = ["--model-path", str(checkpoints("llava-1.5-llama")), "--load-4bit"]
    assert main(["bench", *flags, "--methods", "hivtp", "--r-max", "0.5", "--rounds", "2"]) == 0
    assert "4 bit, float16 activations" in capsys.readouterr().out


def test_the_released_codes_way_is_added_for_what_reads_the_encoder(tmp_path):
    flags = "--geometry llava-1.5-tiny --methods hivtp,random,uniform --all-attentions --rounds 2"
    flags += f" --r-max 0.5 --new-tokens 2 --out {tmp_path}"
    assert main(["bench", *flags.split()]) == 0
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert [row["method"] for row in rows] == [
        *("none", "hivtp", "random", "uniform"),
        "hivtp, all attentions",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--geometry NAME.*llava-1.5-7b"),
        ("--geometry llava-2", "'llava-2'.*llava-1.5-7b"),
        ("--geometry llava-1.5-tiny --model-path x", "one of them"),
        ("--model-path ./nowhere", "./nowhere: no such folder"),
        ("--model-path x --tower-dtype float16", "--tower-dtype goes with --geometry"),
        ("--geometry llava-1.5-tiny --methods hivpt", "'hivpt'.*hivtp"),
        ("--geometry llava-1.5-tiny --r-max 0.5,x", "--r-max 0.5,x"),
        ("--geometry llava-1.5-tiny --r-max 1.5", "1.5"),
        ("--geometry llava-1.5-tiny --r-max 0.5 --num-tokens 9", "exclude each other"),
        ("--geometry llava-1.5-tiny --load-4bit --load-8bit", "exclude each other"),
        ("--geometry llava-1.5-tiny --prune-opt alpha=0.2 --methods hivtp", "alpha.*hivtp"),
        ("--geometry llava-1.5-tiny --prune-opt alpha", "KEY=VALUE"),
        ("--geometry llava-1.5-tiny --batch 0", "--batch 0"),
        ("--geometry llava-1.5-tiny --image-size 20", "WIDTHxHEIGHT"),
        ("--geometry llava-1.5-tiny --image-file nowhere.jpg", "nowhere.jpg"),
        ("--geometry llava-1.5-tiny --image-file a --image-size 2x2", "exclude each other"),
        ("--geometry llava-1.5-tiny --rounds 1", "--rounds 1: give at least 2"),
        ("--geometry llava-1.5-tiny --text-tokens 1", "--text-tokens 1"),
        ("--geometry llava-1.5-tiny --max-seconds 0", "--max-seconds 0"),
        ("--geometry llava-1.5-tiny --device nowhere", "--device nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(flags, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["bench", *flags.split(), "--out", str(out)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()


def test_an_option_goes_to_the_methods_that_have_it():
    found = variants(["hivtp", "hiprune"], [{"r_max": 0.5}], ["alpha=0.2", "newline=all"])
    runtime = Runtime(newline="all")
    assert [v.pruning for v in found] == [
        None,
        PruningConfig(HIVTP(r_max=0.5), runtime),
        PruningConfig(HiPrune(r_max=0.5, alpha=0.2), runtime),
    ]
    with pytest.raises(OptionError, match="beta"):
        variants(["hivtp", "hiprune"], [{"r_max": 0.5}], ["beta=0.2"])


# --- what is timed ---


def test_every_method_runs_and_its_floor_keeps_the_same(bench):
    chosen = variants(["hivtp", "hiprune", "hiprune++", "random", "uniform"], [{"r_max": 0.5}])
    ticks = []
    (measured,) = measure([bench], chosen, 2, tick=ticks.append)
    assert len(ticks) == turns(chosen, 2, bench.vision)
    none = measured[0]
    assert none.kept == none.stock
    assert none.patches == bench.work.tiles * 64
    for m in measured[1:]:
        assert m.stock == none.stock
        assert m.patches == none.patches
        reads = m.variant.name not in ("random", "uniform")
        assert bool(m.floor) == reads
        assert all(len(samples) == 2 for samples in m.seconds.values())
        assert "llava_hvp" not in bench.model.__dict__


def test_the_floor_sends_the_tokens_that_the_method_sent(bench):
    method, runtime = get_method("hivtp", r_max=0.4), Runtime(newline="all")
    with bench.checkpoint.pruned_by(PruningConfig(method, runtime)) as pruning:
        bench.prepare()
        reports = pruning.last
    floor = Floor.below(method, torch.cat([r.selection.keep for r in reports]))
    with bench.checkpoint.pruned_by(PruningConfig(floor, runtime)) as pruning:
        bench.prepare()
        for ours, report in zip(pruning.last, reports, strict=True):
            assert torch.equal(ours.sent, report.sent)
            assert ours.kept_tokens == report.kept_tokens


def test_the_floor_is_no_method_to_ask_for():
    with pytest.raises(OptionError, match=r"'floor'.*hivtp"):
        get_method("floor")


def test_none_is_stock_and_a_pruned_turn_encodes_every_time(bench, monkeypatch):
    tower = bench.model.get_vision_tower()
    seen = []
    stock = type(tower).forward
    monkeypatch.setattr(
        type(tower), "forward", lambda self, x: seen.append("stock") or stock(self, x)
    )
    with bench.checkpoint.pruned_by(Variant()) as pruning:
        assert pruning is None
        assert not vars(bench.model).get("llava_hvp")
        bench.time_parts(None)
        bench.time_answer(2)
    assert seen == ["stock", "stock"]
    with bench.checkpoint.pruned_by(Variant(PruningConfig(HIVTP(r_max=0.5)))) as pruning:
        ours = tower.run_to_layer
        tower.run_to_layer = lambda images: seen.append("pruned") or ours(images)
        bench.time_parts(pruning)
        bench.time_answer(2)
        del tower.run_to_layer
    assert seen[2:] == ["pruned", "pruned"]


def test_variants_take_turns_and_a_method_follows_its_floor():
    class Recorder:
        """Stands in for a Bench: notes the turns."""

        vision = get_geometry("llava-1.5-tiny").vision

    order = []
    chosen = variants(["hivtp", "random"], [{"r_max": 0.5}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module,
            "_look",
            lambda bench, v: (
                Measurements(v, 1, 1, 1, 1),
                HIVTP(r_max=0.3) if v.name == "hivtp" else None,
            ),
        )
        patch.setattr(
            module,
            "_take",
            lambda turn, counted: order.append(
                (turn.of.variant.name + " floor" * turn.is_floor, counted)
            ),
        )
        module.measure([Recorder()], chosen, 2)
    names = [name for name, _ in order]
    assert names[:4] == ["random", "none", "hivtp floor", "hivtp"]
    assert names[4:8] == ["none", "hivtp floor", "hivtp", "random"]
    assert names[8:] == ["hivtp floor", "hivtp", "random", "none"]
    assert [counted for _, counted in order] == [False] * 4 + [True] * 8


def test_time_is_up_after_two_rounds(bench):
    (measured,) = measure([bench], variants(["random"], [{"r_max": 0.5}]), 50, most_seconds=1e-9)
    assert len(measured[0].seconds["ttft"]) == 2


def test_the_decode_is_what_follows_the_first_token(bench):
    with bench.checkpoint.pruned_by(Variant()):
        long, short = bench.time_answer(12), bench.time_answer(1)
    assert long["answer"] > long["ttft"] > 0
    # With one token nothing follows but the end of the loop.
    assert short["answer"] - short["ttft"] < (long["answer"] - long["ttft"]) / 2


def test_ratios_are_of_the_same_round(bench):
    def samples(**seconds):
        return {name: list(values) for name, values in seconds.items()}

    times = {"encode": [1, 2, 4], "prefill": [1, 1, 1], "launched": [1, 1, 1]}
    none = Measurements(
        Variant(), 100, 100, 128, 128, samples(**times, ttft=[2, 4, 8], answer=[4, 6, 10])
    )
    half = {name: [x / 2 for x in values] for name, values in times.items()}
    method = Measurements(
        Variant(PruningConfig(HIVTP(r_max=0.5))),
        50,
        100,
        64,
        128,
        samples(**half, ttft=[1, 2, 4], answer=[2, 3, 5]),
        samples(encode=[0.4, 0.9, 1.8], prefill=[0.5] * 3, ttft=[0.5, 1, 2]),
        {"encode": 10, "prefill": 5, "answer": 7},
    )
    none.peaks = {"encode": 20, "prefill": 10, "answer": 14}
    rows = rows_of([none, method], bench.work, get_geometry("llava-1.5-tiny"), "llava")
    row = rows[1]
    assert row.to_none["ttft"].median == row.to_none["encode"].median == 0.5
    assert row.to_none["ttft"].low == row.to_none["ttft"].high == 0.5
    assert row.to_none["answer"].median == row.to_none["decode"].median == 2
    assert row.to_floor["ttft"].median == 2
    assert row.selection.median == pytest.approx(0.1)
    assert row.selection_of_floor_ttft.median == pytest.approx(0.1)
    # Two rows of the batch, three tokens each, the first of each not decoded.
    assert row.tokens_per_second["answer"].median == 6 / 3
    assert row.tokens_per_second["decode"].median == 4 / 1
    assert row.peak_to_none == {"encode": 0.5, "prefill": 0.5, "answer": 0.5}
    assert row.kept_tokens == 25
    assert (
        row.flops.projector
        == complete(get_geometry("llava-1.5-tiny"), 25, projected=32, text_tokens=20).projector
    )
    assert losses(rows) == []
    slow = rows_of([method, none], bench.work, get_geometry("llava-1.5-tiny"), "llava")
    assert len(losses(slow)) == 1
    assert "TTFT 2.000" in losses(slow)[0]


def test_peak_memory_counts_what_lives_at_once():
    clock = Clock(CPU)
    million = 4_000_000

    def call():
        first = torch.empty(1_000_000)
        del first
        second = torch.empty(1_000_000)
        third = torch.empty(500_000)
        return second, third

    assert clock.peak_bytes(call) == pytest.approx(1.5 * million, rel=0.01)


def test_the_released_codes_way_selects_the_same_and_takes_more_memory(bench):
    method = get_method("hiprune", r_max=0.25)
    found = {}
    for all_attentions in (False, True):
        with bench.checkpoint.pruned_by(Variant(PruningConfig(method), all_attentions)) as pruning:
            bench.prepare()
            keep = torch.cat([r.selection.keep for r in pruning.last])
            found[all_attentions] = keep, bench.peaks(pruning)["encode"]
    assert torch.equal(found[False][0], found[True][0])
    layers, heads, tokens = bench.vision.layers, bench.vision.heads, bench.vision.patches + 1
    maps = 4 * layers * heads * tokens**2 * bench.work.tiles
    assert found[True][1] > maps > found[False][1]
    with attach(bench.model, method):
        assert "see" not in vars(bench.model.get_vision_tower())


# --- random weights ---


@pytest.mark.parametrize("name", list_geometries())
def test_a_published_shape_is_built_without_any_memory_of_the_host(name):
    geometry = get_geometry(name)
    model = build_model(geometry, "meta", torch.float16)
    assert geometry_of(model, name, geometry.tiles) == geometry
    tower = model.get_vision_tower()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.device.type for p in tower.parameters()} == {"meta"}
    assert model.dtype == torch.float16
    assert tower.dtype == (torch.float16 if geometry.is_next else torch.float32)
    language = geometry.language
    matrices = language.layers * language.layer_weights + 2 * language.hidden * language.vocab
    norms = (2 * language.layers + 1) * language.hidden
    found = sum(p.numel() for n, p in model.named_parameters() if ".vision" not in n)
    projector = sum(p.numel() for p in model.get_model().mm_projector.parameters())
    assert found - projector - geometry.is_next * language.hidden == matrices + norms


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_random_weights_generate(bits):
    import bitsandbytes as bnb

    geometry = get_geometry("llava-next-tiny")
    model = build_model(geometry, "cpu", torch.float16, bits=bits)
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert [type(m) for m in linear if type(m) is not kind] == [torch.nn.Linear]  # the logits
    assert len(linear) > 7 * geometry.language.layers + 6 * geometry.vision.layers
    prompt = random_prompt(9, 500, torch.Generator().manual_seed(0))
    processor = model.get_vision_tower().image_processor
    made = LlavaCheckpoint("tiny", None, model, processor, torch.float16, "vicuna_v1")
    work = make_workload(made, [pattern((99, 50), 0)], prompt, new_tokens=2)
    bench = Bench(made, geometry.vision, work, Clock(CPU))
    with bench.checkpoint.pruned_by(Variant(PruningConfig(HIVTP(r_max=0.5)))) as pruning:
        assert bench.time_answer(2)["answer"] > 0
        assert pruning.last[0].kept_of_patches < 0.6


def test_the_prompts_of_random_weights_have_the_length_asked_for():
    prompt = random_prompt(49, 500, torch.Generator().manual_seed(0))
    assert len(prompt) == 50
    assert (prompt == -200).sum() == 1
    assert prompt[0] == 1
    with pytest.raises(OptionError, match="1 text tokens"):
        random_prompt(1, 500, torch.Generator())
