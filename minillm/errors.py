"""Every exception a user of minillm can meet, as one tree.

    MinillmError                 base: catch this one to catch them all
    ├── ConfigError              a config.json, or a combination of options, that we do not support
    ├── CheckpointError          weight or tokenizer files that are missing, broken or do not fit the model
    ├── ModelNotFoundError       a model name that leads to no folder, or a hub that cannot be reached
    │   └── GatedModelError      ... whose licence has to be accepted first
    ├── BudgetError              a budget, context or cache layout that cannot be
    │   ├── ContextFullError     a sequence that does not fit a cache that may not evict
    │   └── MemoryPromiseError   a process that holds more memory than it was promised to
    ├── PromptError              an unusable prompt: empty, not UTF-8, token ids out of range
    │   └── TemplateError        a chat template that is absent, fails, or exceeds its limits
    ├── SamplingError            sampling parameters that contradict each other or are out of range
    ├── SessionError             a session that cannot be saved, restored or rewound
    └── RankError                one of several processes that compute a model together is gone

A message names what is wrong, the limit, and the remedy, on one line: the command line prints it as it is and exits
with status 2.  Errors that are not in this tree are our bugs.
"""


class MinillmError(Exception):
    """Base of all errors that a user can cause or meet."""


class ConfigError(MinillmError):
    """A model configuration or a combination of options that minillm does not support."""


class CheckpointError(MinillmError):
    """Weight or tokenizer files that are missing, damaged, or do not fit the model."""


class ModelNotFoundError(MinillmError):
    """A model name that leads to no usable folder."""


class GatedModelError(ModelNotFoundError):
    """A hub repository whose licence has to be accepted before it can be read."""


class BudgetError(MinillmError):
    """A budget, a context, or a cache layout (sinks, recent, evict-every) that cannot be."""


class ContextFullError(BudgetError):
    """A sequence longer than a cache that never evicts."""


class MemoryPromiseError(BudgetError):
    """More memory in use than the plan promised: the run has stopped."""


class PromptError(MinillmError):
    """A prompt that cannot be fed to the model."""


class TemplateError(PromptError):
    """A chat template that is missing, fails to render, or exceeds its limits."""


class SamplingError(MinillmError):
    """Sampling parameters that are out of range or contradict each other."""


class SessionError(MinillmError):
    """A session that cannot be saved, restored or rewound."""


class RankError(MinillmError):
    """A process that computes a model together with this one is gone, or does not answer."""
