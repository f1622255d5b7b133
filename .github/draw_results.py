"""Draw results.svg from the table of results.md, so that both say the same.

pip install matplotlib==3.11.2    # another version may write another file
python .github/draw_results.py
"""

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
    "admm-grad --block-aware": ("#ba5b00", "D"),
}


def read_rows() -> dict[str, dict[str, float]]:
    """Return the rows of the table that have a name and are of WikiText-2.

    They are dicts from the heads of the columns to perplexities.
    """
    results = (HERE / "results.md").read_text(encoding="utf-8")
    head, _, *rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in results[results.index("| setting | text | dense |") :]
        .split("\n\n")[0]
        .splitlines()
    ]
    return {
        name: {column: float(cell) for column, cell in zip(head[2:], cells, strict=True)}
        for name, text, *cells in rows
        if name and text == "WikiText-2"
    }


def main() -> None:
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 14})
    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    rows = read_rows()
    by_zeros = {zeros: rows[f"{zeros} % zeros"] for zeros in (50, 60, 70)}
    for name, (colour, marker) in METHODS.items():
        points = [(zeros, row[name]) for zeros, row in by_zeros.items()]
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
    dense = by_zeros[70]["dense"]
    axes.axhline(dense, color=GREY, linestyle=":")
    axes.annotate(
        f"dense: {dense}", (70, dense), xytext=(9, 4), textcoords="offset points", color=GREY
    )
    axes.set_xlabel("% of zeros in the blocks", color=GREY)
    axes.set_xlim(49, 82)
    axes.set_xticks(list(by_zeros))
    axes.set_ylabel("perplexity on WikiText-2", color=GREY)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([20, 30, 50, 100, 200, 500]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(colors=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    figure.suptitle("SmolLM2-135M-Instruct, 8 calibration sequences, one draw", color=GREY)
    figure.savefig(HERE / "results.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
