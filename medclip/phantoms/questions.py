"""Generated questions: one body drawn on a film, and what may be asked about it, with the right answer.

A drawing shows a disc, a square or a triangle, in red, green or blue, in one of the picture's four quarters, on a dark
or a light ground. The questions about it go round shape, colour, side and height, closed and open in turn. Of a closed
question the answer is drawn first, yes or no evenly, and then what is asked; so the words of a question tell nothing
of its answer, and a model that does not look gets one in two right. Of open ones it gets one in three (shape, colour)
or in two (side, height).
"""

from __future__ import annotations

import cv2
import numpy as np

from medclip.phantoms.noise import grain
from medclip.phantoms.phantom import Phantom, patient_name

KIND = "questions"
SHAPES = ("disc", "square", "triangle")
COLOURS = {"red": (214, 66, 58), "green": (58, 168, 84), "blue": (64, 98, 214)}
SIDES = ("left", "right")
HEIGHTS = ("top", "bottom")
GROUNDS = {"film": 34, "paper": 222}  # grey level
VALUES = {"shape": SHAPES, "colour": tuple(COLOURS), "side": SIDES, "height": HEIGHTS}
_CLOSED = {
    "shape": ("Is there a {} in the picture?", "Is the body a {}?"),
    "colour": ("Is the body {}?", "Does the picture show something {}?"),
    "side": ("Is the body on the {}?", "Does it lie in the {} half?"),
    "height": ("Is the body at the {}?", "Does it lie near the {}?"),
}
_OPEN = {
    "shape": ("What shape does the body have?", "Which shape is shown?"),
    "colour": ("What colour is the body?", "Which colour does it have?"),
    "side": ("On which side is the body?", "Where does it lie, left or right?"),
    "height": ("How high is the body?", "Where does it lie, top or bottom?"),
}
_STREAM = 1000  # apart from the streams of `phantom.KINDS`


def question_phantom(seed: int, index: int, drawing: int, place: int, size: int) -> Phantom:
    """The question `index`, which is number `place` of those about a drawing; all of these have the same picture.

    Returns:
        A phantom whose caption is the question, whose label is the answer ("Yes", "No", "Disc", "left"…), and whose
        `attributes` are {question, answer, type ("CLOSED" or "OPEN"), kind, modality, the drawing's facts, and a
        statement of all of them}, which is what a CLIP may learn before the questions.
    """
    own, rng = (np.random.default_rng([seed, _STREAM, *key]) for key in ((1, drawing), (0, index)))
    facts = {kind: str(own.choice(values)) for kind, values in VALUES.items()}
    ground = str(own.choice(tuple(GROUNDS)))
    first = int(own.integers(8))
    image, box = _draw(own, facts, ground, size)

    turn = first + place
    kind = tuple(VALUES)[turn // 2 % 4]
    closed = turn % 2 == 0
    answer = asked = facts[kind]
    if closed:
        answer = "Yes" if rng.random() < 0.5 else "No"
        if answer == "No":
            asked = str(rng.choice([value for value in VALUES[kind] if value != asked]))
    question = str(rng.choice((_CLOSED if closed else _OPEN)[kind])).format(asked)
    about = {"question": question, "answer": answer, "type": "CLOSED" if closed else "OPEN", "kind": kind}
    name = patient_name(KIND, seed, drawing)
    statement = "A {colour} {shape} at the {height} {side}, on {ground}.".format(**facts, ground=ground)
    attributes = {**about, "modality": ground, **facts, "statement": statement}
    return Phantom(image, answer, attributes, [question], name, KIND, index, [(facts["shape"], *box)])


def _draw(
    rng: np.random.Generator, facts: dict[str, str], ground: str, size: int
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The picture uint8 (size, size, 3) and the body's box."""
    x, y = 0.28 + rng.uniform(-0.08, 0.08, 2)
    x = 1 - x if facts["side"] == "right" else x
    y = 1 - y if facts["height"] == "bottom" else y
    radius, angle = rng.uniform(0.11, 0.15), rng.uniform(-0.3, 0.3)
    # Shapes of equal area, so that none is known by how much colour there is.
    corners = {"disc": 48, "square": 4, "triangle": 3}[facts["shape"]]
    turns = angle + np.pi * (2 * np.arange(corners) / corners + {4: 0.25, 3: -0.5}.get(corners, 0))
    reach = radius * np.sqrt(2 * np.pi / (corners * np.sin(2 * np.pi / corners)))
    outline = np.stack([x + reach * np.cos(turns), y + reach * np.sin(turns)], 1)
    image = np.full((size, size, 3), GROUNDS[ground], np.uint8)
    fixed = np.rint((outline * size - 0.5) * 256).astype(np.int32)
    cv2.fillPoly(image, [fixed], COLOURS[facts["colour"]], cv2.LINE_AA, shift=8)
    noise = grain(rng, size, 0.7)[..., None] * np.float32(rng.uniform(4, 9))
    image = np.clip(image + noise, 0, 255).astype(np.uint8)
    low, high = np.floor(outline.min(0) * size).astype(int), np.ceil(outline.max(0) * size).astype(int)
    x0, y0, x1, y1 = *np.maximum(low, 0).tolist(), *np.minimum(high, size).tolist()
    return image, (x0, y0, x1, y1)
