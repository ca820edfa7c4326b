"""The built-in sources, one file each."""

from saekit.builtin.sources.encoder import EncoderSource as EncoderSource
from saekit.builtin.sources.labelled import LabelledSource as LabelledSource
from saekit.builtin.sources.module import ModuleSource as ModuleSource
from saekit.builtin.sources.organism import OrganismSource as OrganismSource
from saekit.builtin.sources.pushed import PushedSource as PushedSource
from saekit.builtin.sources.synthetic import SyntheticSource as SyntheticSource
from saekit.builtin.sources.tensors import TensorsSource as TensorsSource
from saekit.builtin.sources.text import TextSource as TextSource
