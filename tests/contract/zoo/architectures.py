"""The zoo: models of many architectures, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from tests.contract.zoo.dense import DENSE, EARLIER
from tests.contract.zoo.others import OTHERS, SEEING
from tests.contract.zoo.settings import Architecture
from tests.contract.zoo.sparse import MIXTURES, RECURRENT

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {each.name: each for each in (*DENSE, *EARLIER, *MIXTURES, *RECURRENT, *SEEING, *OTHERS)}
)
