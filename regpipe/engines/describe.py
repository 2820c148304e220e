"""The settings of a training or an evaluation, read from its objects, however and wherever they were given."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from regpipe.data.augment import MonaiTransforms, RandomAffine
from regpipe.data.load import LoadPair
from regpipe.data.pairs import Case, Split
from regpipe.data.placement import common_space
from regpipe.engines.channels import options_of
from regpipe.engines.record import digest, named
from regpipe.engines.refine import Refinement
from regpipe.fields.algebra import LAYERS, Layers
from regpipe.losses.loss import RegistrationLoss
from regpipe.losses.modules import in_words
from regpipe.networks.symmetric import SymmetricNet
from regpipe.networks.weights import channels_of, unwrapped

if TYPE_CHECKING:  # registering a folder needs none of a training, nor MONAI
    from ignite.handlers import EarlyStopping

    from regpipe.engines.step import TrainingStep
    from regpipe.metrics.cases import CaseMetrics

T = TypeVar("T")


class Training:
    """A training in words and numbers.

    Args:
        trainer: MONAI's.
        handlers: what is attached to it.
        step: its iteration.
        load: how a case becomes tensors.
        split: the data.
        score: the key metric.
        stopper: ends it, see ``engines.handlers.stopper``.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        handlers: Sequence[Any],
        step: TrainingStep,
        load: LoadPair,
        split: Split,
        score: CaseMetrics,
        stopper: EarlyStopping,
    ) -> None:
        self.trainer, self.handlers, self.step, self.load = trainer, handlers, step, load
        self.split, self.score, self.stopper = split, score, stopper
        self.network, self.loss, self.loader = unwrapped(trainer.network), trainer.loss_function, trainer.data_loader

    @property
    def cases(self) -> list[Case] | None:
        """The training pairs; None where they are made on the fly."""
        return getattr(self.loader.dataset, "data", None)

    @property
    def pairs(self) -> list[Case]:
        """``cases``; where there are none, the training pairs of the data on disk."""
        return self.split.pairs("training") if self.cases is None else self.cases

    @property
    def augmentation(self) -> RandomAffine | None:
        """What moves the training images; None where nothing does."""
        return next((part for part in self._transforms() if isinstance(part, RandomAffine)), None)

    @property
    def moved_by_monai(self) -> bool:
        """Whether transforms of MONAI's move the training images."""
        return any(isinstance(part, MonaiTransforms) and part.moving for part in self._transforms())

    def _transforms(self) -> Iterator[Any]:
        """What a training case goes through, the last first where they are nested."""
        from monai.transforms import Compose

        transform = getattr(self.loader.dataset, "transform", None)
        parts = transform.transforms if isinstance(transform, Compose) else [transform]
        for part in parts:
            while part is not None:
                yield part
                part = getattr(part, "load", None)

    @property
    def batch_size(self) -> int:
        """Pairs to a batch."""
        return int(self.loader.batch_size or self.loader.dataset.batch_size)

    @property
    def learning_rate(self) -> float:
        """The highest, of what is not the encoder."""
        group = self.trainer.optimizer.param_groups[-1]
        return float(group.get("initial_lr", group["lr"]))

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two runs comparable: TensorBoard's HParams; a run goes on only where they are the same."""
        from regpipe.engines.handlers import StructuresFirst, WeightAverage

        average, structures = self._handler(WeightAverage), self._handler(StructuresFirst)
        about: dict[str, Any] = {
            **_of_network(self.network),
            "cascades": getattr(self.trainer.inferer, "cascades", 1),
            "learning_rate": self.learning_rate,
            "encoder_factor": self.trainer.optimizer.param_groups[0].get("encoder_factor", 1.0),
            "average": average.batches if average else 0,
            "batch_size": self.batch_size,
            "accumulate": self.step.accumulate,
            "amp": self.step.amp,
            **_of_loss(self.loss),
            "structures_first": structures.share if structures else 0.0,
            "key_metric": self.score.key,
            **_of_load(self.load),
            **_of_layers(self.trainer.inferer),
            "seed": self.split.seed,
        }
        return about | self._of_pairs | _of_grid(self.load)

    @functools.cached_property  # a look at every image file, and the data as they were when it was first asked for
    def _of_pairs(self) -> dict[str, Any]:
        dataset, sampler = self.loader.dataset, self.loader.sampler
        if self.cases is None:
            return {"training_pairs": "synthetic", "pairs_per_epoch": len(dataset) * dataset.batch_size}
        augment = self.augmentation
        theirs = [name for part in self._transforms() if isinstance(part, MonaiTransforms) for name in part.names]
        asked = {"transforms": _words(theirs), "channels": self.split.chosen().get("channels")}
        return {name: value for name, value in asked.items() if value} | {
            "training_pairs": len(self.cases),
            "data": digest(self.cases),
            "augment": augment.amount if augment else 0.0,
            "augment_intensity": getattr(augment.load, "amount", 0.0) if augment else 0.0,
            "mirror": _words(augment.mirror) if augment else "",
            "pairs_per_epoch": getattr(sampler, "size", len(self.cases)),
            "supervised_share": getattr(sampler, "share", None),
        }

    @property
    def schedule(self) -> dict[str, Any]:
        """What may differ between two runs that go on from each other."""
        from regpipe.engines.handlers import Budget, Validation

        budget, validation = self._handler(Budget), self._handler(Validation)
        return {
            "max_epochs": self.trainer.state.max_epochs,
            "budget_seconds": budget.seconds if budget else None,
            "val_interval": validation.interval if validation else None,
            "max_val_pairs": self.split.max_val_pairs,
            "patience": self.stopper.patience,
        }

    @property
    def recipe(self) -> dict[str, Any]:
        """All that it takes to train the same again, for the manifest."""
        return {
            **self.settings,
            **self.schedule,
            "network": type(self.network).__name__,
            **options_of(self.loss),
            "label_ids": list(getattr(self.loss, "label_ids", ())),
            "mirror": self.augmentation.mirror if self.augmentation else [],
            "grid_shape": list(self.load.grid.shape) if self.load.grid else None,
            "grid_spacing": list(self.load.grid.spacing) if self.load.grid else None,
            **self.split.chosen(),
            "num_workers": self.loader.num_workers,
            "epochs": self.trainer.state.epoch,
        }

    @property
    def shown(self) -> dict[str, Any]:
        """What TensorBoard tells of it."""
        return {**self.recipe, "dataset_dir": str(self.split.dataset_dir)}

    def data(self, affine: str, *, own_grids: bool, to_fit_memory: Sequence[str]) -> dict[str, Any]:
        """What evaluating and inference must know, see ``engines.record``.

        ``affine``: the stage at inference, ``own_grids``: whether each pair is then registered on a grid of its own.
        """
        about = _of_load(self.load) | self.split.chosen()
        return about | {
            "dataset_dir": self.split.dataset_dir,
            "cascades": getattr(self.trainer.inferer, "cascades", 1),
            "affine": affine,
            "space": common_space(self.pairs) if affine == "none" else None,
            "own_grids": own_grids,
            "image_channels": channels_of(self.network),
            "to_fit_memory": list(to_fit_memory),
        }

    def _handler(self, kind: type[T]) -> T | None:
        return next((handler for handler in self.handlers if isinstance(handler, kind)), None)


def evaluation(
    network: nn.Module, load: LoadPair, split: Split, *, part: str, refinement: Refinement, inferer: Any
) -> dict[str, Any]:
    """The choices of an evaluation, for the manifest.

    Args:
        network: without DDP's wrapper.
        load: how a case becomes tensors.
        split: the data; ``part`` of them was evaluated.
        refinement: what was asked for.
        inferer: ``engines.inferers``'.
    """
    return {
        "network": type(network).__name__,
        "backbone": _of_network(network)["backbone"],
        "split": part,
        **split.chosen(),
        "max_val_pairs": split.max_val_pairs,
        **_of_load(load),
        **refinement.asked(),
        "repair": getattr(inferer, "repair", False),
        **_of_layers(inferer),
    }


def registrations(network: nn.Module, load: LoadPair, *, refinement: Refinement, inferer: Any) -> dict[str, Any]:
    """The choices of registering a folder: a case whose settings differ is registered again; as ``evaluation``."""
    return {
        "network": _of_network(network)["backbone"],
        "landmark_channels": load.landmark_channels,
        **vars(load.alignment),
        **refinement.asked(),
        "refine_finest": refinement.finest,
        "repair": inferer.repair,
        **_of_layers(inferer),
    }


def _of_network(network: nn.Module) -> dict[str, Any]:
    if not isinstance(network, SymmetricNet):  # an overlay's: named as its overlay does
        return {"backbone": type(network).__name__.lower(), "pretrained": "none", "freeze": 0, "transfer": "encoder"}
    about = {name: getattr(network, name) for name in ("backbone", "freeze", "max_stride", "transfer")}
    many = {"image_channels": network.image_channels} if network.image_channels > 1 else {}
    return about | {"pretrained": named(network.pretrained)} | many


def _of_loss(loss: nn.Module) -> dict[str, Any]:
    if not isinstance(loss, RegistrationLoss):
        return {"loss": type(loss).__name__}
    weights, *others = (_words(f"{name}={x:g}" for name, x in one.weights.items()) for one in (loss, *loss.channels))
    told = {"loss": weights, **{f"loss_{i}": one for i, one in enumerate(others, start=2)}}
    own = {f"loss_{name}": in_words(loss.terms[name]) for name in loss.weights if loss.terms[name].module}
    return {**told, "lncc_window": loss.window, "label_ids": _words(loss.label_ids), **own}


def _of_layers(inferer: Any) -> dict[str, str]:
    """What warps and integrates, where that is not regpipe's own as it is by default."""
    told, usual = map(_each, (getattr(inferer, "layers", LAYERS), LAYERS))
    if told == usual:
        return {}
    from regpipe.fields.layers import DVF2DDF, Warp  # bring MONAI

    return {} if told == _each(Layers(Warp(), DVF2DDF())) else told


def _each(layers: Layers) -> dict[str, str]:
    return {name: _layer(layer) for name, layer in layers._asdict().items()}


def _layer(layer: Any) -> str:
    """Its class, or the function's name, and what MONAI's layers keep of their arguments."""
    kept = {**vars(getattr(layer, "warp_layer", layer)), **vars(layer)}
    names = ("num_steps", "_interp_mode", "_padding_mode", "jitter")
    told = ", ".join(f"{name.strip('_')}={kept[name]}" for name in names if name in kept)
    named = layer if hasattr(layer, "__qualname__") else type(layer)
    return f"{named.__module__}.{named.__qualname__}({told})"


def _of_load(load: LoadPair) -> dict[str, Any]:
    return {"landmark_channels": load.landmark_channels, "mask_rims": load.mask_rims, **vars(load.alignment)}


def _of_grid(load: LoadPair) -> dict[str, Any]:
    if load.grid is None:
        return {}
    grid = {"grid": "x".join(map(str, load.grid.shape)), "spacing": "x".join(f"{s:g}" for s in load.grid.spacing)}
    return {"spatial_dims": len(load.grid.shape), **grid}


def _words(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


def same(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Where the settings of two runs differ, in words; what only one of them has is another version's."""
    old, new = ({**about, "loss": _weighty(about.get("loss"))} for about in (old, new))
    return [f"{key}: {old[key]} -> {new[key]}" for key in new if key in old and old[key] != new[key]]


def _weighty(loss: Any) -> Any:
    """Without terms of no weight, which earlier versions told."""
    return " ".join(term for term in loss.split() if not term.endswith("=0")) if isinstance(loss, str) else loss
