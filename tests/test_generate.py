"""experiment=medvqa_generate as a whole: it learns its questions by heart, resumes, and is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from medclip.config import CONF
from medclip.data.evalset import EvalSet
from medclip.evals.vqa import Vqa
from medclip.evals.vqa_details import VqaDetails
from medclip.models.any import load_any
from medclip.models.generate import Speaker
from medclip.phantoms import questions
from medclip.tasks.vqa import VqaTask
from medclip.train import train
from tests.models.language_toys import language_folder

SOURCE = "{phantoms: {kind: questions, samples: 20, size: 64, seed: 0}}"
TOWER = (
    "{embed_dim: 16, vision_cfg: {image_size: 32, patch_size: 16, layers: 1, width: 32, head_width: 16}, "
    "text_cfg: {context_length: 8, vocab_size: 16, layers: 1, width: 16, heads: 1}}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return language_folder(tmp_path_factory.mktemp("language"), words())


def words() -> list[str]:
    """All that is asked and answered about phantoms."""
    asked = [text for of in (questions._CLOSED, questions._OPEN) for pair in of.values() for text in pair]
    said = [value for values in questions.VALUES.values() for value in values]
    return " ".join([*asked, *said, "question : answer : yes no"]).lower().replace("?", " ").replace(",", " ").split()


def run(folder: Path, output: Path, *more: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            "train",
            [
                *("experiment=medvqa_generate", "trainer=cpu", f"output={output}", f"model.language.folder={folder}"),
                *("model.language.frozen=false", f"model.visual.architecture={TOWER}", "model.visual.pretrained=null"),
                *("data.batch_size=20", "data.workers=0", f"data.sources=[{SOURCE}]", f"data.val_sources=[{SOURCE}]"),
                *(
                    "model.length=20",
                    "model.answer_length=3",
                    "optim.lr=5e-3",
                    "epochs=60",
                    "callbacks.validation.every=30",
                ),
                *more,
            ],
        )
    return train(cfg)


def test_learns_twenty_questions_by_heart_and_says_the_answers(folder: Path, tmp_path: Path):
    run(folder, tmp_path)
    model = load_any(pretrained=str(tmp_path / "checkpoints" / "last.ckpt")).eval()
    assert isinstance(model, Speaker)
    data = EvalSet([{"phantoms": {"kind": "questions", "samples": 20, "size": 64, "seed": 0}}])
    result = Vqa(data, name="phantoms")(model, batch_size=8)
    values = {name: float(value[0]) for name, value in result.outcomes.values(torch.ones(1, 20).numpy()).items()}
    assert values["acc1"] == values["open_accuracy"] == values["bleu1"] == 1
    assert values["acc1:question only"] < 0.8  # four of them about one image, some of the same words
    assert isinstance(result.details, VqaDetails) and result.details.unknown == 0


def test_killed_and_resumed_is_the_same_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lora = "model.language.lora={rank: 2, alpha: 4}"
    options = [lora, "model.language.frozen=true", "data.batch_size=5", "epochs=2", "callbacks.validation.every=2"]
    whole = run(folder, tmp_path / "whole", *options)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(VqaTask, "on_train_batch_start", _die_at_5)
        run(folder, tmp_path / "parts", *options, "callbacks.checkpoint.every_n_steps=3")
    run(folder, tmp_path / "parts", *options, "resume=auto")
    ours, theirs = (
        torch.load(tmp_path / part / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for part in ("whole", "parts")
    )
    assert whole.global_step == 8 and ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def _die_at_5(task: VqaTask, *_: Any) -> None:
    if task.global_step == 5:
        raise SystemExit
