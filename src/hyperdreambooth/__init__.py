"""One photo of a person → a LoRA that any diffusion tool can load, in seconds.

The public names are below; everything is imported when it is first asked for, so `import hyperdreambooth` and
`hdb --help` stay free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperdreambooth.adapter import Adapter as Adapter
    from hyperdreambooth.adapter import load_adapter as load_adapter
    from hyperdreambooth.base.load import Base as Base
    from hyperdreambooth.base.load import load_base as load_base
    from hyperdreambooth.files import InputError as InputError
    from hyperdreambooth.finetune.dreambooth import dreambooth as dreambooth
    from hyperdreambooth.hypernet.predictor import Predictor as Predictor
    from hyperdreambooth.hypernet.predictor import load_hypernet as load_hypernet
    from hyperdreambooth.hypernet.train import train_hypernet as train_hypernet
    from hyperdreambooth.lidb.bank import Bank as Bank
    from hyperdreambooth.personalize import Personalizer as Personalizer
    from hyperdreambooth.preopt.bank_training import preoptimize as preoptimize

__version__ = "0.1.0"

_HOME = {
    "Adapter": "adapter",
    "Bank": "lidb.bank",
    "Base": "base.load",
    "InputError": "files",
    "Personalizer": "personalize",
    "Predictor": "hypernet.predictor",
    "dreambooth": "finetune.dreambooth",
    "load_adapter": "adapter",
    "load_base": "base.load",
    "load_hypernet": "hypernet.predictor",
    "preoptimize": "preopt.bank_training",
    "train_hypernet": "hypernet.train",
}
"""Public name → its module. Functions named like a module here (`finetune`, `generate`) stay in theirs."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_HOME, "__version__"])
