"""The cut about known points: level, at the promised places, at any scale. It needs no detector."""

import numpy as np
import pytest
from PIL import Image

from common.faces.alignment import eye_places, level


def spots(points, radius, size=(400, 300)):
    """A black image with a red, a green and a blue disc about the first two points and between the last two."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] + 0.5
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for channel, (left, top) in enumerate([points[0], points[1], (points[3] + points[4]) / 2]):
        pixels[..., channel] = np.where((x - left) ** 2 + (y - top) ** 2 < radius**2, 255, 0)
    return Image.fromarray(pixels)


def centroids(image):
    """(x, y) of each channel's light as shares of the side."""
    weights = np.asarray(image).astype(float)
    y, x = np.mgrid[0 : image.height, 0 : image.width] + 0.5
    total = weights.sum((0, 1))
    return (
        np.stack([(weights * x[..., None]).sum((0, 1)), (weights * y[..., None]).sum((0, 1))], 1)
        / total[:, None]
        / image.width
    )


def face_points(middle, distance, degrees, mouth=1.1):
    """Five points of a face: eyes `distance` apart, the mouth `mouth` distances below, all turned clockwise."""
    upright = np.array([(-0.5, 0), (0.5, 0), (0, 0.6), (-0.4, mouth), (0.4, mouth)]) * distance
    angle = np.radians(degrees)
    return upright @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) + middle


@pytest.mark.parametrize("degrees", [-160, -90, -20, 0, 7, 45, 90])
@pytest.mark.parametrize(("distance", "size", "crop"), [(60, 64, 1.0), (60, 128, 0.6), (25, 64, 0.8), (100, 28, 0.7)])
def test_the_eyes_come_to_their_places(degrees, distance, size, crop):
    points = face_points((210, 140), distance, degrees)
    found = centroids(level(spots(points, 0.15 * distance), points, size, crop))
    assert np.abs(found[:2] - eye_places(crop)).max() < 0.005
    (left, eye_level), (right, _) = eye_places(crop)
    assert np.abs(found[2] - (0.5, eye_level + 1.1 * (right - left))).max() < 0.005


def test_a_face_turned_aside_is_scaled_by_the_way_to_the_mouth():
    points = face_points((200, 120), 30, 15, mouth=2.7)  # eyes at half the distance that a frontal face would show
    found = centroids(level(spots(points, 5), points, 64, 1.0))
    assert np.abs(found[:2].mean(0) - np.mean(eye_places(1.0), axis=0)).max() < 0.005
    assert found[1, 0] - found[0, 0] == pytest.approx(0.25 * 1.35 / 2.7, abs=0.005)
    assert found[2, 1] - found[0, 1] == pytest.approx(0.25 * 1.35, abs=0.005)


def test_beyond_the_edges_the_outermost_pixels_are_repeated():
    rows = np.broadcast_to(np.linspace(20, 220, 120).astype(np.uint8)[:, None, None], (120, 90, 3))
    points = face_points((5, 60), 40, 0)
    columns = np.asarray(level(Image.fromarray(rows), points, 64, 1.0)).astype(int)
    assert np.abs(columns - columns[:, -1:]).max() <= 1  # left of the edge every row goes on as it was
    away = level(Image.new("L", (50, 50), 77), face_points((500, -300), 40, 30), 32, 1.0)
    assert set(np.asarray(away).ravel().tolist()) == {77}


def test_shrinking_averages():
    checks = (np.indices((1200, 1200)).sum(0) % 2 * 255).astype(np.uint8)
    cut = np.asarray(level(Image.fromarray(checks), face_points((600, 500), 220, 12), 32, 1.0)).astype(int)
    assert np.abs(cut - 127).max() <= 6


def test_points_without_extent_are_no_crash():
    assert level(Image.new("RGB", (40, 40), (9, 9, 9)), np.full((5, 2), 20.0), 32, 1.0).size == (32, 32)
