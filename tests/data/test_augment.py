"""RandAugment is timm's, a function of the sample alone; classifiers are tested as torchvision would."""

# ruff: noqa: NPY002  # numpy's global generator is what timm draws from

from __future__ import annotations

import random
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from medclip.data.augment import RandAugment, augmented
from medclip.data.crop import Flip, RandomCrop
from medclip.data.decode import read_image
from medclip.data.module import PairData
from medclip.types import Preprocess, UserError
from tests.conftest import jpeg
from tests.data.test_pairs import trace

SPEC = "rand-m6-mstd0.5-inc1"
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)


def test_it_is_timms_own() -> None:
    """The same seeds in its hands, with the arguments that its training transform passes, give the same pixels."""
    from timm.data.transforms_factory import create_transform

    ours = RandAugment(SPEC, 64, (0.5, 0.25, 1.0))
    steps = create_transform(
        64, is_training=True, auto_augment=SPEC, interpolation="bicubic", mean=(0.5, 0.25, 1.0), separate=True
    )[1]
    theirs = steps.transforms[0]
    changed = 0
    for k in range(40):
        found = ours(IMAGE, np.random.default_rng(k))
        seed = int(np.random.default_rng(k).integers(2**32))
        random.seed(seed)
        np.random.seed(seed)
        np.testing.assert_array_equal(found, np.asarray(theirs(Image.fromarray(IMAGE))))
        changed += not np.array_equal(found, IMAGE)
    assert 20 <= changed <= 39  # two operations, each with probability a half: three of four pictures


def test_the_global_generators_are_as_before_and_do_not_matter() -> None:
    one = RandAugment(SPEC, 64)
    random.seed(1)
    np.random.seed(1)
    first = one(IMAGE, np.random.default_rng(5))
    after = random.random(), float(np.random.random())
    random.seed(1)
    np.random.seed(1)
    assert after == (random.random(), float(np.random.random()))
    np.testing.assert_array_equal(one(IMAGE, np.random.default_rng(5)), first)


@pytest.mark.parametrize("spec", ["", "m6", "rand-q7", "augmix-m5"])
def test_a_bad_spec_gets_one_line(spec: str) -> None:
    with pytest.raises(UserError, match=r"data\.randaug is .*rand-m6-mstd0\.5-inc1"):
        RandAugment(spec)


def test_order_and_options() -> None:
    crop = RandomCrop(then=[Flip(1.0)])
    made = augmented(crop, 0.5, SPEC, Preprocess(size=(64, 48)))
    assert made is not None and list(made.then) == [
        Flip(1.0),
        Flip(0.5),
        RandAugment(SPEC, 48, Preprocess().mean),
    ]
    assert augmented(crop, 0, None, Preprocess()) is crop and augmented(None, 0, None, Preprocess()) is None
    with pytest.raises(UserError, match=r"data\.crop is null"):
        augmented(None, 0.5, None, Preprocess())
    for flip in (2, -0.1, "half", True):
        with pytest.raises(UserError, match=r"data\.flip"):
            augmented(crop, flip, None, Preprocess())  # type: ignore[arg-type]


# In the stream


def data(folder: Path, workers: int = 0, **options: Any) -> PairData:
    made = PairData(
        [{"folder": str(folder)}],
        val_sources=[{"folder": str(folder)}],
        batch_size=5,
        epochs=2,
        workers=workers,
        crop=RandomCrop((0.5, 1.0)),
        storage={"index": folder / "index", "cache": False},
        **options,
    )
    model = SimpleNamespace(preprocess=Preprocess(size=(32, 32)), tokenizer=None)
    trainer = SimpleNamespace(global_rank=0, world_size=1, lightning_module=SimpleNamespace(model=model))
    made.trainer = trainer  # type: ignore[assignment]
    made.setup("fit")
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    for i in range(23):
        (folder / f"{i}.jpg").write_bytes(jpeg(rng, 60, 50))
    return folder


def traced(batch: Any) -> tuple[Any, ...]:
    return trace({**batch, "text": torch.zeros(len(batch["image"]), 1)})  # type: ignore[typeddict-item]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_workers_and_a_resume_in_the_middle_give_the_same_pixels(folder: Path) -> None:
    whole = [traced(batch) for batch in data(folder, flip=0.5, randaug=SPEC).train_dataloader()]
    assert [traced(batch) for batch in data(folder, workers=2, flip=0.5, randaug=SPEC).train_dataloader()] == whole
    first = data(folder, flip=0.5, randaug=SPEC)
    batches = iter(first.train_dataloader())
    before = [traced(next(batches)) for _ in range(7)]
    random.seed(99)
    np.random.seed(99)
    second = data(folder, flip=0.5, randaug=SPEC)
    second.load_state_dict(first.state_dict())
    assert before + [traced(batch) for batch in second.train_dataloader()] == whole
    assert [traced(batch) for batch in data(folder).train_dataloader()] != whole


def test_about_half_are_mirrored(folder: Path) -> None:
    plain = {(b["epoch"], k): row for b in data(folder).train_dataloader() for k, row in zip(b["key"], b["image"])}  # noqa: B905
    flipped = 0
    for batch in data(folder, flip=0.5).train_dataloader():
        for key, image in zip(batch["key"], batch["image"], strict=False):
            original = plain[batch["epoch"], key]
            mirrored = torch.equal(image, original.flip(2))
            assert mirrored or torch.equal(image, original)
            flipped += mirrored
    assert 12 <= flipped <= 34  # of 46; beyond with probability 0.001


# Evaluation


@pytest.mark.parametrize(("height", "width"), [(300, 400), (401, 299), (256, 256), (100, 90), (224, 1000)])
def test_evaluation_is_resize_256_and_centre_crop_224(height: int, width: int) -> None:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    theirs = transforms.Compose(
        [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    )(Image.fromarray(pixels))
    for mode in ("shortest", "longest", "squash"):
        ours = read_image(out.getvalue(), Preprocess(resize_mode=mode), exact=True, resize=256)  # type: ignore[arg-type]
        np.testing.assert_array_equal(ours, np.asarray(theirs))


def test_only_validation_is_resized(folder: Path) -> None:
    (loader,) = data(folder, eval_resize=40).val_dataloader()
    image, key = loader.reader[next(loader.plan.tickets(loader.order, 0))][0]["image"][0], "0.jpg"
    expected = read_image((folder / key).read_bytes(), Preprocess(size=(32, 32)), resize=40)
    np.testing.assert_array_equal(image.numpy().transpose(1, 2, 0), expected)
    plain = [traced(batch) for batch in data(folder).train_dataloader()]
    assert [traced(batch) for batch in data(folder, eval_resize=40).train_dataloader()] == plain
    with pytest.raises(UserError, match=r"data\.eval_resize is 20, less than the model's 32"):
        data(folder, eval_resize=20).val_dataloader()
