"""Where transferred weights come from, and how they are laid into an encoder.

Sources, as given to ``--pretrained``:

- ``none``: random weights.
- ``imagenet``: torchvision's own, from its cache or downloaded into it.
- ``medicalnet``: MedicalNet's 3D ResNet18 (Chen et al. 2019), from the Hugging Face cache or downloaded.
- a file: a state dict in torchvision's or MedicalNet's names, or a regpipe ``model.pt``.
- a folder: a regpipe bundle; its ``models/model.pt``.
- ``shipped``: what came with regpipe, trained on synthetic pairs; of the network's dimension, or in 3D the 2D one.

Files are read with ``weights_only=True``, always: nothing in them can run.
"""

from __future__ import annotations

import logging
import pickle  # for the name of its error  # nosec B403
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from regpipe.data.channels import MOST
from regpipe.utils.errors import InputError
from regpipe.utils.files import damage, save_tensors

log = logging.getLogger(__name__)

_HERE = Path(__file__).parents[1]
SHIPPED = (_HERE / "shipped", _HERE.parent / "bundles")  # where an installed package has its bundles, and a checkout
BEST = {2: "resnet18", 3: "none"}  # where nothing is said: from zero is better than the 3D one is yet (docs/results)
PUBLISHED = ("none", "imagenet", "medicalnet")  # sources of encoders alone
DETAIL = "detail.texture.0.weight"  # of a network trained here: what looks at the images beside its encoder
ANATOMY = ("anatomy.net.model.0.conv.unit0.conv.weight", "anatomy.net.model.0.residual.weight")  # and what else does
MEDICALNET = ("TencentMedicalNet/MedicalNet-Resnet18", "resnet_18_23dataset.pth")


def read_weights(source: str, backbone: str, dim: int) -> dict[str, Tensor] | None:
    """The state dict that ``source`` names (see the module's head), or None for ``none``; ``dim``: of the network.

    Raises:
        InputError: nothing there, not a weight file, or no network to fetch it; it says which file to put where.
    """
    if source == "none":
        return None
    if source == "imagenet":
        return _imagenet(backbone)
    if source == "medicalnet":
        return _medicalnet(backbone)
    if source == "shipped":
        return read_state_dict(_shipped(backbone, dim))
    path = Path(source)
    return read_state_dict(path / "models" / "model.pt" if path.is_dir() else path)


def shipped(backbone: str, dim: int) -> Path | None:
    """The bundle of a backbone that came with regpipe, where it holds a model for images of ``dim`` dimensions."""
    for parent in SHIPPED:
        bundle = parent / f"symreg_{backbone}"
        if (bundle / "models" / f"{dim}d" / "model.pt").is_file():
            return bundle
    return None


def _shipped(backbone: str, dim: int) -> Path:
    for d in (dim, 2):
        bundle = shipped(backbone, d)
        if bundle is not None:
            return bundle / "models" / f"{d}d" / "model.pt"
    raise InputError(f"regpipe came without a model of {backbone}: give --pretrained none, a file or a bundle folder")


def read_state_dict(path: str | Path, *, old: bool = True) -> dict[str, Tensor]:
    """A file's tensors by name; ``state_dict`` / ``network`` wrappers and ``module.`` prefixes are taken off.

    ``old``: files of before torch 1.6, too, which have no checksums.

    Raises:
        InputError: missing, damaged, not a state dict, or holding NaN.
    """
    if not Path(path).is_file():
        raise InputError(
            f"{path}: no such weight file; give none, imagenet, medicalnet, shipped, a file or a bundle folder"
        )
    try:
        if not old or zipfile.is_zipfile(path):
            check_sound(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        raise InputError(
            f"{path}: not a readable weight file ({_reason(error)}); save it with torch.save(net.state_dict())"
        ) from error
    for wrapper in ("state_dict", "network"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path}: holds no state dict (names and tensors); save it with torch.save(net.state_dict())")
    if not all(map(_plain, state.values())):
        raise InputError(f"{path}: its tensors say more than they store; save it with torch.save(net.state_dict())")
    broken = next((name for name, tensor in state.items() if not torch.isfinite(tensor).all()), None)
    if broken is not None:
        raise InputError(f"{path}: '{broken}' holds NaN or infinite values; take another checkpoint, or train again")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def unwrapped(network: nn.Module) -> nn.Module:
    """The network itself, which DDP, or torch's ``AveragedModel``, may be around."""
    return getattr(network, "module", network)


def channels_of(network: object) -> int:
    """How many images of each side a network sees, DDP's wrapper around it or not; 1 where it does not say."""
    return int(getattr(getattr(network, "module", network), "image_channels", 1))


def weights_now(network: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's weights, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in unwrapped(network).state_dict().items()}


def save_weights(path: Path, network: nn.Module) -> None:
    """Write a network's weights as ``read_state_dict`` reads them."""
    save_tensors(path, weights_now(network))


def check_sound(path: str | Path) -> None:
    """Raises ``InputError`` where a part of the file does not have its checksum: ``torch.load`` would not notice."""
    why = damage(path)
    if why:
        raise InputError(f"{path}: damaged ({why}); copy it again from where it is whole, or train again")


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are all stored: one without strides takes no room, and any when it is copied."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own advice there is to let the file run its code
        return "damaged, or it holds something other than tensors"
    return str(error).partition("\n")[0][:200] or type(error).__name__


def _imagenet(backbone: str) -> dict[str, Tensor]:
    import torchvision  # takes a second

    if backbone not in torchvision.models.list_models():
        raise InputError(f"imagenet has no {backbone}: give --pretrained none, or a file or bundle folder trained here")
    weights = torchvision.models.get_model_weights(backbone).DEFAULT
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
    except Exception as error:  # URLError, a proxy's error page, a hash that does not fit
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        name = weights.url.rsplit("/", 1)[-1]
        raise InputError(
            f"imagenet weights of {backbone} cannot be had ({_reason(error)}): download {weights.url} elsewhere, "
            f"put it at {folder / name} and run again"
        ) from error


def _medicalnet(backbone: str) -> dict[str, Tensor]:
    if backbone != "resnet18":
        raise InputError(f"medicalnet has no {backbone}: take resnet18, or --pretrained imagenet")
    repository, name = MEDICALNET
    try:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(repo_id=repository, filename=name)  # read as data  # nosec B615
    except Exception as error:  # not installed, or no network: the remedy is the same file
        raise InputError(
            f"medicalnet weights cannot be had ({_reason(error)}): download {name} of {repository} elsewhere "
            f"and give its path as --pretrained"
        ) from error
    return read_state_dict(path)


def lay_in(stages: nn.Module, state: dict[str, Tensor], names: dict[str, str], *, source: str) -> list[str]:
    """Copy ``state`` into ``stages`` in place, fitting 2D to 3D and colour to grey; returns what it lacks.

    Args:
        stages: an encoder's ``nn.ModuleList``.
        state: names as in torchvision, MedicalNet or a regpipe network (``encoder.stages.…``).
        names: module path in ``stages`` -> module path in torchvision's network.
        source: where ``state`` comes from, for the error messages.

    Raises:
        InputError: no name matches, or a tensor does not fit: another backbone's file.
    """
    missing, own = [], stages.state_dict()
    for key, target in own.items():
        module, leaf = key.rpartition(".")[::2]
        candidates = (f"{names.get(module, '')}.{leaf}", f"encoder.stages.{key}", f"stages.{key}")
        found = next((name for name in candidates if name in state), None)
        if found is None:
            missing.append(key)
        else:
            target.copy_(fit(state[found], target, name=f"{source}: '{found}'"))
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    # MedicalNet's ResNet18 has shortcuts without weights; everything else must be there
    essential = [key for key in missing if "downsample" not in key]
    if essential:
        raise InputError(
            f"{source}: not this backbone's weights: {len(essential)} of {len(own)} tensors are not in it, "
            f"e.g. {essential[0]}; name the backbone they belong to"
        )
    for key in missing:  # MedicalNet's shortcuts subsample and pad with empty channels: what an identity kernel does
        if own[key].ndim > 1:
            nn.init.dirac_(own[key])
    return missing


def channels_in(source: str, backbone: str, dim: int) -> int:
    """Of how many channels the images are for a network that was trained here; 1 for any other ``source``."""
    if source in PUBLISHED:
        return 1
    first = (read_weights(source, backbone, dim) or {}).get(DETAIL)
    return 1 if first is None else first.shape[1] // 2 ** (first.ndim - 2)


def holds_decoder(source: str, backbone: str, dim: int) -> bool:
    """Whether ``source`` (of ``read_weights``) is a whole network that was trained here."""
    if source in PUBLISHED:
        return False
    return any(name.startswith("levels.") for name in read_weights(source, backbone, dim) or {})


def lay_in_decoder(network: nn.Module, source: str, backbone: str) -> list[str]:
    """Copy into ``network``, in place, all that a trained one holds beside its encoder; returns what does not fit.

    The encoder is ``lay_in``'s. Parts of another width or correlation, or of a level that the file does not
    have, start anew.

    Args:
        network: of the same dimension as the file's: a decoder's vectors have one channel per axis.
        source: as of ``read_weights``.
        backbone: of the network.

    Raises:
        InputError: no trained network's file, or one of the other dimension.
    """
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("encoder.")}
    dim = max(tensor.ndim for tensor in own.values()) - 2
    state = read_weights(source, backbone, dim) or {}
    known = [name for name in own if name in state]
    if not known:
        raise InputError(
            f"{source}: holds no decoder to transfer; give --transfer encoder, or a model.pt or bundle folder"
        )
    if any(state[name].ndim != own[name].ndim for name in known):
        raise InputError(
            f"{source}: its decoder is not {dim}D as these data are; give --transfer encoder, which inflates"
        )
    inputs = {DETAIL: 2**dim, **dict.fromkeys(ANATOMY, 1)}  # of each channel
    state |= {name: _shared_out(state[name], own[name], each) for name, each in inputs.items() if name in known}
    fitting = [name for name in known if state[name].shape == own[name].shape]
    for name in fitting:
        own[name].copy_(state[name])
    left = [name for name in own if name not in fitting]
    if left:
        log.warning("%s: %d of the decoder's %d tensors do not fit and start anew", source, len(left), len(own))
    return left


def fit(source: Tensor, target: Tensor, *, name: str) -> Tensor:
    """``source`` in ``target``'s shape: colours summed, 2D kernels inflated to 3D, 3D ones summed to 2D.

    A stem's sum is shared out among the target's channels, unless it has as many.

    Raises:
        InputError: the shapes do not correspond.
    """
    if source.ndim >= 4 and source.shape[1] != (many := target.shape[1]) and max(source.shape[1], many) <= MOST:
        source = source.sum(1, keepdim=True)
        source = source if many == 1 else source.repeat_interleave(many, 1) / many
    if source.ndim == 4 and target.ndim == 5:
        source = inflate(source, target.shape[-1])
    elif source.ndim == 5 and target.ndim == 4:
        source = source.sum(-1)
    if source.shape != target.shape:
        raise InputError(
            f"{name} has shape {tuple(source.shape)} where this backbone has {tuple(target.shape)}; "
            f"name the backbone it belongs to"
        )
    return source


def _shared_out(source: Tensor, target: Tensor, each: int) -> Tensor:
    """Weights of some channels, ``each`` of the inputs for one, for as many channels as ``target`` has: as ``fit``."""
    cells = source.unflatten(1, (-1, each))
    many = target.shape[1] // each
    if many == cells.shape[1]:
        return source
    return (cells.sum(1, keepdim=True).repeat_interleave(many, 1) / many).flatten(1, 2)


def inflate(weight: Tensor, depth: int) -> Tensor:
    """(O, I, k, k) -> (O, I, k, k, depth): repeated along the new last axis, divided by its length (I3D, 2017)."""
    return weight.unsqueeze(-1).repeat(1, 1, 1, 1, depth) / depth
