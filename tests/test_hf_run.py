"""Scripts with transformers' own LLaVA under `llava-hvp run`: pruned, or ended by an error."""

import ast
import functools

import pytest
from evaluation import call
from hf_models import needs_release

from llava_hvp import HIVTP, FastV, prune
from llava_hvp.hosts.hf.versions import OLDEST, release

FLAGS = "--prune-method hivtp --r-max 0.5"
ASKED = {"LLAVA_HVP": FLAGS}
QUESTION = "What is this?"
START = """
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained({path!r})
processor.tokenizer.pad_token = processor.tokenizer.unk_token
image = Image.open("photo.png")
inputs = processor(images=image, text="USER: <image>\\n{question} ASSISTANT:", return_tensors="pt")

def ask(model):
    given = dict(do_sample=False, max_new_tokens=6, min_new_tokens=6)
    ids = model.eval().generate(**inputs, **given)
    print(ids[0, inputs["input_ids"].shape[1]:].tolist())
"""
LOAD = (
    START + "model = AutoModelForImageTextToText.from_pretrained({path!r}, dtype=torch.float32)\n"
)
BUILD = (
    START
    + """
from transformers import LlavaForConditionalGeneration
from safetensors.torch import load_file
kept = LlavaForConditionalGeneration.from_pretrained({path!r}, dtype=torch.float32)
model = LlavaForConditionalGeneration(kept.config).float()
model.load_state_dict(kept.state_dict())
"""
)
SCRIPTS = {
    "auto": LOAD + "ask(model)",
    "next": LOAD + "ask(model)",
    "both": LOAD + "ask(model)",
    "class": START + "from transformers import LlavaForConditionalGeneration\n"
    "kind = LlavaForConditionalGeneration\n"
    "model, info = kind.from_pretrained({path!r}, dtype=torch.float32, output_loading_info=True)\n"
    "ask(model)",
    "pipeline": START
    + """
from transformers import pipeline
asked = pipeline("image-text-to-text", model={path!r}, processor=processor, dtype=torch.float32)
said = [dict(role="user", content=[dict(type="image", image=image),
                                   dict(type="text", text={question!r})])]
print(len(asked(text=said, max_new_tokens=4)))
""",
    "llava-too": LOAD
    + """
ask(model)
from llava.model.builder import load_pretrained_model
model = load_pretrained_model({llava!r}, None, "llava", device="cpu", device_map="cpu")[1]
print(len(model.encode_images(torch.zeros(1, 3, 112, 112, dtype=model.dtype))[0]))
""",
    "no-llava": "import sys\nsys.modules['llava'] = None\n" + LOAD + "ask(model)",
    "import_module": "import importlib\nimportlib.import_module("
    "'transformers.models.llava.modeling_llava')\n" + LOAD + "ask(model)",
    "earlier": "import os, llava_hvp_startup\n"
    "from transformers import LlavaForConditionalGeneration\n"
    "os.environ['LLAVA_HVP'] = '--prune-method hivtp --r-max 0.5'\nllava_hvp_startup.wake()\n"
    + LOAD
    + "ask(model)",
    "unused": START + "from transformers import LlavaForConditionalGeneration\nprint('went on')",
    "none": LOAD + "ask(model)",
    "built": BUILD + "ask(model)",
    "inside": START + "from transformers import AutoModel\n"
    "model = AutoModel.from_pretrained({path!r}, dtype=torch.float32).eval()\n"
    "with torch.no_grad():\n    model(**inputs)\nprint('went on')",
    "forked": BUILD
    + """
import os
child = os.fork()
if child == 0:
    ask(model)
    os._exit(0)
print("child ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""",
    "twice": LOAD
    + "ask(model)\nimport importlib, transformers.models.llava.modeling_llava as classes\n"
    "importlib.reload(classes)\nprint('went on')",
    "by-hand": "import sys, types\nfrom importlib.util import find_spec, module_from_spec\n"
    "import transformers.models.llava, importlib.machinery as machinery\n"
    "name = 'transformers.models.llava.modeling_llava'\n"
    "spec = machinery.PathFinder.find_spec(name, transformers.models.llava.__path__)\n"
    "sys.modules[name] = module_from_spec(spec)\nspec.loader.exec_module(sys.modules[name])\n"
    "print('went on')",
    "trained": LOAD
    + "model.train()\nmodel(**inputs, labels=inputs['input_ids'])\nprint('went on')",
    "trained-pruned": LOAD
    + "model.train()\nmodel(**inputs, labels=inputs['input_ids']).loss.backward()\n"
    "print('went on')",
    "switched": LOAD
    + """
for method in (None, "hiprune", {{"method": "hivtp", "r_max": 0.25}}):
    given = dict(do_sample=False, max_new_tokens=6, min_new_tokens=6, prune=method)
    model.eval().generate(**inputs, **given)
ask(model)
""",
    "deep": LOAD + "ask(model)",
    "swallowed": START + "try:\n    AutoModelForImageTextToText.from_pretrained({path!r})\n"
    "except Exception as error:\n    print(type(error).__name__)\n",
}
ENVIRONMENTS = {
    "earlier": {},
    "both": {"LLAVA_HVP": f"{FLAGS} --prune-inside fastv --inside-r-max 0.75"},
    "none": {"LLAVA_HVP": "--prune-method none"},
    "trained-pruned": {"LLAVA_HVP": f"{FLAGS} --prune-train"},
    "deep": {"LLAVA_HVP": f"{FLAGS} --prune-opt layers=(40,)"},
    "swallowed": {"LLAVA_HVP": f"{FLAGS} --prune-opt layers=(40,)"},
}
PRUNED = ("auto", "next", "class", "no-llava", "import_module", "earlier")


@pytest.fixture(scope="module")
def ended(hf, checkpoints, photos, tmp_path_factory):
    """A function from a name to that script's process, at its end."""
    folder = tmp_path_factory.mktemp("hf-run")
    photos[0].save(folder / "photo.png")

    @functools.cache
    def end(name):
        kind = "llava-next-llama" if name == "next" else "llava-1.5-llama"
        code = SCRIPTS[name].format(
            path=str(hf(kind).path), question=QUESTION, llava=str(checkpoints("llava-1.5-llama"))
        )
        (folder / f"{name}.py").write_text(code)
        return call(f"python {name}.py", folder, **ENVIRONMENTS.get(name, ASKED))

    return end


def pruned_here(bundle, photo, *methods):
    """The ids that `prune` in this process gives, and how many tokens it keeps."""
    with prune(bundle.model, HIVTP(r_max=0.5), *methods) as pruned:
        ids = bundle.generate(bundle.ask(QUESTION, pictures=[photo]))[0].tolist()
        return ids, pruned.last[0]


@needs_release
@pytest.mark.parametrize("name", PRUNED)
def test_whoever_loads_it_gets_it_pruned(ended, hf, photos, name):
    bundle = hf("llava-next-llama" if name == "next" else "llava-1.5-llama")
    ids, report = pruned_here(bundle, photos[0])
    assert ended(name).returncode == 0, ended(name).stderr
    assert ast.literal_eval(ended(name).stdout) == ids
    lines = [line for line in ended(name).stderr.splitlines() if line.startswith("llava-hvp: ")]
    assert lines[0].startswith("llava-hvp: pruning on: hivtp r_max=0.5 (llava-hvp ")
    assert f"1 image, kept {report.kept_of_stock:.1%} of stock's visual tokens" in lines[-1]
    assert "llava-torch" not in lines[0]


@needs_release
def test_a_method_inside_the_language_model_prunes_too(ended, hf, photos):
    ids, report = pruned_here(hf("llava-1.5-llama"), photos[0], FastV(r_max=0.75))
    assert ended("both").returncode == 0, ended("both").stderr
    assert ast.literal_eval(ended("both").stdout) == ids
    before, after = report.layer_tokens
    assert f"{before} -> {after} after layer 1" in ended("both").stderr.splitlines()[-1]
    assert after < before == report.kept_tokens


@needs_release
def test_a_pipeline_is_pruned(ended):
    assert (ended("pipeline").returncode, ended("pipeline").stdout) == (0, "1\n"), ended(
        "pipeline"
    ).stderr
    assert "1 image, kept 50.0% of stock's visual tokens" in ended("pipeline").stderr


@needs_release
def test_both_hosts_in_one_process_are_pruned_and_counted(ended, hf, photos):
    ids, _ = pruned_here(hf("llava-1.5-llama"), photos[0])
    assert ended("llava-too").returncode == 0, ended("llava-too").stderr
    assert ended("llava-too").stdout == f"{ids}\n32\n"
    assert "2 images, kept 50.0% of stock's visual tokens" in ended("llava-too").stderr


@needs_release
def test_unpruned_images_are_counted_as_asked(ended, hf, photos):
    bundle = hf("llava-1.5-llama")
    stock = bundle.generate(bundle.ask(QUESTION, pictures=[photos[0]]))[0].tolist()
    assert (ended("none").returncode, ended("none").stdout) == (0, f"{stock}\n"), ended(
        "none"
    ).stderr
    assert ended("none").stderr.splitlines()[-1] == "llava-hvp: images encoded unpruned: 1"


@needs_release
def test_calls_that_choose_are_counted_by_method_and_an_unpruned_one_is_no_accident(
    ended, hf, photos
):
    ids, _ = pruned_here(hf("llava-1.5-llama"), photos[0])
    assert (ended("switched").returncode, ended("switched").stdout) == (0, f"{ids}\n"), ended(
        "switched"
    ).stderr
    said = ended("switched").stderr.splitlines()[-1]
    assert said.startswith("llava-hvp: 4 images, kept 56.2% of stock's visual tokens")
    assert said.endswith(
        "(means); none: 1 image, 100.0%; hiprune r_max=0.5: 1 image, 50.0%; "
        "hivtp r_max=0.25: 1 image, 25.0%; hivtp r_max=0.5: 1 image, 50.0%"
    )


@needs_release
def test_the_class_alone_is_no_error(ended):
    assert (ended("unused").returncode, ended("unused").stdout) == (0, "went on\n")


@needs_release
@pytest.mark.parametrize(
    ("name", "went_on", "message"),
    [
        ("built", True, "1 images were encoded without pruning, 0 with it"),
        ("inside", True, "1 images were encoded without pruning, 0 with it"),
        ("twice", True, "modeling_llava was imported a second time"),
        ("by-hand", True, "LLaVA was imported past llava-hvp"),
        ("trained", False, "a pruned model is being trained"),
        ("deep", False, "layer 40"),
    ],
)
def test_what_would_run_unpruned_ends_with_an_error(ended, name, went_on, message):
    assert ended(name).returncode == 1, ended(name).stderr
    assert bool(ended(name).stdout) is went_on
    errors = [x for x in ended(name).stderr.splitlines() if x.startswith("llava-hvp: error: ")]
    assert any(message in line for line in errors), ended(name).stderr


@needs_release
def test_a_fork_that_would_encode_unpruned_ends_before_it_does(ended):
    assert ended("forked").stdout == "child ended with 1\n", ended("forked").stderr
    assert "images would be encoded without pruning" in ended("forked").stderr


@needs_release
def test_training_is_pruned_where_that_is_asked_for(ended):
    assert (ended("trained-pruned").returncode, ended("trained-pruned").stdout) == (
        0,
        "went on\n",
    ), ended("trained-pruned").stderr
    assert "1 image, kept 50.0%" in ended("trained-pruned").stderr


@needs_release
def test_an_error_that_a_script_swallows_leaves_it_without_a_model(ended):
    assert ended("swallowed").stdout == "LayerError\n", ended("swallowed").stderr


@needs_release
def test_the_launcher_sums_up(hf, photos, tmp_path):
    photos[0].save(tmp_path / "photo.png")
    code = SCRIPTS["auto"].format(path=str(hf("llava-1.5-llama").path), question=QUESTION)
    (tmp_path / "script.py").write_text(code)
    run = f"llava-hvp run {FLAGS} -- bash -c"
    result = call(f"{run} 'python script.py; python script.py'", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        "llava-hvp: 2 processes, 2 images, kept 50.0% of stock's visual tokens"
    )
    built = SCRIPTS["built"].format(path=str(hf("llava-1.5-llama").path), question=QUESTION)
    (tmp_path / "script.py").write_text(built)
    result = call(f"{run} 'python script.py || true'", tmp_path)
    assert result.returncode == 1
    assert "did not finish pruned: images were encoded without pruning" in result.stderr


@pytest.mark.skipif(release() >= OLDEST, reason="these releases are pruned")
def test_a_release_that_is_not_pruned_refuses_to_build_the_class(tmp_path):
    code = "from transformers import LlavaConfig, LlavaForConditionalGeneration as Llava"
    (tmp_path / "script.py").write_text(f"{code}\nprint('imported')\nLlava(LlavaConfig())\n")
    result = call("python script.py", tmp_path, **ASKED)
    assert (result.returncode, result.stdout) == (1, "imported\n"), result.stderr
    assert "transformers >= 4.57" in result.stderr
