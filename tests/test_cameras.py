"""Poses, intrinsics and labels."""

import math

import pytest
import torch

from models.cameras import (
    CameraSetup,
    camera_label,
    fov_to_intrinsics,
    intrinsics,
    look_at,
    orbit,
    split_label,
)

ANGLES = torch.tensor([-0.6, -0.1, 0.0, 0.3])


def test_poses_are_rotations_that_look_at_the_target():
    target = torch.tensor([0.1, -0.2, 0.2])
    pose = look_at(torch.randn(5, 3) * 2, target)
    rotation, eye = pose[:, :3, :3], pose[:, :3, 3]
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(3).expand(5, 3, 3))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(5))
    ahead = (target - eye) / (target - eye).norm(dim=1, keepdim=True)
    torch.testing.assert_close(rotation[:, :, 2], ahead)


def test_images_are_upright():
    pose = look_at(torch.tensor([[0.5, 0.4, 2.0]]), torch.zeros(3))
    right, down = pose[0, :3, 0], pose[0, :3, 1]
    assert right[1].abs() < 1e-6  # No roll.
    assert down[1] < 0 and right[0] > 0  # Seen from +z, the world's x points right.


def test_look_at_refuses_a_single_point():
    with pytest.raises(ValueError, match=r"eye must be \[B, 3\]"):
        look_at(torch.zeros(3), torch.zeros(3))


def test_orbit_keeps_its_radius_and_turns_as_eg3d():
    eye = orbit(ANGLES, torch.zeros(4), radius=2.7)[:, :3, 3]
    torch.testing.assert_close(eye.norm(dim=1), torch.full([4], 2.7))
    torch.testing.assert_close(torch.atan2(eye[:, 0], eye[:, 2]), ANGLES)


@pytest.mark.parametrize(("pitch", "elevation"), [(-0.2, 0.128), (-0.5, 0.324), (0.2, -0.128)])
def test_pitch_is_uniform_in_area(pitch, elevation):
    eye = orbit(torch.zeros(1), torch.tensor([pitch]), 1.0)[0, :3, 3]
    assert math.asin(eye[1]) == pytest.approx(elevation, abs=1e-3)


def test_label_round_trip():
    pose, K = orbit(ANGLES, ANGLES), intrinsics(3.0)
    c = camera_label(pose, K)
    assert c.shape == (4, 25)
    pose_back, K_back = split_label(c)
    assert torch.equal(pose_back, pose) and torch.equal(K_back, K.expand(4, 3, 3))


def test_split_label_refuses_other_widths():
    with pytest.raises(ValueError, match=r"must be \[..., 25\], got \[2, 24\]"):
        split_label(torch.zeros(2, 24))


def test_fov_uses_the_rounded_constants():
    assert fov_to_intrinsics(18.837)[0, 0] == pytest.approx(4.26339, abs=1e-5)
    assert fov_to_intrinsics(45)[1, 1] == pytest.approx(1.7074, abs=1e-4)


@pytest.mark.parametrize("distribution", ["uniform", "gaussian", "ellipse"])
def test_sampled_views_are_reproducible_labels(distribution):
    setup = CameraSetup(distribution=distribution)
    torch.manual_seed(5)
    first = setup.sample(3)
    torch.manual_seed(5)
    assert torch.equal(first, setup.sample(3))
    assert first.shape == (3, 25) and first.dtype == torch.float32
    torch.testing.assert_close(first[:, [3, 7, 11]].norm(dim=1), torch.full([3], 2.7))


def test_uniform_views_stay_within_their_half_widths():
    setup = CameraSetup(pivot=(0, 0, 0), yaw_range=0.6, pitch_range=0.3, distribution="uniform")
    eye = setup.sample(500)[:, [3, 7, 11]] / 2.7
    yaw, edge = torch.atan2(eye[:, 0], eye[:, 2]), setup.label(torch.zeros(1), torch.tensor([0.3]))
    assert 0.55 < yaw.abs().max() <= 0.6 + 1e-5
    assert eye[:, 1].abs().max() <= edge[0, 7].abs() / 2.7 + 1e-5


@pytest.mark.parametrize("distribution", ["uniform", "gaussian", "ellipse"])
def test_rim_is_a_closed_path_within_the_range(distribution):
    setup = CameraSetup(yaw_range=0.6, pitch_range=0.3, distribution=distribution)
    rim = setup.rim(torch.linspace(0, 2 * math.pi, 33))
    torch.testing.assert_close(rim[0], rim[-1], atol=1e-5, rtol=0)
    eye = split_label(rim)[0][:, :3, 3]
    assert torch.atan2(eye[:, 0], eye[:, 2]).abs().max() <= 0.6 + 1e-5
    highest = orbit(torch.zeros(1), torch.tensor([-0.35 if distribution == "ellipse" else -0.3]))
    torch.testing.assert_close(eye[:, 1].max(), highest[0, 1, 3])


def test_rim_of_faces_is_the_path_of_eg3d_s_videos():
    turn = torch.linspace(0, 6, 7)
    yaw, pitch = 0.35 * turn.sin(), -0.05 + 0.25 * turn.cos()
    assert torch.equal(CameraSetup().rim(turn), CameraSetup().label(yaw, pitch))


def test_frontal_view_is_the_mean_camera():
    setup = CameraSetup()
    torch.testing.assert_close(setup.frontal(2), setup.label(torch.zeros(2), torch.zeros(2)))
    torch.testing.assert_close(setup.frontal()[0, [3, 7, 11]], torch.tensor([0.0, 0.0, 2.7]))


def test_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="got 'box'"):
        CameraSetup(distribution="box")
