"""The web pages of one run directory: server-rendered, streamed over SSE, nothing from other hosts."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from pmdflow.dashboard import trajectories
from pmdflow.dashboard.access import LocalNames, RequireToken, is_local, shown_link, token_of, url_of
from pmdflow.dashboard.advice import AdviceView
from pmdflow.dashboard.comparison import CHARTS, HELD_OUT, Comparison
from pmdflow.dashboard.episode import episode_of
from pmdflow.dashboard.live import live_detail, live_rows
from pmdflow.dashboard.panels import figures
from pmdflow.dashboard.queries import RunView
from pmdflow.dashboard.stream import streamed
from pmdflow.errors import LaunchError
from pmdflow.metrics.companion import bind
from pmdflow.store import StoreError

FIRST_WAIT_S = 0.3
"""So long the run page waits for the files; a longer reading does not keep the page from being seen."""

_HERE = Path(__file__).parent
_PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'none'"
_HEADERS = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"}
_TEMPLATES = Jinja2Templates(directory=_HERE / "templates")


def serve(runs: Sequence[Path], *, host: str, port: int) -> None:
    """Serve a run, or the comparison of several, at `host` until interrupted; port 0 takes a free one.

    Prints the address; the token is that of the first run.

    Raises:
        LaunchError: one is no run directory, the port is taken, or there is no token and none can be made.
    """
    for run in runs:
        require_run(run)
    token = None if is_local(host) else token_of(runs[0])
    app = make_app(*runs, host=host, token=token)
    with bind("dashboard", host, port, hint="choose another with --port, or 0 for any free one") as listener:
        listener.listen()  # from here on a browser that is too early waits instead of failing
        link = shown_link(runs[0], url_of(host, listener.getsockname()[1]), token, sys.stdout)
        sys.stdout.write(f"dashboard: {link}\n")
        sys.stdout.flush()
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
        uvicorn.Server(config).run(sockets=[listener])


def require_run(run: Path) -> None:
    """Refuse what holds no run.

    Raises:
        LaunchError: `run` is no run directory.
    """
    if not (run / "config.yaml").is_file() and not (run / "metrics.jsonl").is_file():
        raise LaunchError(f"{run} is no run directory (it has neither config.yaml nor metrics.jsonl)")


def make_app(*runs: Path, host: str = "127.0.0.1", token: str | None = None) -> Starlette:
    """The application that serves a run, or the comparison of several, at `host`.

    Args:
        runs: Run directories.
        host: Where it is served; without a token, only requests under names of this machine are answered.
        token: What every request must show; None asks for nothing.

    Raises:
        LaunchError: one is no run directory.
    """
    for run in runs:
        require_run(run)
    own = Pages(runs[0]).routes() if len(runs) == 1 else ComparisonPages(runs).routes()
    routes = [
        *own,
        Route("/plotly.min.js", lambda _: FileResponse(_PLOTLY, media_type="text/javascript")),
        Mount("/static", StaticFiles(directory=_HERE / "static")),
    ]
    guard = Middleware(LocalNames, host=host) if token is None else Middleware(RequireToken, token=token)
    return Starlette(routes=routes, middleware=[guard])


class Pages:
    """The handlers of one run's pages."""

    def __init__(self, run: Path) -> None:
        """Begin to read the run's files."""
        self.view = RunView(run)
        self._advice = AdviceView(run)
        self._charts: tuple[int, dict[str, str]] = (-1, {})
        self._reading = threading.Thread(target=self.view.refresh, name="first-reading", daemon=True)
        self._reading.start()

    def routes(self) -> list[Route]:
        """Where each page is."""
        return [
            Route("/", self.overview),
            Route("/api/update", self.update),
            Route("/events", streamed(self.snapshot)),
            Route("/trajectories", self.table),
            Route("/trajectories/{iteration:int}/{trajectory:int}", self.trajectory),
            Route("/trajectories/live/{trajectory:int}", self.live),
        ]

    def overview(self, request: Request) -> Response:
        """The run page; while the files of a long run are read for the first time, without its parts, which follow."""
        self._reading.join(FIRST_WAIT_S)
        if self._reading.is_alive():
            return self._page(request, "overview.html", reading=True)
        self.view.refresh()
        return self._page(request, "overview.html", **self._parts())

    def update(self, _: Request) -> Response:
        """Everything that the page shows, as one JSON object: what the stream sends first."""
        return JSONResponse({key: json.loads(value) for key, value in self.snapshot().items()})

    def table(self, request: Request) -> Response:
        """The table of archived trajectories, or of those in the store."""
        wanted, page = _filter(request.query_params)
        rows, problem = self._rows(wanted)
        last = max(0, math.ceil(len(rows) / trajectories.PAGE_ROWS) - 1)
        page = min(page, last)
        shown = rows[page * trajectories.PAGE_ROWS : (page + 1) * trajectories.PAGE_ROWS]
        return self._page(
            request, "table.html", rows=shown, total=len(rows), page=page, last=last, wanted=wanted,
            query=dict(request.query_params), sort_keys=trajectories.SORT_KEYS, newest=trajectories.NEWEST_PARTS,
            problem=problem,
        )  # fmt: skip

    def trajectory(self, request: Request) -> Response:
        """One trajectory, token by token."""
        iteration, trajectory = request.path_params["iteration"], request.path_params["trajectory"]
        self.view.refresh()
        tokenizer = trajectories.load_tokenizer(self.view.run_dir, self.view.setting("model", "path"))
        found = trajectories.detail(self.view.run_dir, iteration, trajectory, tokenizer)
        if found is None:
            raise HTTPException(404, f"the archive holds no trajectory {trajectory} in iteration {iteration}")
        return self._page(
            request, "trajectory.html", detail=found, decoded=tokenizer is not None,
            episode=episode_of(self.view.run_dir, found.branches[0][0]),
        )  # fmt: skip

    def live(self, request: Request) -> Response:
        """One trajectory of the store, token by token; once it is archived, its place there."""
        trajectory = request.path_params["trajectory"]
        self.view.refresh()
        tokenizer = trajectories.load_tokenizer(self.view.run_dir, self.view.setting("model", "path"))
        try:
            found = live_detail(self.view.run_dir, trajectory, tokenizer)
        except StoreError as error:
            raise HTTPException(503, f"the store cannot be read: {error}") from error
        if found is not None:
            growing = found.row.state == "generating" and self.view.diagnosis().state == "running"
            return self._page(
                request, "trajectory.html", detail=found, decoded=tokenizer is not None, growing=growing,
                episode=episode_of(self.view.run_dir, trajectory),
            )  # fmt: skip
        archived = trajectories.find(self.view.run_dir, trajectory)
        if archived is None:
            raise HTTPException(404, f"neither store nor archive holds trajectory {trajectory}")
        return RedirectResponse(f"/trajectories/{archived.iteration}/{trajectory}")

    def _rows(self, wanted: trajectories.Filter) -> tuple[list[trajectories.Row], str | None]:
        """What the table shows, and why it cannot."""
        if not wanted.live:
            return trajectories.search(self.view.run_dir, wanted), None
        try:
            return trajectories.select(live_rows(self.view.run_dir), wanted), None
        except StoreError as error:
            return [], f"the store cannot be read: {error}"

    def _page(self, request: Request, template: str, **context: Any) -> Response:
        values = {"run": self.view.name, "path": str(self.view.run_dir), **context}
        return _TEMPLATES.TemplateResponse(request, template, values, headers=_HEADERS)

    def _parts(self) -> dict[str, Any]:
        view = self.view
        return {
            "diagnosis": view.diagnosis(), "facts": view.facts(), "ledger": view.ledger(), "happened": view.events(),
            "advice": self._advice.lines(revision=view.revision),
        }  # fmt: skip

    def snapshot(self) -> dict[str, str]:
        """Parts of the page by name, each as JSON text: figures, and fragments of HTML."""
        view = self.view
        with view.lock:
            revision = view.refresh()
            if self._charts[0] != revision:
                charts = figures(view)
                self._charts = revision, {f"chart:{name}": json.dumps(figure) for name, figure in charts.items()}
            fragments = self._parts()
            html = {
                f"html:{name}": json.dumps(_TEMPLATES.get_template(f"{name}.html").render(fragments))
                for name in fragments
            }
            return {**self._charts[1], **html}


class ComparisonPages:
    """The handlers of the page that shows several runs."""

    def __init__(self, runs: Sequence[Path]) -> None:
        """Read nothing yet."""
        self._comparison = Comparison(runs)

    def routes(self) -> list[Route]:
        """Where each page is."""
        events = Route("/events", streamed(self.snapshot))
        return [Route("/", self.overview), Route("/api/update", self.update), events]

    def overview(self, request: Request) -> Response:
        """The page."""
        with self._comparison.lock:
            self._comparison.refresh()
            names, sides = self._comparison.names(), self._sides()
        charts = {"held-out": HELD_OUT, **{name: caption for name, (caption, _, _) in CHARTS.items()}}
        context = {"run": ", ".join(names), "path": "", "compared": True, "charts": charts, **sides}
        return _TEMPLATES.TemplateResponse(request, "compare.html", context, headers=_HEADERS)

    def update(self, _: Request) -> Response:
        """Everything that the page shows, as one JSON object: what the stream sends first."""
        return JSONResponse({key: json.loads(value) for key, value in self.snapshot().items()})

    def snapshot(self) -> dict[str, str]:
        """Parts of the page by name, each as JSON text."""
        with self._comparison.lock:
            self._comparison.refresh()
            sides, drawn = self._sides(), self._comparison.figures()
        html = _TEMPLATES.get_template("sides.html").render(sides)
        charts = {f"chart:{name}": json.dumps(figure) for name, figure in drawn.items()}
        return {**charts, "html:sides": json.dumps(html)}

    def _sides(self) -> dict[str, Any]:
        states, rows = self._comparison.facts()
        differences = self._comparison.differences()
        return {"names": self._comparison.names(), "states": states, "rows": rows, "differences": differences}


def _filter(query: Mapping[str, str]) -> tuple[trajectories.Filter, int]:
    """The table's filter and page from a query string; what is not a number does not filter."""
    sort = query.get("sort", "iteration")
    iteration = _read(query.get("iteration"), math.nan)
    wanted = trajectories.Filter(
        live=query.get("where") == "live",
        iteration=None if math.isnan(iteration) else int(iteration),
        reward_min=_read(query.get("reward_min"), -math.inf),
        reward_max=_read(query.get("reward_max"), math.inf),
        length_min=int(_read(query.get("length_min"), 0)),
        multi_version=query.get("multi_version") == "1",
        sort=sort if sort in trajectories.SORT_KEYS else "iteration",
        descending=query.get("order", "down") != "up",
    )
    return wanted, max(0, int(_read(query.get("page"), 0)))


def _read(text: str | None, default: float) -> float:
    try:
        value = float(text or "")
    except ValueError:
        return default
    return value if math.isfinite(value) else default
