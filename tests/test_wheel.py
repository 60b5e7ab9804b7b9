"""The built wheel in an environment of its own: installed it works, uninstalled it is gone."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """(python of a fresh environment, its files before, the wheel).

    torch, transformers and LLaVA are seen where they are, since another copy takes gigabytes; not
    so this project, which is installed there in editable form.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env/bin/python"
    (packages,) = (folder / "env/lib").glob("python*/site-packages")
    # Seen, but the .pth files in it are not read.
    (packages / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    before = files(folder / "env")
    install = ["install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run([*pip, "--python", python, *install], check=True)
    return python, before, packages, [*pip, "--python", python]


def run(python, *arguments, **environ):
    return subprocess.run(
        [python, *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", **environ},
        cwd=Path(python).parent,
        check=False,
    )


def files(folder):
    return {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}


def test_the_hook_and_the_package_come_from_the_wheel(fresh):
    python, _, packages, _ = fresh
    code = "import llava_hvp_startup as s, llava_hvp as p; print(s.__file__); print(p.__file__)"
    seen = run(python, "-c", code).stdout.splitlines()
    assert seen == [str(packages / "llava_hvp_startup.py"), str(packages / "llava_hvp/__init__.py")]
    assert (packages / "llava_hvp.start").read_text() == "llava_hvp_startup:wake\n"
    assert (packages / "llava_hvp/py.typed").exists()
    assert (packages / "llava_hvp/show/page.html").exists()


def test_flags_are_understood_by_a_stock_command(fresh):
    result = run(fresh[0], "-m", "llava.eval.model_vqa", "--prune-method", "hivtpp")
    assert result.returncode == 2
    assert "unknown method 'hivtpp'" in result.stderr
    helped = run(fresh[0], "-m", "llava.eval.model_vqa", "--help")
    assert helped.returncode == 0, helped.stderr
    assert "--prune-method" in helped.stdout


def test_the_command_line_is_installed(fresh):
    listed = run(fresh[0].parent / "llava-hvp", "methods")
    assert listed.returncode == 0, listed.stderr
    assert "hivtp: " in listed.stdout


def test_uninstalled_it_leaves_nothing_behind(fresh):
    python, before, packages, pip = fresh
    environment = packages.parents[2]
    assert len(files(environment)) > len(before) + 30
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "llava-hvp"], check=True)
    assert files(environment) - before == set()
    assert not list(packages.glob("*llava*"))
    result = run(python, "-c", "import sys; print([m for m in sys.modules if 'hvp' in m])")
    assert (result.stdout, result.stderr) == ("[]\n", "")
