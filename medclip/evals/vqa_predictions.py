"""Each question about an image with what was answered to it, as a table for one's own analysis.

Columns: id, image, question, type, answer, predicted, score (the probability of the predicted answer by itself), routed
(the type that the model took the question for, empty where it does not tell), right (1 or 0). All words are normalised.
"""

from __future__ import annotations

import csv
import io

from medclip.evals.vqa_outcomes import VqaOutcomes

COLUMNS = ("id", "image", "question", "type", "answer", "predicted", "score", "routed", "right")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # the wide ones, too


def table(outcomes: VqaOutcomes) -> str:
    """The text of the table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    rows = zip(
        outcomes.questions, outcomes.given, outcomes.probability, outcomes.routed, outcomes.right.tolist(), strict=True
    )
    for asked, given, probability, routed, right in rows:
        words = (asked.id, asked.image, asked.question, asked.type, asked.answer, given)
        writer.writerow([*map(plain, words), f"{probability:.6g}", routed, int(right)])
    return text.getvalue()


def plain(cell: str) -> str:
    """The cell as a spreadsheet takes it for text: one that would be run as a formula gets an apostrophe in front."""
    return f"'{cell}" if cell.startswith(_FORMULA) else cell
