"""What structures are painted in."""

# the paper's red, green, yellow and blue (Fig. 8, 10 and 12), then others
PALETTE = ("#d62728", "#2ca02c", "#ffd700", "#1f77b4", "#ff7f0e", "#9467bd", "#17becf", "#e377c2")
RED, GREEN, YELLOW, BLUE = PALETTE[:4]


def to_rgb(colour: str) -> tuple[int, int, int]:
    """``#rrggbb`` as numbers up to 255."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
