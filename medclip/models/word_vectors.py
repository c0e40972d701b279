"""First values of word embeddings: GloVe from a file, and each word as the words it stands beside.

GloVe (Pennington et al. 2014) is a text file, a word and its numbers a line; nothing is fetched. The second table is
MEVF's: with the pairs (i, j) of words that stand in one question, and n_j how often word j is asked,

    T_ij = sum over such pairs of 1 / n_j, its rows divided by their sums        table = T @ GloVe
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor

from medclip.types import UserError

_SPREAD = 0.4  # about the standard deviation of GloVe's 6B numbers, for tables without a file


def learned(words: int, dim: int) -> Float[Tensor, "words dim"]:
    """Vectors to begin with where there is no file."""
    return torch.randn(words, dim) * _SPREAD


def read_glove(path: str | Path, words: Sequence[str], dim: int) -> Float[Tensor, "words dim"]:
    """The vectors of `words`; 0 for those that the file lacks.

    Raises:
        UserError: no such file, no text of vectors, vectors of another width, or none of the words.
    """
    path = Path(path).expanduser()
    wanted = {word: i for i, word in enumerate(words)}
    table, found = np.zeros((len(words), dim), dtype=np.float32), set()
    number, word = 0, ""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                word, *values = line.rstrip("\n").split(" ")
                if number == 1 and len(values) != dim:
                    raise UserError(
                        f"{path} has vectors of {len(values)} numbers, model.questions.embedding is {dim}: give the "
                        f"file of {dim} numbers (glove.6B.{dim}d.txt), or say model.questions.embedding={len(values)}"
                    )
                if word in wanted and len(values) == dim:
                    table[wanted[word]] = np.array(values, dtype=np.float32)
                    found.add(word)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text file of word vectors: unpack glove.6B.zip and give its .txt") from error
    except ValueError as error:
        raise UserError(
            f"{path}, line {number}: `{word}` has something else than numbers: get the file anew"
        ) from error
    except OSError as error:
        raise UserError(f"model.questions.glove={path} cannot be read ({error.strerror}): null learns them") from error
    if not found:
        raise UserError(f"{path} has none of the {len(words)} words: is it GloVe of the questions' language?")
    _say(f"model.questions.glove: {len(found)} of {len(words)} words are in {path}; the rest begin at 0")
    return torch.from_numpy(table)


def neighbours(
    questions: Iterable[Sequence[int]], table: Float[Tensor, "words dim"], *, paper: bool = False
) -> Float[Tensor, "words dim"]:
    """T @ table; 0 for a word that never stands beside another.

    Args:
        questions: word ids of each; ids that `table` lacks are passed over.
        table: a vector a word.
        paper: the published code divides entry n_j of its list by n_j, once for each pair with j, in the place of the
            pair's own: most pairs then count 1, the first few next to nothing.
    """
    n = len(table)
    asked: Counter[int] = Counter()
    pairs: list[tuple[int, int]] = []
    for question in questions:
        known = [i for i in question if i < n]
        asked.update(known)
        pairs += [pair for k, i in enumerate(known) for j in known[k + 1 :] for pair in ((i, j), (j, i))]
    if not pairs:
        return torch.zeros_like(table)
    rows, columns = torch.tensor(pairs).T
    if paper:
        weights = torch.ones(len(pairs), dtype=torch.float64)
        for j, count in Counter(columns.tolist()).items():
            if j < len(weights):
                weights[j] = float(asked[j]) ** -count
    else:
        weights = 1 / torch.tensor([asked[j] for j in columns.tolist()], dtype=torch.float64)
    sums = torch.zeros(n, dtype=torch.float64).index_add(0, rows, weights)[rows]
    shares = torch.where(sums > 0, weights / sums, 0.0)
    matrix = torch.sparse_coo_tensor(torch.stack([rows, columns]), shares, (n, n), check_invariants=True)
    return torch.sparse.mm(matrix, table.double()).to(table.dtype)


@rank_zero_only
def _say(line: str) -> None:
    print(line, file=sys.stderr)
