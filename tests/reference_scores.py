"""Slow implementations of scores from their definitions, for test_scoring, test_simpson and test_evaluate."""

import itertools
import math

import numpy as np
from scipy.spatial.distance import cdist
from skimage.measure import find_contours

DISTANCES = ("assd_mean", "assd_pooled", "hd", "hd95_pooled", "hd95_maxdir", "nsd_0.5", "nsd_1.0", "nsd_2.0")
CAMUS_IMAGES = [*itertools.product(("2CH", "4CH"), ("ED", "ES"))]


def brute_surface(mask, border):
    """Points of the mask that have a face neighbour outside it, found one by one."""
    points = []
    for point in map(tuple, np.argwhere(mask)):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            neighbour = list(point)
            neighbour[axis] += step
            if 0 <= neighbour[axis] < mask.shape[axis]:
                outside = not mask[tuple(neighbour)]
            else:
                outside = border
            if outside:
                points.append(point)
                break
    return np.array(points, float).reshape(-1, mask.ndim)


def brute(pred, ref, axes, border):
    """Every metric but the surfels', by its formula, over all pairs of surface points; ``axes``: columns in mm."""
    p_set, g_set = ({tuple(x) for x in np.argwhere(m)} for m in (pred, ref))
    both, p, g, total = len(p_set & g_set), len(p_set), len(g_set), pred.size
    nan = math.nan
    found = {
        "dice": 2 * both / (p + g) if p + g else nan,
        "iou": both / len(p_set | g_set) if p + g else nan,
        "sensitivity": both / g if g else nan,
        "specificity": (total - len(p_set | g_set)) / (total - g) if total > g else nan,
        "precision": both / p if p else nan,
        "ravd": 100 * abs(p - g) / g if g else nan,
        "volume": p * abs(np.linalg.det(axes)) / 1000 if pred.ndim == 3 else nan,
        "volume_ref": g * abs(np.linalg.det(axes)) / 1000 if pred.ndim == 3 else nan,
    }
    a, b = (brute_surface(m, border) @ axes.T for m in (pred, ref))
    if not len(a) or not len(b):
        return found | dict.fromkeys(DISTANCES, nan)
    pairs = cdist(a, b)
    to_ref, to_pred = pairs.min(1), pairs.min(0)
    together = np.sort(np.concatenate([to_ref, to_pred]))
    return found | {
        "assd_mean": (to_ref.mean() + to_pred.mean()) / 2,
        "assd_pooled": together.sum() / len(together),
        "hd": together[-1],
        "hd95_pooled": percentile_95(together),
        "hd95_maxdir": max(percentile_95(np.sort(to_ref)), percentile_95(np.sort(to_pred))),
        **{
            f"nsd_{t:.1f}": ((to_ref <= t).sum() / len(to_ref) + (to_pred <= t).sum() / len(to_pred)) / 2
            for t in (0.5, 1, 2)
        },
    }


def percentile_95(ordered):
    """Linear between the two ranks around 0.95 (n - 1)."""
    place = 0.95 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def half_even(x):
    return round(float(x))


def slow_view(mask, spacing):
    """Diameters and height in mm of one view; None where there is no contour or no base."""
    smallest = min(spacing)
    rows, cols = (round(n * s / smallest) for n, s in zip(mask.shape, spacing, strict=True))
    square = np.zeros((rows, cols), bool)
    for r in range(rows):
        for c in range(cols):
            source = math.floor((r + 0.5) * mask.shape[0] / rows), math.floor((c + 0.5) * mask.shape[1] / cols)
            square[r, c] = mask[source]
    contours = find_contours(square.astype(float), 0.5)
    if not contours:
        return None
    contour = [(float(r), float(c)) for r, c in contours[0]]
    best, base = 0.0, None
    for i in range(2, len(contour)):
        for j in range(i):
            dr, dc = contour[j][0] - contour[i][0], contour[j][1] - contour[i][1]
            square_length = dr * dr + dc * dc
            if square_length <= best or abs(math.degrees(math.atan2(dr, dc))) > 45:
                continue
            length = math.sqrt(square_length)
            if all(
                abs((r - contour[i][0]) * dc - (c - contour[i][1]) * dr) / length <= 8 for r, c in contour[j + 1 : i]
            ):
                best, base = square_length, (i, j)
    if base is None:
        return None
    i, j = base
    middle = contour[int(j + round((i - j) / 2))]
    apex, farthest = middle, 0.0
    for r, c in contour:
        away = (r - middle[0]) ** 2 + (c - middle[1]) ** 2
        if away > farthest:
            apex, farthest = (r, c), away
    v = apex[0] - middle[0], apex[1] - middle[1]
    length = math.sqrt(farthest)
    n = -v[1] / length, v[0] / length
    diameters = []
    for k in range(20):
        start = middle[0] + v[0] * k / 20, middle[1] + v[1] * k / 20
        diameter = 0.0
        for side in (1, -1):
            width = 8.0
            while True:
                r, c = half_even(start[0] + side * width * n[0]), half_even(start[1] + side * width * n[1])
                if not (0 <= r < rows and 0 <= c < cols) or not square[r, c]:
                    break
                width += 0.5
            diameter += width
        diameters.append(diameter * smallest)
    return diameters, length * smallest / 20


def slow_volumes(masks, step="largest"):
    views = {key: slow_view(*masks[key]) for key in CAMUS_IMAGES}
    found = []
    for instant in ("ED", "ES"):
        heights = [views[k][1] for k in CAMUS_IMAGES if step == "largest" or k[1] == instant]
        total = sum(a * b for a, b in zip(views["2CH", instant][0], views["4CH", instant][0], strict=True))
        found.append(math.pi / 4 * max(heights) * total / 1000)
    return found


def ventricle(shape, spacing, *, length=70.0, width=22.0, turn=0.0, shift=(0.0, 0.0), bend=0.0):
    """Half an ellipse, its base below and its apex above, in mm; ``turn`` in degrees."""
    rows, cols = shape
    y, x = np.meshgrid((np.arange(rows) + 0.5) * spacing[0], (np.arange(cols) + 0.5) * spacing[1], indexing="ij")
    y0, x0 = rows * spacing[0] * 0.85 + shift[0], cols * spacing[1] * 0.5 + shift[1]
    a = math.radians(turn)
    up = -(y - y0) * math.cos(a) + (x - x0) * math.sin(a)
    across = (y - y0) * math.sin(a) + (x - x0) * math.cos(a) + bend * (up / length) ** 2
    return (up >= 0) & ((up / length) ** 2 + (across / width) ** 2 <= 1)
