"""Small data in each benchmark's real file format, where LLaVA's Evaluation.md puts it."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

import skimage
from PIL import Image

SHORT = "Answer the question using a single word or phrase."
THINGS = ("rocket", "tower", "person", "dog", "cup", "spoon", "cat", "car")


def picture(number: int) -> Image.Image:
    """One of eight: four photos, and the same mirrored."""
    name = ("rocket.jpg", "astronaut.png", "coffee.png", "chelsea.png")[number % 4]
    image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    image.thumbnail((160, 160))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if number % 8 >= 4 else image


def save(folder: Path, name: str, number: int) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(folder / name)


def jsonl(path: Path, records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_pope(root: Path, each: int = 4) -> None:
    questions = []
    for category in ("adversarial", "popular", "random"):
        labels = []
        for i in range(each):
            name = f"COCO_val2014_{i // 2:012d}.jpg"
            save(root / "pope/val2014", name, i // 2)
            text = f"Is there a {THINGS[i % 8]} in the image?"
            questions.append(
                {
                    "question_id": len(questions) + 1,
                    "image": name,
                    "text": f"{text}\n{SHORT}",
                    "category": category,
                }
            )
            label = "no" if (i + len(category)) % 3 == 0 else "yes"
            labels.append({"question_id": i + 1, "image": name, "text": text, "label": label})
        jsonl(root / f"pope/coco/coco_pope_{category}.json", labels)
    jsonl(root / "pope/llava_pope_test.jsonl", questions)


def write_mme(root: Path) -> None:
    """Both layouts of the release: texts beside the pictures, and in a folder of their own."""
    release, questions = root / "MME/MME_Benchmark_release_version", []
    for category, images, texts in (
        ("existence", "", ""),
        ("code_reasoning", "", ""),
        ("landmark", "images/", "questions_answers_YN/"),
    ):
        for i in range(2):
            name = f"{category}/{images}{i:04d}.jpg"
            save(release, name, i)
            asked = [f"Is there a {thing} in this image?" for thing in THINGS[2 * i : 2 * i + 2]]
            # The release has one or two spaces before its suffix.
            spaces = " " * (1 + i)
            lines = [
                f"{q}{spaces}Please answer yes or no.\t{t}"
                for q, t in zip(asked, ("Yes", "No"), strict=True)
            ]
            path = release / f"{category}/{texts}{i:04d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
            questions += [
                {"question_id": name, "image": name, "text": f"{q}\n{SHORT}", "category": category}
                for q in asked
            ]
    jsonl(root / "MME/llava_mme.jsonl", questions)


def write_textvqa(root: Path, said: list[str] | None = None) -> None:
    """Two questions to the first picture, which share its id.

    said : what a model answers: the truth of the first question holds it six times, of the second
        twice, of the others never
    """
    questions, annotations = [], []
    for i, name in enumerate(("a1b2", "a1b2", "c3d4", "e5f6")):
        save(root / "textvqa/train_images", f"{name}.jpg", i // 2)
        text = f"what is written on number {i}?"
        ocr = f"Reference OCR token: STOP, {i}"
        questions.append(
            {"question_id": name, "image": f"{name}.jpg", "text": f"{text}\n{ocr}\n{SHORT}"}
        )
        times = (6, 2, 0, 0)[i]
        hits = [said[i]] * times if said else ["stop"] * times
        answers = [*hits, *(f"nothing {j}" for j in range(10 - times))]
        annotations.append({"image_id": name, "question": text.title(), "answers": answers})
    jsonl(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", questions)
    (root / "textvqa/TextVQA_0.5.1_val.json").write_text(json.dumps({"data": annotations}))


def write_mmbench(root: Path, name: str = "mmbench", answers: bool = True) -> None:
    """Three questions, the first in two rotations. The options of the last two are numbers."""
    file = {
        "mmbench": "mmbench_dev_20230712.tsv",
        "mmbench_cn": "mmbench_dev_cn_20231003.tsv",
    }[name]
    rows = [
        (241, "Which?", "a hint", "cat", "dog", "cup", "", "A"),
        (1000241, "Which?", "a hint", "dog", "cup", "cat", "", "C"),
        (252, "How many?", "", "1", "2", "", "", "B"),
        (253, "How many more?", "", "3", "4", "5", "none of them", "D"),
    ]
    path = root / name / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as out:
        table = csv.writer(out, delimiter="\t")
        extra = ["answer"] if answers else []
        table.writerow(
            [
                *("index", "question", "hint", "A", "B", "C", "D", *extra),
                *("category", "image", "source", "l2-category", "comment", "split"),
            ]
        )
        for number, row in enumerate(rows):
            content = io.BytesIO()
            picture(number // 2).save(content, format="JPEG")
            image = base64.b64encode(content.getvalue()).decode()
            given = row if answers else row[:-1]
            table.writerow([*given, "counting", image, "made", "perception", "", "dev"])


def write_scienceqa(root: Path) -> None:
    folder = root / "scienceqa"
    problems, questions = {}, []
    for i in range(4):
        number, has_image = str(11 + i), i % 2 == 0
        choices = ["iron", "wood", "water"][: 2 + i % 2]
        problems[number] = {
            "question": f"Which is number {i}?",
            "choices": choices,
            "answer": i % 2,
            "image": "image.png" if has_image else None,
            "split": "test",
        }
        options = "\n".join(f"{letter}. {c}" for letter, c in zip("ABC", choices, strict=False))
        text = f"Which is number {i}?\n{options}"
        record = {"id": number, "conversations": [{"from": "human", "value": text}]}
        if has_image:
            record["image"] = f"{number}/image.png"
            record["conversations"][0]["value"] = f"<image>\n{text}"
            save(folder / "images/test", record["image"], i)
        questions.append(record)
    (folder / "llava_test_CQM-A.json").write_text(json.dumps(questions))
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))


def write_gqa(root: Path, said: list[str] | None = None) -> None:
    """Four questions, of which one is not balanced; the truth of the first two is what is said."""
    folder = root / "gqa/data"
    questions, truths = [], {}
    for i in range(4):
        number, name = f"2019{i:04d}", f"n{i // 2}"
        save(folder / "images", f"{name}.jpg", i // 2)
        questions.append(
            {"question_id": number, "image": f"{name}.jpg", "text": f"What is it {i}?\n{SHORT}"}
        )
        answer = said[i].rstrip(".").lower() if said and i < 2 else "table"
        truths[number] = {
            "imageId": name,
            "question": f"What is it {i}?",
            "answer": answer,
            "isBalanced": i != 1,
        }
    jsonl(root / "gqa/llava_gqa_testdev_balanced.jsonl", questions)
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(truths))


def write_vqav2(root: Path) -> None:
    """Test-dev is a part of the test split, to all of which the upload has an answer."""
    questions = []
    for i in range(4):
        name = f"COCO_test2015_{i:012d}.jpg"
        save(root / "vqav2/test2015", name, i)
        questions.append(
            {"question_id": 262144000 + i, "image": name, "text": f"What is {i}?\n{SHORT}"}
        )
    jsonl(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", questions[1:])
    jsonl(root / "vqav2/llava_vqav2_mscoco_test2015.jsonl", questions)


def write_vizwiz(root: Path) -> None:
    name = "VizWiz_test_{:08d}.jpg"
    hint = "When the provided information is insufficient, respond with 'Unanswerable'."
    questions = []
    for i in range(3):
        save(root / "vizwiz/test", name.format(i), i)
        questions.append(
            {
                "question_id": name.format(i),
                "image": name.format(i),
                "text": f"What is this {i}?\n{hint}\n{SHORT}",
            }
        )
    jsonl(root / "vizwiz/llava_test.jsonl", questions)


WRITERS = {
    "mme": write_mme,
    "pope": write_pope,
    "textvqa": write_textvqa,
    "mmbench": write_mmbench,
    "mmbench_cn": lambda root: write_mmbench(root, "mmbench_cn"),
    "scienceqa": write_scienceqa,
    "gqa": write_gqa,
    "vqav2": write_vqav2,
    "vizwiz": write_vizwiz,
}


def write_all(root: Path) -> Path:
    """Data of every benchmark."""
    for write in WRITERS.values():
        write(root)
    return root
