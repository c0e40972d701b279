"""Words to ids to states: unknown words, padding, GloVe files that do not fit, the table by neighbouring words."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from medclip.models.question_rnn import QuestionRnn
from medclip.models.question_words import QuestionTokenizer
from medclip.models.word_vectors import neighbours, read_glove
from medclip.types import UserError

WORDS = ["is", "there", "lung"]


def test_ids_unknown_words_and_padding_as_ours_and_as_published():
    ours, paper = QuestionTokenizer(WORDS, 4), QuestionTokenizer(WORDS, 4, paper=True)
    texts = ["is there Lung", "there brain", "", "is is is is lung"]
    assert ours(texts).tolist() == [[0, 1, 2, 4], [1, 3, 4, 4], [4] * 4, [0] * 4]
    assert paper(texts).tolist() == [[0, 1, 2, 3], [1, 2, 3, 3], [3] * 4, [0] * 4]
    assert ours(texts[0]).shape == (1, 4)
    assert ours.decode([1, 3, 4, 4]) == "there ?"
    for words, complaint in (([], "is empty"), (["a", "a"], "a word twice")):
        with pytest.raises(UserError, match=complaint):
            QuestionTokenizer(words)


def glove(path: Path, words: dict[str, list[float]]) -> Path:
    path.write_text("".join(f"{word} {' '.join(map(str, row))}\n" for word, row in words.items()))
    return path


def test_glove_rows_land_on_their_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = glove(tmp_path / "glove.txt", {"lung": [1, 2.5], "tree": [9, 9], "is": [-1e-3, 0]})
    questions = QuestionRnn(WORDS, glove=str(path), embedding=2, hidden=4)
    assert "2 of 3 words are in" in capsys.readouterr().err
    expected = [[-1e-3, 0], [0, 0], [1, 2.5], [0, 0], [0, 0]]  # is, there, lung, unknown, padding
    np.testing.assert_allclose(questions.tables[0].weight.detach(), expected)
    asked = questions(questions.tokenizer(["lung is"]))
    np.testing.assert_allclose(asked.embedded[0, :2, :2].detach(), [expected[2], expected[0]])
    assert asked.real[0].tolist() == [True, True] + [False] * 10


def test_glove_files_that_do_not_fit_are_one_line(tmp_path: Path):
    path = glove(tmp_path / "glove.50d.txt", {"lung": [0.0] * 50})
    with pytest.raises(UserError, match=r"vectors of 50 numbers, model.questions.embedding is 300: .*=50$"):
        QuestionRnn(WORDS, glove=str(path))
    with pytest.raises(UserError, match=r"cannot be read .*null learns them"):
        QuestionRnn(WORDS, glove=str(tmp_path / "none.txt"))
    path.write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(UserError, match="no text file of word vectors: unpack"):
        read_glove(path, WORDS, 2)
    path.write_text("tree 1 2\nlung 1 two\n")
    with pytest.raises(UserError, match="line 2: `lung` has something else than numbers"):
        read_glove(path, WORDS, 2)
    path.write_text("tree 1 2\n")
    with pytest.raises(UserError, match="has none of the 3 words"):
        read_glove(path, WORDS, 2)


def by_pairs(questions: list[list[int]], table: np.ndarray) -> np.ndarray:
    """The formula, pair by pair."""
    n = len(table)
    asked = np.bincount([i for q in questions for i in q], minlength=n)
    matrix = np.zeros((n, n))
    for question in questions:
        for a, b in permutations(range(len(question)), 2):
            matrix[question[a], question[b]] += 1 / asked[question[b]]
    sums = matrix.sum(1, keepdims=True)
    return np.divide(matrix, sums, where=sums > 0, out=np.zeros_like(matrix)) @ table


def test_the_second_table_is_each_word_as_its_neighbours():
    rng = np.random.default_rng(0)
    questions = [rng.integers(0, 8, rng.integers(1, 6)).tolist() for _ in range(30)]
    table = torch.randn(10, 4)
    found = neighbours(questions, table)
    np.testing.assert_allclose(found, by_pairs(questions, table.double().numpy()), atol=1e-6)
    assert (found[8:] == 0).all()  # never asked
    # The published weights are others, and rows of them still are means of vectors.
    paper = neighbours(questions, torch.ones(10, 4), paper=True)
    torch.testing.assert_close(paper[:8], torch.ones(8, 4))
    assert not torch.allclose(neighbours(questions, table, paper=True), found, atol=1e-3)
    assert (neighbours([[1], []], table) == 0).all()


def test_the_published_weights_by_its_own_loop():
    """`vals[col] /= df[col]` for each pair's column, then rows divided by their sums (MEVF's code, restated)."""
    questions = [[0, 2, 1], [2, 1], [3, 0], [1, 1, 3]]
    table, asked = torch.randn(4, 3), [2, 4, 2, 2]
    rows, columns = [], []
    for question in questions:
        for k, i in enumerate(question):
            for j in question[k + 1 :]:
                rows += [i, j]
                columns += [j, i]
    values = [1.0] * len(columns)
    for column in columns:
        values[column] /= asked[column]
    expected = torch.zeros(4, 3)
    for row, column, value in zip(rows, columns, values, strict=True):
        expected[row] += value / sum(v for v, r in zip(values, rows, strict=True) if r == row) * table[column]
    torch.testing.assert_close(neighbours(questions, table, paper=True), expected)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_states_are_torchs_and_another_encoder_is_its_own(cell: str):
    torch.manual_seed(0)
    questions = QuestionRnn(WORDS, cell=cell, embedding=3, hidden=4, texts=["is there lung", "there lung"])  # type: ignore[arg-type]
    assert questions.width == 6 and questions.dim == 4
    asked = questions(questions.tokenizer(["is there lung", "lung"]))
    torch.testing.assert_close(asked.states, questions.rnn(asked.embedded)[0])
    other = questions.another()
    assert (other.width, other.options["cell"]) == (3, "gru")
    assert torch.equal(other.tables[0].weight, questions.tables[0].weight)
    other.tables[0].weight.data.add_(1)
    assert not torch.equal(other.tables[0].weight, questions.tables[0].weight)
    again = QuestionRnn.from_description({k: v for k, v in questions.description.items() if k != "part"})
    again.load_state_dict(questions.state_dict())
    assert again.description == questions.description
    assert torch.equal(again(again.tokenizer(["is lung"])).states, questions(again.tokenizer(["is lung"])).states)


def test_both_tables_are_trained_and_padding_stays_zero():
    questions = QuestionRnn(WORDS, embedding=3, hidden=4)
    optimizer = torch.optim.SGD(questions.parameters(), 0.5)
    before = [table.weight.detach().clone() for table in questions.tables]
    questions(questions.tokenizer(["is there brain"])).states.pow(2).sum().backward()
    optimizer.step()
    for table, old in zip(questions.tables, before, strict=True):
        moved = (table.weight != old).any(1).tolist()
        assert moved == [True, True, False, True, False]  # is, there, lung, unknown, padding


def test_wrong_options_are_one_line():
    for options, complaint in (
        ({"cell": "rnn"}, "cell is 'rnn': choose gru or lstm"),
        ({"tables": 3}, "tables is 3: choose 1 or 2"),
        ({"compat": "code"}, "compat is 'code': say paper"),
    ):
        with pytest.raises(UserError, match=complaint):
            QuestionRnn(WORDS, **options)
