"""Write what the stages trained as the files that LLaVA's stock loader opens.

python -m training.export TOWER_FOLDER LANGUAGE_FOLDER --name llava-shapes
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from llava_hvp.shapes.weights import CHECKPOINTS, SHIPPED, TOWER
from llava_hvp.testing import make_checkpoint, make_clip
from llava_hvp.testing.tokenizers import write_clip_tokenizer, write_llama_tokenizer
from llava_hvp.testing.weights import save_weights, write_json
from training.captions import word_list
from training.language import LANGUAGE, MAX_LENGTH, STATE
from training.llama import Language
from training.models import State
from training.pool import SIDE
from training.prompts import VOCABULARY, tokenizer_text
from training.tower import HEADS, INNER, LAYERS, WIDTH, Supervised
from training.tower import STATE as TOWER_STATE

TEXT_LAYERS = 2


def export_tower(state: State, folder: Path) -> Path:
    """A CLIPModel with tokenizer and image processor: the tester's files with trained weights."""
    make_clip(folder, layers=LAYERS, hidden_size=WIDTH, heads=HEADS, image_size=SIDE, patch_size=14)
    size = write_clip_tokenizer(folder, text=word_list())
    model = Supervised(size)
    model.load_state_dict(state, strict=False)  # heads do not matter here
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype"] = "float16"
    config["vision_config"]["intermediate_size"] = INNER
    config["text_config"] |= {
        "intermediate_size": INNER,
        "vocab_size": size,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
        "pad_token_id": size - 1,
    }
    write_json(folder / "config.json", config)
    _save(folder, model.vision.hf() | model.text.hf())
    return folder


def export_language(state: State, folder: Path, tower: Path, version: str) -> Path:
    """LLaVA's own folder; `mm_vision_tower` stays a bare name until `shapes.checkpoint` copies."""
    make_checkpoint(
        folder,
        version=version,
        vision_tower=tower,
        layers=LANGUAGE["layers"],
        hidden_size=LANGUAGE["width"],
        heads=LANGUAGE["heads"],
    )
    write_llama_tokenizer(
        folder, model_max_length=MAX_LENGTH, text=tokenizer_text(), vocab_size=VOCABULARY
    )
    model = Language(VOCABULARY, WIDTH, **LANGUAGE)
    model.load_state_dict(state)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "intermediate_size": LANGUAGE["inner"],
        "mm_vision_tower": TOWER,
        "tokenizer_model_max_length": MAX_LENGTH,
        "vocab_size": VOCABULARY,
    }
    write_json(folder / "config.json", config)
    weights = model.hf()
    if version == "1.5":
        del weights["model.image_newline"]
    _save(folder, weights)
    return folder


def _save(folder: Path, weights: State) -> None:
    # The skeleton says which names there are: a missing or wrong one would load as random numbers.
    wanted = load_file(folder / "model.safetensors").keys()
    if wanted != weights.keys():
        raise ValueError(f"names differ: {sorted(wanted ^ weights.keys())[:5]}")
    exact = {
        name: weight.detach().to(torch.float16).contiguous() for name, weight in weights.items()
    }
    save_weights(folder, exact)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the checkpoints' files.")
    parser.add_argument("tower", type=Path, help="what training.tower wrote")
    parser.add_argument("language", type=Path, help="what training.language wrote")
    parser.add_argument("--name", choices=CHECKPOINTS, default=CHECKPOINTS[0])
    parser.add_argument("--to", type=Path, default=SHIPPED)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        tower = export_tower(torch.load(options.tower / TOWER_STATE), Path(scratch) / TOWER)
        version = "next" if options.name.endswith("next") else "1.5"
        state = torch.load(options.language / STATE)
        folder = export_language(state, Path(scratch) / options.name, tower, version)
        options.to.mkdir(parents=True, exist_ok=True)
        for made in (tower, folder):
            shutil.rmtree(options.to / made.name, ignore_errors=True)
            shutil.copytree(made, options.to / made.name)
    size = sum(f.stat().st_size for n in (TOWER, options.name) for f in (options.to / n).iterdir())
    print(f"{options.to / options.name} and its tower: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
