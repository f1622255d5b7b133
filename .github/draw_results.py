"""Draw results.svg from two tables of the README, so that both say the same.

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
# Head of the column: name on the command line, colour, marker.
METHODS = {
    "Wanda": ("wanda", "#1671eb", "s"),
    "SparseGPT": ("sparsegpt", "#b0539d", "^"),
    "admm-grad": ("admm-grad", "#1a874b", "o"),
    "recommended": ("admm-grad\n--block-aware", "#ba5b00", "D"),
}


def read_table(first_head: str) -> list[dict[str, str]]:
    """Return the rows of the README's table whose first column has this head.

    Each is a dict from the heads of the columns to the cells.
    """
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index(f"\n| {first_head} |") + 1 :].split("\n\n")[0]
    head, _, *rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    return [dict(zip(head, row, strict=True)) for row in rows]


def first_number(cell: str) -> float:
    """Return the perplexity of a cell, or the mean of a cell such as "41.9 (41.8–42.0)"."""
    return float(re.match(r"[\d.]+", cell)[0])


def main() -> None:
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 15})
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    # The first row of the first table is of the same model, text and number of sequences.
    sixty = read_table("model")[0] | {"zeros": "60 %"}
    fifty, seventy, _ = read_table("zeros")
    rows = [fifty, sixty, seventy]
    zeros = [first_number(row["zeros"]) for row in rows]
    for head, (name, colour, marker) in METHODS.items():
        perplexities = [first_number(row[head]) for row in rows]
        axes.plot(zeros, perplexities, marker=marker, color=colour, linewidth=2, markersize=8)
        axes.text(zeros[-1] + 0.6, perplexities[-1], name, color=colour, va="center")
    dense = first_number(sixty["dense"])
    axes.axhline(dense, color=GREY, linestyle=":")
    axes.text(zeros[-1] + 0.6, 1.06 * dense, f"dense: {dense}", color=GREY)
    axes.set_title("SmolLM2-135M, perplexity on WikiText-2 (lower is better)", color=GREY)
    axes.set_xlabel("% of zeros", color=GREY)
    axes.set_xticks(zeros)
    axes.set_xlim(zeros[0] - 1, zeros[-1] + 7)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([20, 30, 50, 100, 200, 500]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(colors=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    figure.savefig(HERE / "results.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
