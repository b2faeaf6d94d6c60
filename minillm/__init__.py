"""minillm: name a memory budget, and an LLM runs inside it for ever.

    from minillm import LLM

    llm = LLM.load("mistral-7b", budget=0.3)
    print(llm.generate("Once upon a time").text)

Public names are imported when they are first used: `import minillm` alone imports no torch, so that the command line
answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .budget import Budget as Budget
    from .config import ModelConfig as ModelConfig
    from .llm import LLM as LLM
    from .sampling import Sample as Sample
    from .sampling import SamplingParams as SamplingParams

from .errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    ContextFullError,
    GatedModelError,
    MemoryPromiseError,
    MinillmError,
    ModelNotFoundError,
    PromptError,
    RankError,
    SamplingError,
    SessionError,
    TemplateError,
)
from .version import __version__

_HOMES = {"LLM": "llm", "Budget": "budget", "ModelConfig": "config", "Sample": "sampling", "SamplingParams": "sampling"}

__all__ = [
    "LLM",
    "Budget",
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "ContextFullError",
    "GatedModelError",
    "MemoryPromiseError",
    "MinillmError",
    "ModelConfig",
    "ModelNotFoundError",
    "PromptError",
    "RankError",
    "Sample",
    "SamplingError",
    "SamplingParams",
    "SessionError",
    "TemplateError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
