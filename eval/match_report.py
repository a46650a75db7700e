"""What a folder of matched pairs comes to: `pairs.csv`, and `index.html` with pictures, in order of doubt."""
import html
from collections import Counter
from pathlib import Path
from urllib.parse import quote

from eval.summary import write_csv
from tools.files import atomic_path

ORDER = ("doubtful", "trusted", "none")  # where nothing is claimed, nothing is in doubt
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Matched pairs</title>
<style>
body {{ font: 16px/1.5 sans-serif; margin: 1em; color: #282828 }}
img {{ max-width: 100%; height: auto }}
section {{ margin: 2em 0 }}
h2 {{ font-size: 1em; margin: 0; overflow-wrap: anywhere }}
p {{ margin: .3em 0 }}
.trusted {{ color: #187a10 }} .doubtful {{ color: #a85b00 }} .none {{ color: #b01818 }}
</style>
<h1>Matched pairs</h1>
<p>{counts}; doubtful ones first, then fewest inliers first; <a href="pairs.csv">pairs.csv</a> has the numbers.</p>
{sections}
</html>
"""
SECTION = """<section>
<h2>{title}</h2>
<p><b class="{verdict}">{verdict}</b>{line}</p>
<a href="{picture}"><img loading="lazy" src="{picture}" alt="matches of {title}"></a>
</section>"""


def write_report(folder, summaries: dict[str, dict]) -> None:
    """Write `pairs.csv` and `index.html` into a folder, atomically.

    summaries: {name of a pair's files without suffix: `ImageMatches.summary`}.
    """
    write_csv(Path(folder, "pairs.csv"), [
        {name: _as_text(value) for name, value in {**summary, "files": stem}.items()}
        for stem, summary in summaries.items()])
    ranking = sorted(summaries.items(), key=lambda item: (ORDER.index(item[1]["verdict"]), item[1]["inliers"]))
    page = PAGE.format(counts=count_verdicts(summaries), sections="\n".join(_section(*item) for item in ranking))
    with atomic_path(Path(folder, "index.html")) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def count_verdicts(summaries: dict[str, dict]) -> str:
    """One line: how many pairs are trusted, doubtful, and without a pose."""
    counts = Counter(summary["verdict"] for summary in summaries.values())
    return f"{counts['trusted']} trusted, {counts['doubtful']} doubtful, {counts['none']} without a result"


def _as_text(value):
    """A cell of a table: text that a spreadsheet would take for a formula begins with an apostrophe."""
    if not isinstance(value, str):
        return value
    value = value.encode(errors="replace").decode()
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _section(stem: str, summary: dict) -> str:
    parts = [f": {summary['inliers']} inliers of {summary['matches']} matches"]
    if summary["rotation"] is not None:
        parts.append(f"rotation {summary['rotation']:.1f} degrees")
    if summary["iterations"] is not None:
        parts.append(f"{summary['iterations']} of {summary['layers']} iterations")
    parts += [f"{summary['seconds']:.2f} s", f"K {summary['K_source0']}, {summary['K_source1']}", summary["remark"]]
    return SECTION.format(title=html.escape(f"{summary['image0']} \u2013 {summary['image1']}"),
                          line=html.escape("; ".join(filter(None, parts))), verdict=summary["verdict"],
                          picture=html.escape(quote(f"{stem}.png", errors="surrogateescape")))
