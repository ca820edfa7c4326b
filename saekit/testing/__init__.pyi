from .checks import checks_of as checks_of
from .fixtures import make_step as make_step
from .fixtures import registry_of as registry_of
from .fixtures import synthetic_truth as synthetic_truth
from .kit import (
    Check as Check,
)
from .kit import (
    Failed as Failed,
)
from .kit import (
    NotApplicable as NotApplicable,
)
from .kit import (
    Outcome as Outcome,
)
from .kit import (
    Report as Report,
)
from .kit import (
    Subject as Subject,
)
from .running import check as check
from .running import conformance as conformance
from .tiny import TinyRun as TinyRun
from .tiny import tiny_language_run as tiny_language_run
from .tiny import tiny_run as tiny_run
