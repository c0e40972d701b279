"""Every evaluation of a public set, on a tiny set in that set's own layout, by an encoder whose answers are known.

Pictures are flat greys, one grey a class, and the encoder knows which: each class has one picture, and the first class
one more in the grey of the second. So the accuracy of C classes must be C / (C + 1), whatever layout, class names and
templates an evaluation has; a reader that mixed up labels, or took what it should leave out, would miss it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import cv2
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from medclip.config import CONF
from medclip.evals.result import ClassificationDetails, MultiLabelDetails
from medclip.evals.run import evaluate_checkpoint
from medclip.evaluate import build_evals, cards_of, check_evals, sets_missing
from medclip.infer.zeroshot import fill
from medclip.models.patches import fingerprint
from medclip.types import Preprocess, Tokenizer, UserError

NAMES = sorted(path.stem for path in (CONF / "eval").glob("*.yaml") if "\nroot: " in path.read_text())
REAL = Path(__file__).parents[2] / "shared/data"
NOTHING = 31  # what a picture or a text of no class is embedded as
Items = list[tuple[str, int]]  # label, grey


def grey(number: int) -> int:
    return 6 + 12 * number


def paint(path: Path, number: int) -> str:
    """A flat picture in the file's format; where OpenCV cannot write that, as PNG under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = path.suffix if path.suffix in (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff") else ".png"
    path.write_bytes(cv2.imencode(ending, np.full((16, 16, 3), grey(number), np.uint8))[1].tobytes())
    return path.name


class GreyClip(nn.Module):
    """Sees a picture's grey, and knows what each text means."""

    tokenizer: Tokenizer

    def __init__(self, meaning: dict[str, int]) -> None:
        super().__init__()
        self.preprocess = Preprocess(size=(8, 8))
        self.meaning = meaning
        self.__dict__["tokenizer"] = self  # not as a part of itself
        self.context_length = 1
        self.device = torch.device("cpu")

    def __call__(self, texts: str | list[str]) -> Tensor:
        return torch.tensor([[self.meaning.get(text, NOTHING)] for text in texts])

    def encode_image(self, image: Tensor) -> Tensor:
        number = ((image.float().mean(dim=(1, 2, 3)) - 6) / 12).round().long()
        return nn.functional.one_hot(number.clamp(0, NOTHING), NOTHING + 1).float()

    def encode_text(self, text: Tensor) -> Tensor:
        return nn.functional.one_hot(text[:, 0], NOTHING + 1).float()


def one_hot(columns: list[str]) -> Callable[[str], dict[str, Any]]:
    return lambda label: {column: int(column == label) for column in columns}


# Where a picture of a class lies, for folders that are more than CLASS/FILE.
FOLDERS = {
    "breakhis": "{label}/SOB/type/P{n}/40X/a.png",
    "busi": "{label}/{label} ({n}).png",
    "covid_qu": "{label}/images/covid_{n}.png",
    "kermany_oct": "{label}/{label}-10{n}-1.jpeg",
    "kather2016": "{label}/a{n}.tif",
    "wsss4luad": "100{n}-20-30-[{label}, 1, 0].png",
}
# And what lies there too that must be left out.
BESIDE = {"busi": "benign/benign (0)_mask.png", "covid_qu": "Normal/lung masks/covid_0.png"}

# Table, the picture's place and name by its number, the row by label and name.
Row = Callable[[str, str, int], dict[str, Any]]
TABLES: dict[str, tuple[str, str, Row]] = {
    "sicapv2": (
        "partition/Test/Test.xlsx",
        "images/17B{n}_Block_x.jpg",
        lambda label, name, n: {"image_name": name} | one_hot(["NC", "G3", "G4", "G5"])(label) | {"G4C": 0},
    ),
    "skin_cancer": (
        "data/tiles-v2.csv",
        "data/tiles/a{n}.jpg",
        lambda label, name, n: {"file": f"data/tiles/{name}", "class": label, "set": "Test", "malignicy": "x"},
    ),
    "mhist": (
        "annotations.csv",
        "images/MHIST_a{n}.png",
        lambda label, name, n: {"Image Name": name, "Majority Vote Label": label, "Partition": "test"},
    ),
    "ham10000": (
        "ISIC2018_Task3_Test_GroundTruth/ISIC2018_Task3_Test_GroundTruth.csv",
        "ISIC2018_Task3_Test_Input/ISIC_00{n}.jpg",
        lambda label, name, n: (
            {"image": Path(name).stem}
            | {k: float(v) for k, v in one_hot(["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"])(label).items()}
        ),
    ),
    "deepdrid": (
        "Challenge1_labels.xlsx",
        "Images/{n}/{n}_l1.jpg",
        lambda label, name, n: {"image_id": Path(name).stem, "DR_Levels": int(label)},
    ),
    "aptos2019": (
        "train.csv",
        "train_images/000c{n}.png",
        lambda label, name, n: {"id_code": Path(name).stem, "diagnosis": int(label)},
    ),
    "idrid": (
        "2. Groundtruths/b. IDRiD_Disease Grading_Testing Labels.csv",
        "1. Original Images/b. Testing Set/IDRiD_00{n}.jpg",
        lambda label, name, n: {"Image name": Path(name).stem, "Retinopathy grade": int(label), "Risk": 0},
    ),
    "messidor2": (
        "messidor_data.csv",
        "IMAGES/2005{n}.png",
        lambda label, name, n: {"image_id": name, "adjudicated_dr_grade": int(label), "adjudicated_gradable": 1},
    ),
    "odir": (
        "full_df.csv",
        "preprocessed_images/{n}_left.jpg",
        lambda label, name, n: {"ID": n, "labels": f"['{label}']", "filename": name},
    ),
    "rsna_pneumonia": (
        "stage_2_train_labels.csv",
        "stage_2_train_images/0004cf{n}.dcm",
        lambda label, name, n: {"patientId": Path(name).stem, "x": "", "Target": int(label)},
    ),
    "covidx": (
        "test.txt",
        "test/c{n}.png",
        lambda label, name, n: {"patient": n, "image": name, "class": label, "source": "cohen"},
    ),
    "wbc": (
        "labels.jsonl",
        "images/00{n}.bmp",
        lambda label, name, n: {"image": f"images/{name}", "label": 1, "label_text": label},
    ),
    "nih14": (
        "Data_Entry_2017_v2020.csv",
        "images_00{n}/images/0000{n}_000.png",
        lambda label, name, n: {"Image Index": name, "Finding Labels": label, "Patient ID": n},
    ),
    "covid_cxr": (
        "labels.jsonl",
        "images/x{n}.png",
        lambda label, name, n: {
            "image": f"images/{name}",
            "finding": {"other pneumonia": "Klebsiella", "no finding": "No Finding"}.get(label, label),
            "view": "PA",
            "patient": n,
        },
    ),
}
ORGANS = [name.removeprefix("dresden_") for name in NAMES if name.startswith("dresden_")]
# Rows that an evaluation must leave out, beside its own.
OUTSIDE: dict[str, list[dict[str, Any]]] = {
    "skin_cancer": [{"file": "no.jpg", "class": "tumor_skin_naevus_naevus", "set": "Train", "malignicy": "x"}],
    "mhist": [{"Image Name": "no.png", "Majority Vote Label": "HP", "Partition": "train"}],
    "sicapv2": [{"image_name": "no.jpg", "NC": 0, "G3": 1, "G4": 1, "G5": 0, "G4C": 0}],
    "messidor2": [{"image_id": "no.png", "adjudicated_dr_grade": 0, "adjudicated_gradable": 0}],
    "covid_cxr": [{"image": "no.png", "finding": "COVID-19", "view": "L", "patient": 99}],
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows)
    if path.suffix == ".xlsx":
        pytest.importorskip("openpyxl")
        frame.to_excel(path, index=False)
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        # COVIDx's lists and ROCO's captions have no header.
        bare = path.suffix == ".txt"
        frame.to_csv(
            path, index=False, header=not bare, sep={"captions.txt": "\t", "test.txt": " "}.get(path.name, ",")
        )


def write_table(name: str, root: Path, items: Items) -> None:
    table, place, row = TABLES[name]
    rows = [row(label, paint(root / place.format(n=n), number), n) for n, (label, number) in enumerate(items)]
    if name == "rsna_pneumonia":
        rows += rows[-1:]  # a second box on one image
    write_rows(root / table, rows + OUTSIDE.get(name, []))
    if name == "nih14":
        (root / "test_list.txt").write_text("".join(f"{r['Image Index']}\n" for r in rows))


def write_arrays(config: DictConfig, items: Items, columns: int) -> None:
    labels = np.array([[int(label) == c for c in range(columns)] if columns else int(label) for label, _ in items])
    images = np.stack([np.full((28, 28, 3), grey(number), np.uint8) for _, number in items])
    labels = labels.astype(np.uint8).reshape(len(items), -1)
    for place, values in ((config.images, images), (config.labels, labels)):
        path, _, name = place.rpartition(":")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".npz"):
            there = dict(np.load(path)) if Path(path).exists() else {"train_images": images[:1]}
            np.savez_compressed(path, **there, **{name: values})
        else:
            with h5py.File(path, "w") as file:
                file[name] = values.reshape(-1, 1, 1, 1) if name == "y" else values


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def picture(number: int) -> dict[str, Any]:
    return {"bytes": cv2.imencode(".png", np.full((16, 16, 3), grey(number), np.uint8))[1].tobytes(), "path": "x.png"}


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", [f"eval=[{','.join(NAMES)}]"])
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))


@pytest.fixture
def only(composed: dict[str, Any], tmp_path: Path) -> Callable[..., DictConfig]:
    """The config as it is with `eval=[NAME] paths.data_root=TMP`."""

    def of(*names: str) -> DictConfig:
        own = {"paths": {"data_root": str(tmp_path)}, "evals": {name: composed["evals"][name] for name in names}}
        return OmegaConf.create(composed | own)

    return of


def by_kind(kind: str) -> list[str]:
    return [name for name in NAMES if f".{kind}\n" in (CONF / "eval" / f"{name}.yaml").read_text()]


def write_classes(name: str, node: DictConfig, items: Items) -> None:
    source, root = node.data.sources[0], Path(node.root)
    if "folder" in source:
        place = FOLDERS.get(name, "{label}/image {n}.png")
        for n, (label, number) in enumerate(items):
            paint(Path(source.folder) / place.format(label=label, n=n), number)
        if name in BESIDE:
            paint(root / BESIDE[name], 19)
    elif "arrays" in source:
        write_arrays(source.arrays, items, len(source.arrays.get("columns") or ()))
    elif name.startswith("dresden_"):
        organ, rows = name.removeprefix("dresden_"), []
        for n, (label, number) in enumerate(items):
            paint(root / f"images/{n}.png", number)
            rows.append({"image": f"images/{n}.png", "patient": n} | dict.fromkeys(ORGANS, 0) | {organ: int(label)})
        write_rows(root / "labels.csv", rows)
    else:
        write_table(name, root, items)


@pytest.mark.parametrize("name", by_kind("ZeroShotClassification"))
def test_classification(only: Callable[..., DictConfig], name: str) -> None:
    cfg = only(name)
    node = cfg.evals[name]
    classes = {str(label): list(names) for label, names in node.classes.items()}
    numbers = {label: i for i, label in enumerate(classes)}
    labels = list(classes)
    items = [(label, numbers[label]) for label in labels] + [(labels[0], 1)]
    write_classes(name, node, items)
    meaning = {fill(t, n): numbers[label] for label, names in classes.items() for n in names for t in node.templates}
    assert len(meaning) == len(node.templates) * sum(map(len, classes.values())), "two classes have one prompt"
    check_evals(cfg)
    [result] = evaluate_checkpoint(GreyClip(meaning), build_evals(cfg)).values()
    assert result.metrics["acc1"] == pytest.approx(len(labels) / (len(labels) + 1), abs=1e-12)
    assert result.skipped == {}


def test_mixed_tiles_of_osteo_are_viable(only: Callable[..., DictConfig]) -> None:
    cfg = only("osteo")
    folders = ["Non-Tumor", "Non-Viable-Tumor", "Viable", "viable: non-viable"]
    for n, folder in enumerate(folders):
        paint(Path(cfg.evals.osteo.root) / folder / f"{n}.jpg", n)
    [result] = evaluate_checkpoint(GreyClip({}), build_evals(cfg)).values()
    assert isinstance(result.details, ClassificationDetails)
    support = dict(zip(result.details.classes, result.details.support, strict=True))
    assert support == {"Non-Tumor": 1, "Non-Viable-Tumor": 1, "Viable": 2}


# A slide's row in the table of its set, by label and number; and rows that are none of the evaluation's slides.
SLIDES: dict[str, tuple[Callable[[str, int], dict[str, Any]], list[dict[str, Any]]]] = {
    "camelyon16": (lambda label, n: {"slide": f"test_00{n}", "label": label, "kind": "None", "size": "None"}, []),
    "camelyon17": (
        lambda label, n: {"patient": f"patient_{n:03d}_node_0.tif", "stage": label},
        [{"patient": "patient_000.zip", "stage": "pN0"}],
    ),
    "bracs": (
        lambda label, n: {
            "WSI Filename": f"BRACS_{n}",
            "Patient Id": n,
            "RoI": 0,
            "WSI label": {"BT": ("N", "PB", "UDH"), "AT": ("FEA", "ADH"), "MT": ("DCIS", "IC")}[label][n % 2],
            "Set": "Testing",
        },
        [{"WSI Filename": "BRACS_99", "Patient Id": 99, "RoI": 0, "WSI label": "N", "Set": "Training"}],
    ),
}


@pytest.mark.parametrize("name", SLIDES)
def test_slides(only: Callable[..., DictConfig], name: str) -> None:
    cfg = only(name)
    node = cfg.evals[name]
    row, outside = SLIDES[name]
    classes = {str(label): list(names) for label, names in node.classes.items()}
    labels = [*classes, next(iter(classes))]
    rows = [row(label, n) for n, label in enumerate(labels)]
    table = Path(node.data.table)
    if "header" in node.data:
        table.parent.mkdir(parents=True)
        pd.DataFrame(rows)[list(node.data.header)].to_csv(table, header=False, index=False)
    else:
        write_rows(table, outside + rows)
    numbers = [*range(len(classes)), 1]
    meaning = {
        fill(t, own): number for number, names in enumerate(classes.values()) for own in names for t in node.templates
    }
    clip = GreyClip(meaning)
    folder = Path(node.data.features) / "20x_256px_0px_overlap/features_x"
    folder.mkdir(parents=True)
    slides = [(next(iter(own.values())), n) for own, n in zip(rows, numbers, strict=True)]
    for slide, number in [*slides, *((next(iter(own.values())), 2) for own in outside)]:
        with h5py.File(folder / f"{str(slide).removesuffix('.tif')}.h5", "w") as file:
            # Patches that look like nothing, and one of a class.
            file["features"] = np.eye(NOTHING + 1, dtype=np.float32)[[NOTHING, NOTHING, number, NOTHING]]
            file["features"].attrs["weights"] = fingerprint(clip, clip.preprocess)
            file["coords"] = np.arange(8).reshape(4, 2) * 256
            file["coords"].attrs["patch_size_level0"] = 256
    check_evals(cfg)
    [result] = evaluate_checkpoint(clip, build_evals(cfg)).values()
    assert result.metrics["acc1"] == pytest.approx(len(classes) / len(labels), abs=1e-12)
    assert len(result.outcomes.keys) == len(labels) and len(set(result.outcomes.groups)) == len(labels)


@pytest.mark.parametrize("name", by_kind("MultiLabel"))
def test_findings(only: Callable[..., DictConfig], name: str) -> None:
    cfg = only(name)
    node = cfg.evals[name]
    labels = [str(label) for label in node.classes]
    # Where labels are numbers of columns, the column's number stands for the class.
    items = [(str(i) if "arrays" in node.data.sources[0] else label, i) for i, label in enumerate(labels)]
    if name == "chexpert5":
        for n, (_, number) in enumerate(items):
            paint(Path(node.root) / f"valid/patient{n}/study1/view1_frontal.jpg", number)
        rows = [
            {"Path": f"CheXpert-v1.0-small/valid/patient{n}/study1/view1_frontal.jpg"} | one_hot(labels)(label)
            for n, (label, _) in enumerate(items)
        ]
        lateral = {"Path": "CheXpert-v1.0-small/valid/patient0/study1/view2_lateral.jpg"} | dict.fromkeys(labels, 1)
        write_rows(Path(node.root) / "valid.csv", [*rows, lateral])
    else:
        write_classes(name, node, items)
    meaning = {
        fill(pair[0], word): i
        for i, names in enumerate(node.classes.values())
        for word in names
        for pair in node.prompts
    }
    [result] = evaluate_checkpoint(GreyClip(meaning), build_evals(cfg)).values()
    assert result.metrics["auroc"] == 1 and len(result.outcomes.keys) == len(labels)
    # The same pictures, and an encoder that takes the first class for the second and back.
    swapped = {text: {0: 1, 1: 0}.get(number, number) for text, number in meaning.items()}
    [worse] = evaluate_checkpoint(GreyClip(swapped), build_evals(cfg)).values()
    assert worse.metrics["auroc"] < 1


@pytest.mark.parametrize("name", by_kind("Retrieval"))
def test_retrieval(only: Callable[..., DictConfig], name: str) -> None:
    cfg = only(name)
    node = cfg.evals[name]
    root, count = Path(node.root), 4
    texts = [f"Axial view, number {n}." for n in range(count)]
    if name == "biomed_flickr":
        rows = [{"image": picture(n), "caption": text} for n, text in enumerate(texts)]
        write_arrow(root / "data-00000-of-00001.arrow", rows)
    else:
        folder, table, column = {
            "roco_retrieval": ("images", "captions.txt", "caption"),
            "rocov2_retrieval": ("test", "test_captions.csv", "Caption"),
        }[name]
        for n in range(count):
            paint(root / folder / f"ROCO_{n}.jpg", n)
        write_rows(root / table, [{"ID": f"ROCO_{n}", column: f" {text}"} for n, text in enumerate(texts)])
    meaning = {text: n for n, text in enumerate(texts)} | {texts[0]: 1}  # the first caption is taken for the second's
    [result] = evaluate_checkpoint(GreyClip(meaning), build_evals(cfg)).values()
    assert result.metrics["image_retrieval_recall@1"] <= 0.75
    meaning[texts[0]] = 0
    [right] = evaluate_checkpoint(GreyClip(meaning), build_evals(cfg)).values()
    assert right.metrics["image_retrieval_recall@1"] == right.metrics["text_retrieval_recall@1"] == 1


def microbench_rows() -> list[dict[str, Any]]:
    """A row of each part of µ-Bench, and four more of one; the right option is the picture's own number."""
    names = re.findall(r'dataset == "(\w+)"', " ".join((CONF / f"eval/{n}.yaml").read_text() for n in NAMES))
    parts = [(name, "H&E") for name in sorted(set(names))]
    parts += [(None, "H2B-mCherry"), (None, "GalT–EGFP"), ("opencell", "x"), ("sirinukunwattana_et_al_2016", "x")]
    parts += 4 * [("acevedo_et_al_2020", "Giemsa")]
    rows = []
    for n, (dataset, stain) in enumerate(parts):
        number = n % 3
        options = ["zero", "one", "two", "none of the above"]
        # The last picture of all is of another grey than its answer.
        row: dict[str, Any] = {
            "image": picture((number + 1) % 3 if n == len(parts) - 1 else number),
            "dataset": dataset,
            "stain": stain,
        }
        wordings = {f"classification_{i}": [f"{'an image of' * i} {option}" for option in options] for i in (0, 1)}
        row["captions"] = {kind: {"options": own, "answer_idx": number} for kind, own in wordings.items()}
        asked = {"question": "What?", "options": options, "answer": options[number]}
        row["questions"] = {kind: asked for kind in ("domain", "modality", "submodality", "stain", "subdomain")}
        rows.append(row)
    return rows


def test_microbench(only: Callable[..., DictConfig], tmp_path: Path) -> None:
    rows = microbench_rows()
    write_arrow(tmp_path / "ubench/perception/0.1.0/ubench-test-00000-of-00002.arrow", rows[:7])
    write_arrow(tmp_path / "ubench/perception/0.1.0/ubench-test-00001-of-00002.arrow", rows[7:])
    options = {"zero": 0, "one": 1, "two": 2}
    meaning = {f"{said} {option}": n for option, n in options.items() for said in ("", "an image of")} | options
    names = [name for name in by_kind("ClosedQuestions") if name.startswith("ubench_")]
    assert len(names) == 22 + 4
    asked = {}
    for name, result in evaluate_checkpoint(GreyClip(meaning), build_evals(only(*names))).items():
        asked[name] = len(result.outcomes.keys)
        # One picture of Acevedo's five is answered wrong, in both wordings.
        wrong = {"ubench_acevedo_2020": 1 / 5} | {n: 1 / (len(rows) - 2) for n in names if _coarse(n)}
        assert result.metrics["acc1"] == pytest.approx(1 - wrong.get(name, 0), abs=1e-12), name
    assert asked["ubench_acevedo_2020"] == 10 and asked["ubench_held_galt"] == 2
    assert {asked[name] for name in names if _coarse(name)} == {len(rows) - 2}
    assert sum(asked[name] for name in names if not _coarse(name)) == 2 * (len(rows) - 2)


def _coarse(name: str) -> bool:
    return name in ("ubench_domain", "ubench_modality", "ubench_submodality", "ubench_stain")


@pytest.mark.parametrize("name", NAMES)
def test_what_a_missing_set_says(only: Callable[..., DictConfig], name: str) -> None:
    cfg = only(name)
    card = cards_of(cfg.evals)[name]
    assert card.domain and card.source in ("confirmed", "unconfirmed") and card.needs
    assert re.match(r"https://\S+", card.get)
    assert list(sets_missing(cfg.evals)) == [name]
    with pytest.raises(UserError) as error:
        check_evals(cfg)
    assert card.get in str(error.value) and f"evals.{name}.root" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", [CONF / "eval" / f"{name}.yaml" for name in NAMES], ids=lambda path: path.stem)
def test_headers_say_what_and_where_from(path: Path) -> None:
    text = path.read_text()
    head = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert "Layout" in head and re.search(r"arXiv:|doi:|github\.com|Kaggle", head), "paper or page"
    if "templates:" in text or "questions:" in text:
        assert "Words:" in head, "whose words the classes and templates are"


def table(cfg: DictConfig) -> str:
    """The table of docs/evaluation.md: a row an evaluation, from its config and the first sentence of its header."""
    suites = {path.stem: path.read_text() for path in sorted((CONF / "suite").glob("*.yaml"))}
    rows = ["| `eval=` | set | domain | source | core | suites | folder below `paths.data_root` | get it from |"]
    rows.append("|" + 8 * "---|")
    for name in sorted(NAMES, key=lambda name: (cfg.evals[name].domain, name)):
        node, lines = cfg.evals[name], (CONF / "eval" / f"{name}.yaml").read_text().splitlines()[1:]
        head = " ".join(line[2:] for line in lines if line.startswith("# "))
        folder = Path(node.root).relative_to(cfg.paths.data_root)
        page = node["get"].split(": ")[0].split(" ")[0]
        within = ", ".join(suite for suite, text in suites.items() if f"- {name}\n" in text)
        core = "yes" if node.core else ""
        rows.append(
            f"| `{name}` | {re.split(r'[.:?] | [(]', head)[0]} | {node.domain} | {node.source} | {core} | {within} "
            f"| `{folder}` | <{page}> |"
        )
    return "\n".join(rows) + "\n"


def test_the_table_of_the_docs(only: Callable[..., DictConfig]) -> None:
    expected = table(only(*NAMES))
    assert expected in (CONF.parent / "docs/evaluation.md").read_text(), (
        f"put this into docs/evaluation.md:\n{expected}"
    )


@pytest.mark.skipif(not REAL.is_dir(), reason="the sample data is not beside the checkout")
@pytest.mark.parametrize(
    ("name", "folder", "support"),
    [
        ("lc25000_lung", "lc25000_lung", {"lung_n": 248, "lung_aca": 242, "lung_scc": 248}),
        ("wbc", "wbc_dataset1", {"neutrophil": 26, "lymphocyte": 26, "monocyte": 25, "eosinophil": 22, "basophil": 1}),
        ("covid_cxr", "cxr_large", None),
    ],
)
def test_real_samples(only: Callable[..., DictConfig], name: str, folder: str, support: dict[str, int] | None) -> None:
    cfg = only(name)
    cfg.evals[name].root = str(REAL / folder)
    check_evals(cfg)
    [result] = evaluate_checkpoint(GreyClip({}), build_evals(cfg)).values()
    if isinstance(result.details, ClassificationDetails):
        assert dict(zip(result.details.classes, result.details.support, strict=True)) == support
    else:
        # By hand from labels.jsonl: frontal, and labelled at all.
        rows = [json.loads(line) for line in (REAL / folder / "labels.jsonl").read_text().splitlines()]
        frontal = [r["finding"] for r in rows if r["view"] in ("PA", "AP", "AP Supine") and r["finding"] != "todo"]
        assert isinstance(result.details, MultiLabelDetails)
        assert result.details.classes[0].positives == sum(f.startswith("COVID-19") for f in frontal)
        assert result.details.classes[2].positives == frontal.count("No Finding")
        assert result.details.classes[1].known == len(frontal) == len(result.outcomes.keys)
