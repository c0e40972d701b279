"""The public data sets of chest X-rays: a tiny copy of each layout, read by the config that is shipped for it."""

from __future__ import annotations

import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from medclip.config import CONF
from medclip.data.module import PairData
from medclip.types import Preprocess, UserError
from tests.conftest import jpeg
from tests.data.test_dicom import GREY, dicom

DATA = Path(__file__).parents[3] / "shared" / "data"


def opened(name: str, folder: Path, *words: str, model: Any = None) -> PairData:
    """The data module of `data=NAME`, set up for a model without a tokenizer."""
    words = (f"data={name}", "data.batch_size=4", "data.workers=0", f"+data.storage.index={folder}/index", *words)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*words, f"output={folder}"])
    made: PairData = instantiate(cfg.data)
    model = model or SimpleNamespace(preprocess=Preprocess(size=(16, 16)), tokenizer=None)
    trainer = SimpleNamespace(global_rank=0, world_size=1, lightning_module=SimpleNamespace(model=model))
    made.trainer = trainer  # type: ignore[assignment]
    made.setup("fit")
    return made


def labels(made: PairData) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """key -> labels, of the training and of the validation part, as the loaders hand them out."""

    def of(loader: Any) -> dict[str, list[float]]:
        found = {}
        for batch in loader:
            assert "text" not in batch and batch["image"].dtype.is_floating_point is False
            found |= dict(zip(batch["key"], batch["label"].tolist(), strict=False))
        return found

    return of(made.train_dataloader()), of(made.val_dataloader()[0])


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(np.random.default_rng(len(str(path))), 40, 40))


def test_nih14(tmp_path: Path) -> None:
    """Its table ends every line with a comma; its images lie in twelve folders; a list says which are in."""
    lines = [
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    ]
    says = ["Atelectasis|Effusion", "No Finding", "Hernia", "Pleural_Thickening"]
    for p in range(30):
        for k in range(2):
            file = f"{p:08d}_{k:03d}.png"
            lines.append(f"{file},{says[(p + k) % 4]},{k},{p},058Y,M,PA,2682,2749,0.143,0.143,")
            image(tmp_path / f"images_{1 + p % 12:03d}" / "images" / file)
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text("\n".join(lines))
    listed = [line.split(",")[0] for line in lines[1:] if not line.startswith("00000029")]
    (tmp_path / "train_val_list.txt").write_text("\n".join(listed) + "\n")
    train, val = labels(
        opened(
            "nih14",
            tmp_path,
            f"data.sources.0.table={tmp_path}/Data_Entry_2017_v2020.csv",
            f"data.sources.0.image_root={tmp_path}",
            f"data.sources.0.keep={tmp_path}/train_val_list.txt",
        )
    )
    assert len(train) + len(val) == 58 and not set(train) & set(val) and len(val) >= 2
    assert not {key[:8] for key in train} & {key[:8] for key in val}  # by patient
    both = train | val
    ones = {key: [k for k, value in enumerate(row) if value] for key, row in both.items()}
    assert ones["00000000_000.png"] == [0, 2] and ones["00000000_001.png"] == []
    assert ones["00000002_000.png"] == [13] and ones["00000002_001.png"] == [12]
    assert all(len(row) == 14 and not np.isnan(row).any() for row in both.values())


def test_nih14_statistics_reach_the_batch(tmp_path: Path) -> None:
    image(tmp_path / "a" / "0.png")
    (tmp_path / "t.csv").write_text(
        "Image Index,Finding Labels,Patient ID,\n" + "\n".join(f"0.png,Mass,{p}," for p in range(30))
    )
    (tmp_path / "list.txt").write_text("0.png")
    words = [f"data.sources.0.{k}={tmp_path}/{v}" for k, v in (("table", "t.csv"), ("keep", "list.txt"))]
    made = opened("nih14", tmp_path, *words, f"data.sources.0.image_root={tmp_path}")
    batch = next(iter(made.train_dataloader()))
    np.testing.assert_allclose(batch["mean"], np.full((4, 3), 0.5056))
    np.testing.assert_allclose(batch["std"], np.full((4, 3), 0.252))


def test_chexpert(tmp_path: Path) -> None:
    """1.0, 0.0, -1.0 and empty; lateral views stay out; uncertain ones differ by column."""
    columns = "No Finding,Cardiomegaly,Edema,Consolidation,Atelectasis,Pleural Effusion"
    head = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{columns}\n"
    root = tmp_path / "CheXpert-v1.0-small"
    rows = {
        "train/patient00001/study1/view1_frontal.jpg": ",1.0,,0.0,-1.0,",
        "train/patient00001/study1/view2_lateral.jpg": ",1.0,,0.0,-1.0,",
        "train/patient00002/study2/view1_frontal.jpg": ",-1.0,-1.0,-1.0,,-1.0",
    }
    valid = {"valid/patient64541/study1/view1_frontal.jpg": "0.0,1.0,0.0,0.0,0.0,1.0"}
    for file, part in (("train.csv", rows), ("valid.csv", valid)):
        for path in part:
            image(root / path)
        body = [f"{root.name}/{path},Female,68,Frontal,AP,{values}" for path, values in part.items()]
        (root / file).write_text(head + "\n".join(body))
    words = [
        f"data.sources.0.table={root}/train.csv",
        f"data.val_sources.0.table={root}/valid.csv",
        f"data.sources.0.image_root={tmp_path}",
    ]
    train, val = labels(opened("chexpert", tmp_path, *words))
    # Atelectasis, Cardiomegaly, Consolidation, Edema, Pleural Effusion
    first, second = (f"{root.name}/{path}" for path in rows if "frontal" in path)
    assert train == {first: [1, 1, 0, 0, 0], second: [0, 0, 0, 1, 0]}
    assert list(val.values()) == [[0, 1, 0, 0, 1]]
    both = str(root / "train.csv")
    with pytest.raises(
        UserError, match=r"2 of 2 groups by patient in data\.val_sources are in data\.sources too"
    ) as no:
        opened("chexpert", tmp_path, words[0], f"data.val_sources.0.table={both}", words[2])
    assert "patient0000" not in str(no.value)


@pytest.mark.parametrize("packed", [False, True])
def test_mimic_cxr(tmp_path: Path, packed: bool) -> None:
    """Three tables, of which labels are one row a study; numbers with eight digits are names."""
    rows = [  # subject, study, dicom, view, split
        (10000032, 50414267, "02aa804e-bde0afdd", "PA", "train"),
        (10000032, 50414267, "174413ec-4ec4c1f7", "LATERAL", "train"),
        (10000764, 57375967, "096052b7-d256dc40", "AP", "train"),
        (10000935, 50578979, "d0b71acc-b5a62046", "PA", "validate"),
        (10000980, 50985099, "6ad03ed1-97ee17ee", "PA", "test"),
    ]
    metadata = "dicom_id,subject_id,study_id,ViewPosition,Rows\n"
    split = "dicom_id,study_id,subject_id,split\n"
    for subject, study, key, view, part in rows:
        metadata += f"{key},{subject},{study},{view},3056\n"
        split += f"{key},{study},{subject},{part}\n"
        image(tmp_path / "files" / f"p{str(subject)[:2]}" / f"p{subject}" / f"s{study}" / f"{key}.jpg")
    chexpert = (
        "subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,No Finding,Pleural Effusion\n"
        "10000032,50414267,,,,,1.0,\n10000764,57375967,-1.0,0.0,1.0,,,-1.0\n10000935,50578979,0.0,,,1.0,,\n"
    )
    names = {"metadata": metadata, "split": split, "chexpert": chexpert}
    paths = {name: tmp_path / f"mimic-cxr-2.0.0-{name}.csv{'.gz' if packed else ''}" for name in names}
    for name, text in names.items():
        paths[name].write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    words = [
        f"data.sources.0.table={paths['metadata']}",
        f"data.sources.0.join.0.table={paths['split']}",
        f"data.sources.0.join.1.table={paths['chexpert']}",
    ]
    train, val = labels(opened("mimic_cxr", tmp_path, *words))
    assert train == {"02aa804e-bde0afdd": [0, 0, 0, 0, 0], "096052b7-d256dc40": [1, 0, 1, 0, 0]}
    assert val == {"d0b71acc-b5a62046": [0, 0, 0, 1, 0]}
    paths["chexpert"].write_bytes(paths["split"].read_bytes())  # a study has several images: no label of its own
    with pytest.raises(UserError, match="two rows of the same subject_id and study_id"):
        opened("mimic_cxr", tmp_path, *words)


def test_covidx(tmp_path: Path) -> None:
    """Lines with spaces between; patients' names may be numbers, files may have brackets."""
    lines = []
    for p in range(40):
        file = f"COVID-19({p}).png" if p % 2 else f"{p}-fig.jpg"
        image(tmp_path / "train" / file)
        lines.append(f"{p if p % 3 else f'ANON{p}'} {file} {'positive' if p % 2 else 'negative'} cohen")
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    words = [f"data.sources.0.table={tmp_path}/train.txt", f"data.sources.0.image_root={tmp_path}/train"]
    train, val = labels(opened("covidx", tmp_path, *words))
    assert len(train) + len(val) == 40 and len(val) > 0
    assert all(row == [float("COVID" in key)] for key, row in (train | val).items())
    three = opened("covidx", tmp_path, *words, "data.labels.names=[normal,pneumonia,COVID-19]")
    assert labels(three)[0]["COVID-19(1).png"] == [0, 0, 1]


def test_vindr(tmp_path: Path) -> None:
    """Two of three radiologists decide; the pictures are DICOM, one of them with text burned in."""
    names = (
        "Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Consolidation,ILD,Infiltration,Lung Opacity,"
        "Nodule/Mass,Other lesion,Pleural effusion,Pleural thickening,Pneumothorax,Pulmonary fibrosis"
    )
    lines = [f"image_id,rad_id,{names},No finding"]
    (tmp_path / "train").mkdir()
    for i in range(40):
        for rad in range(3):
            votes = [int(rad < 2), int(rad < 1), *[0] * 11, 1, 0]  # two of three, one of three, …, all
            lines.append(f"{i:032x},R{rad},{','.join(map(str, votes))}")
        marked = {"BurnedInAnnotation": "YES"} if i == 7 else {}
        (tmp_path / "train" / f"{i:032x}.dicom").write_bytes(dicom(GREY, **marked))
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    words = [f"data.sources.0.table={tmp_path}/labels.csv", f"data.sources.0.image_root={tmp_path}/train"]
    train, val = labels(opened("vindr", tmp_path, *words, "data.max_bad_fraction=0.2"))
    assert len(train) + len(val) == 39 and f"{7:032x}" not in train | val
    assert all(row == [1, *[0] * 12, 1] for row in (train | val).values())
    wanted = opened("vindr", tmp_path, *words, "+data.sources.0.burned_in=true", "+data.val_sources.0.burned_in=true")
    assert sum(map(len, labels(wanted))) == 40


def test_cxr_without_labels_is_for_pretraining(tmp_path: Path) -> None:
    for p in range(20):
        image(tmp_path / f"{p}.jpg")
    (tmp_path / "xrays.csv").write_text("image,patient\n" + "\n".join(f"{p}.jpg,{p // 2}" for p in range(20)))
    made = opened("cxr", tmp_path, f"data.sources.0.table={tmp_path}/xrays.csv")
    batches = list(made.train_dataloader())
    assert {*batches[0]} == {"image", "key", "skipped", "epoch", "position"}
    assert sum(len(batch["key"]) for batch in (*batches, *made.val_dataloader()[0])) == 20


COVID = (
    "data.labels={names: [COVID-19, ARDS, Bacterial, Fungal, Viral], from: list, field: finding, separator: ',', "
    "unlabelled: todo, other: zeros, values: {COVID-19: [COVID-19, Viral], Varicella: Viral, Pneumocystis: Fungal, "
    "Klebsiella: Bacterial, Legionella: Bacterial, Streptococcus: Bacterial, "
    "Mycoplasma Bacterial Pneumonia: Bacterial}}"
)


@pytest.mark.skipif(not DATA.is_dir(), reason="the sample data is not beside the checkout")
def test_cxr_on_real_x_rays(tmp_path: Path) -> None:
    """279 X-rays of 138 patients; 51 of them nobody has labelled."""
    made = opened("cxr", tmp_path, f"data.sources.0.table={DATA}/cxr_large/labels.jsonl", COVID)
    train, val = labels(made)
    assert len(train) + len(val) == 279 and 30 < len(val) < 90
    rows = np.array([*train.values(), *val.values()])
    assert np.isnan(rows).all(axis=1).sum() == 51 and np.isnan(rows).any(axis=1).sum() == 51
    # 155 + 4 COVID-19, 4 + 2 ARDS; bacterial 8 + 6 + 4 + 4 + 4; 13 Pneumocystis; 159 + 5 viral
    assert np.nansum(rows, axis=0).tolist() == [159, 6, 26, 13, 164]
    assert {name: present for name, (present, _) in made.label_counts().items()} == {
        name: int(np.nansum([row[k] for row in train.values()])) for k, name in enumerate(made.classes)
    }
