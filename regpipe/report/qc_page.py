"""Writes ``report.html``, the page to judge a folder of registered cases by. It loads nothing from elsewhere."""

from __future__ import annotations

import base64
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from regpipe import __version__
from regpipe.metrics.metric import METRICS, Threshold, shown_in
from regpipe.metrics.thresholds import Verdict, judge, said, with_gains
from regpipe.report import views
from regpipe.utils.errors import InputError
from regpipe.utils.files import parse_json, replace_file

PAGE = "report.html"
COPIES = "report"  # the folder of pictures beside a page with ``--out``
TEMPLATES = Path(__file__).parent / "page"
BINS = 20
VIEWED = ("planes", "layers", "landmarks")  # the parts of a view that the page needs
UNKNOWN = "could not be computed"
KINDS = {".webp": "image/webp", ".png": "image/png"}


class Registered(NamedTuple):
    """A finished case, read from its folder."""

    name: str
    folder: Path
    row: dict[str, float]  # the metrics; NaN where the case has none
    verdict: Verdict
    view: dict[str, Any] | None  # see ``report.views``
    warnings: list[str]  # see ``metrics.trust``
    volumes: dict[str, Any]  # of its labels, see ``transforms.volume``
    origin: str  # its weights and settings, as JSON


def write_report(
    folder: Path, limits: Mapping[str, Threshold], *, out: Path | None = None, single_file: bool = False
) -> tuple[Path, list[Registered]]:
    """Write the page of the cases in ``folder``; returns its path and the cases, the worst first.

    Args:
        folder: what ``regpipe register`` or a bundle's inference wrote, or one case's folder.
        limits: see ``metrics.thresholds``.
        out: a folder for the page and copies of the pictures, to hand on; default: ``folder``, with the pictures of
            its cases.
        single_file: all pictures inside the page.

    Raises:
        InputError: no folder, no finished case in it, or it cannot be written to.
    """
    cases, problems = read_cases(folder, limits)
    target = out or folder
    pictures = [_pictures(case, target, copied=out is not None, inside=single_file) for case in cases]
    shown = [_for_viewer(case, of_case, limits) for case, of_case in zip(cases, pictures, strict=True)]
    text = _render(
        title=folder.resolve().name,
        cases=list(zip(cases, shown, strict=True)),
        problems=problems,
        counts={status: sum(case.verdict.status == status for case in cases) for status in ("fail", "warn", "pass")},
        columns=[name for name in shown_in("page") if any(_has(case, name) for case in cases)],
        limits=limits,
        volumes=_volumes(cases),
        made=_made([case.folder for case in cases]),
    )
    try:
        replace_file(target / PAGE, text.encode())
    except OSError as cause:
        raise InputError(
            f"{target}: cannot be written to ({cause.strerror}); give another folder with --out"
        ) from cause
    return target / PAGE, cases


def read_cases(folder: Path, limits: Mapping[str, Threshold]) -> tuple[list[Registered], list[str]]:
    """The finished cases of a folder, the worst first, and a line for each problem.

    Raises:
        InputError: no folder, or no finished case in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give what regpipe register -o wrote")
    found = (
        [folder] if (folder / "metrics.json").is_file() else sorted(path for path in folder.iterdir() if path.is_dir())
    )
    cases, problems = [], []
    for path in found:
        if not (path / "metrics.json").is_file():
            if (path / "transform.json").is_file():
                problems.append(f"{path.name}: unfinished; the same command as before goes on with it")
            continue
        try:
            cases.append(_read(path, limits))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as cause:
            problems.append(f"{path.name}: its metrics.json is damaged ({type(cause).__name__}); register it again")
    if not cases:
        why = f" ({problems[0]})" if problems else ""
        raise InputError(f"{folder}: holds no finished registration{why}; give what regpipe register -o wrote")
    return sorted(cases, key=lambda case: _worst_first(case.verdict)), problems + _made_otherwise(cases)


def _read(path: Path, limits: Mapping[str, Threshold]) -> Registered:
    content = parse_json((path / "metrics.json").read_bytes())
    warnings = [str(line) for line in content.get("warnings", [])]
    numbers = {k: math.nan if v is None else float(v) for k, v in content.items() if isinstance(v, int | float | None)}
    row = with_gains(numbers)
    verdict = judge(row, limits)
    if warnings and verdict.status == "pass":
        verdict = verdict._replace(status="warn")
    made = content.get("made_from")
    made = made if isinstance(made, dict) else {}  # of another tool's row, or an older version's: unknown
    origin = json.dumps([made.get("weights"), made.get("settings")], sort_keys=True)
    volumes = {str(int(label)): {"ratio": float(told["ratio"])} for label, told in content.get("volumes", {}).items()}
    return Registered(str(content["case"]), path, row, verdict, _view(path / views.FOLDER), warnings, volumes, origin)


def _volumes(cases: Sequence[Registered]) -> dict[str, tuple[int, float, float, float]]:
    told = [{"volumes": case.volumes} for case in cases if case.volumes]
    if not told:
        return {}
    from regpipe.metrics.measures import mean_ratios  # brings torch, which a page without labels does not need

    return mean_ratios(told)


def _made_otherwise(cases: Sequence[Registered]) -> list[str]:
    """A line for each case that was registered with other weights or settings than most cases."""
    (usual, count), *_ = Counter(case.origin for case in cases).most_common(1)
    why = f"was registered with other weights or settings than {count} other cases; register the folder again"
    return [f"{case.folder.name}: {why}" for case in cases if case.origin != usual]


def _view(folder: Path) -> dict[str, Any] | None:
    """The case's ``view.json``; None where it is missing or damaged."""
    try:
        view: dict[str, Any] = parse_json((folder / views.NAME).read_bytes())
        named = [plane["name"] for plane in view["planes"]] + [*view["layers"].values()]
        sound = view["format"] == views.FORMAT and set(VIEWED) <= view.keys() and all(isinstance(n, str) for n in named)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return view if sound else None


def _worst_first(verdict: Verdict) -> tuple[int, tuple[float, ...]]:
    return ("fail", "warn", "pass").index(verdict.status), tuple(-value for value in verdict.badness)


# ------------------------------------------------------------------------------------------ pictures


def _pictures(case: Registered, target: Path, *, copied: bool, inside: bool) -> dict[str, str]:
    """File name -> address in the page, for each picture of a case."""
    files = [case.folder / "sheet.png"]  # of a case without a view
    if case.view is not None:
        ends = case.view["layers"].values()
        names = [f"{plane['name']}_{end}" for plane in case.view["planes"] for end in ends]
        files = [case.folder / views.FOLDER / Path(name).name for name in names]  # of this folder and no other
    files = [file for file in files if file.is_file()]
    if inside:
        held = ((file, base64.b64encode(file.read_bytes()).decode()) for file in files)
        return {file.name: f"data:{KINDS[file.suffix]};base64,{data}" for file, data in held}
    if copied:
        place = target / COPIES / Path(os.path.abspath(case.folder)).name  # a link's own name
        place.mkdir(parents=True, exist_ok=True)
        files = [shutil.copyfile(file, place / file.name) for file in files]
    return {file.name: quote(file.relative_to(target).as_posix()) for file in files}


def _has(case: Registered, name: str) -> bool:
    """Whether a case has a value or a verdict for a metric."""
    return name in case.verdict.steps or not math.isnan(case.row.get(name, math.nan))


def _for_viewer(case: Registered, pictures: Mapping[str, str], limits: Mapping[str, Threshold]) -> dict[str, Any]:
    """The data of a case for the page's script."""
    numbers = [
        {
            "title": METRICS[name].title,
            "unit": METRICS[name].unit,
            "before": _number(case.row.get(f"{name}_before", math.nan)),
            "value": _number(case.row.get(name, math.nan)) or UNKNOWN,
            "limits": said(name, limits[name]) if name in limits else "",
            "step": case.verdict.steps.get(name, ""),
        }
        for name in shown_in("page")
        if _has(case, name)
    ]
    view = case.view or {"planes": [], "layers": {}, "landmarks": []}
    return {
        "name": case.name,
        "status": case.verdict.status,
        "warnings": case.warnings,
        "numbers": numbers,
        "pictures": pictures,
        **{key: view[key] for key in VIEWED},
    }


# ---------------------------------------------------------------------------------------------- page


def template() -> Any:
    """The page's Jinja2 template; it escapes every name."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    page = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters["number"] = _number
    return page.get_template(f"{PAGE}.j2")


def _render(**content: Any) -> str:
    from markupsafe import Markup

    files = {name: (TEMPLATES / f"report.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    css, js = (Markup(files[name]) for name in ("css", "js"))  # no text of a user  # nosec B704
    rows = [case.row for case, _ in content["cases"]]
    charts = [
        chart(name, [row.get(name, math.nan) for row in rows], content["limits"].get(name))
        for name in content["columns"]
    ]
    bar: dict[str, Any] = {"stops": views.stops(views.CHANGE), "largest": views.LARGEST, "fold": views.FOLD}
    bar |= {"rising": views.stops(views.ERROR), "farthest": views.FARTHEST, "colours": views.COLOURS}
    about = {"css": css, "js": js, "charts": charts, "metrics": METRICS, "version": __version__, "bar": bar}
    return template().render(**content, **about, nan=math.nan, unknown=UNKNOWN)


def chart(name: str, values: Sequence[float], limit: Threshold | None) -> dict[str, Any]:
    """The histogram of a metric in units of its width and height (0 to 1), for an SVG.

    The range holds the values, and a threshold where it is near them.
    """
    numbers = np.array(values, float)
    numbers = numbers[np.isfinite(numbers)]
    low, high = (float(numbers.min()), float(numbers.max())) if len(numbers) else (0.0, 1.0)
    steps = [] if limit is None else [(kind, getattr(limit, kind)) for kind in ("warn", "fail")]
    steps = [step for step in steps if math.isfinite(step[1])]
    low, high = (low, low) if high - low < 1e-9 * abs(high) else (low, high)  # digits lost, no range of values
    reach = high - low or max([abs(step - low) for _, step in steps], default=0.0) or 1.0
    near = [step for _, step in steps if low - reach <= step <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    high = high if high > low else low + reach
    counts, _ = np.histogram(numbers, BINS, (low, high))
    share = [round(float(n) / max(counts.max(), 1), 4) for n in counts]
    lines = [{"kind": kind, "at": round((step - low) / (high - low), 4)} for kind, step in steps if low <= step <= high]
    middle = float(np.median(numbers)) if len(numbers) else math.nan
    return {"name": name, "bars": share, "lines": lines, "low": low, "high": high, "median": middle, "n": len(numbers)}


def _number(value: float) -> str:
    """Four significant digits, at most four decimal places, two digits below 1e-4; empty for NaN."""
    if math.isnan(value):
        return ""
    if value == 0 or math.isinf(value) or abs(value) >= 1000:
        return f"{value:.0f}"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    digits = 3 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(digits, 4)}f}"


def _made(folders: Sequence[Path]) -> dict[str, str]:
    """Versions and settings of the cases; "differs between cases" where they do."""
    told: dict[str, set[str]] = {}
    for folder in folders:
        try:
            content = json.loads((folder / "transform.json").read_text(encoding="utf-8"))
            known_of = {**content["versions"], **content["settings"], "alignment": content["alignment"]["stage"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        for name, value in known_of.items():
            told.setdefault(name, set()).add(_words(value))
    return {name: values.pop() if len(values) == 1 else "differs between cases" for name, values in told.items()}


def _words(value: Any) -> str:
    """A setting as text; of a path only the last part, because the page may be handed on."""
    if isinstance(value, str):
        return value.replace("\\", "/").rstrip("/").rpartition("/")[2]
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_words(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_words(v) for v in value)
    return str(value)
