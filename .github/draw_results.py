"""Draw results.svg from two tables of the README, so that both say the same.

pip install matplotlib==3.11.2    # another version may write another file
python .github/draw_results.py
"""

import re
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

HERE = Path(__file__).parent
GREY = "#767676"  # legible on white and on black
COLOURS = {
    "Wanda": "#2f80ed",
    "SparseGPT": "#a05fd0",
    "admm-grad": "#1e9e58",
    "recommended": "#d96a00",
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


def draw(axes, rows: list[dict[str, str]], dense: str, title: str) -> None:
    """Draw the perplexities of all methods against the number in the first column.

    A cell is "not run", a perplexity, or a mean with the range, "41.9 (41.8–42.0)".
    """
    ticks = [int(re.match(r"\d+", next(iter(row.values())))[0]) for row in rows]
    for method, colour in COLOURS.items():
        measured = []
        for x, row in zip(ticks, rows, strict=True):
            y = [float(number) for number in re.findall(r"[\d.]+", row[method])]
            if y:
                measured.append((x, y[0]))
            if len(y) == 3:
                axes.vlines(x, y[1], y[2], colour, linewidth=7, alpha=0.6)
        axes.plot(*zip(*measured, strict=True), "o-", color=colour, label=method, markersize=4)
    axes.axhline(float(dense), color=GREY, linestyle=":", label="dense")
    axes.set_title(title, fontsize=11)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 12})
    plt.rcParams.update({f"{part}.color": GREY for part in ("text", "xtick", "ytick")})
    plt.rcParams.update(
        {f"axes.{part}": GREY for part in ("edgecolor", "labelcolor", "titlecolor")}
    )
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    sequences = read_table("sequences")
    zeros = [row for row in read_table("zeros") if "%" in row["zeros"]]
    for axes, text in ((middle, "WikiText-2"), (right, "source code")):
        rows = [row for row in sequences if row["text"] == text]
        axes.set_xscale("log")  # before the ticks, which it would replace
        draw(axes, rows, rows[0]["dense"], f"{text}, 60 % zeros")
        axes.set_xlabel("calibration sequences")
    # The first row of the table is of WikiText-2, too.
    draw(left, zeros, sequences[0]["dense"], "WikiText-2, 8 sequences")
    left.set_ylabel("perplexity of SmolLM2-135M")
    left.set_xlabel("% of zeros")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False
    )
    figure.savefig(HERE / "results.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
