"""One photo of a person → a LoRA that any diffusion tool can load, in seconds.

    from hyperdreambooth import Personalizer

    me = Personalizer.from_pretrained()                    # the embedded avatars; or base=…, hypernet=…
    ana = me.personalize("ana.jpg")                        # a path, a PIL image, or several of either
    ana.save("ana.safetensors", format="kohya")            # or "diffusers"; a prediction also as "lidb"
    me.generate("a painting of a [V] face", adapter=ana)   # a list of one picture
    me.generate(["a [V] face"] * 2, [ana, ben])            # a person for each prompt, in one batch
    mix = 0.5 * ana + 0.5 * ben                            # people between people
    with me.wearing(ana) as pipe:                          # the diffusers pipeline itself
        pipe(f"a photo of a {ana.trigger} face")

Without a hypernetwork: `load_base`, then `dreambooth` and `generate_images`. To make a hypernetwork:
    `preoptimize` and `train_hypernet`. Each of them takes its settings as
one of the configs below; what the trainings share is documented in `TrainConfig` and `LossConfig`.

Everything is imported when it is first asked for, so `import hyperdreambooth` and `hdb --help` load no torch.
"""

from __future__ import annotations

import logging
import os
import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# what packages for quantisation make of their import, which diffusers does wherever they are installed
for _logger, _words in {
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}.items():
    logging.getLogger(_logger).addFilter(lambda record, words=_words: words not in record.getMessage())

if TYPE_CHECKING:
    from hyperdreambooth.adapter import Adapter as Adapter
    from hyperdreambooth.adapter import load_adapter as load_adapter
    from hyperdreambooth.base.config import LossConfig as LossConfig
    from hyperdreambooth.base.load import Base as Base
    from hyperdreambooth.base.load import load_base as load_base
    from hyperdreambooth.faces.dataset import Photo as Photo
    from hyperdreambooth.files import InputError as InputError
    from hyperdreambooth.finetune.config import DreamboothConfig as DreamboothConfig
    from hyperdreambooth.finetune.config import FinetuneConfig as FinetuneConfig
    from hyperdreambooth.finetune.dreambooth import dreambooth as dreambooth
    from hyperdreambooth.finetune.fast import finetune_adapter as finetune_adapter
    from hyperdreambooth.generate import generate_images as generate_images
    from hyperdreambooth.hypernet.config import HypernetConfig as HypernetConfig
    from hyperdreambooth.hypernet.predictor import Predictor as Predictor
    from hyperdreambooth.hypernet.predictor import load_hypernet as load_hypernet
    from hyperdreambooth.hypernet.train import train_hypernet as train_hypernet
    from hyperdreambooth.lidb.bank import Bank as Bank
    from hyperdreambooth.personalize import Personalizer as Personalizer
    from hyperdreambooth.preopt.bank_training import preoptimize as preoptimize
    from hyperdreambooth.preopt.config import PreoptConfig as PreoptConfig
    from hyperdreambooth.training.config import TrainConfig as TrainConfig
    from hyperdreambooth.training.looks import Look as Look

__version__ = "0.1.0"

try:
    Path.home()
except RuntimeError:  # a user without a home, as in some containers: the hub's libraries need a folder
    os.environ.setdefault("HF_HOME", str(Path(tempfile.gettempdir()) / "huggingface"))

_HOME = {
    "Adapter": "adapter",
    "Bank": "lidb.bank",
    "Base": "base.load",
    "DreamboothConfig": "finetune.config",
    "FinetuneConfig": "finetune.config",
    "HypernetConfig": "hypernet.config",
    "InputError": "files",
    "Look": "training.looks",
    "LossConfig": "base.config",
    "Personalizer": "personalize",
    "Photo": "faces.dataset",
    "Predictor": "hypernet.predictor",
    "TrainConfig": "training.config",
    "PreoptConfig": "preopt.config",
    "dreambooth": "finetune.dreambooth",
    "finetune_adapter": "finetune.fast",
    "generate_images": "generate",
    "load_adapter": "adapter",
    "load_base": "base.load",
    "load_hypernet": "hypernet.predictor",
    "preoptimize": "preopt.bank_training",
    "train_hypernet": "hypernet.train",
}
"""Public name → its module."""

__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_HOME, "__version__"])
