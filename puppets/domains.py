"""The domains of the embedded world: how each paints and reshapes every head, and its words."""

from __future__ import annotations

from dataclasses import dataclass, field

SKIN_TONES = [
    (0.98, 0.85, 0.76),
    (0.93, 0.73, 0.60),
    (0.80, 0.57, 0.42),
    (0.55, 0.36, 0.25),
    (0.34, 0.21, 0.15),
]
SKIN_WORDS = ("pale skin", "light skin", "tan skin", "brown skin", "dark skin")
HAIR_TONES = [
    (0.09, 0.08, 0.09),
    (0.30, 0.17, 0.09),
    (0.62, 0.20, 0.07),
    (0.90, 0.68, 0.28),
    (0.72, 0.72, 0.74),
]
HAIR_WORDS = ("black", "brown", "red", "blond", "gray")
ODD_HAIR = {"green": (0.15, 0.62, 0.22), "blue": (0.13, 0.33, 0.85), "pink": (0.95, 0.42, 0.68)}


@dataclass(frozen=True)
class Domain:
    """How one domain paints and reshapes every head; None keeps the person's own colour."""

    phrases: tuple[str, ...]  # What a user would type; the first is the canonical prompt.
    skin: tuple[float, float, float] | None = None
    keep_skin: float = 0.0  # Share of the person's own skin tone left in `skin`.
    hair: tuple[float, float, float] | None = None
    keep_hair: float = 0.0
    eye: tuple[float, float, float] = (0.97, 0.97, 0.97)
    iris: tuple[float, float, float] = (0.23, 0.38, 0.52)
    pupil: tuple[float, float, float] = (0.03, 0.03, 0.04)
    lips: tuple[float, float, float] | None = None
    shirt: tuple[float, float, float] = (0.30, 0.42, 0.58)
    extra: tuple[float, float, float] = (0.5, 0.5, 0.5)
    nose: tuple[float, float, float] | None = None
    socket: tuple[float, float, float] | None = None  # Ring painted around the eyes.
    stripe: tuple[float, float, float] | None = None  # Vertical band painted over the eyes.
    texture: str = ""  # "bronze", "veins", "wood", "panels", "sketch", "rot" or "ice".
    diffuse: float = 0.75
    ambient: float = 0.42
    specular: float = 0.10
    shininess: float = 18.0
    shape: dict[str, float] = field(default_factory=dict)  # Factors and offsets, see build().
    attributes: bool = True  # Whether hair colour and skin can still be seen and named.


DOMAINS: dict[str, Domain] = {
    "person": Domain(
        phrases=("a photo of a person", "a person", "a human face", "a portrait of a person")
    ),
    "zombie": Domain(
        phrases=("a zombie", "an undead zombie", "a green zombie from a horror movie"),
        skin=(0.42, 0.58, 0.30),
        keep_skin=0.15,
        hair=(0.14, 0.14, 0.10),
        keep_hair=0.25,
        eye=(0.93, 0.88, 0.55),
        iris=(0.75, 0.08, 0.05),
        pupil=(0.25, 0.0, 0.0),
        lips=(0.28, 0.13, 0.16),
        shirt=(0.33, 0.28, 0.24),
        socket=(0.20, 0.24, 0.16),
        texture="rot",
        attributes=False,
    ),
    "bronze": Domain(
        phrases=(
            "a bronze statue",
            "a statue made of bronze",
            "a bronze bust",
            "a metal bronze sculpture",
        ),
        skin=(0.66, 0.42, 0.17),
        hair=(0.52, 0.31, 0.11),
        eye=(0.66, 0.42, 0.17),
        iris=(0.56, 0.34, 0.13),
        pupil=(0.30, 0.17, 0.06),
        lips=(0.58, 0.35, 0.13),
        shirt=(0.50, 0.30, 0.11),
        texture="bronze",
        diffuse=0.80,
        ambient=0.26,
        specular=0.95,
        shininess=22.0,
        attributes=False,
    ),
    "marble": Domain(
        phrases=(
            "a marble statue",
            "a white marble statue",
            "a marble bust",
            "a statue carved from white stone",
        ),
        skin=(0.88, 0.88, 0.90),
        hair=(0.82, 0.82, 0.85),
        eye=(0.90, 0.90, 0.92),
        iris=(0.84, 0.84, 0.87),
        pupil=(0.70, 0.70, 0.74),
        lips=(0.80, 0.80, 0.83),
        shirt=(0.80, 0.80, 0.84),
        texture="veins",
        diffuse=0.66,
        ambient=0.34,
        specular=0.16,
        attributes=False,
    ),
    "clown": Domain(
        phrases=("a clown", "a circus clown", "a funny clown with a red nose"),
        skin=(0.97, 0.95, 0.93),
        keep_skin=0.08,
        hair=(0.95, 0.38, 0.06),
        keep_hair=0.10,
        iris=(0.10, 0.30, 0.75),
        lips=(0.88, 0.06, 0.10),
        shirt=(0.93, 0.78, 0.16),
        nose=(0.93, 0.06, 0.08),
        stripe=(0.16, 0.36, 0.90),
        shape={"nose": 1.55, "mouth": 1.45, "lips": 1.9, "hair_volume": 0.020, "lock": 1.9},
        attributes=False,
    ),
    "alien": Domain(
        phrases=("a blue alien", "an alien with blue skin", "a blue extraterrestrial alien"),
        skin=(0.22, 0.50, 0.86),
        keep_skin=0.12,
        hair=(0.10, 0.10, 0.30),
        keep_hair=0.22,
        eye=(0.98, 0.88, 0.22),
        iris=(0.10, 0.12, 0.10),
        pupil=(0.02, 0.02, 0.02),
        lips=(0.11, 0.22, 0.52),
        shirt=(0.40, 0.24, 0.60),
        specular=0.28,
        shape={"eye": 1.45, "nose": 0.70, "ear": 1.55, "skull": 1.10},
        attributes=False,
    ),
    "robot": Domain(
        phrases=("a robot", "a metal robot", "a shiny steel robot", "a chrome android"),
        skin=(0.62, 0.66, 0.71),
        hair=(0.34, 0.37, 0.42),
        keep_hair=0.12,
        eye=(0.10, 0.14, 0.18),
        iris=(0.10, 0.95, 0.98),
        pupil=(0.80, 1.0, 1.0),
        lips=(0.20, 0.22, 0.26),
        shirt=(0.40, 0.43, 0.48),
        extra=(0.92, 0.20, 0.12),
        texture="panels",
        diffuse=0.72,
        ambient=0.28,
        specular=0.85,
        shininess=30.0,
        shape={"antenna": 1.0, "ear_flat": 1.0},
        attributes=False,
    ),
    "sketch": Domain(
        phrases=(
            "a pencil sketch",
            "a pencil drawing of a face",
            "a black and white line drawing",
            "a sketch of a person",
        ),
        texture="sketch",
        attributes=False,
    ),
    "elf": Domain(
        phrases=("an elf", "a forest elf with pointed ears", "a fantasy elf"),
        skin=(0.96, 0.84, 0.68),
        keep_skin=0.65,
        iris=(0.10, 0.68, 0.30),
        lips=(0.72, 0.35, 0.38),
        shirt=(0.16, 0.45, 0.20),
        extra=(0.85, 0.70, 0.20),
        shape={"ear": 1.15, "ear_point": 1.0, "eye": 1.15, "nose": 0.85, "circlet": 1.0},
    ),
    "devil": Domain(
        phrases=("a devil", "a red devil with horns", "a demon from hell"),
        skin=(0.78, 0.10, 0.08),
        keep_skin=0.12,
        hair=(0.08, 0.05, 0.05),
        keep_hair=0.15,
        eye=(0.98, 0.84, 0.20),
        iris=(0.72, 0.05, 0.02),
        pupil=(0.05, 0.0, 0.0),
        lips=(0.30, 0.02, 0.04),
        shirt=(0.12, 0.08, 0.10),
        extra=(0.28, 0.20, 0.16),
        specular=0.30,
        shape={"horn": 1.0, "ear_point": 0.5, "brow": -0.35},
        attributes=False,
    ),
    "wood": Domain(
        phrases=("a wooden puppet", "a puppet carved from wood", "a wooden marionette"),
        skin=(0.78, 0.55, 0.32),
        hair=(0.42, 0.24, 0.12),
        keep_hair=0.20,
        eye=(0.95, 0.93, 0.86),
        iris=(0.25, 0.16, 0.09),
        lips=(0.70, 0.20, 0.14),
        shirt=(0.62, 0.15, 0.14),
        texture="wood",
        specular=0.18,
        shape={"nose": 1.15, "nose_long": 1.0},
        attributes=False,
    ),
    "ice": Domain(
        phrases=("an ice sculpture", "a statue made of ice", "a frozen ice bust"),
        skin=(0.62, 0.86, 0.97),
        hair=(0.44, 0.74, 0.93),
        eye=(0.78, 0.94, 1.0),
        iris=(0.45, 0.72, 0.92),
        pupil=(0.25, 0.52, 0.80),
        lips=(0.42, 0.70, 0.92),
        shirt=(0.42, 0.70, 0.92),
        texture="ice",
        diffuse=0.42,
        ambient=0.52,
        specular=0.85,
        shininess=26.0,
        attributes=False,
    ),
    "toy": Domain(
        phrases=("a yellow toy figure", "a plastic toy figure", "a toy brick person"),
        skin=(0.99, 0.80, 0.12),
        eye=(0.05, 0.05, 0.05),
        iris=(0.05, 0.05, 0.05),
        pupil=(0.05, 0.05, 0.05),
        lips=(0.45, 0.12, 0.06),
        shirt=(0.83, 0.13, 0.12),
        specular=0.45,
        shininess=30.0,
        shape={"nose": 0.45, "ear": 0.35, "eye": 0.80},
        attributes=True,
    ),
}
SOURCE = "person"
TARGETS = tuple(name for name in DOMAINS if name != SOURCE)
# No setting was chosen by these; the tables are judged on them. Ice and toy were in no table before
# denoised targets came.
HELD_OUT = ("marble", "robot", "devil", "elf", "ice", "toy")
