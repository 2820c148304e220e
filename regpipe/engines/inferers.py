"""The adapters between regpipe's functions and MONAI's SupervisedTrainer / SupervisedEvaluator.

``prepare_batch`` makes the network's input of a collated batch (``data.pairs``), ``RegistrationInferer`` turns the
network's velocity into warped images, and ``losses.loss.RegistrationLoss`` weighs them. The iteration that does so
in training is ``engines.step.TrainingStep``; what happens around it is in ``engines.handlers``.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regpipe.data.pairs import SIDES, list_pairs
from regpipe.engines.refine import NO_TRUTH, Refiner
from regpipe.fields.algebra import (
    LAYERS,
    Layers,
    Registration,
    integrate_both,
    register,
    register_midway,
    resize,
    warp_both,
)
from regpipe.fields.folds import repair
from regpipe.io import images
from regpipe.io.images import Grid, load_grid
from regpipe.networks.symmetric import Prediction, SymmetricNet, prediction
from regpipe.networks.weights import channels_of, check_sound, read_state_dict, unwrapped
from regpipe.utils.errors import InputError

if TYPE_CHECKING:
    from monai.inferers import Inferer
else:
    Inferer = object  # MONAI's class holds nothing, and importing MONAI takes seconds

log = logging.getLogger(__name__)


def prepare_batch(
    batch: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **to_kwargs: Any
) -> tuple[Tensor, dict[str, Any], tuple[()], dict[str, Any]]:
    """A collated batch -> (pair (B, 2, *spatial), the whole batch on the device, (), what the inferer is told).

    MONAI's ``prepare_batch``.
    """
    target = {
        key: value.to(device, non_blocking=non_blocking, **to_kwargs) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
    told = {"masks": tuple(target[key] for key in ("fixed_mask", "moving_mask") if key in target)}
    if "fixed_channels" in target:
        told["channels"] = target["fixed_channels"], target["moving_channels"]
    return torch.cat([target["fixed_image"], target["moving_image"]], 1), target, (), told


class RegistrationInferer(Inferer):
    """Network -> velocity -> both displacements and both warped images, as a dict of ``Registration``'s fields.

    Under autocast only the network computes in half precision; its output is cast to float32. The dict's ``anatomy``
    are the structures that it sees. SYMNet's two velocities are composed to both fields, see
    ``networks.symmetric.Prediction``.

    Args:
        layers: what warps and integrates; ``channels`` of a pair are seen by a network of as many ``image_channels``.
        cascades: how often the network is applied: each time it sees both images in the midway space of the velocity so
            far and adds to it, for motion beyond its reach (as Zhao et al. 2019, but symmetric).
        refiner: optimises the velocity of each pair further, starting from the network's, or from zero where no
            part of it pays: ``start`` then says ``network`` or ``zero``, of each pair; ``contrast``: see
            ``losses.contrast``.
        repair: remove what folds are left; ``repaired`` (B,) then says how far the fields were moved, voxels at most.
    """

    def __init__(
        self, *, layers: Layers = LAYERS, cascades: int = 1, refiner: Refiner | None = None, repair: bool = False
    ) -> None:
        self.layers = layers
        self.cascades = cascades
        self.refiner = refiner
        self.repair = repair
        if cascades < 1:
            raise InputError(f"--cascades {cascades}: the network is applied once at least")

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Tensor | Prediction],
        *args: Any,
        masks: Sequence[Tensor] = (),
        truth: Mapping[str, Tensor] = NO_TRUTH,
        channels: Sequence[Tensor] = (),
        **kwargs: Any,
    ) -> dict[str, Any]:
        seen = all_channels(inputs, channels, network)
        found = prediction(network(seen, *args, **kwargs))
        if found.back is not None and (self.refiner is not None or self.cascades > 1):
            raise InputError("refinement and cascades go on from one velocity, SYMNet gives two: leave them out")
        anatomy = {} if found.structures is None else {"anatomy": found.structures.float()}
        fixed, moving = inputs.float().chunk(2, dim=1)
        velocity = found.velocity.float()
        for _ in range(self.cascades - 1):
            one, other = seen.float().chunk(2, dim=1)
            more = prediction(network(midway_images(one, other, velocity, self.layers), *args, **kwargs))
            velocity = velocity + more.velocity.float()
        beside: dict[str, Any] = dict(anatomy)
        with torch.autocast(inputs.device.type, enabled=False):
            if self.refiner is not None:
                told: dict[str, Any] = {"masks": masks, "truth": truth, "channels": channels, **anatomy}
                velocity, beside["start"], beside["contrast"] = self.refiner.refine(
                    fixed, moving, velocity, better=True, **told
                )
            if found.back is None:
                result = register(fixed, moving, velocity, layers=self.layers)
            else:
                result = register_midway(fixed, moving, velocity, found.back.float(), layers=self.layers)
        return {**(without_folds(fixed, moving, result, self.layers) if self.repair else result.tensors()), **beside}


def all_channels(pair: Tensor, channels: Sequence[Tensor], network: Callable[..., Any]) -> Tensor:
    """What a network sees of a pair (B, 2, *spatial) and the images beside it: (B, 2 C, *spatial), C as it takes.

    ``channels``: (B, C - 1, *spatial) of the fixed and of the moving side; a network of one sees none of them.
    """
    wanted = channels_of(network)
    if wanted == 1:
        return pair
    many = 1 + (channels[0].shape[1] if channels else 0)
    if many != wanted:
        raise InputError(f"the network takes {wanted} channels of each image, these have {many}; give as many")
    fixed, moving = pair.chunk(2, dim=1)
    return torch.cat([fixed, channels[0], moving, channels[1]], 1)


def midway_images(fixed: Tensor, moving: Tensor, velocity: Tensor, layers: Layers = LAYERS) -> Tensor:
    """Both images (B, C, *spatial) moved halfway to each other by exp(-v/2) and exp(v/2): (B, 2 C, *spatial)."""
    to_fixed, to_moving = integrate_both(velocity / 2, layers=layers)
    shape = fixed.shape[2:]
    halves = warp_both(fixed, moving, resize(to_moving, shape), resize(to_fixed, shape), layers=layers)
    return torch.cat(halves, 1)


def without_folds(fixed: Tensor, moving: Tensor, result: Registration, layers: Layers = LAYERS) -> dict[str, Tensor]:
    """The registration with both fields repaired (``fields.folds``), and ``repaired`` (B,): see the inferer."""
    there, back = repair(result.displacement), repair(result.inverse)
    warped = warp_both(moving, fixed, there.displacement, back.displacement, layers=layers)
    mended = Registration(result.velocity, there.displacement, back.displacement, *warped, result.back)
    return {**mended.tensors(), "repaired": torch.maximum(there.moved_max, back.moved_max)}


class ZeroInferer(Inferer):
    """Registration without a network: each pair's velocity optimised from zero; the network is not called.

    ``repair``: as ``RegistrationInferer``'s.
    """

    def __init__(self, refiner: Refiner, *, repair: bool = False) -> None:
        self.refiner = refiner
        self.repair = repair

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Tensor],
        *args: Any,
        masks: Sequence[Tensor] = (),
        truth: Mapping[str, Tensor] = NO_TRUTH,
        channels: Sequence[Tensor] = (),
        **kwargs: Any,
    ) -> dict[str, Any]:
        fixed, moving = inputs.float().chunk(2, dim=1)
        found = self.refiner.refine(fixed, moving, masks=masks, truth=truth, channels=channels)
        result = register(fixed, moving, found.velocity)
        fields = without_folds(fixed, moving, result) if self.repair else result.tensors()
        return {**fields, "contrast": found.contrasts}


def metric_input(output: Mapping[str, Any]) -> dict[str, Any]:
    """A MONAI evaluator's ``engine.state.output`` -> what ``metrics.cases.CaseMetrics`` is updated with."""
    return {"pred": output["pred"], "batch": output["label"]}


def parameter_groups(network: nn.Module, learning_rate: float, *, encoder_factor: float = 1.0) -> list[dict[str, Any]]:
    """Trainable parameters in two groups, the encoder's with ``encoder_factor`` times the learning rate.

    Transferred weights are near a good place already: give them a factor below 1 (discriminative fine-tuning,
    Howard & Ruder 2018).
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith("encoder.")].append(parameter)
    rates = {True: learning_rate * encoder_factor, False: learning_rate}
    told = {"encoder_factor": encoder_factor}  # torch keeps it
    return [{"params": params, "lr": rates[key], **told} for key, params in groups.items() if params]


def model_folder(folder: str, dataset_dir: str) -> str:
    """The folder in a bundle's ``models`` whose model registers these data.

    ``folder`` itself holds a model that was trained in the bundle; ``2d`` and ``3d`` in it hold the models that the
    bundle came with, which are taken where none was trained, or one for the other dimension.
    """
    own = Path(folder)
    if not any((own / name / "model.pt").is_file() for name in ("2d", "3d")):
        return folder
    dim = min(dimensions_of(dataset_dir, most=1))
    shipped = own / f"{dim}d"
    if not (shipped / "model.pt").is_file():
        return folder
    if (own / "model.pt").is_file() and trained_dimension(folder) == dim:
        return folder
    log.info("%s: the model that the bundle came with, trained on synthetic pairs", shipped)
    return str(shipped)


def dimensions_of(dataset_dir: str, *, most: int | None = None) -> set[int]:
    """The dimensions, 2, 3 or both, of a data set's images, of the first ``most``; 2 where none can be read."""
    found: set[int] = set()
    cases = list_pairs(dataset_dir, pairing="first", problems={})
    known = dict.fromkeys(case[f"{side}_image"] for case in cases for side in SIDES)
    for path in itertools.islice(known, most):
        with contextlib.suppress(InputError):  # said when its turn comes
            found.add(len(images.header(path, film=True)[0]))
    return found or {2}


def trained_grid(ckpt_dir: str) -> Grid | None:
    """The working grid that the model in ``ckpt_dir`` was trained on; None where nothing is trained yet."""
    path = Path(ckpt_dir) / "working_grid.json"
    if path.is_file() or (Path(ckpt_dir) / "model.pt").is_file():  # a model without its grid is an error, not a guess
        return load_grid(path)
    return None


def trained_dimension(ckpt_dir: str) -> int:
    """2 or 3, of the data that the model in ``ckpt_dir`` was trained on; 2 where nothing is trained yet."""
    grid = trained_grid(ckpt_dir)
    return 2 if grid is None else len(grid.shape)


def trained_structures(ckpt_dir: str) -> int:
    """How many structures the model in ``ckpt_dir`` tells apart; 0 before training."""
    path = Path(ckpt_dir) / "model.pt"
    head = read_state_dict(path, old=False).get("anatomy.classes.weight") if path.is_file() else None
    return 0 if head is None else len(head) - 1


def trained_weights(ckpt_dir: str) -> str:
    """``pretrained`` for a network that ``model.pt`` will be loaded into: its layout, or ``none`` before training."""
    return require_model(ckpt_dir) if (Path(ckpt_dir) / "model.pt").is_file() else "none"


def trained_network(backbone: str, ckpt_dir: str) -> SymmetricNet:
    """The network that ``model.pt`` in ``ckpt_dir`` belongs to, laid out as in the file but without its weights.

    Raises:
        InputError: there is no model.
    """
    path = _model(ckpt_dir)
    dim, structures = trained_dimension(ckpt_dir), trained_structures(ckpt_dir)
    return SymmetricNet(dim, backbone, pretrained=str(path), transfer="encoder", structures=structures)


def loaded_folder(bundle_root: str) -> str:
    """The folder of the model that ``monai.bundle.load`` is about to read; else ``models`` of the bundle.

    MONAI does not tell the configuration which file it reads, and silently skips weights of another network.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == ("monai.bundle.scripts", "load"):
            return str(Path(frame.f_locals["full_path"]).parent)
        frame = frame.f_back
    return f"{bundle_root}/models"


def require_model(ckpt_dir: str, network: nn.Module | None = None) -> str:
    """The path of the trained model; where a ``network`` is given, the model's tensors are checked against it.

    Raises:
        InputError: there is none, it is damaged, or it is another network's.
    """
    path = _model(ckpt_dir)
    if network is None:
        check_sound(path)
        return str(path)
    states = read_state_dict(path, old=False), unwrapped(network).state_dict()
    held, wanted = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in states)
    unlike = next((name for name in {**wanted, **held} if held.get(name) != wanted.get(name)), None)
    if unlike is not None:
        shapes = f"{held.get(unlike, 'missing')} where the bundle's network has {wanted.get(unlike, 'none')}"
        raise InputError(f"{path}: another network's weights ('{unlike}' is {shapes}); give the bundle its own model")
    return str(path)


def _model(ckpt_dir: str) -> Path:
    path = Path(ckpt_dir) / "model.pt"
    if not path.is_file():
        raise InputError(f"{path}: no trained model; run training first, or give --ckpt_dir")
    return path
