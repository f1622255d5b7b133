"""Draw results.svg from the table of results.md, so that both say the same.

pip install matplotlib==3.11.2    # another version may write another file
python .github/draw_results.py
"""

import re
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

HERE = Path(__file__).parent
# All colours have a contrast of 4.5 to white and to black.
GREY = "#767676"
# Head of the column: colour, marker.
METHODS = {
    "Wanda": ("#1671eb", "s"),
    "SparseGPT": ("#b0539d", "^"),
    "admm-grad": ("#1a874b", "o"),
    "recommended": ("#ba5b00", "D"),
}


def read_rows() -> dict[str, dict[str, float]]:
    """Return the rows of the table that have a name and are of WikiText-2.

    They are dicts from the heads of the columns to perplexities: the first number of each cell,
    which is the mean in one such as "42.0 ± 0.6".
    """
    results = (HERE / "results.md").read_text(encoding="utf-8")
    head, _, *rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in results[results.index("| setting | text | dense |") :]
        .split("\n\n")[0]
        .splitlines()
    ]
    return {
        name: {
            column: float(re.match(r"[\d.]+", cell)[0])
            for column, cell in zip(head[2:], cells, strict=True)
        }
        for name, text, *cells in rows
        if name and text == "WikiText-2"
    }


def draw(axes: plt.Axes, xlabel: str, xscale: str, rows: dict[int, dict[str, float]]) -> None:
    """Draw a line for each method through its perplexities. `rows` are named by their x."""
    last = max(rows)
    for name, (colour, marker) in METHODS.items():
        points = [(x, row[name]) for x, row in sorted(rows.items())]
        axes.plot(
            *zip(*points, strict=True), marker=marker, color=colour, linewidth=2, markersize=8
        )
        axes.annotate(
            name,
            points[-1],
            xytext=(9, 0),
            textcoords="offset points",
            color=colour,
            va="center",
        )
    dense = rows[last]["dense"]
    axes.axhline(dense, color=GREY, linestyle=":")
    axes.annotate(
        f"dense: {dense}", (last, dense), xytext=(9, 4), textcoords="offset points", color=GREY
    )
    axes.set_xlabel(xlabel, color=GREY)
    axes.set_xscale(xscale)
    axes.set_xticks(sorted(rows))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([20, 30, 50, 100, 200, 500]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(colors=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)


def main() -> None:
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 14})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    rows = read_rows()
    main_row = rows["60 % zeros, 8 sequences"]
    zeros = {50: rows["50 % zeros"], 60: main_row, 70: rows["70 % zeros"]}
    draw(left, "% of zeros, with 8 calibration sequences", "linear", zeros)
    left.set_xlim(49, 79)
    sequences = {8: main_row, 32: rows["32 sequences"]}
    draw(right, "calibration sequences, with 60 % of zeros", "log", sequences)
    right.set_xlim(7, 80)
    figure.suptitle(
        "Perplexity of SmolLM2-135M-Instruct on WikiText-2 (recommended: admm-grad --block-aware)",
        color=GREY,
    )
    figure.savefig(HERE / "results.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
