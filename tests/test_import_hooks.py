"""LLaVA that is imported by other hooks than ours, or twice: pruned all the same, or an error."""

import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from evaluation import call

ASKED = {"LLAVA_HVP": "--prune-method hivtp --r-max 0.5", "LLAVA_HVP_DEVICE": "cpu"}
USE = """
import torch
from llava.model.builder import load_pretrained_model
model = load_pretrained_model({path!r}, None, "llava")[1]
with torch.no_grad():
    print([len(f) for f in model.encode_images(torch.zeros(1, 3, 112, 112, dtype=model.dtype))])
"""
# As typeguard.install_import_hook("llava") does it.
FINDER = """
import importlib, sys
from importlib.machinery import PathFinder, SourceFileLoader

class Loader(SourceFileLoader):
    ran = []

    def exec_module(self, module):
        self.ran.append(module.__name__)
        super().exec_module(module)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "llava":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec

sys.meta_path.insert(0, Finder())
"""
SCRIPTS = {
    "statement": FINDER + USE + "assert {{'llava', 'llava.model'}} <= set(Loader.ran)",
    "import_module": FINDER + "importlib.import_module('llava.model.builder')" + USE,
    "removed": "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if not "
    "type(f).__module__.startswith('llava_hvp')]" + USE,
    # As a .pth file that comes before ours would.
    "earlier": f"import llava, os, llava_hvp_startup\nos.environ |= {ASKED}\n".replace(
        "{", "{{"
    ).replace("}", "}}")
    + "llava_hvp_startup.wake()"
    + USE,
    "zip": USE,
    "reloaded": "import importlib, llava\nimportlib.reload(llava)"
    + USE
    + "importlib.reload(llava.model)",
    "tower-reloaded": USE
    + "import importlib, llava.model.multimodal_encoder.clip_encoder as towers\n"
    "importlib.reload(towers)",
    "twice": USE + "import sys\nfor name in [n for n in sys.modules if n.split('.')[0] == 'llava']:"
    "\n    del sys.modules[name]\nimport llava\nprint('went on')",
    # What no hook of an import statement could see.
    "by-hand": "import sys, types\nfrom importlib.util import find_spec\n"
    "(folder,) = find_spec('llava').submodule_search_locations\n"
    "for name in ('llava', 'llava.model'):\n"
    "    bare = sys.modules[name] = types.ModuleType(name)\n"
    "    bare.__path__ = [folder + name.removeprefix('llava').replace('.', '/')]\n"
    "from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM\n"
    "print('went on')",
}
PRUNED = ("statement", "import_module", "removed", "earlier", "zip", "reloaded")


@pytest.fixture(scope="module")
def ended(checkpoints, tmp_path_factory):
    """Each process of this file by its name, at its end."""
    folder = tmp_path_factory.mktemp("import-hooks")
    path = str(checkpoints("llava-1.5-llama"))
    package = Path(next(iter(find_spec("llava").submodule_search_locations)))
    with zipfile.ZipFile(folder / "llava.zip", "w") as archive:
        for file in package.rglob("*"):  # folders too: some packages of LLaVA's have no __init__
            archive.write(file, file.relative_to(package.parent))
    for name, code in SCRIPTS.items():
        (folder / f"{name}.py").write_text(code.format(path=path))
    before = filter(None, [str(folder / "llava.zip"), os.environ.get("PYTHONPATH")])
    environ = dict.fromkeys(SCRIPTS, ASKED)
    environ |= {"earlier": {}, "zip": {**ASKED, "PYTHONPATH": os.pathsep.join(before)}}
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(lambda name: call(f"python {name}.py", folder, **environ[name]), SCRIPTS)
        return dict(zip(SCRIPTS, ends, strict=True))


@pytest.mark.parametrize("name", PRUNED)
def test_whoever_imports_llava_gets_it_pruned(ended, name):
    assert (ended[name].returncode, ended[name].stdout) == (0, "[32]\n"), ended[name].stderr
    assert "1 image, kept 50.0% of stock's visual tokens" in ended[name].stderr


@pytest.mark.parametrize(
    ("name", "printed", "message"),
    [
        ("tower-reloaded", "[32]\n", "clip_encoder was imported a second time"),
        ("twice", "[32]\n", "was imported a second time"),
        ("by-hand", "went on\n", "LLaVA was imported past llava-hvp"),
    ],
)
def test_what_cannot_be_pruned_ends_with_an_error(ended, name, printed, message):
    assert (ended[name].returncode, ended[name].stdout) == (1, printed), ended[name].stderr
    last = ended[name].stderr.splitlines()[-1]
    assert last.startswith("llava-hvp: error: ")
    assert message in last
