"""Register a folder: each case gets a folder of results, finished cases are skipped, failures are reported."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regpipe.data import manifest
from regpipe.data.checks import check_pairs
from regpipe.data.load import LoadPair, collate_pairs
from regpipe.data.pairs import SIDES, Case, list_pairs
from regpipe.engines.inferers import prepare_batch
from regpipe.engines.rigid import held, labels_of
from regpipe.fields.algebra import LAYERS
from regpipe.inference import guides, jobs, summary
from regpipe.inference.case_files import BY_DEFAULT, DENSE, clear, save_case
from regpipe.inference.ladder import FittingInferer, require_for_files
from regpipe.io import images
from regpipe.io.source import Source
from regpipe.metrics import typical
from regpipe.transforms import export
from regpipe.utils import console, distributed, machine
from regpipe.utils.errors import REMEDIES, InputError, cause, disk_full, explain, out_of_memory, root
from regpipe.utils.files import parse_json, replace_file, sha256

log = logging.getLogger(__name__)


class FolderRun:
    """The pairs of a folder, which of them are left to register, and the handler that writes their results.

    ``metrics.json`` is written last, after ``manifest.json`` (``data.manifest``): a case that has one is finished and
    is not registered again. Iterating yields a batch of one case for each case that is left and can be read;
    ``failures`` holds those that cannot. Several processes share the cases that were left when they began.

    Args:
        dataset_dir: see ``regpipe.list_pairs``.
        load: how a case becomes tensors.
        output_dir: a folder per case is made in it.
        model: the weight file; a case finished with another one, or from other files, is registered again.
        pairing: see ``regpipe.list_pairs``.
        formats: transforms written per case, also one text with commas: ``displacement``, and ``transforms.export``'.
        fill: what lies outside of the warped image; None: as the moving image has it, see ``io.background``.
        settings: what else the results depend on; a case finished with other ones is registered again.
        memory_gib: see ``inference.ladder``.
        rigid: labels of the fixed images that stay rigid, see ``engines.rigid``.
        guide_labels: of labels that lead only these.
        channels: of images of several values at each place, which are channels: ``data.channels.spread``.

    Raises:
        InputError: there is no pair in ``dataset_dir`` at all, or no such format.
    """

    def __init__(
        self,
        dataset_dir: str,
        *,
        load: LoadPair,
        output_dir: str,
        model: str = "",
        pairing: str = "all",
        formats: str | Sequence[str] = BY_DEFAULT,
        fill: float | None = None,
        settings: Mapping[str, Any] | None = None,
        memory_gib: float | None = None,
        uncertainty: bool = False,
        rigid: str | Sequence[Any] = (),
        guide_labels: str | Sequence[Any] = (),
        channels: str | int | Sequence[int] | None = None,
    ) -> None:
        if not str(output_dir):
            raise InputError("the folder for the results has no name; give one, or . for the current folder")
        if isinstance(formats, str):
            formats = [name.strip() for name in formats.split(",") if name.strip()]
        dim = 3 if load.grid is None else len(load.grid.shape)  # of a folder of any pairs each case says
        export.check_formats([name for name in formats if name != DENSE], dim)
        self.memory_gib, self._held = memory_gib, machine.held()
        self.load, self.folder, self.formats = load, Path(output_dir), tuple(formats)
        told: dict[str, Any] = {} if fill is None else {"fill": str(fill)}  # JSON has no NaN
        self._fill = fill
        self.uncertainty = uncertainty
        self._rigid = labels_of(rigid) if rigid else []
        self._guide_labels = labels_of(guide_labels, "--guide-labels") if guide_labels else []
        given = {"guide_labels": self._guide_labels, "uncertainty": uncertainty, "rigid": self._rigid}
        told |= {name: value for name, value in given.items() if value}
        self._settings = {**(settings or {}), "formats": sorted(formats), **told}
        self.failures: dict[str, str] = {}
        listed = list_pairs(dataset_dir, pairing=pairing, channels=channels, problems=self.failures)
        self.cases = {case["case"]: case for case in listed}
        self._model = manifest.bundle_files(Path(model).parent) if Path(model).is_file() else []
        self._weights = sha256([Path(model)]) if self._model else ""
        self._typical = typical.read(Path(model).parent, dim) if self._model else {}
        self._mine, self._taken = list(self.cases), jobs.of_this_process()
        # rank 0's list: on that of one that begins later, what others have finished by then would be missing
        left = distributed.of_first([case["case"] for case in self._todo()])
        self._finished, self._mine = len(self.cases) - len(left), distributed.share(left)
        self._current, self._began, self._files = "", 0.0, Source()
        self._guides: list[str] = []  # of the pair's own truth, see ``inference.guides``
        self._layers = LAYERS  # what the inferer warps by, and the metrics

    @functools.cached_property
    def dataset(self) -> Any:
        """What a bundle calls its dataset: the cases that were left, as ``monai.data.Dataset``."""
        from monai.data import Dataset  # MONAI takes seconds to import

        return Dataset(data=self._todo(), transform=self._load)

    def _result(self, name: str) -> dict[str, Any] | None:
        """The row of a finished case."""
        path = self.folder / name / "metrics.json"
        try:
            if not path.is_file():
                return None
            row = parse_json(path.read_bytes())
            row.setdefault("warnings", [])  # of a version that had none
            return row if row.pop("made_from") == self._made_from(self.cases[name]) else None
        except (OSError, ValueError, AttributeError, KeyError):  # no file of ours, or a damaged one
            return None

    def _made_from(self, case: Case) -> dict[str, Any]:
        """What a result depends on: each file's name, size and time, the weights and the settings."""
        found = {key: _stamps(path) for key, path in case.items() if key != "case"}
        return {**found, "weights": self._weights, "settings": self._settings}

    def _todo(self) -> list[Case]:
        left = (name for name in self._mine if name not in self.failures and self._taken.free(name))
        return [self.cases[name] for name in left if self._result(name) is None]

    # No __len__: a case that fails yields no batch, and Ignite would begin again to fill up an epoch.
    def __iter__(self) -> Iterator[dict[str, Any]]:
        for case in console.Progress(self._todo(), what="registering", unit="pairs"):
            if not self._taken.take(case["case"]):
                continue
            self._current, self._began, self._files = case["case"], time.monotonic(), Source(hashed=True)
            try:
                self.load.require_channels(case)
                problem = check_pairs([case], landmark_channels=self.load.landmark_channels, files=self._files)
                if problem:
                    raise InputError(problem[case["case"]])
                self._require_memory(case)
                batch = collate_pairs([self._load(case)])
            except Exception as error:  # whatever one case meets, the others are done
                self._fail(case["case"], cause(error) or _told("loaded", error))
                continue
            yield batch

    def _require_memory(self, case: Case) -> None:
        shapes = [self._files.header(case[f"{side}_image"])[0] for side in SIDES]
        reusable = machine.held_since(self._held)
        require_for_files(case["fixed_image"], *shapes, memory_gib=self.memory_gib, reusable=reusable)

    def _load(self, case: Case) -> dict[str, Any]:
        """The case's tensors; of its files only images and labels are kept, as they are written later."""
        item = self.load(case, self._files)
        for role in case:
            if not role.endswith(("image", "label")):
                self._files.let_go(case[role])
        return item

    def attach(self, engine: Any) -> None:
        """As a handler of an Ignite engine."""
        from ignite.engine import Events

        engine.add_event_handler(Events.ITERATION_COMPLETED, self._of_engine)

    def _of_engine(self, engine: Any) -> None:
        output = engine.state.output
        engine.state.output = engine.state.batch = None  # not kept while the next case is registered
        self._save(output["label"], output["pred"])

    def _save(self, batch: Mapping[str, Any], prediction: Mapping[str, Any]) -> None:
        name = batch["case"][0]
        try:
            self._write(name, batch, prediction)
        except InputError as problem:
            self._give_up(name, problem)
        except OSError as problem:
            if disk_full(problem):  # nor can any other case be written
                self._clean(name)
                raise
            # a folder that may not be written, or a file where the case's folder should be
            self._give_up(name, InputError(f"{self.folder / name}: cannot be written ({problem.strerror})"))
        except Exception as problem:  # whatever it is, the other cases are done
            log.debug("%s", name, exc_info=True)
            self._give_up(name, _told("written", problem))
        finally:
            self._files = Source()

    def _write(self, name: str, batch: Mapping[str, Any], prediction: Mapping[str, Any]) -> None:
        """Write all results of a case, in place of an earlier run's."""
        case, folder = self.cases[name], self.folder / name
        if (folder / "metrics.json").is_file():
            console.say(f"{name}: was registered from other files, weights or settings before, and is replaced")
        clear(folder)
        told_of = {key: prediction.get(key, [None])[0] for key in ("start", "contrast")}  # of the refinement
        told_of = {"to_fit_memory": prediction.get("to_fit_memory"), **told_of}
        spared: dict[str, Any] = {key: value for key, value in told_of.items() if value}
        if not prediction["displacement"].any():
            spared["found"] = summary.NOTHING
        told = {**self._settings, "weights": self._weights, **spared}
        how: dict[str, Any] = {"formats": self.formats, "fill": self._fill, "settings": told, "typical": self._typical}
        row, hashes = save_case(case, batch, prediction, self.load, folder, self._files, layers=self._layers, **how)
        motions = prediction.get("rigid", {})
        row["warnings"] += guides.warnings(self._guides, motions)
        row |= {**spared, **guides.told_of(motions), "made_from": self._made_from(case)}
        self._finish(name, json.dumps(row, indent=1).encode(), hashes, prediction)
        if row["warnings"]:
            console.complain("warning", f"{name}: {'; '.join(row['warnings'])}")

    def _finish(self, name: str, metrics: bytes, hashes: Mapping[str, str], prediction: Mapping[str, Any]) -> None:
        """Write the manifest, and last the file that marks the case as finished."""
        folder = self.folder / name
        manifest.write(
            folder,
            "registration",
            case=name,
            inputs=manifest.inputs_of(self.cases[name], self._files),
            model=self._model,
            settings=self._settings,
            files={path: hashes[path] for path in sorted(hashes, key=Path)}
            | {"metrics.json": hashlib.sha256(metrics).hexdigest()},
            seed=manifest.SEED,
            machine=manifest.machine(prediction["displacement"].device),
            given_up=prediction.get("to_fit_memory") or [],
            seconds=round(time.monotonic() - self._began, 2),
        )
        replace_file(folder / "metrics.json", metrics)

    def _give_up(self, name: str, problem: InputError) -> None:
        self._clean(name)
        self._fail(name, problem)

    def _clean(self, name: str) -> None:
        """Remove the files of a case that could not be written completely."""
        with contextlib.suppress(OSError):
            clear(self.folder / name)
            (self.folder / name).rmdir()

    def _fail(self, name: str, problem: InputError) -> None:
        self.failures[name] = str(problem)
        if not jobs.started():  # the first process does it again, and says so
            console.complain("error", f"{name}: {problem}")

    def register_by(self, network: nn.Module, inferer: Any, *, strict: bool = False, processes: int = 1) -> None:
        """As ``register``, without MONAI: ``inferer`` applies ``network``, within memory, in so many ``processes``."""
        device, _ = distributed.device(), network.eval()
        self._guides = getattr(getattr(inferer, "refiner", None), "guides", [])
        if self._guide_labels and "labels" not in self._guides:
            raise InputError("--guide-labels goes with --guide labels")
        if self._guides and self.uncertainty:
            raise InputError(
                "--uncertainty: it moves the images, and --guide's labels and landmarks would not follow; leave one out"
            )
        FittingInferer(inferer, memory_gib=self.memory_gib)  # refuses a wrong one, before anything is written

        def run() -> None:
            fitting = FittingInferer(inferer, memory_gib=self.memory_gib, uncertainty=self.uncertainty)
            for batch in self:
                pair, target, _, told = prepare_batch(batch, device)
                with torch.no_grad():
                    truth = {"truth": guides.truth_of(target, self._guides, self._guide_labels)} if self._guides else {}
                    prediction = fitting(pair, network, **told, **truth)
                    if self._rigid:
                        prediction, motions = held(prediction, target, self._rigid)
                        prediction["rigid"] = motions
                self._save(target, prediction)
                del batch, pair, target, told, truth, prediction  # not kept while the next case is registered

        self._register(run, inferer, strict=strict, processes=processes)

    def register(self, evaluator: Any, *, strict: bool = False) -> None:
        """As ``_register``, with MONAI's evaluator, whose data loader and handler this object is."""
        if self._rigid:
            raise InputError("--rigid goes with regpipe's own configurations")
        self._register(evaluator.run, evaluator.inferer, strict=strict)

    def _register(self, run: Callable[[], object], inferer: Any, *, strict: bool, processes: int = 1) -> None:
        """Register the cases that are left, write ``metrics.csv`` over all finished ones and print a summary.

        Raises:
            InputError: the output folder cannot be made; the disk is full, and finished cases are kept.
            SystemExit: with 1, if a case failed or, where ``strict``, has a warning; with 130 on Ctrl-C, finished
                cases kept.
        """
        self._layers = getattr(inferer, "layers", LAYERS)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            message = f"{self.folder}: cannot be made ({problem.strerror}); give another folder for the results"
            raise InputError(message) from problem
        if self._finished:
            console.say(f"{self._finished} of {len(self.cases)} cases are finished already")
        try:
            with jobs.beside(processes) as self._taken:
                while self._todo():
                    self._run(run)
            if jobs.started():
                return
            self._taken = jobs.Taken()
            while self._todo():
                self._run(run)
        except KeyboardInterrupt:
            console.say("\nstopped: the same command goes on with the cases that are left")
            raise SystemExit(130) from None
        except OSError as problem:
            raise InputError(f"{explain(problem)}; the same command goes on with the cases that are left") from problem
        self.failures = distributed.merged(self.failures)
        rows = [row for row in map(self._result, self.cases) if row is not None]
        if distributed.rank() == 0:
            all_cases = len(self.cases.keys() | self.failures.keys())
            summary.tell(self.folder, rows, cases=all_cases, failures=self.failures, finished=self._finished)
        distributed.leave()
        if self.failures or (strict and any(row["warnings"] for row in rows)):
            raise SystemExit(1)

    def _run(self, run: Callable[[], object]) -> None:
        """Register all that is left, up to the first case that fails in the network: out of memory, say."""
        self._current = ""
        try:
            run()
        except OSError:  # a full disk: nor can any other case be written
            raise
        except Exception as error:  # whatever one case meets, the others are done
            if not self._current:
                raise  # not a case's fault
            log.debug("%s", self._current, exc_info=True)
            self._fail(self._current, _told("registered", error))


def _told(done: str, error: BaseException) -> InputError:
    if out_of_memory(error):
        return InputError(f"cannot be {done} (out of memory: {REMEDIES})")
    return InputError(f"cannot be {done} ({root(error)}); leave it out, or report it with the output of regpipe doctor")


def _stamps(path: str) -> str:
    """A hash of the name, size and time of each file of a case's entry; a name may identify a patient."""
    stamps = [[file.name, *about] for file, *about in images.stamps(path)]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
