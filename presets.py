"""The presets of bases and methods: what a run has where nothing is given.

What is the same for all of them stands beside the options in config.py. Rows of four kinds, the
later above the former: BASES, METHODS (what a method is on any base), NUMBERS (what it needs on
this base) and EDITS. A name is that of an option (config.Config), of a weight (config.Weights), or
a group of options, to which each table may add: "targets", "scores".
"""

from __future__ import annotations

from typing import Any

# What learns. Biases, constants and noise strengths would let every head drift alike
# (StyleGAN-Fusion, which freezes them).
WEIGHTS_LEARN = (r"(backbone\.synthesis|superresolution)\..*\.weight",)
BACKBONE_LEARNS = (r"backbone\.synthesis\..*",)
NO_TORGB_LEARNS = (r"backbone\.synthesis\.(?!.*\.torgb\.).*",)
LAYERS_LEARN = (r"synthesis\.b(?!4\.)\d+\.conv[01]\.(weight|affine\.weight|noise_strength)",)
DECODER_THEN_SUPERRES = (r"decoder\..*", r"superresolution\..*\.(weight|bias)")

STABLE_DIFFUSION = {
    "generator": "",
    "diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "controlnet": "lllyasviel/control_v11f1p_sd15_depth",
    "ip_adapter": "h94/IP-Adapter",
    "features": "facebook/dinov2-small",
    "clip": "openai/clip-vit-base-patch32",
    # StyleGAN-Fusion's for EG3D (arXiv:2212.04473), except the batch, which is 1 there.
    **{"steps": 5000, "batch": 4, "t_range": (0.01, 0.5), "save_every": 250, "grid_every": 250},
}
FACES = {"source_prompt": "a photo of a person"}
CATS = {"source_prompt": "a photo of a cat", "steps": 2000, "t_range": (0.01, 0.3)}
# What a base brings: its networks, and how long a run takes.
BASES: dict[str, dict[str, Any]] = {
    "puppets": {
        "generator": "checkpoints/puppets/generator.safetensors",
        "diffusion": "checkpoints/puppets/diffusion",
        "controlnet": "",
        "ip_adapter": "",
        "features": "checkpoints/puppets/dino",
        "clip": "checkpoints/puppets/clip",
        "source_prompt": "a photo of a person",
        **{"t_range": (0.02, 0.98), "save_every": 25, "grid_every": 25},
    },
    "ffhq": STABLE_DIFFUSION | FACES,
    # Cats as StyleGAN-Fusion turns them into dogs.
    "afhq": STABLE_DIFFUSION | CATS,
    "stylegan2-ffhq": STABLE_DIFFUSION | FACES | {"steps": 1000},
    "stylegan2-afhq": STABLE_DIFFUSION | CATS,
    # Heads from all sides: without words for backs they would get a second face there.
    "panohead": STABLE_DIFFUSION | FACES | {"view_words": True},
}
BASES["puppets2d"] = BASES["puppets"] | {"generator": "checkpoints/puppets2d/generator.safetensors"}
BASES["puppets360"] = BASES["puppets"] | {
    "generator": "checkpoints/puppets360/generator.safetensors",
    "diffusion": "checkpoints/puppets360/diffusion",
    "ip_adapter": "checkpoints/puppets/diffusion/ip_adapter",
    "view_words": True,
}
# What a method is on any base: what learns, and what the prior sees of the source.
METHODS: dict[str, dict[str, Any]] = {
    # Ours: onto what the prior paints of the source's pictures, with GCA-3D's consistency.
    "denoised": {
        "learns": WEIGHTS_LEARN,
        "depth_scale": 1.0,
        "mask": True,
        "momentum": 0.9,
        "targets": {"steps": 6, "pool": 22, "reuse": 6},
    },
    "gca3d": {"learns": WEIGHTS_LEARN, "depth_scale": 1.0, "mask": True},  # arXiv:2412.15491
    "sds": {"learns": WEIGHTS_LEARN},  # Plain score distillation, GCA-3D's baseline.
    "stylegan-fusion": {"learns": WEIGHTS_LEARN},  # arXiv:2212.04473
    "diffusiongan3d": {"learns": NO_TORGB_LEARNS},  # arXiv:2312.16837
    "nada": {"learns": BACKBONE_LEARNS},  # arXiv:2108.00946, the baseline of all these papers.
    "3d-adapter": {"learns": DECODER_THEN_SUPERRES},  # arXiv:2410.08824
}
# The same, where shapes may change: pictures are edited, from an earlier time on, and depth only
# holds the pose.
METHODS["denoised-shapes"] = METHODS["denoised"] | {
    "depth_scale": 0.6,
    "targets": METHODS["denoised"]["targets"]
    | {"level": 0.9, "draws": 2, "held": (0.8, 1.0), "margin": 0.1, "reuse": 2},
}
# The same where generators make pictures alone: nothing has depth or a mask.
METHODS_2D = {
    method: row
    | {"depth_scale": 0.0, "mask": False, "learns": (r"synthesis\..*\.weight",)}
    | ({"learns": row["learns"]} if method == "3d-adapter" else {})
    for method, row in METHODS.items()
}
METHODS_2D["stylegan-fusion"] |= {  # As its code has it for StyleGAN2.
    "learns": LAYERS_LEARN,
    "scores": {"unit": False, "unit_direction": False, "divisor": 1.0, "clip": 0.95},
}
for _method in ("nada", "diffusiongan3d"):
    METHODS_2D[_method] |= {"learns": (r"synthesis\.(?!.*\.torgb\.).*",)}
# Learning rate, guidance, weights. On Stable Diffusion those of the papers: StyleGAN-Fusion's are
# for gradients summed over 64 x 64 latent cells (LPIPS * 2000 / 100), DiffusionGAN3D's are not
# public, 3D-Adapter's are those of DoRM, by its authors. Score distillation that neither scales its
# gradient to unit size nor clamps it gets guidance 25: with 100, on puppets, half of the head left
# [-1, 1]. HSC's 0.1 keeps the ratio of its gradient to that of DSDS, 0.2 to 0.7 on puppets. --delta
# would double what UNet and ControlNet cost, which there is most of a step, so it is off.
PAPERS: dict[str, dict[str, float]] = {
    "denoised": dict(lr=8e-4, guidance=7.5, denoised=1.0, denoised_tokens=0.3, hsc=0.3),
    "gca3d": dict(lr=8e-4, guidance=25.0, dsds=1.0, hsc=0.1),
    "sds": dict(lr=8e-4, guidance=25.0, dsds=1.0),
    "stylegan-fusion": dict(
        lr=8e-4, guidance=100.0, fusion=1.0, score_direction=0.5, perceptual=20 / 64**2
    ),
    "diffusiongan3d": dict(lr=8e-4, guidance=25.0, dsds=1.0, distance=1.0),
    "nada": dict(lr=8e-4, guidance=100.0, clip_direction=1.0),
    "3d-adapter": dict(
        lr=8e-4,
        guidance=100.0,
        clip_direction=0.5,
        target=1.0,
        structure=10.0,
        feature_structure=10.0,
    ),
}
# The same and how long a run takes, tuned on the puppets' small networks.
TUNED: dict[str, dict[str, Any]] = {
    "denoised": dict(
        steps=130, batch=2, lr=2e-3, guidance=2.5, denoised=1.0, denoised_tokens=0.3, hsc=0.3
    ),
    "gca3d": dict(lr=2e-3, guidance=3.0, delta=0.5, dsds=1.0, hsc=0.05),
    "sds": dict(lr=3e-3, guidance=1.5, dsds=1.0),
    "stylegan-fusion": dict(
        lr=3e-3, guidance=3.0, fusion=1.0, score_direction=0.03, perceptual=20 / 64**2
    ),
    "diffusiongan3d": dict(lr=2e-3, guidance=3.0, dsds=1.0, distance=1.0),
    "nada": dict(lr=2e-3, guidance=3.0, clip_direction=1.0),
    "3d-adapter": dict(
        lr=1e-2, guidance=3.0, clip_direction=1.0, target=5.0, structure=0.1, feature_structure=0.1
    ),
}
TUNED = {method: {"steps": 50, "batch": 4} | row for method, row in TUNED.items()}
PAPERS["denoised-shapes"] = PAPERS["denoised"] | {"silhouette": 2.0, "opacity": 0.3}
# Guidance brings the domain; the first step, in which depth holds the pose, and the last have none.
TUNED["denoised-shapes"] = TUNED["denoised"] | dict(
    steps=396, silhouette=2.0, opacity=0.3, targets={"guided": (0.2, 0.8)}
)
# In pictures nothing has planes to keep at their distance.
PAPERS_2D = PAPERS | {
    "stylegan-fusion": dict(
        lr=8e-4, guidance=100.0, fusion_clipped=1.0, score_direction=1.0, perceptual=2000 / 64**2
    ),
    "diffusiongan3d": PAPERS["diffusiongan3d"] | {"distance": 0.0},
}
TUNED_2D = TUNED | {
    "denoised": TUNED["denoised"] | {"steps": 110},  # Each painted picture five times.
    "stylegan-fusion": TUNED["stylegan-fusion"]
    | {"fusion": 0.0, "fusion_clipped": 1.0, "perceptual": 2000 / 64**2},
    "diffusiongan3d": TUNED["diffusiongan3d"] | {"distance": 0.0},
}
FLAT = ("puppets2d", "stylegan2-ffhq", "stylegan2-afhq")
NUMBERS = {
    "puppets": TUNED,
    "puppets2d": TUNED_2D,
    "puppets360": TUNED,
    "ffhq": PAPERS,
    "afhq": PAPERS,
    "stylegan2-ffhq": PAPERS_2D,
    "stylegan2-afhq": PAPERS_2D,
    "panohead": PAPERS,
}
# What --edit changes of a method; others have no local edits.
EDITS: dict[str, dict[str, Any]] = {"diffusiongan3d": {"learns": BACKBONE_LEARNS, "keep": 20.0}}
EDITS_2D = {"diffusiongan3d": {"learns": (r"synthesis\..*",), "keep": 20.0}}
# How targets begin from a picture without words, which the source's own picture would outweigh.
FROM_PICTURE: dict[str, Any] = {
    **{"inverted": False, "level": 0.9, "draws": 0, "held": (0.0, 1.0), "guided": (0.0, 1.0)}
}
