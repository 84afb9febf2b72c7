"""Colours of structures in figures."""

# red, green, yellow and blue of the paper (Fig. 8, 10 and 12), and further colours
PALETTE = ("#d62728", "#2ca02c", "#ffd700", "#1f77b4", "#ff7f0e", "#9467bd", "#17becf", "#e377c2")
RED, GREEN, YELLOW, BLUE = PALETTE[:4]


def to_rgb(colour: str) -> tuple[int, int, int]:
    """Return red, green and blue from 0 to 255, given ``#rrggbb``."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
