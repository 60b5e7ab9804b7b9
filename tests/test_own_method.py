"""A method of one's own, in a file of one's own, on every command that takes a method."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from benchdata import write_pope
from evaluation import GREEDY, PYTHON, call, read_answers, run_all, write_data

from llava_hvp.hook.audit import record_path

# The page's own code: what a reader copies is what runs here.
PAGE = Path(__file__).parent.parent / "docs" / "own-method.md"
EXAMPLE, ON_SCORES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
MINE = "mine:Dominant"


@pytest.fixture
def folder(tmp_path):
    """Where somebody works: data, and the file with the method."""
    write_data(tmp_path)
    (tmp_path / "mine.py").write_text(EXAMPLE)
    return tmp_path


@pytest.fixture
def stock_line(checkpoints):
    """LLaVA's own eval command."""
    path = checkpoints("llava-1.5-llama")
    return (
        f"{PYTHON} -m llava.eval.model_vqa_loader --question-file questions.jsonl "
        f"--image-folder images {GREEDY} --max_new_tokens 4 --model-path {path} "
        "--answers-file out/answers.jsonl"
    )


def test_the_page_shows_it_on_scores_without_a_model():
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 12
    names: dict[str, object] = {}
    shown = ON_SCORES.replace("Dominant(r_max", "chosen = Dominant(r_max")
    exec(f"{EXAMPLE}\n{shown}", names)
    assert names["chosen"] == 144
    assert f"# tensor({names['chosen']})" in ON_SCORES


def assert_pruned(folder, result):
    assert result.returncode == 0, result.stderr
    assert len(read_answers(folder / "out" / "answers.jsonl")) == 3
    record = json.loads(record_path(folder / "out" / "answers.jsonl").read_text())
    assert record["method"] == MINE
    assert record["given"] == ["--prune-method", MINE, "--num-tokens", "16"]
    assert record["counts"]["kept_tokens"] == 3 * 16
    assert "pruning on: dominant num_tokens=16" in result.stderr


FLAGS = f"--prune-method {MINE} --num-tokens 16"


def test_llavas_own_command_takes_it_by_a_flag(folder, stock_line):
    assert_pruned(folder, call(f"{stock_line} {FLAGS} --device cpu", folder))


def test_the_variable_takes_it(folder, stock_line):
    assert_pruned(folder, call(stock_line, folder, LLAVA_HVP=f"{FLAGS} --device cpu"))


@pytest.mark.parametrize("where", [".", "inside"])
def test_the_launcher_hands_it_to_its_children_wherever_they_go(where, folder, stock_line):
    (folder / "inside").mkdir()
    line = stock_line.replace("questions.jsonl", f"{folder}/questions.jsonl")
    line = line.replace(" images ", f" {folder}/images ")
    line = line.replace(" out/", f" {folder}/out/")
    script = f"cd {where} && {line}"
    run = f"llava-hvp run {FLAGS} --device cpu -- bash -c {shlex.quote(script)}"
    assert_pruned(folder, call(run, folder))


# --- our own commands ---


def test_show_bench_and_accuracy_take_it_beside_ours(folder, checkpoints):
    path = checkpoints("llava-1.5-llama")
    picture = f"--model-path {path} --image-file images/rocket.jpg --device cpu"
    shown, compared, page, timed, asked = run_all(
        folder,
        [
            f"show {picture} --prune-method {MINE} --r-max 0.25 -o one.png",
            f"show {picture} --methods none,{MINE},hivtp --r-max 0.5,0.25 -o grid.png",
            f"show {picture} --methods {MINE} --prune-opt newline=all --html page.html",
            f"bench --geometry llava-1.5-tiny --methods {MINE},hivtp --r-max 0.5 --rounds 2 "
            "--new-tokens 2 --device cpu --out timed",
            f"accuracy --methods none,{MINE} --r-max 0.25 --questions 4 --device cpu --out marks",
        ],
    )
    for code, _, said in (shown, compared, page, timed, asked):
        assert code == 0, said
    for name in ("one.png", "grid.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    html = (folder / "page.html").read_text()
    assert "the patches that CLS attends to most" in html
    assert "dominant" in timed[1]
    (file,) = (folder / "timed").glob("*.json")
    assert {row["method"] for row in json.loads(file.read_text())["rows"]} == {
        *("none", "dominant", "hivtp"),
    }
    (file,) = (folder / "marks").glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["method"] for row in rows] == ["none", "dominant"]
    assert 0.24 < rows[1]["kept_of_patches"] < 0.26


def test_eval_runs_it_and_its_results_are_read_again(folder, checkpoints):
    shutil.copytree(checkpoints("llava-1.5-llama"), folder / "llava-v1.5-tiny")
    write_pope(folder / "data", 2)
    line = (
        "eval pope --model-path llava-v1.5-tiny --data data --device cpu --max_new_tokens 2 "
        f"--out results {FLAGS} --prune-opt newline=all"
    )
    measured, table = run_all(folder, [line, "table results"])
    assert measured[0] == table[0] == 0, measured[2] + table[2]
    (path,) = (folder / "results").rglob("result.json")
    assert path.parts[-3] == "dominant-num_tokens-16-newline-all"
    result = json.loads(path.read_text())
    assert (result["method"], result["kept_tokens"]) == (MINE, 16)
    assert result["options"]["newline"] == "all"
    assert "dominant num_tokens=16 newline=all" in table[1]
    (folder / "mine.py").write_text(f"{EXAMPLE}# another rule\n")
    ((code, _, said),) = run_all(folder, [line])
    assert code == 2
    assert "holds answers of other settings: method_sha256 was" in said


def test_lmms_eval_takes_it_as_a_model_argument(folder):
    given = "pretrained=p,prune_method=mine:Dominant,num_tokens=16,newline=all"
    code = f"""
from llava_hvp.evaluation.model_args import model_args, pruning_of
options = dict(pair.split("=") for pair in {given!r}.split(","))
name, path = options.pop("prune_method"), options.pop("pretrained")
options["num_tokens"] = int(options["num_tokens"])
print(model_args(path, pruning_of(name, options)))
"""
    (folder / "code.py").write_text(code)
    result = call(f"{PYTHON} code.py", folder)
    assert (result.stdout, result.returncode) == (f"{given}\n", 0), result.stderr


WRONG = """
import sys
from dataclasses import dataclass
from llava_hvp import Method, VisionMethod
class Plain: pass
class Abstract(VisionMethod):
    name, roles, summary = "abstract", ("a",), "lacks its rule"
class OfNoKind(Method):
    name, roles, summary = "of-no-kind", ("a",), "says not where it prunes"
class Rule(VisionMethod):
    def choose(self, context, budget): ...
class Taken(Rule):
    name, roles, summary = "hivtp", ("a",), "a name that a paper has"
class Nameless(Rule):
    roles, summary = ("a",), "no name"
class Listed(Rule):
    name, roles, summary = "a,b", ("a",), "no name for a list"
class None_(Rule):
    name, roles, summary = "none", ("a",), "the word for unpruned"
"""
ERRORS = {
    "nowhere:Dominant": "ModuleNotFoundError: No module named 'nowhere'",
    "mine:Nothing": "has no attribute 'Nothing'",
    "mine:": "the method 'mine:' cannot be had",
    ":Dominant": "the method ':Dominant' cannot be had",
    "exits:Dominant": "SystemExit: usage: exits.py",
    "broken:Dominant": "ZeroDivisionError: first and second line",
    "wrong:Plain": "is no subclass of llava_hvp.VisionMethod",
    "wrong:sys": "is no subclass of llava_hvp.VisionMethod",
    "wrong:Abstract": "is abstract: it lacks choose",
    "wrong:OfNoKind": "is of no kind: build on llava_hvp.VisionMethod",
    "wrong:Taken": "calls itself 'hivtp', as another does: rename",
    "wrong:Nameless": "lacks a name, a summary or roles of its own",
    "wrong:Listed": "calls itself 'a,b': give a name of letters, digits",
    "wrong:None_": "calls itself 'none': give a name",
    "dominent": "unknown method 'dominent'",
}


def test_what_is_no_method_is_said_in_one_line(folder):
    (folder / "wrong.py").write_text(WRONG)
    (folder / "exits.py").write_text("import sys; sys.exit('usage: exits.py')")
    (folder / "broken.py").write_text("raise ZeroDivisionError('first\\nand second line')")
    commands = (
        "show --model-path m --image-file i -o o.png --prune-method",
        "bench --geometry llava-1.5-tiny --methods",
        "run --prune-method",
    )
    lines = [
        f"{command} {name}{' -- true' if command.startswith('run') else ''}"
        for name in ERRORS
        for command in commands
    ]
    for line, (code, _, said) in zip(lines, run_all(folder, lines), strict=True):
        name = next(name for name in line.split() if name in ERRORS)
        assert code == 2, (line, said)
        assert said.count("\n") == 1, (line, said)
        assert ERRORS[name] in said, (line, said)


def test_an_installed_package_may_bring_one(folder):
    """By an entry point of its distribution; its name is as good as one of ours."""
    place = folder / "site"
    info = place / "dominance-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dominance\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[llava_hvp.methods]\ndominant = dominance:Dominant\nlost = nowhere:Lost\n"
    )
    (place / "dominance.py").write_text(EXAMPLE)
    code = f"""
import sys
sys.path.insert(0, {str(place)!r})
from llava_hvp import get_method, list_methods
from llava_hvp.config import Request, to_flags
from llava_hvp.errors import OptionError
from llava_hvp.runtime import PruningConfig
assert "dominance" not in sys.modules
assert {{"dominant", "hivtp", "lost"}} <= set(list_methods())
pruning = PruningConfig.of("dominant", num_tokens=9, newline="all")
assert type(pruning.method).__module__ == "dominance"
print(to_flags(Request(pruning)))
try:
    get_method("lost")
except OptionError as error:
    print(error)
"""
    (folder / "code.py").write_text(code)
    result = call(f"{PYTHON} code.py", folder)
    assert result.returncode == 0, result.stderr
    flags, error = result.stdout.splitlines()
    assert flags == str(
        ["--prune-method", "dominant", "--num-tokens", "9", "--prune-opt", "newline=all"]
    )
    assert error.startswith("the method 'lost', which an installed package names, cannot be had")
