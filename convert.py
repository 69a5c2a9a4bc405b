"""Turn official files into a .safetensors, which loads at once and holds no code.

    python convert.py --generator ffhqrebalanced512-128.pkl --out ffhq.safetensors
    python convert.py --generator ffhqrebalanced512-128.pkl --out ffhq-half.safetensors --half

EG3D's .pkl shrinks from 377 MB to 123 MB, since only its averaged generator is kept, and with
--half to half of that. Scripts read both kinds of files alike.
"""

from dataclasses import dataclass
from pathlib import Path

from harness.cli import exit_codes, read_options
from harness.run_folder import check_folder, check_source, locate, make_folder
from harness.store import check_replaced

GENERATORS = ("eg3d", "panohead", "stylegan2")  # Formats that are written.


@dataclass
class Config:
    """Options of convert.py."""

    generator: str  # Official .pkl, .pth, .pt or another generator: file, hub id, URL.
    out: Path  # The .safetensors to write; one that exists is replaced.
    half: bool = False  # Whether weights are rounded to half precision.


def check(cfg: Config) -> None:
    """Refuse options that cannot be used.

    Raises:
        ValueError: naming the flag and the path.
    """
    if cfg.out.suffix != ".safetensors" or cfg.out.is_dir():
        raise ValueError(f"--out must be a file that ends in .safetensors, got {cfg.out}")
    check_folder(cfg.out.absolute().parent)
    if cfg.out.exists() and cfg.out.resolve() == Path(locate(cfg.generator)).resolve():
        raise ValueError(f"--out {cfg.out} would replace the generator itself: name another file")
    check_replaced(cfg.out, *GENERATORS)
    check_source("--generator", cfg.generator)


if __name__ == "__main__":
    CFG = read_options(Config, __doc__, check)

import torch

from files.generators import load_generator, save_generator


def main(cfg: Config) -> None:
    """Convert a generator.

    Raises:
        ValueError: it cannot be read, or the result not be written.
    """
    check(cfg)
    G = load_generator(cfg.generator)
    make_folder(cfg.out.absolute().parent)
    save_generator(G, cfg.out, torch.float16 if cfg.half else torch.float32)
    print(f"{cfg.out} written, {cfg.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    with exit_codes():
        main(CFG)
