"""Serves TensorBoard on the logs of a folder, to this machine alone."""

from __future__ import annotations

import contextlib
import io
import threading
from pathlib import Path
from typing import Any

from tensorboard import default, program

from regpipe.utils import console
from regpipe.utils.errors import InputError

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
SAMPLES = "scalars=5000,images=50,histograms=100,text=20"  # steps shown of each; by default 10 pictures


class _Here(program.WerkzeugServer):
    """Answers only requests that name this machine: another site can make its own name lead to 127.0.0.1."""

    def __init__(self, wsgi_app: Any, flags: Any) -> None:
        def asked(environ: dict[str, Any], start_response: Any) -> Any:
            if environ.get("HTTP_HOST", "").partition(":")[0] in NAMES:
                return wsgi_app(environ, start_response)
            start_response("403 Forbidden", [("Content-Type", "text/plain")])
            return [b"regpipe dashboard answers as 127.0.0.1 or localhost; behind a proxy run tensorboard itself"]

        super().__init__(asked, flags)


def start(folder: str | Path, *, port: int | None = None) -> str:
    """Start TensorBoard on every log below a folder, in a thread that ends with the process; returns its address.

    Args:
        folder: of a run, or of several.
        port: to listen on; without one the first that is free from 6006 on.

    Raises:
        InputError: no logs there, or the port is taken.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if next(folder.rglob("events.out.tfevents.*"), None) is None:
        raise InputError(f"{folder}: no TensorBoard logs in it; training a bundle and regpipe compare write them")
    board = program.TensorBoard(plugins=default.get_plugins(), server_class=_Here)
    options = {"logdir": folder, "host": HOST, "window_title": f"regpipe: {folder.name}", "samples_per_plugin": SAMPLES}
    options |= {} if port is None else {"port": port}
    board.configure(["tensorboard", *(f"--{name}={value}" for name, value in options.items())])
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # advice on its own options
            return str(board.launch())
    except program.TensorBoardServerException as error:
        where = "all ports from 6006 on are taken" if port is None else f"--port {port}: cannot be listened on"
        raise InputError(f"{where} ({error.msg.strip().splitlines()[0]}); give another --port") from error


def serve(folder: str | Path, *, port: int | None = None) -> None:
    """``start``, print the address of the tab that compares all runs, and stay until Ctrl-C."""
    address = start(folder, port=port)
    console.tell(address=address)
    print(f"TensorBoard on {address}#custom_scalars (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nended")
